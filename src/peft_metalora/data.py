# SPDX-License-Identifier: Apache-2.0
"""Photos of people on disk: folders, captions, decoding and the random crops of training.

The layout is `DIR/<subject>/*.{png,jpg,jpeg,webp}`. A caption comes from `metadata.jsonl` (in the subject's folder or
in `DIR`; a line has `file_name` and optionally `text`, `subject`, `reference`), else from a `.txt` of the same name,
else from a template. No model is known here, and nothing is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import MetadataError, NoImagesError, TooFewImagesError, UnreadableImageError

METADATA_FILE = "metadata.jsonl"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
TRIGGER_MARK = "{trigger}"

_FIELDS: dict[str, type] = {"file_name": str, "text": str, "subject": str, "reference": bool}
_SIDES = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(left|right)(?=\b|wards?\b|most\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Photo:
    """An image file, its caption (None if it has none) and whether it is the subject's reference."""

    path: Path
    caption: str | None = None
    reference: bool = False


@dataclass(frozen=True)
class Subject:
    """One person (or thing) and their photos, in natural order of the file names."""

    name: str
    photos: list[Photo] = field(default_factory=list)

    def split(self) -> tuple[Photo, list[Photo]]:
        """The reference (the photo marked so, else the first) and the other photos, as R-FaceSim needs them.

        Raises:
            TooFewImagesError: there is no other photo.
        """
        if len(self.photos) < 2:
            raise TooFewImagesError(
                f"expected at least 2 images of {self.name!r} (a reference and another photo), found "
                f"{len(self.photos)}: add photos of the same person"
            )
        chosen = next((index for index, photo in enumerate(self.photos) if photo.reference), 0)
        return self.photos[chosen], self.photos[:chosen] + self.photos[chosen + 1 :]


@dataclass(frozen=True)
class _Entry:
    """A line of `metadata.jsonl`: what it says about an image."""

    text: str | None
    subject: str | None
    reference: bool


def read_subjects(
    directory: str | os.PathLike[str],
    *,
    template: str | None = None,
    trigger: str | None = None,
    min_photos: int = 1,
) -> list[Subject]:
    """Read a folder of people.

    Args:
        directory: `DIR` of the layout above.
        template: caption of images that have none, e.g. "a photo of {trigger}".
        trigger: replaces the mark `{trigger}` in captions and in the template.
        min_photos: fewer images of a subject are an error.

    Returns:
        The subjects in natural order of their names ("2" before "10").

    Raises:
        NoImagesError: no such folder, no subject in it, or a subject without images.
        TooFewImagesError: a subject has fewer than `min_photos` images.
        MetadataError: a `metadata.jsonl` cannot be understood.
        UnreadableImageError: a caption file is no UTF-8 text.
    """
    root = Path(directory)
    if not root.is_dir():
        raise NoImagesError(f"expected a folder with a folder of photos for each person, found no folder {root}")
    entries = _read_metadata(root)
    people: dict[str, dict[Path, _Entry | None]] = {}
    for folder in sorted((path for path in root.iterdir() if path.is_dir() and _visible(path)), key=_natural):
        people[folder.name] = dict.fromkeys(_images_in(folder))
        people[folder.name].update(_read_metadata(folder))
    for path, entry in entries.items():
        inside = path.relative_to(root).parts
        name = entry.subject or (inside[0] if len(inside) > 1 else None)
        if name is None:
            raise MetadataError(
                f'{root / METADATA_FILE}: expected a "subject" for {path.name}, which lies in no folder of its own, '
                "found none: add it to the line"
            )
        for photos in people.values():
            photos.pop(path, None)
        people.setdefault(name, {})[path] = entry
    people = {name: photos for name, photos in people.items() if photos or (root / name).is_dir()}
    if not people:
        hint = "put the photos of each person into a folder of their own" if _images_in(root) else "check the path"
        raise NoImagesError(f"expected {root}/<subject>/*.png (or .jpg, .webp), found no subject: {hint}")
    subjects = [Subject(name, _photos(people[name], template, trigger)) for name in sorted(people, key=_natural)]
    for subject in subjects:
        if not subject.photos:
            raise NoImagesError(f"expected images in {root / subject.name}, found none: add some or remove the folder")
        if len(subject.photos) < min_photos:
            raise TooFewImagesError(
                f"expected at least {min_photos} images of {subject.name!r}, found {len(subject.photos)}: "
                "add photos or remove the folder"
            )
    return subjects


