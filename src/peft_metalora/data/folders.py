# SPDX-License-Identifier: Apache-2.0
"""Photos of people on disk: folders, captions, masks, and what is said of the people.

The layout is `DIR/<subject>/*.jpg` (or another of `IMAGE_SUFFIXES`). A caption comes from `metadata.jsonl` (in the
subject's folder or in `DIR`; a line has `file_name` and optionally `text` or `caption`, `subject`, `reference`,
`mask`), else from a `.txt` of the same name, else from a template. A mask is `<name>.mask.png` beside `<name>.jpg`,
unless `metadata.jsonl` names another. What else a line says (strings, numbers) is a tag of the photo's subject; so is
what `DIR/people.json` says of people by name. A subject's name may become the name of a folder, and has to be able to.
What lies in a subject's folder and is not used is named in a warning. Nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from ..errors import MetadataError, NoImagesError, TooFewImagesError, UnreadableImageError
from ..files import open_regular
from .images import HEIC_EXTRA, HEIC_SUFFIXES, IMAGE_SUFFIXES, decode_image, read_file, reads_heic

METADATA_FILE = "metadata.jsonl"
PEOPLE_FILE = "people.json"
CONDITIONS_FOLDER = "conditions"  # of bad references, in a person's folder; see `evaluation`
TRIGGER_MARK = "{trigger}"
MAX_CAPTION = 10_000
"""Characters of the longest caption: several times what any text encoder reads, and no book."""

_FIELDS: dict[str, type] = {
    **dict.fromkeys(("file_name", "text", "caption", "subject", "mask"), str),
    "reference": bool,
}
_MASK_SUFFIX = ".mask.png"
_MAX_NAME = 200  # bytes: file systems take 255, and files beside it have longer names
_OF_THE_SYSTEM = {"desktop.ini", "thumbs.db"}
_NAMED = 10  # of what is left out


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

    Raises:
        MetadataError: a name that cannot be the name of a folder, such as "../ann".
    """

    name: str
    photos: list[Photo] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _is_component(self.name):
            raise MetadataError(
                f"expected a subject's name that can be the name of a folder, found {self.name[:60]!r}: rename it, "
                "without slashes, control characters, a dot in front, a dot or space at the end, or more than "
                f"{_MAX_NAME} bytes"
            )

    def split(self) -> tuple[Photo, list[Photo]]:
        """The reference (the photo marked so, else the first) and the other photos, as R-FaceSim needs them.

        A copy of the reference is no other photo.

        Raises:
            TooFewImagesError: there is no other photo.
        """
        chosen = next((index for index, photo in enumerate(self.photos) if photo.reference), 0)
        reference, rest = self.photos[chosen : chosen + 1], self.photos[:chosen] + self.photos[chosen + 1 :]
        others = not_among(rest, reference)
        if not others:
            copies = f", {len(rest)} of which are copies" if rest else ""
            raise TooFewImagesError(
                f"expected at least 2 images of {self.name!r} (a reference and another photo), found "
                f"{len(self.photos)}{copies}: add photos of the same person"
            )
        return reference[0], others


@dataclass(frozen=True)
class _Entry:
    """A line of `metadata.jsonl`: what it says about an image."""

    text: str | None
    subject: str | None
    reference: bool
    mask: Path | None
    tags: dict[str, str]


def first_copies(photos: Sequence[Photo]) -> list[int]:
    """Of each photo the place of the first that has the same bytes, its own as a rule.

    Files of a size that no other has are not read.
    """
    sizes = [_size(photo) for photo in photos]
    count = Counter(sizes)
    first: dict[bytes, int] = {}
    found = []
    for place, (photo, size) in enumerate(zip(photos, sizes, strict=True)):
        same = place
        if size is not None and count[size] > 1:
            with suppress(NoImagesError, UnreadableImageError):
                same = first.setdefault(hashlib.sha256(photo.read()).digest(), place)
        found.append(same)
    return found


def not_among(photos: Sequence[Photo], known: Sequence[Photo]) -> list[Photo]:
    """The photos that are no copies of known ones."""
    same = first_copies([*known, *photos])[len(known) :]
    return [photo for photo, first in zip(photos, same, strict=True) if first >= len(known)]


def _size(photo: Photo) -> int | None:
    try:
        return len(photo.read()) if photo.content is not None else photo.path.stat().st_size
    except (NoImagesError, UnreadableImageError, OSError):
        return None


