# SPDX-License-Identifier: Apache-2.0
"""References made worse: which conditions an evaluation asks for, and the photo of each person under one.

Most conditions are filters (`degrade`). A photo `DIR/<person>/conditions/NAME=STRENGTH.png` takes a filter's place;
strong yaw, which no filter can make, exists only so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data import CONDITIONS_FOLDER, IMAGE_SUFFIXES, Photo, Subject, caption_beside, load_image
from ..data.degrade import DEGRADATIONS, degrade
from ..data.images import png
from ..errors import ConfigError
from ..files import write_bytes
from .evaluation_settings import named

_STRENGTHS = "0.5,1.0"


@dataclass(frozen=True)
class Condition:
    """A kind of bad reference and how bad it is, in (0, 1]."""

    name: str
    strength: float

    def __str__(self) -> str:
        return f"{self.name}={self.strength}"


def conditions_of(texts: Sequence[str], data: str | Path, subjects: Sequence[Subject]) -> list[Condition]:
    """The conditions of some settings 'blur', 'noise=0.25,0.5', 'all'; every person can be shown under each.

    Raises:
        ConfigError: no name, a strength that is not in (0, 1], a condition given twice, or one that neither a filter
            nor a photo of every person can show.
    """
    found = []
    for text in texts:
        name, strengths = named(text)
        if not name.isidentifier():
            raise ConfigError(f"degrade must be NAME or NAME=STRENGTH,STRENGTH, found {text!r}")
        for one in DEGRADATIONS if name == "all" else (name,):
            for number in (strengths or _STRENGTHS).split(","):
                try:
                    strength = float(number)
                except ValueError:
                    strength = 0.0
                if not 0 < strength <= 1:
                    raise ConfigError(f"degrade {text!r}: expected strengths above 0 and up to 1, found {number!r}")
                found.append(Condition(one, strength))
    if len(set(found)) < len(found):
        raise ConfigError(f"degrade: expected each condition once, found {', '.join(texts)}: leave one out")
    for condition in found:
        lacking = [one.name for one in subjects if _photo(data, one, condition) is None]
        if condition.name not in DEGRADATIONS and lacking:
            raise ConfigError(
                f"degrade: expected one of {', '.join(DEGRADATIONS)}, or a photo of every person, found no "
                f"{Path(data) / lacking[0] / CONDITIONS_FOLDER / str(condition)}.png"
            )
    return found


def bad_reference(data: str | Path, subject: Subject, condition: Condition, folder: Path) -> Photo:
    """The reference of a person under a condition: a photo of theirs (its caption may lie beside it), or a new file."""
    reference = subject.split()[0]
    path = _photo(data, subject, condition)
    if path is not None:
        return Photo(path, caption_beside(path) or reference.caption, True)
    path = folder / f"{subject.name}.png"
    write_bytes(path, png(degrade(load_image(reference.path), condition.name, condition.strength)))
    return Photo(path, reference.caption, True, reference.mask)


def _photo(data: str | Path, subject: Subject, condition: Condition) -> Path | None:
    folder = Path(data) / subject.name / CONDITIONS_FOLDER
    files = (folder / f"{condition}{suffix}" for suffix in sorted(IMAGE_SUFFIXES))
    return next((path for path in files if path.is_file()), None)
