# SPDX-License-Identifier: Apache-2.0
"""Procedural faces: who is shown, the splits of subjects, and datasets on disk.

An identity is a vector of ``len(IDENTITY_FACTORS)`` numbers in [0, 1]. Subjects of the fixed splits are drawn from
one generator per (split, index), with seeds that no two subjects share:

=========  ============  ==========================================================
split      subjects      used for
=========  ============  ==========================================================
base       no limit      training the base model, the face embedder and the judge
meta       0 ... 1023    stage 1 (meta-training)
tune       0 ... 31      choosing learning rates
held-out   0 ... 63      figures that are reported
=========  ============  ==========================================================
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..files import staged_folder
from .render import IDENTITY_FACTORS, render
from .scene import Scene, captions, sample_scenes, scene_from_labels

SPLITS: dict[str, int | None] = {"base": None, "meta": 1024, "tune": 32, "held-out": 64}
"""Number of subjects in each split; None: as many as wanted."""

STRONG_YAWS = {0.5: 0.6, 1.0: 0.9}
"""Turns of the head in radians by strength; ordinary photos of the domain turn by 0.45 at most."""

_SEED_STRIDE = 1 << 24  # seed of a subject = number of its split * stride + index; torch uses 32 bits on the CPU


def sample_identities(n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
    """Draw n identities uniformly, (n, len(IDENTITY_FACTORS)) float32 in [0, 1], on ``device``."""
    source = generator.device if generator is not None else torch.device(device)
    return torch.rand(n, len(IDENTITY_FACTORS), generator=generator, device=source).to(device)


def subject_identity(split: str, index: int) -> Tensor:
    """Return the identity of one subject of a split, (len(IDENTITY_FACTORS),).

    Raises:
        ConfigError: if there is no such split or no such subject in it.
    """
    return sample_identities(1, torch.Generator().manual_seed(_subject_seed(split, index)))[0]


def _subject_seed(split: str, index: int) -> int:
    if split not in SPLITS:
        raise ConfigError(f"expected a split of {', '.join(SPLITS)}, found {split!r}")
    size = SPLITS[split] or _SEED_STRIDE
    if not 0 <= index < size:
        raise ConfigError(f"expected a subject from 0 to {size - 1} in split {split!r}, found {index}")
    return (list(SPLITS).index(split) + 1) * _SEED_STRIDE + index


def write_dataset(
    directory: str | Path,
    split: str,
    subjects: int | Iterable[int],
    images_per_subject: int,
    size: int = 64,
    seed: int = 0,
    conditions: bool = False,
) -> Path:
    """Write photos of subjects in the layout that real data uses.

    Gives ``directory/<subject>/<n>.png`` and ``directory/<subject>/metadata.jsonl`` with a ``file_name``, a full
    caption as ``text`` and ``reference`` (true for image 0) per line. The reference is an ordinary photo, except
    that the person faces forward with a neutral expression; its wall and shirt are random, so that copying them can
    be measured. Equal arguments write equal files, and image n of a subject does not depend on the other arguments.

    Args:
        subjects: how many subjects (the first ones), or their indices.
        conditions: also write ``conditions/yaw=0.5.png`` and ``yaw=1.0.png`` with their captions: references that
            `metalora evaluate --degrade yaw` learns from instead of the good one.

    Returns:
        The directory.

    Raises:
        ConfigError: if there is no such split or subject, or no subject, image or pixel is asked for.
        WriteFailedError: if a folder cannot be written; subjects written before it stay.
    """
    indices = range(subjects) if isinstance(subjects, int) else list(subjects)
    for what, count in (("subject", len(indices)), ("image per subject", images_per_subject), ("pixel", size)):
        if count < 1:
            raise ConfigError(f"expected at least one {what}, found {count}")
    directory = Path(directory)
    identities = {index: subject_identity(split, index) for index in indices}  # all are checked before any is drawn
    for index, identity in tqdm(identities.items(), desc=f"Drawing {split} subjects", unit="subject"):
        scene = _subject_scenes(split, index, images_per_subject, seed)
        images = render(identity.expand(images_per_subject, -1), scene, size)
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        with staged_folder(directory / f"{split}-{index:04d}") as folder:
            lines = []
            for number, (image, text) in enumerate(zip(pixels, captions(scene), strict=True)):
                name = f"{number}.png"
                Image.fromarray(image).save(folder / name)
                lines.append(json.dumps({"file_name": name, "text": text, "reference": number == 0}) + "\n")
            (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
            for strength in STRONG_YAWS if conditions else ():
                photo, text = turned_photo(split, index, strength, size)
                (folder / "conditions").mkdir(exist_ok=True)
                photo.save(folder / "conditions" / f"yaw={strength}.png")
                (folder / "conditions" / f"yaw={strength}.txt").write_text(text, encoding="utf-8")
    return directory


def turned_photo(split: str, index: int, strength: float, size: int = 64) -> tuple[Image.Image, str]:
    """A reference that faces farther to the side than any photo the base model has seen, and its caption.

    Args:
        strength: a key of `STRONG_YAWS`.

    Raises:
        ConfigError: if there is no such split or subject.
    """
    identity = subject_identity(split, index)
    scene = scene_from_labels(yaw="right", expression="neutral", generator=torch.Generator().manual_seed(index))
    text = captions(scene)[0]
    scene = replace(scene, yaw=torch.full_like(scene.yaw, STRONG_YAWS[strength]))
    pixels = (render(identity[None], scene, size)[0] * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.numpy()), text


def _subject_scenes(split: str, index: int, count: int, seed: int) -> Scene:
    """Draw the scenes of one subject one by one, so that more images leave the earlier ones as they are."""
    digest = hashlib.sha256(f"scenes {_subject_seed(split, index)} {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
    scenes = [scene_from_labels(yaw="forward", expression="neutral", generator=generator)]
    scenes += [sample_scenes(1, generator) for _ in range(count - 1)]
    return Scene.cat(scenes)