def require_distinct(subjects: Iterable[Subject]) -> None:
    """Check that each subject can have a folder of its own, on any file system and after any cleaning of names.

    Raises:
        MetadataError: two names that differ in case, or in what stands between letters and digits, alone.
    """
    known: dict[str, str] = {}
    for subject in subjects:
        plain = re.sub(r"[^A-Za-z0-9\x80-\U0010ffff]+", "_", unicodedata.normalize("NFKC", subject.name)).casefold()
        other = known.setdefault(plain, subject.name)
        if other != subject.name:
            raise MetadataError(
                f"expected names of subjects that differ in letters or digits, found {other!r} and {subject.name!r}, "
                "who would share a folder: rename one, or give both one name if they are one"
            )


def read_subjects(
    directory: str | os.PathLike[str],
    *,
    template: str | None = None,
    trigger: str | None = None,
    min_photos: int = 1,
) -> list[Subject]:
    """Read a folder of people.

    Warns of files that were left out, with their number and names.

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
        MetadataError: a `metadata.jsonl` or `people.json` cannot be understood, or a name cannot be a folder's.
        UnreadableImageError: a caption file is no UTF-8 text, or too long.
    """
    root = Path(directory)
    if not os.path.isdir(root):
        raise NoImagesError(f"expected a folder with a folder of photos for each person, found no folder {root}")
    entries = _read_metadata(root)
    people: dict[str, dict[Path, _Entry | None]] = {}
    folders = sorted((path for path in _visible_in(root) if path.is_dir()), key=_natural)
    for folder in folders:
        people[folder.name] = dict.fromkeys(_images_in(folder))
        people[folder.name].update(_of_one_person(folder, {folder.name}))
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
    here = {folder.name for folder in folders}
    people = {name: photos for name, photos in people.items() if photos or name in here}
    if not people:
        hint = "put the photos of each person into a folder of their own" if _images_in(root) else "check the path"
        raise NoImagesError(f"expected {root}/<subject>/*.jpg (or .png, .heic), found no subject: {hint}")
    told = read_tags(root)
    subjects = [
        Subject(
            name,
            _photos(people[name], template, trigger),
            {**_common_tags(list(people[name].values())), **told.get(name, {})},
        )
        for name in sorted(people, key=_natural)
    ]
    require_distinct(subjects)
    used = _used(photo for subject in subjects for photo in subject.photos)
    loose = [path for path in _visible_in(root) if path.suffix.lower() in IMAGE_SUFFIXES or not path.exists()]
    left = [path for path in sorted(loose, key=_natural) if path not in used and not path.is_dir()]
    left += [path for folder in folders for path in _left_out(folder, used)]
    _warn_left_out(root, left)
    for subject in subjects:
        if not subject.photos:
            unused = [path for path in left if path.parent.name == subject.name]
            raise NoImagesError(
                f"expected images in {root / subject.name}, found "
                f"{_listed(root, unused) if unused else 'none'}: add some or remove the folder"
            )
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

    Warns of files of the folder that were left out, with their number and names.

    Args:
        path: the folder or the file; a `metadata.jsonl` or `.txt` beside the images gives captions.
        template: caption of images that have none.
        trigger: replaces the mark `{trigger}` in captions and in the template.

    Raises:
        NoImagesError: no such path, or no image in it.
        MetadataError: `metadata.jsonl` cannot be understood.
        UnreadableImageError: a caption file is no UTF-8 text, or too long.
    """
    given = Path(path)
    if os.path.isdir(given):
        found: dict[Path, _Entry | None] = dict.fromkeys(_images_in(given))
        found.update(_of_one_person(given, set()))
        photos = _photos(found, template, trigger)
        left = _left_out(given, _used(photos))
        if not photos:
            what = _listed(given, left) if left else "none"
            raise NoImagesError(f"expected images (.jpg, .png, .heic) in {given}, found {what}: check the folder")
        _warn_left_out(given, left)
        return photos
    if not os.path.isfile(given):
        raise NoImagesError(f"expected an image or a folder of images, found nothing at {given}: check the path")
    return _photos({given: _read_metadata(given.parent).get(given)}, template, trigger)


def read_tags(directory: str | os.PathLike[str]) -> dict[str, dict[str, str]]:
    """What `DIR/people.json` says of the people, e.g. {"ann": {"sex": "female", "age": "30-39"}}; {} without it.

    Raises:
        MetadataError: it is something else.
    """
    path = Path(directory) / PEOPLE_FILE
    if not path.is_file():
        return {}
    try:
        tags = json.loads(_read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise MetadataError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(tags, dict) or not all(isinstance(one, dict) for one in tags.values()):
        raise MetadataError(f'{path}: expected {{"person": {{"sex": "..."}}}}, found something else')
    return {name: {str(k): str(v) for k, v in one.items()} for name, one in tags.items()}


def caption_beside(path: Path) -> str | None:
    """What the `.txt` of an image's name says; None without one, and of a blank one.

    Raises:
        UnreadableImageError: it is no UTF-8 text, or longer than `MAX_CAPTION`.
    """
    return _caption_of(_companions(path.parent).get((path.stem, ".txt")))


def usable_caption(text: str | None) -> str | None:
    """A caption without blanks and byte order mark around it; None of a blank one.

    Raises:
        ValueError: it is longer than `MAX_CAPTION`.
    """
    text = (text or "").strip().removeprefix("\ufeff").strip()
    if len(text) > MAX_CAPTION:
        raise ValueError(f"{len(text)} characters, where at most {MAX_CAPTION} are read")
    return text or None


def _photos(found: dict[Path, _Entry | None], template: str | None, trigger: str | None) -> list[Photo]:
    photos = []
    masks = {entry.mask for entry in found.values() if entry is not None}
    beside = {folder: _companions(folder) for folder in {path.parent for path in found}}
    for path in sorted(found.keys() - masks, key=_natural):
        entry = found[path]
        near = beside[path.parent]
        caption = (entry.text if entry else None) or _caption_of(near.get((path.stem, ".txt"))) or template
        if caption is not None and trigger is not None:
            caption = caption.replace(TRIGGER_MARK, trigger)
        mask = entry.mask if entry is not None and entry.mask is not None else near.get((path.stem, _MASK_SUFFIX))
        photos.append(Photo(path, caption, bool(entry and entry.reference), mask))
    return photos


def _companions(folder: Path) -> dict[tuple[str, str], Path]:
    """Captions and masks of a folder by the name of their photo and their kind; suffixes in capitals count too."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(_visible_in(folder)):  # small letters come last, and win
        for suffix in (".txt", _MASK_SUFFIX):
            if path.name.lower().endswith(suffix) and path.is_file():
                found[path.name[: -len(suffix)], suffix] = path
    return found


