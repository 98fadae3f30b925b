# SPDX-License-Identifier: Apache-2.0
"""The procedural faces: exact symmetries, labels that are what the pixels show, files that anyone can read."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from peft_metalora.demo import faces
from peft_metalora.demo.render import IDENTITY_FACTORS, render
from peft_metalora.demo.scene import (
    LABELS,
    VOCABULARY,
    Scene,
    captions,
    labels,
    parse_caption,
    sample_scenes,
    scene_from_labels,
)
from peft_metalora.errors import ConfigError, MetaLoraError

# Mean change of an image, in 1/255, when a factor goes through its values: at least this for any, this for the bold.
VISIBLE, BOLD = 0.12, 3.0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_scene(n: int, **labels: str) -> Scene:
    """One frontal, centred, evenly lit scene, n times; labels change what they name only."""
    wanted = {"yaw": "forward", "expression": "neutral", "pattern": "plain", "light": "white"} | labels
    scene = scene_from_labels(**wanted, generator=generator())
    zero = torch.zeros(1)
    still = dict.fromkeys(("pitch", "roll", "shift_x", "shift_y", "light_x", "light_y"), zero)
    if wanted["yaw"] == "forward":
        still["yaw"] = zero
    return replace(scene, scale=zero + 1, **still)[torch.zeros(n, dtype=torch.long)]


def average(**factors: float) -> Tensor:
    """A clean-shaven person without glasses, light skin and short dark hair, (1, factors)."""
    values = {"skin_lightness": 0.85, "hair_hue": 0.0, "hair_length": 0.1, "beard": 0, "moustache": 0, "glasses": 0}
    return torch.tensor([[(values | factors).get(name, 0.5) for name in IDENTITY_FACTORS]])


def test_identities_are_about_thirty_factors_in_the_unit_interval():
    identities = faces.sample_identities(64, generator())
    assert identities.shape == (64, len(IDENTITY_FACTORS)) and 25 <= len(IDENTITY_FACTORS) <= 30
    assert len(set(IDENTITY_FACTORS)) == len(IDENTITY_FACTORS)
    assert identities.min() >= 0 and identities.max() <= 1
    assert torch.equal(identities, faces.sample_identities(64, generator()))


def test_images_are_rgb_in_range_and_deterministic():
    identity, scene = faces.sample_identities(20, generator()), sample_scenes(20, generator(1))
    image = render(identity, scene)
    assert image.shape == (20, 3, 64, 64) and image.dtype == torch.float32
    assert image.isfinite().all() and image.min() >= 0 and image.max() <= 1
    assert torch.equal(image, render(identity, scene))


def test_an_image_does_not_depend_on_its_batch():
    identity, scene = faces.sample_identities(40, generator()), sample_scenes(40, generator(1))
    together = render(identity, scene)
    order = torch.randperm(40, generator=generator(2))
    torch.testing.assert_close(render(identity[order], scene[order]), together[order], atol=1e-5, rtol=0)
    alone = torch.cat([render(identity[i : i + 1], scene[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", IDENTITY_FACTORS)
def test_every_identity_factor_is_visible(factor):
    people = faces.sample_identities(24, generator())
    people[:, IDENTITY_FACTORS.index("glasses")] = 1.0
    people[:, IDENTITY_FACTORS.index("fringe")] *= 0.3
    scene = sample_scenes(24, generator(1))
    column = IDENTITY_FACTORS.index(factor)
    steps = []
    for value in (0.0, 0.33, 0.66, 1.0):
        people[:, column] = value
        steps.append(render(people, scene))
    images = torch.stack(steps)
    change = 255 * (images.amax(0) - images.amin(0)).mean()
    assert change > VISIBLE
    if factor in {"skin_lightness", "hair_hue", "hair_lightness", "hair_length", "face_width", "glasses_colour"}:
        assert change > BOLD


def test_a_mirrored_person_in_a_mirrored_scene_is_the_mirrored_image():
    identity, scene = faces.sample_identities(40, generator()), sample_scenes(40, generator(1))
    mole, sides = IDENTITY_FACTORS.index("mole_x"), ("yaw", "roll", "shift_x", "light_x", "pattern_angle")
    other = identity.clone()
    other[:, mole] = 1 - identity[:, mole]  # nothing else of a person has a side
    mirror = replace(scene, **{name: -getattr(scene, name) for name in sides})
    flipped = render(other, mirror)
    torch.testing.assert_close(flipped.flip(-1), render(identity, scene), atol=1e-4, rtol=0)
    swap = {"left": "right", "right": "left"}
    for text, mirrored in zip(captions(scene), captions(mirror), strict=True):
        asked = parse_caption(text)
        asked["yaw"] = swap.get(asked["yaw"], asked["yaw"])
        assert parse_caption(mirrored) == asked


def test_facing_left_moves_the_features_to_the_left_of_the_image():
    """The mouth is the reddest thing on a pale face: its centre of mass must follow the yaw."""
    centre = {}
    for yaw in LABELS["yaw"]:
        scene = plain_scene(1, yaw=yaw, background="grey", shirt="grey")
        image = render(average(lip_colour=0.5), scene)[0]
        red = (image[0] - 1.9 * image[1]).clamp(min=0)[24:52]
        centre[yaw] = float((red * torch.linspace(-1, 1, 64)).sum() / red.sum())
    assert centre["left"] < -0.1 < centre["forward"] < 0.1 < centre["right"]


def test_expressions_differ_clearly():
    scenes = Scene.cat([plain_scene(1, expression=name) for name in LABELS["expression"]])
    images = render(average().expand(len(scenes), -1), scenes)
    for first in range(len(scenes)):
        for second in range(first):
            strong = (images[first] - images[second]).abs().amax(0) > 0.25
            assert strong.sum() >= 60, (LABELS["expression"][first], LABELS["expression"][second])


def test_teeth_show_in_a_smile_and_the_corners_of_a_sad_mouth_hang():
    def white_pixels(expression: str) -> int:
        image = render(average(), plain_scene(1, expression=expression))[0, :, 38:56, 16:48]
        return int((image.amin(0) > 0.8).sum())

    assert white_pixels("neutral") == 0
    assert white_pixels("smiling") >= 20 and white_pixels("laughing") >= 20

    def corner_height(expression: str) -> float:
        """y of the dark pixels at the mouth's ends less that in its middle, in pixels."""
        image = render(average(lip_colour=0.5, nose_length=0), plain_scene(1, expression=expression))[0]
        red = (image[0] - 1.9 * image[1]).clamp(min=0)[38:54, 16:48]
        columns = red.sum(0) > 0.3
        y = (red * torch.arange(16.0)[:, None]).sum(0)[columns] / red.sum(0)[columns]
        return float((y[:2].mean() + y[-2:].mean()) / 2 - y[len(y) // 2 - 1 : len(y) // 2 + 1].mean())

    assert corner_height("smiling") < -1 and corner_height("sad") > 1


@pytest.mark.parametrize("what", ["background", "shirt"])
def test_named_colours_stay_apart_under_every_light(what):
    """The nearest name to the mean colour of wall or shirt is the one in the caption, under each light."""
    colours = LABELS[what]
    region = (..., slice(2, 12), slice(0, 8)) if what == "background" else (..., slice(60, 64), slice(8, 56))

    def mean_colour(light: str, seed: int) -> Tensor:
        scenes = [
            scene_from_labels(**{what: name}, light=light, pattern="plain", generator=generator(seed))
            for name in colours
        ]
        image = render(average().expand(len(colours), -1), Scene.cat(scenes))[region]
        return image.flatten(2).mean(-1)

    for light in LABELS["light"]:
        known = mean_colour(light, 0)
        for seed in range(1, 9):
            nearest = torch.cdist(mean_colour(light, seed), known).argmin(1)
            assert nearest.tolist() == list(range(len(colours)))


def test_patterns_are_what_they_are_called():
    left, top = {}, {}  # strips of wall beside and above the head
    for pattern in LABELS["pattern"]:
        scene = replace(plain_scene(1, pattern=pattern, background="grey"), pattern_angle=torch.zeros(1))
        image = render(average(), scene)[0, 0]
        left[pattern], top[pattern] = image[:26, 3], image[1]
    assert left["plain"].std() < 0.02 > top["plain"].std()
    assert left["striped"].std() > 0.05
    assert top["striped"].std() < 0.02
    assert left["checkered"].std() > 0.05 < top["checkered"].std()
    assert left["gradient"].std() > 0.02 > top["gradient"].std()
    assert (left["gradient"].diff().abs() < 0.02).all()


def test_edges_are_soft_and_move_smoothly():
    person = average(skin_lightness=1.0, hair_hue=0.0)
    scene = plain_scene(1, background="yellow", shirt="blue")
    image = render(person, scene)[0]
    shoulder = image[2, 40:, 6]  # blue channel: yellow wall above, dark outline, blue shirt below
    assert ((shoulder > shoulder.min() + 0.05) & (shoulder < shoulder.max() - 0.05)).any()
    half_pixel = 1 / 64
    shifts = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]) * 2 * half_pixel
    scenes = replace(scene[torch.zeros(5, dtype=torch.long)], shift_x=shifts)
    moved = render(person.expand(5, -1), scenes)
    steps = (moved.diff(dim=0)).abs()
    assert (steps.mean((1, 2, 3)) > 1e-3).all()  # each quarter of a pixel is seen
    assert steps.amax() < 0.6  # and none flips a pixel at once


