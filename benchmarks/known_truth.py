# SPDX-License-Identifier: Apache-2.0
"""What a drawn world knows that a photographed one does not: who was meant, to the last factor.

People whom no training has seen the like of (`strangers`), how far images are from the true render of a person in the
same scene (`same_scenes`), and whether they show a mark (`mark_shown`). No network has a say in these but for
the labels of the scene, from which the search for the same scene starts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from peft_metalora.demo.drawing import cover, paint
from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.demo.faces import sample_identities
from peft_metalora.demo.render import IDENTITY_FACTORS, front, render
from peft_metalora.demo.scene import LABELS, Scene, captions, sample_scenes, scene_from_labels

STRANGERS = ("outside", "marked", "unmarked")
_OUTSIDE = 0.25  # how far beyond the range of training, whose width is 1
# Factors that may leave their range: the renderer draws what lies beyond. Colours end in their palettes.
_SHAPES = (
    *("face_width", "face_height", "jaw", "ears", "hair_length", "hair_volume", "eye_size", "eye_spacing"),
    *("nose_length", "nose_width", "mouth_width", "lip_thickness"),
)
_MARK, _MARK_X, _MARK_Y, _MARK_RADIUS = (0.10, 0.30, 0.95), 0.5, 0.22, 0.16
_SEEN = 4.0  # pixels of a mark that count as seen
# What is searched for, and the ends of where: those of `sample_scenes`, a little wider.
_SEARCHED = {
    **{"yaw": (-0.55, 0.55), "pitch": (-0.2, 0.2), "roll": (-0.22, 0.22), "scale": (0.86, 1.14)},
    **{"shift_x": (-0.18, 0.18), "shift_y": (-0.1, 0.1), "light_x": (-1.2, 1.2), "light_y": (-1.2, 0.6)},
    "strength": (0.0, 1.2),
}
_YAW = {"left": -0.36, "forward": 0.0, "right": 0.36}
FIT_STEPS = 60
_FIT_RATE, _TOGETHER = 0.06, 512


def strangers(kind: str, count: int, photos: int, seed: int) -> tuple[Tensor, Scene, Tensor]:
    """People who are in no split: identities (count, factors), their scenes person by person, and images.

    Args:
        kind: `outside`: half of the shapes of each lie beyond the range of training. `marked`: with a blue mark on a
            cheek; `unmarked`: the same people and scenes without it.
    """
    generator = torch.Generator().manual_seed(seed)
    identity = sample_identities(count, generator)
    if kind == "outside":
        chosen = torch.tensor([IDENTITY_FACTORS.index(name) for name in _SHAPES])
        beyond = torch.where(torch.rand(count, len(chosen), generator=generator) < 0.5, -_OUTSIDE, 1 + _OUTSIDE)
        leaves = torch.rand(count, len(chosen), generator=generator) < 0.5
        identity[:, chosen] = torch.where(leaves, beyond, identity[:, chosen])
    fronts = scene_from_labels(count, yaw="forward", expression="neutral", generator=generator)
    scenes = Scene.cat([fronts, sample_scenes(count * (photos - 1), generator)])
    scenes = scenes[torch.arange(count * photos).view(photos, count).T.flatten()]
    each = identity.repeat_interleave(photos, 0)
    images = render(each, scenes, RESOLUTION)
    return identity, scenes, with_mark(images, each, scenes) if kind == "marked" else images


def write_people(folder: Path, identity: Tensor, scenes: Scene, images: Tensor) -> None:
    """Write photos as `demo.faces.write_dataset` does: a folder a person, the first photo the reference."""
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).unflatten(0, (len(identity), -1)).numpy()
    texts = captions(scenes)
    for number, photos in enumerate(pixels):
        home = folder / f"{number:04d}"
        home.mkdir(parents=True)
        lines = []
        for photo, shown in enumerate(photos):
            Image.fromarray(shown).save(home / f"{photo}.png")
            text = texts[number * len(photos) + photo]
            lines.append(json.dumps({"file_name": f"{photo}.png", "text": text, "reference": photo == 0}) + "\n")
        (home / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _mark(identity: Tensor, scenes: Scene) -> Tensor:
    """Coverage of the mark, (n, size, size)."""
    face = front(identity, scenes, RESOLUTION)
    distance = ((face.x - _MARK_X) ** 2 + (face.y - _MARK_Y) ** 2 + 1e-8).sqrt() - _MARK_RADIUS
    return cover(distance, distance.new_tensor(2 / RESOLUTION)) * face.inside


def with_mark(images: Tensor, identity: Tensor, scenes: Scene) -> Tensor:
    """Images (n, 3, h, w) of these people in these scenes, with the mark."""
    colour = images.new_tensor(_MARK)[None, :, None, None]
    return paint(images, colour, _mark(identity, scenes))


def same_scenes(
    images: Tensor, identity: Tensor, labels: Sequence[Mapping[str, str]], steps: int = FIT_STEPS
) -> tuple[Scene, Tensor]:
    """For each image the scene in which the render of a person comes nearest to it, and how near.

    Args:
        images: (n, 3, size, size) in [0, 1]. identity: (n, factors) who is rendered. labels: what the images show.
        steps: of the search.

    Returns:
        Scenes, and (n,) the mean absolute difference of colours over the face as rendered.
    """
    identity = identity.to(images.device)
    pairs = zip(images.split(_TOGETHER), identity.split(_TOGETHER), strict=True)
    parts = [
        _same_scenes(some, whose, labels[number * _TOGETHER :][:_TOGETHER], steps)
        for number, (some, whose) in enumerate(pairs)
    ]
    return Scene.cat([scene for scene, _ in parts]), torch.cat([distance for _, distance in parts])


def _same_scenes(
    images: Tensor, identity: Tensor, labels: Sequence[Mapping[str, str]], steps: int
) -> tuple[Scene, Tensor]:
    device, count = images.device, len(images)
    start = sample_scenes(count, torch.Generator().manual_seed(0)).to(device)
    names = {name for name in LABELS if name != "yaw"}
    shown = {
        name: torch.tensor([LABELS[name].index(one[name]) for one in labels], device=device) for name in sorted(names)
    }
    start = dataclasses.replace(start, **shown)
    low, high = (torch.tensor([ends[side] for ends in _SEARCHED.values()], device=device)[:, None] for side in (0, 1))
    middle = torch.zeros(len(_SEARCHED), count, device=device)
    middle[0] = torch.tensor([_YAW[one["yaw"]] for one in labels], device=device) / high[0]
    position = middle.atanh().requires_grad_(True)

    def scene() -> Scene:
        values = low + (high - low) * (position.tanh() + 1) / 2
        return dataclasses.replace(start, **dict(zip(_SEARCHED, values.unbind(0), strict=True)))

    optimizer = torch.optim.Adam([position], lr=_FIT_RATE)
    for number in range(steps):
        optimizer.param_groups[0]["lr"] = _FIT_RATE * (1 - number / steps)
        drawn, inside = _with_face(identity, scene())
        fine = _difference(drawn, images, inside)
        coarse = _difference(F.avg_pool2d(drawn, 4), F.avg_pool2d(images, 4), F.avg_pool2d(inside[:, None], 4)[:, 0])
        optimizer.zero_grad()
        (fine + coarse).sum().backward()
        optimizer.step()
    with torch.no_grad():
        found = scene()
        drawn, inside = _with_face(identity, found)
        return found, _difference(drawn, images, inside)


def _with_face(identity: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    # The renderer draws CPU images in chunks; all at once have one graph either way.
    return render(identity, scene, RESOLUTION), front(identity, scene, RESOLUTION).inside.detach()


def _difference(drawn: Tensor, images: Tensor, inside: Tensor) -> Tensor:
    return ((drawn - images).abs().mean(1) * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)


def mark_shown(images: Tensor, identity: Tensor, labels: Sequence[Mapping[str, str]], steps: int = FIT_STEPS) -> Tensor:
    """(n,): how much of the mark each image shows, 0 for skin and 1 for its colour; NaN where it would be hidden."""
    scenes, _ = same_scenes(images, identity, labels, steps)
    identity = identity.to(images.device)
    with torch.no_grad():
        plain, mark = render(identity, scenes, RESOLUTION), _mark(identity, scenes)[:, None]
        way = images.new_tensor(_MARK)[None, :, None, None] - plain
        shown = (mark * (images - plain) * way).sum((1, 2, 3)) / (mark * way * way).sum((1, 2, 3)).clamp(min=1e-6)
        return torch.where(mark.sum((1, 2, 3)) >= _SEEN, shown, torch.nan)