def _caption_of(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return usable_caption(_read_text(file, 5 * MAX_CAPTION))
    except (OSError, ValueError) as error:
        raise UnreadableImageError(f"expected a caption as UTF-8 text, found {file} ({error}): rewrite it") from error


def _read_text(path: Path, limit: int | None = None) -> str:
    """UTF-8, with Windows' byte order mark or without.

    Args:
        limit: bytes that it may have.
    """
    with open_regular(path) as file:
        content = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(content) > limit:
        raise ValueError(f"{limit} bytes and more, where at most {MAX_CAPTION} characters are read")
    return content.decode("utf-8-sig")


def _common_tags(entries: list[_Entry | None]) -> dict[str, str]:
    """What all lines that say it say alike; what differs is said of photos and not of the person."""
    said: dict[str, set[str]] = {}
    for entry in entries:
        for key, value in (entry.tags if entry is not None else {}).items():
            said.setdefault(key, set()).add(value)
    return {key: values.pop() for key, values in said.items() if len(values) == 1}


def _read_metadata(folder: Path) -> dict[Path, _Entry]:
    """What `metadata.jsonl` in a folder says, by image path; nothing where there is no such file."""
    file = folder / METADATA_FILE
    if not file.is_file():
        return {}
    try:
        # Not splitlines: U+2028 and its kin end a line of text, but no line of JSON.
        lines = _read_text(file).replace("\r", "\n").split("\n")
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


def _of_one_person(folder: Path, names: set[str]) -> dict[Path, _Entry]:
    """What `metadata.jsonl` says in a folder of one person's photos, who is called so, if that is known.

    Raises:
        MetadataError: a line says of a photo that it shows somebody else. As `_read_metadata`.
    """
    entries = _read_metadata(folder)
    names = names | {entry.subject for entry in entries.values() if entry.subject}
    if len(names) > 1:
        told = ", ".join(sorted(names)[:5])
        raise MetadataError(
            f"{folder / METADATA_FILE}: expected the photos of one person in {folder}, found several subjects "
            f"({told}): move each person's photos into a folder of their own, or correct the lines"
        )
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
        _text_of(where, row), row.get("subject") or None, bool(row.get("reference")), mask, tags
    )


