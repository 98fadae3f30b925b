# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/from_loras.py` makes of ordinary LoRAs: a Down of what they share, and a space that holds them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import from_loras
from lora_collection import Loras, codes_of, directions, down_source, kept, space_of, subjects_of

from peft_metalora.tuner import DownSource, MetaLoraConfig
from peft_metalora.tuner.down import DOWN, MID, UP

PEOPLE, R, D_IN, D_OUT, SHARED = 6, 2, 20, 12, 5


@pytest.fixture
def collection() -> tuple[Loras, torch.Tensor]:
    """LoRAs whose A lie in one space of 5 directions, and these."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.linalg.qr(torch.randn(D_IN, SHARED, generator=generator)).Q.T
    a = torch.randn(PEOPLE, R, SHARED, generator=generator) @ shared
    b = torch.randn(PEOPLE, D_OUT, R, generator=generator)
    named = {"x.lora_A.default.weight": a, "x.lora_B.default.weight": b}
    return Loras.of(named), shared


def a_down(loras: Loras, meta_r: int, r: int) -> DownSource:
    config = MetaLoraConfig(r=R, meta_r=SHARED, lora_alpha=R, target_modules=["x"], stage="meta")
    like = DownSource(config, {f"x.{UP}": torch.zeros(1, D_OUT, R)}, "")
    rows = {module: found[:meta_r] for module, found in directions(loras, "products").items()}
    return down_source(like, rows, loras, r)


def changes(subjects: dict[str, torch.Tensor], down: DownSource) -> torch.Tensor:
    """What subjects add to the weight of x, (people, d_out, d_in)."""
    scaling = down.config.lora_alpha / down.config.r
    return scaling * subjects[f"x.{UP}"] @ subjects[f"x.{MID}"] @ down.tensors[f"x.{DOWN}"]


@pytest.mark.parametrize("how", ["products", "equal", "factors"])
def test_a_down_of_loras_that_share_directions_is_these(collection, how: str) -> None:
    loras, shared = collection
    rows = {"x": directions(loras, how)["x"][:SHARED]}
    q = torch.linalg.qr(rows["x"].T).Q
    assert torch.allclose(q @ q.T, shared.T @ shared, atol=1e-5)
    assert kept(loras, rows) == pytest.approx(1, abs=1e-6)
    fewer = {"x": directions(loras, "products")["x"][: SHARED - 1]}
    assert kept(loras, fewer) < 0.999


def test_the_leading_direction_is_that_of_the_products_and_not_of_long_factors() -> None:
    """Bug: who has a long A and a B of 0 decided on the Down."""
    a, b = torch.zeros(2, 1, 3), torch.zeros(2, 2, 1)
    a[0, 0, 0], a[1, 0, 1] = 100, 1
    b[1] = 1
    loras = Loras({"x": a}, {"x": b})
    assert directions(loras, "products")["x"][0].abs().argmax() == 1
    assert directions(loras, "equal")["x"][0].abs().argmax() == 1
    assert directions(loras, "factors")["x"][0].abs().argmax() == 0


def test_the_mean_subject_is_the_nearest_to_the_mean_of_the_loras(collection) -> None:
    loras, _ = collection
    down = a_down(loras, SHARED, R)
    mean = {name: down.tensors[name] for name in (f"x.{MID}", f"x.{UP}")}
    left, singular, right = torch.linalg.svd(loras.mean("x").float(), full_matrices=False)
    best = left[:, :R] * singular[:R] @ right[:R]
    assert torch.allclose(changes(mean, down)[0], best, atol=1e-4)


@pytest.mark.parametrize(("how", "rank"), [("factors", R), ("turned", R), ("products", SHARED)])
def test_numbers_of_the_space_are_the_persons_lora(collection, how: str, rank: int) -> None:
    """As many directions as people less one leave nothing out; fewer leave out what is their least."""
    loras, _ = collection
    down = a_down(loras, SHARED, rank)
    subjects = subjects_of(loras, down, how)
    wanted = loras.b["x"] @ loras.a["x"]
    assert torch.allclose(changes(subjects, down), wanted, atol=1e-4), "on this Down they are exact"
    space = space_of(subjects, PEOPLE - 1, down.fingerprint)
    codes = codes_of(space, subjects)
    found = space.split(space(codes).detach())
    shown = {name: found[name].view_as(subjects[name]) for name in subjects}
    assert torch.allclose(changes(shown, down), wanted, atol=1e-3)
    assert torch.allclose(codes.square().mean(0), torch.ones(PEOPLE - 1), atol=1e-3), "of variance 1"

    fewer = space_of(subjects, 2, down.fingerprint)
    lines = torch.cat([subjects[name].flatten(1) for name, _ in space.layout], dim=1)
    left_out = (fewer(codes_of(fewer, subjects)) - lines).square().sum()
    least = torch.linalg.svdvals(lines - lines.mean(0))[2:].square().sum()
    assert left_out.item() == pytest.approx(least.item(), rel=1e-3)


def test_people_of_many_starts_are_turned_towards_each_other(collection) -> None:
    """Bug: one LoRA, written with two pairs of factors, was two people far from each other."""
    loras, _ = collection
    turn = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(1))).Q
    twice = Loras(
        {"x": torch.cat([loras.a["x"], 3 * turn.T @ loras.a["x"]])},
        {"x": torch.cat([loras.b["x"], loras.b["x"] @ turn / 3])},
    )
    down = a_down(twice, SHARED, R)
    for factor in subjects_of(twice, down, "turned").values():
        assert torch.allclose(factor[:PEOPLE], factor[PEOPLE:], atol=1e-4)


def test_figures_are_paired_with_the_control_of_the_same_size() -> None:
    """Bug: a Down of 8 rows was compared with a random one of 64."""

    def family(value: float) -> dict:
        scores = {"r_facesim": [value, value + 0.1]}
        return {"curve": {"25": {**scores, "prompt_adherence": [1.0, 1.0], "copied_background": [0.0, 0.0]}}}

    families = {"random": family(0.1), "common": family(0.3), "random, 8 rows": family(0.0)}
    found = from_loras.figures(families | {"common, 8 rows": family(0.4)}, 1)["differences"]
    assert found["common - random"]["25"]["value"] == pytest.approx(0.2)
    assert found["common, 8 rows - random"]["25"]["value"] == pytest.approx(0.4)
