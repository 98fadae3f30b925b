# SPDX-License-Identifier: Apache-2.0
"""Scores on vectors whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from peft_metalora.errors import MetricInputError
from peft_metalora.metrics import (
    Comparison,
    Embeddings,
    bootstrap,
    clip_i,
    clip_t,
    copy_paste,
    dino,
    face_sim,
    pose_copy,
    r_facesim,
    real_ceiling,
)


def seen(vectors: Tensor, found: list[bool] | None = None) -> Embeddings:
    flags = torch.ones(len(vectors), dtype=torch.bool) if found is None else torch.tensor(found)
    return Embeddings(normalize(vectors.float(), dim=-1) * flags[:, None], flags)


AXES = torch.eye(4)


@pytest.mark.parametrize("score", [r_facesim, face_sim, clip_i, dino])
def test_identical_is_1_orthogonal_0_opposite_minus_1(score) -> None:
    result = score(seen(torch.stack([AXES[0], AXES[1], -AXES[0]])), seen(AXES[:1]))
    assert result.per_image.tolist() == [1, 0, -1]
    assert result.mean == 0 and result.miss_rate == 0


def test_r_facesim_is_the_mean_over_the_other_photos() -> None:
    result = r_facesim(seen(AXES[:1]), seen(torch.stack([AXES[0], AXES[1], AXES[0] + AXES[1]])))
    assert result.mean == pytest.approx((1 + 0 + 0.5**0.5) / 3)


def test_no_face_is_a_miss_that_counts() -> None:
    result = r_facesim(seen(AXES[[0, 0, 0, 0]], [True, False, True, True]), seen(AXES[:1]))
    assert result.per_image.tolist() == [1, 0, 1, 1]
    assert result.mean == 0.75 and result.miss_rate == 0.25


def test_photos_without_a_face_are_no_targets() -> None:
    others = seen(torch.stack([AXES[0], AXES[1]]), [True, False])
    assert r_facesim(seen(AXES[:1]), others).mean == 1
    with pytest.raises(MetricInputError, match="at least one of the other photos of the person, found none in 2"):
        r_facesim(seen(AXES[:1]), seen(AXES[:2], [False, False]))


def at(*degrees: float) -> Embeddings:
    angles = torch.tensor(degrees).deg2rad()
    return seen(torch.stack([angles.cos(), angles.sin()], dim=1))


def test_copy_paste_is_one_on_the_reference_and_minus_one_on_another_photo() -> None:
    # Angles to the reference at 0 and the other photo at 40 degrees, by the formula of WithAnyone.
    found = copy_paste(at(0, 40, 20, 10, 100), at(0), at(40))
    torch.testing.assert_close(found, torch.tensor([1, -1, 0, 0.5, -1]), atol=2e-3, rtol=0)
    two = copy_paste(at(0, 30), at(0), at(40, 60))
    torch.testing.assert_close(two, torch.tensor([1, ((10 - 30) / 40 + (30 - 30) / 60) / 2]), atol=2e-3, rtol=0)
    missed = copy_paste(seen(AXES[:2], [False, True]), seen(AXES[:1]), seen(AXES[1:2]))
    assert missed.tolist() == pytest.approx([0, -1], abs=2e-3)
    assert copy_paste(at(0), at(0), at(0)).tolist() == [0]  # photos that are one tell nothing apart


def test_the_real_ceiling_is_the_mean_of_all_pairs() -> None:
    assert real_ceiling(at(0, 60, 90)) == pytest.approx((0.5 + 0 + 3**0.5 / 2) / 3, abs=1e-6)
    assert real_ceiling(seen(AXES[:3], [True, False, True])) == 0
    assert math.isnan(real_ceiling(at(0)))


def test_vectors_are_compared_as_their_embedder_says() -> None:
    by_length = Comparison(lambda a, b: 1 - torch.cdist(a, b), torch.cdist)
    one, other = (Embeddings(torch.tensor([[x, 0.0]]), torch.tensor([True]), compared=by_length) for x in (1, 1.25))
    assert r_facesim(one, other).mean == pytest.approx(0.75)  # their cosine is 1
    assert copy_paste(one, one, other).tolist() == [1]


def people(number: int, photos: int, noise: float) -> Tensor:
    """Face vectors (number, photos, 64): a direction for each person, and what varies between their photos."""
    generator = torch.Generator().manual_seed(3)
    identity = torch.randn(number, 1, 64, generator=generator)
    return normalize(identity + noise * torch.randn(number, photos, 64, generator=generator), dim=-1)


def test_a_copier_of_the_reference_scores_high_on_face_sim_and_low_on_r_facesim() -> None:
    photos = people(8, 6, noise=0.8)
    copier, honest = [], []
    for person in photos:
        reference, others = seen(person[:1]), seen(person[1:4])
        copies, pictures = seen(person[:1].repeat(2, 1)), seen(person[4:])
        assert face_sim(copies, reference).mean == pytest.approx(1, abs=1e-6)
        copier.append((r_facesim(copies, others).mean, float(pose_copy(copies, reference, others).mean())))
        honest.append((r_facesim(pictures, others).mean, float(pose_copy(pictures, reference, others).mean())))
    (copier_r, copier_gap), (honest_r, honest_gap) = torch.tensor(copier).mean(0), torch.tensor(honest).mean(0)
    assert copier_r < 0.8 and copier_r == pytest.approx(float(honest_r), abs=0.05)
    assert copier_gap > 0.25 and abs(honest_gap) < 0.05


def test_shuffled_people_score_near_0() -> None:
    photos = people(8, 4, noise=0.5)
    own = torch.tensor([r_facesim(seen(person[:2]), seen(person[2:])).mean for person in photos])
    shuffled = torch.tensor(
        [r_facesim(seen(a[:2]), seen(b[2:])).mean for a, b in zip(photos, photos.roll(1, 0), strict=True)]
    )
    assert own.min() > 0.6 and shuffled.abs().mean() < 0.15


def test_clip_t_pairs_each_image_with_its_own_prompt() -> None:
    assert clip_t(seen(AXES[:2]), AXES[:2] * 7).per_image.tolist() == [1, 1]
    assert clip_t(seen(AXES[:2]), AXES[[1, 0]]).per_image.tolist() == [0, 0]
    with pytest.raises(MetricInputError, match=r"\(2, 4\), found \(3, 4\)"):
        clip_t(seen(AXES[:2]), AXES[:3])


def test_vectors_of_two_embedders_do_not_mix() -> None:
    with pytest.raises(MetricInputError, match=r"found \(1, 4\) and \(1, 3\): use one embedder"):
        face_sim(seen(AXES[:1]), seen(torch.ones(1, 3)))


class TestBootstrap:
    def test_a_subject_counts_once_however_many_images_it_has(self) -> None:
        interval = bootstrap(torch.tensor([0.0, 1, 1, 1]), ["ann", "bob", "bob", "bob"])
        assert interval.value == 0.5 and (interval.low, interval.high) == (0, 1)

    def test_no_spread_no_width(self) -> None:
        interval = bootstrap(torch.full((6,), 0.25), [0, 0, 1, 1, 2, 2])
        assert (interval.low, interval.value, interval.high) == (0.25, 0.25, 0.25)
        assert str(interval) == "0.250 [0.250, 0.250]"

    def test_one_person_has_no_interval(self) -> None:
        """Bug: a report on one person showed `0.300 [0.300, 0.300]`, as if it were certain."""
        interval = bootstrap(torch.tensor([0.2, 0.4]), ["ann", "ann"])
        assert (str(interval), f"{interval:.1f}") == ("0.300", "0.3")

    def test_it_covers_the_mean_as_often_as_it_says(self) -> None:
        generator = torch.Generator().manual_seed(0)
        hits = 0
        for trial in range(200):
            interval = bootstrap(torch.randn(40, generator=generator), level=0.9, resamples=400, seed=trial)
            hits += interval.low <= 0 <= interval.high
        assert 0.83 < hits / 200 < 0.96

    def test_images_of_one_person_do_not_narrow_it(self) -> None:
        people = torch.randn(10, generator=torch.Generator().manual_seed(1))
        once = bootstrap(people)
        often = bootstrap(people.repeat_interleave(50), torch.arange(10).repeat_interleave(50).tolist())
        assert (often.low, often.high) == pytest.approx((once.low, once.high), abs=1e-6)

    def test_the_seed_decides(self) -> None:
        values = torch.randn(20)
        assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)

    def test_bad_input(self) -> None:
        with pytest.raises(MetricInputError, match="found 0 scores"):
            bootstrap(torch.tensor([]))
        with pytest.raises(MetricInputError, match="found 2 scores and 1 subjects"):
            bootstrap(torch.ones(2), ["ann"])
