# SPDX-License-Identifier: Apache-2.0
"""Head pose, diversity and coverage on cases whose answers are known."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from peft_metalora.errors import EmbedderUnavailableError, MetricInputError
from peft_metalora.metrics import Lpips, coverage, distances_to_others, diversity, head_pose, pose_difference

FRONT = torch.tensor([[[30.0, 40], [70, 40], [50, 60], [35, 80], [65, 80]]])


def test_a_face_from_before_has_no_roll_and_no_turn() -> None:
    assert head_pose(FRONT)[0].tolist() == pytest.approx([0, 0, 0.5])


def test_roll_is_the_angle_and_turn_the_nose() -> None:
    angle = 0.3
    turned = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    assert head_pose(FRONT @ turned)[0].tolist() == pytest.approx([angle, 0, 0.5], abs=1e-5)
    aside = FRONT.clone()
    aside[0, 2, 0] += 10
    assert head_pose(aside)[0].tolist() == pytest.approx([0, 0.25, 0.5])


def test_a_copied_pose_has_no_difference_wherever_and_however_large() -> None:
    aside = FRONT.clone()
    aside[0, 2, 0] -= 8
    differences = pose_difference(torch.cat([3 * FRONT + 7, aside]), FRONT)
    assert differences.tolist() == pytest.approx([0, 0.2], abs=1e-5)
    with pytest.raises(MetricInputError, match=r"landmarks \(n, 5, 2\)"):
        head_pose(FRONT[0])


def test_without_a_mouth_a_pose_is_roll_and_turn_and_without_a_face_it_is_none() -> None:
    aside = FRONT.clone()
    aside[0, 2] += torch.tensor([8.0, 5])
    aside[0, 3:] = math.nan
    missed = torch.full_like(FRONT, math.nan)
    assert pose_difference(torch.cat([aside, missed]), FRONT).tolist() == pytest.approx([0.2, math.nan], nan_ok=True)


def test_diversity_is_the_mean_over_pairs_of_scaled_images() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    found = diversity(images, lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert found == pytest.approx((1 + 2 + 1) / 3)
    assert diversity(images[[1, 1]], lambda a, b: (a - b).abs().mean((1, 2, 3))) == 0
    with pytest.raises(MetricInputError, match="at least 2 images"):
        diversity(images[:1], lambda a, b: a)


def test_the_distance_of_each_image_is_to_the_others() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    found = distances_to_others(images, lambda a, b: (a - b).abs().mean((1, 2, 3)))
    assert found.tolist() == pytest.approx([1.5, 1, 1.5])


class StandIn(torch.nn.Module):
    """In the place of `lpips.LPIPS`: its arguments, inputs and the shape of its output, with one layer of features."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({"alex": torch.nn.Conv2d(3, 4, 3), "vgg": torch.nn.Conv2d(3, 8, 3)})
        self.net, self.sizes = net, []

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(first))
        assert float(first.min()) >= -1 and not torch.is_grad_enabled()
        features = [torch.nn.functional.normalize(self.layers[self.net](images), dim=1) for images in (first, second)]
        return (features[0] - features[1]).square().sum(1, keepdim=True).mean((2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("lpips")
    package.LPIPS = StandIn
    monkeypatch.setitem(sys.modules, "lpips", package)


def test_lpips_is_0_for_equal_images_and_goes_in_batches(lpips: None) -> None:
    distance, images = Lpips("vgg", batch_size=2), torch.rand(3, 3, 8, 8)
    assert diversity(images[[0, 0, 0]], distance) == pytest.approx(0, abs=1e-6)
    assert distance.model.sizes == [2, 1] and not any(p.requires_grad for p in distance.model.parameters())
    assert diversity(images, distance) > 0.01
    found = distance(images, images.flip(0))
    assert found.shape == (3,) and found[1] == 0 and found[0] == pytest.approx(float(found[2]), rel=1e-4)


def test_without_the_package_or_a_net_the_extra_is_named(lpips: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EmbedderUnavailableError, match="expected"):
        monkeypatch.setitem(sys.modules, "lpips", None)
        Lpips()


def test_coverage_counts_prompts_and_not_images() -> None:
    scores = torch.tensor([0.9, 0.1, 0.2, 0.3])
    assert coverage(scores, ["a", "a", "b", "c"], 0.3) == pytest.approx(2 / 3)
    with pytest.raises(MetricInputError, match="4 scores, 1 prompts"):
        coverage(scores, ["a"], 0.3)
