# SPDX-License-Identifier: Apache-2.0
"""Photos of people on disk: folders, captions, masks, and what is said of the people.

The layout is `DIR/<subject>/*.{png,jpg,jpeg,webp}`. A caption comes from `metadata.jsonl` (in the subject's folder or
in `DIR`; a line has `file_name` and optionally `text`, `subject`, `reference`, `mask`), else from a `.txt` of the same
name, else from a template. A mask is `<name>.mask.png` beside `<name>.jpg`, unless `metadata.jsonl` names another. What
else a line says (strings, numbers) is a tag of the photo's subject; so is what `DIR/people.json` says of people by
name. Nothing is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from ..errors import MetadataError, NoImagesError, TooFewImagesError, UnreadableImageError
from .images import decode_image, read_file

METADATA_FILE = "metadata.jsonl"
PEOPLE_FILE = "people.json"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
TRIGGER_MARK = "{trigger}"

_FIELDS: dict[str, type] = {"file_name": str, "text": str, "subject": str, "reference": bool, "mask": str}
_MASK_SUFFIX = ".mask.png"


@dataclass(frozen=True)
class Photo:
    """An image and what is known of it.

    Attributes:
        path: the file; of an image that is none, a name for messages.
        caption: None if it has none.
        reference: whether it is the subject's reference.
        mask: a file that is white where the subject is; None if there is none.
        content: gives the bytes of an image that is no file of its own.
    """

    path: Path
    caption: str | None = None
    reference: bool = False
    mask: Path | None = None
    content: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            NoImagesError, UnreadableImageError: it is not there, or cannot be read.
        """
        return read_file(self.path) if self.content is None else self.content()

    def load(self) -> Image.Image:
        """The image as `load_image` decodes it; raises as that does."""
        return decode_image(self.read(), self.path)


@dataclass(frozen=True)
class Subject:
    """One person (or thing) and their photos, in natural order of the file names.

    Attributes:
        tags: what is said of the person, e.g. {"sex": "female"}: in `people.json`, or alike in the lines of all photos.
    """

    name: str
    photos: list[Photo] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

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
    mask: Path | None
    tags: dict[str, str]


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
        MetadataError: a `metadata.jsonl` or `people.json` cannot be understood.
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
    told = read_tags(root)
    subjects = [
        Subject(
            name,
            _photos(people[name], template, trigger),
            {**_common_tags(list(people[name].values())), **told.get(name, {})},
        )
        for name in sorted(people, key=_natural)
    ]
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


def read_tags(directory: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """What `DIR/people.json` says of the people, e.g. {"ann": {"sex": "female", "age": "30-39"}}; {} without it.

    Raises:
        MetadataError: it is something else.
    """
    path = Path(directory) / PEOPLE_FILE
    if not path.is_file():
        return {}
    try:
        tags = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MetadataError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(tags, dict) or not all(isinstance(one, dict) for one in tags.values()):
        raise MetadataError(f'{path}: expected {{"person": {{"sex": "..."}}}}, found something else')
    return {name: {str(k): str(v) for k, v in one.items()} for name, one in tags.items()}


def _photos(found: dict[Path, _Entry | None], template: str | None, trigger: str | None) -> list[Photo]:
    photos = []
    masks = {entry.mask for entry in found.values() if entry is not None}
    for path in sorted(found.keys() - masks, key=_natural):
        entry = found[path]
        caption = (entry.text if entry else None) or _text_beside(path) or template
        if caption is not None and trigger is not None:
            caption = caption.replace(TRIGGER_MARK, trigger)
        mask = entry.mask if entry is not None and entry.mask is not None else _mask_beside(path)
        photos.append(Photo(path, caption, bool(entry and entry.reference), mask))
    return photos


def _mask_beside(path: Path) -> Path | None:
    mask = path.with_suffix(_MASK_SUFFIX)
    return mask if mask.is_file() else None


def _common_tags(entries: list[_Entry | None]) -> dict[str, str]:
    """What all lines that say it say alike; what differs is said of photos and not of the person."""
    said: dict[str, set[str]] = {}
    for entry in entries:
        for key, value in (entry.tags if entry is not None else {}).items():
            said.setdefault(key, set()).add(value)
    return {key: values.pop() for key, values in said.items() if len(values) == 1}


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
    mask = _file_inside(folder, where, row["mask"]) if row.get("mask") else None
    tags = {key: str(value) for key, value in row.items() if key not in _FIELDS and isinstance(value, (str, int))}
    return _file_inside(folder, where, row["file_name"]), _Entry(
        row.get("text") or None, row.get("subject") or None, bool(row.get("reference")), mask, tags
    )


def _file_inside(folder: Path, where: str, given: str) -> Path:
    name = PurePosixPath(given.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise MetadataError(f"{where}: expected a file inside {folder}, found {given!r}: correct the path")
    path = folder / name
    if not path.is_file():
        raise MetadataError(f"{where}: expected an image, found no file {path}: add it or remove the line")
    return path


def _images_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and _is_photo(path)]


def _is_photo(path: Path) -> bool:
    return _visible(path) and not path.name.endswith(_MASK_SUFFIX)


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _natural(path: Path | str) -> tuple[tuple[int, int, str], ...]:
    """Sorts "2.png" before "10.png"."""

    def parts() -> Iterator[tuple[int, int, str]]:
        for text in re.split(r"(\d+)", str(path)):
            yield (0, int(text), text) if text.isdecimal() else (1, 0, text)

    return tuple(parts())