def read_photos(
    path: str | os.PathLike[str], *, template: str | None = None, trigger: str | None = None
) -> list[Photo]:
    """Read the photos of one person: a folder of images, or one image file.

    Args:
        path: the folder or the file; a `metadata.jsonl` or `.txt` beside the images gives captions.
        template: caption of images that have none.
        trigger: replaces the mark `{trigger}` in captions and in the template.

    Raises:
        NoImagesError: no such path, or no image in it.
        MetadataError: `metadata.jsonl` cannot be understood.
        UnreadableImageError: a caption file is no UTF-8 text.
    """
    given = Path(path)
    if given.is_dir():
        found: dict[Path, _Entry | None] = dict.fromkeys(_images_in(given))
        found.update(_read_metadata(given))
        if not found:
            raise NoImagesError(f"expected images (.png, .jpg, .webp) in {given}, found none: check the folder")
    elif given.is_file():
        found = {given: _read_metadata(given.parent).get(given)}
    else:
        raise NoImagesError(f"expected an image or a folder of images, found nothing at {given}: check the path")
    return _photos(found, template, trigger)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image to RGB, upright as its EXIF data says, transparency on white.

    Raises:
        NoImagesError: there is no such file.
        UnreadableImageError: it is damaged, too large, or no image.
    """
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            image.load()
    except FileNotFoundError as error:
        raise NoImagesError(f"expected an image, found no file {os.fspath(path)}: check the path") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"expected an image, found {os.fspath(path)} which cannot be decoded ({error}): replace or remove it"
        ) from error
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def augment(
    image: Image.Image,
    size: int | tuple[int, int],
    generator: torch.Generator | None = None,
    *,
    flip: bool = False,
    min_scale: float = 0.8,
) -> Tensor:
    """Cut a random crop of the target's aspect ratio out of an image and scale it to the target.

    Meta-LoRA trains on several crops and mirror images of its one photo, against overfitting to pose, background and
    light (https://arxiv.org/abs/2503.22352). The sizes of the crops are our choice.

    Args:
        image: RGB.
        size: height and width of the result, in pixels; one number for a square.
        generator: source of the crop's size and place; the same state gives the same crop.
        flip: mirror the crop; use `flip_caption` on its caption.
        min_scale: sides of the smallest crop as a share of the largest that fits, in (0, 1]; 1 varies only the place.

    Returns:
        (3, height, width) float32 in [-1, 1].
    """
    height, width = (size, size) if isinstance(size, int) else size
    scale, x, y = torch.rand(3, generator=generator).tolist()
    unit = min(image.width / width, image.height / height) * (min_scale + (1 - min_scale) * scale)
    left, top = x * (image.width - width * unit), y * (image.height - height * unit)
    # The sum may exceed the image by a rounding error, which Pillow refuses.
    box = (left, top, min(left + width * unit, image.width), min(top + height * unit, image.height))
    cut = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(-1) if flip else pixels.contiguous()


def flip_caption(caption: str) -> str:
    """The caption of the mirrored image: the words "left" and "right" change places.

    >>> flip_caption("facing left, a bright lamp on the right")
    'facing right, a bright lamp on the left'
    """

    def other(match: re.Match[str]) -> str:
        word = match.group(1)
        swapped = _SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(other, caption)


def _photos(found: dict[Path, _Entry | None], template: str | None, trigger: str | None) -> list[Photo]:
    photos = []
    for path in sorted(found, key=_natural):
        entry = found[path]
        caption = (entry.text if entry else None) or _text_beside(path) or template
        if caption is not None and trigger is not None:
            caption = caption.replace(TRIGGER_MARK, trigger)
        photos.append(Photo(path, caption, bool(entry and entry.reference)))
    return photos


def _text_beside(path: Path) -> str | None:
    file = path.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableImageError(f"expected a caption as UTF-8 text, found {file} ({error}): rewrite it") from error


def _read_metadata(folder: Path) -> dict[Path, _Entry]:
    """What `metadata.jsonl` in a folder says, by image path; nothing where there is no such file."""
    file = folder / METADATA_FILE
    if not file.is_file():
        return {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MetadataError(f"expected UTF-8 text, found {file} ({error}): rewrite it") from error
    entries: dict[Path, _Entry] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, entry = _read_line(folder, f"{file}, line {number}", line)
        if path in entries:
            raise MetadataError(f"{file}, line {number}: expected each image once, found {path.name} again: remove one")
        entries[path] = entry
    return entries


def _read_line(folder: Path, where: str, line: str) -> tuple[Path, _Entry]:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MetadataError(f"{where}: expected a JSON object, found {line[:60]!r} ({error}): correct it") from error
    if not isinstance(row, dict):
        raise MetadataError(f"{where}: expected a JSON object, found {line[:60]!r}: correct it")
    for key, kind in _FIELDS.items():
        value = row.get(key)
        if not isinstance(value, kind) and (key == "file_name" or value is not None):
            raise MetadataError(f'{where}: expected "{key}" to be a {kind.__name__}, found {value!r}: correct it')
    name = PurePosixPath(row["file_name"].replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise MetadataError(f"{where}: expected a file inside {folder}, found {row['file_name']!r}: correct the path")
    path = folder / name
    if not path.is_file():
        raise MetadataError(f"{where}: expected an image, found no file {path}: add it or remove the line")
    return path, _Entry(row.get("text") or None, row.get("subject") or None, bool(row.get("reference")))


def _images_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _visible(path) and path.suffix.lower() in IMAGE_SUFFIXES]


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _natural(path: Path | str) -> tuple[tuple[int, int, str], ...]:
    """Sorts "2.png" before "10.png"."""

    def parts() -> Iterator[tuple[int, int, str]]:
        for text in re.split(r"(\d+)", str(path)):
            yield (0, int(text), text) if text.isdecimal() else (1, 0, text)

    return tuple(parts())