def _text_of(where: str, row: dict[str, Any]) -> str | None:
    try:
        texts = dict.fromkeys(filter(None, (usable_caption(row.get("text")), usable_caption(row.get("caption")))))
    except ValueError as error:
        raise MetadataError(f"{where}: expected a caption, found {error}: shorten it") from error
    if len(texts) > 1:
        raise MetadataError(f'{where}: expected "text" or "caption", found both, which differ: remove one')
    return next(iter(texts), None)


def _file_inside(folder: Path, where: str, given: str) -> Path:
    name = PurePosixPath(given.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or not name.parts or PureWindowsPath(given).drive:
        raise MetadataError(f"{where}: expected a file inside {folder}, found {given!r}: correct the path")
    path = folder / name
    if not os.path.isfile(path):
        raise MetadataError(f"{where}: expected an image, found no file {path}: add it or remove the line")
    return path


def _is_component(name: str) -> bool:
    """Whether a name is one part of a path, on any system, as it is."""
    try:
        short = len(name.encode("utf-8")) <= _MAX_NAME
    except UnicodeEncodeError:
        return False
    plain = PurePosixPath(name).name == PureWindowsPath(name).name == name
    kept = name == name.strip().rstrip(".") and not name.startswith(".")
    written = not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)
    return bool(name) and short and plain and kept and written


def _visible_in(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise NoImagesError(f"expected a folder that can be read, found {folder} ({error}): allow it") from error


def _images_in(folder: Path) -> list[Path]:
    return [path for path in _visible_in(folder) if _is_photo(path)]


def _is_photo(path: Path) -> bool:
    suffix = path.suffix.lower()
    known = suffix in IMAGE_SUFFIXES and (suffix not in HEIC_SUFFIXES or reads_heic())
    return known and not path.name.lower().endswith(_MASK_SUFFIX) and path.is_file()


def _used(photos: Iterable[Photo]) -> set[Path]:
    """Photos, their masks and their captions."""
    used: set[Path] = set()
    for photo in photos:
        used.update(filter(None, (photo.path, photo.mask)))
    for folder in {path.parent for path in used}:
        names = {path.stem for path in used if path.parent == folder}
        used.update(path for (name, suffix), path in _companions(folder).items() if suffix == ".txt" and name in names)
    return used


def _left_out(folder: Path, used: set[Path]) -> list[Path]:
    """What lies in a person's folder and is none of the files that are used; folders, if photos lie in them."""
    left = []
    for path in sorted(_visible_in(folder), key=_natural):
        if path.is_dir():
            known = path.name == CONDITIONS_FOLDER or not set(_images_in(path)) - used
        elif path.name in (METADATA_FILE, PEOPLE_FILE):
            known = path.is_file()
        else:
            known = path in used or path.name.lower() in _OF_THE_SYSTEM
        if not known:
            left.append(path)
    return left


def _warn_left_out(root: Path, left: list[Path]) -> None:
    if left:
        count = f"{len(left)} file{'s' if len(left) > 1 else ''}"
        warnings.warn(f"left out {count} of {root}, no photos, captions or masks: {_listed(root, left)}", stacklevel=3)


def _listed(root: Path, left: list[Path]) -> str:
    """Names, and why where the name does not say it."""
    texts = []
    for path in left[:_NAMED]:
        why = ""
        if path.is_dir():
            why = " (a folder in a person's folder)"
        elif path.suffix.lower() in HEIC_SUFFIXES:
            why = f" ({HEIC_EXTRA})"
        elif not path.is_file():
            why = " (a link to nothing)" if not path.exists() else " (no regular file)"
        elif path.parent == root and path.suffix.lower() in IMAGE_SUFFIXES:
            why = " (of nobody)"
        texts.append(f"{path.relative_to(root)}{why}")
    more = len(left) - _NAMED
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


def _natural(path: Path | str) -> tuple[tuple[int, int, str], ...]:
    """Sorts "2.png" before "10.png"."""

    def parts() -> Iterator[tuple[int, int, str]]:
        for text in re.split(r"(\d+)", str(path)):
            yield (0, int(text), text) if text.isdecimal() else (1, 0, text)

    return tuple(parts())