def test_other_sizes_show_the_same_picture():
    identity, scene = faces.sample_identities(4, generator()), sample_scenes(4, generator(1))
    large = torch.nn.functional.avg_pool2d(render(identity, scene, 128), 2)
    assert (large - render(identity, scene, 64)).abs().mean() < 0.03


def test_captions_name_the_scene_in_the_grammar():
    scene = scene_from_labels(
        yaw="left", expression="smiling", shirt="red", background="blue", pattern="checkered", light="warm"
    )
    text = "a photo of a person, facing left, smiling, in a red shirt, on a blue checkered wall, in warm light"
    assert captions(scene) == [text]
    orange = scene_from_labels(shirt="orange", background="orange", pattern="plain")
    assert "in an orange shirt, on a plain orange wall" in captions(orange)[0]


def test_captions_parse_back_to_the_labels():
    scene = sample_scenes(300, generator())
    truth = labels(scene)
    for row, text in enumerate(captions(scene)):
        asked = parse_caption(text)
        assert asked == {name: LABELS[name][index[row]] for name, index in truth.items()}
        assert set(text.replace(",", " ,").split()) <= set(VOCABULARY)
    for name, index in truth.items():
        assert set(index.tolist()) == set(range(len(LABELS[name])))


def test_dropped_clauses_are_absent_and_the_rest_is_kept():
    scene = sample_scenes(400, generator())
    full = [parse_caption(text) for text in captions(scene)]
    assert captions(scene, drop=1.0) == ["a photo of a person"] * 400
    kept = [parse_caption(text) for text in captions(scene, generator(1), drop=0.3)]
    assert all(part.items() <= whole.items() for part, whole in zip(kept, full, strict=True))
    for name in LABELS:
        assert 0.6 < sum(name in part for part in kept) / 400 < 0.8
    assert captions(scene, generator(1), drop=0.3) == captions(scene, generator(1), drop=0.3)


@pytest.mark.parametrize("text", ["a cat", "a photo of a person, in a mauve shirt", "a photo of a person, facing up"])
def test_foreign_captions_are_refused(text):
    with pytest.raises(ConfigError, match="expected a c"):
        parse_caption(text)


def test_scenes_show_the_labels_asked_for_and_nothing_else_changes():
    for name, values in LABELS.items():
        for index, value in enumerate(values):
            scene = scene_from_labels(16, **{name: value}, generator=generator(3))
            assert (labels(scene)[name] == index).all()
            free = sample_scenes(16, generator(3))
            for other in {field.name for field in fields(Scene)} - {name}:
                assert torch.equal(getattr(scene, other), getattr(free, other))


@pytest.mark.parametrize("labels", [{"mood": "sad"}, {"shirt": "mauve"}])
def test_unknown_labels_are_refused(labels):
    with pytest.raises(ConfigError, match="expected one of"):
        scene_from_labels(**labels)


def test_yaw_classes_have_a_gap_between_them():
    scene = sample_scenes(2000, generator())
    size = scene.yaw.abs()
    assert ((size < 0.07) | (size > 0.25)).all()


def test_splits_share_no_subject():
    drawn = {split: {tuple(faces.subject_identity(split, i).tolist()) for i in range(32)} for split in faces.SPLITS}
    assert all(len(people) == 32 for people in drawn.values())
    assert len(set().union(*drawn.values())) == 32 * len(faces.SPLITS)
    assert faces.SPLITS == {"base": None, "meta": 1024, "tune": 32, "held-out": 64}
    assert torch.equal(faces.subject_identity("meta", 7), faces.subject_identity("meta", 7))


@pytest.mark.parametrize(("split", "index"), [("test", 0), ("held-out", 64), ("meta", -1)])
def test_subjects_outside_the_splits_are_refused(split, index):
    with pytest.raises(MetaLoraError, match="expected a s"):
        faces.subject_identity(split, index)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"\(3, 30\).*found \(1, 30\)"):
        render(average(), sample_scenes(3))


def test_a_dataset_is_ordinary_files(tmp_path):
    faces.write_dataset(tmp_path / "a", "held-out", 2, 4, size=32)
    folders = sorted((tmp_path / "a").iterdir())
    assert [folder.name for folder in folders] == ["held-out-0000", "held-out-0001"]
    for folder in folders:
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert [row["file_name"] for row in rows] == [f"{n}.png" for n in range(4)]
        assert [row["reference"] for row in rows] == [True, False, False, False]
        assert {path.name for path in folder.iterdir()} == {"metadata.jsonl", *(row["file_name"] for row in rows)}
        first = parse_caption(rows[0]["text"])
        assert (first["yaw"], first["expression"]) == ("forward", "neutral")
        for row in rows:
            assert set(parse_caption(row["text"])) == set(LABELS)
            with Image.open(folder / row["file_name"]) as image:
                assert (image.size, image.mode) == ((32, 32), "RGB")


def test_a_dataset_is_the_same_whatever_else_is_written(tmp_path):
    faces.write_dataset(tmp_path / "few", "tune", [1], 2, size=32)
    faces.write_dataset(tmp_path / "many", "tune", 3, 5, size=32)
    faces.write_dataset(tmp_path / "seed", "tune", [1], 2, size=32, seed=1)
    name = "tune-0001/1.png"
    assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()
    assert (tmp_path / "few" / name).read_bytes() != (tmp_path / "seed" / name).read_bytes()


def test_a_dataset_that_cannot_be_leaves_nothing(tmp_path):
    for subjects, images in ((65, 2), (1, 0)):
        with pytest.raises(ConfigError, match="expected"):
            faces.write_dataset(tmp_path / "none", "held-out", subjects, images)
    assert not (tmp_path / "none").exists()
