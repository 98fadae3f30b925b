# SPDX-License-Identifier: Apache-2.0
"""The model card as a file: a seal tells what of it was made here from what somebody wrote into it, which stays."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CorruptFileError

CARD_FILE = "README.md"
_SEAL = re.compile(r"^<!-- made by peft_metalora, sha256:([0-9a-f]{64})(?: (\{.*\}))? -->(?:\n|\Z)", re.MULTILINE)
_HEAD = re.compile(r"\s*---[^\S\n]*\n(.*?)^---[^\S\n]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_LICENSE = "license", "license_name", "license_link"  # one says nothing without the others
_OPENING = "#"


def sealed(card: str) -> str:
    """A made card with a last line that tells it, and each of its parts, from what somebody edited."""
    return f"{card}\n{_seal_of(card)}"


def is_made_card(path: Path) -> bool:
    """Whether a card is one of ours, as it was made."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    seals = list(_SEAL.finditer(text))
    return bool(seals) and seals[-1].end() == len(text) and seals[-1][1] == _whole(text[: seals[-1].start() - 1])


def renewed(older: bytes, card: str, where: str) -> str:
    """A made card, sealed, in the place of an older one, of which everything stays that somebody wrote.

    A part is a field of the header or a section. One that is as it was made is made anew, or goes; one that somebody
    changed or added stays; one that somebody took out stays away.

    Args:
        where: what the older card is called, for an error.

    Raises:
        CorruptFileError: the older card is no text, or its header no YAML: nobody could say what to keep.
    """
    try:
        text = older.decode("utf-8-sig").replace("\r\n", "\n")
        seals = list(_SEAL.finditer(text))
        body, after = (text[: seals[-1].start()], text[seals[-1].end() :].strip("\n")) if seals else (text, "")
        theirs, ours = _parts(body), _parts(card)
    except ValueError as error:
        raise CorruptFileError(
            f"{where}: expected a card in UTF-8 whose header is YAML, so that what somebody wrote can be kept, found: "
            f"{' '.join(str(error).split())}. Mend it there, or delete the file. Nothing was sent."
        ) from error
    made = _digests_in(seals[-1][2]) if seals else {}
    if seals and seals[-1][1] == _whole(body[:-1]):  # an older seal names no parts
        made |= {name: _digest(value) for name, value in theirs.items()}
    kept: dict[str, Any] = {}
    for name, value in theirs.items():
        if made.get(name) != _digest(value):
            kept[name] = value
        elif name in ours:
            kept[name] = ours[name]
    kept |= {name: value for name, value in ours.items() if name not in theirs and name not in made}
    if "widget" in ours:  # pictures that were given now are shown, beside those that somebody added
        shown = ours["widget"]
        others = kept["widget"] if isinstance(kept.get("widget"), list) else []
        kept["widget"] = [*shown, *(one for one in others if _url(one) not in {*map(_url, shown)})]
    if kept == ours and not after:
        return sealed(card)
    return f"{_joined(kept)}\n{_seal_of(card)}" + (f"\n{after}\n" if after else "")


def _url(picture: Any) -> str:
    output = picture.get("output") if isinstance(picture, dict) else None
    return str(output.get("url")) if isinstance(output, dict) else ""


def _seal_of(card: str) -> str:
    digests = json.dumps({name: _digest(value) for name, value in _parts(card).items()})
    return f"<!-- made by peft_metalora, sha256:{_whole(card)} {digests} -->\n"


def _whole(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()


def _digests_in(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _parts(text: str) -> dict[str, Any]:
    """The fields of a card's header by name, and its sections by their headings, which begin with #.

    Raises:
        ValueError: the header is no YAML.
    """
    import yaml

    head = _HEAD.match(text)
    try:
        fields = (yaml.safe_load(head[1]) or {}) if head else {}
    except (AttributeError, LookupError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise ValueError("a header that does not say what is what")
    parts = {name: value for name, value in fields.items() if name not in _LICENSE}
    if licence := {name: fields[name] for name in _LICENSE if name in fields}:
        parts["license"] = licence
    times: Counter[str] = Counter()
    for section in re.split(r"^(?=## )", text[head.end() if head else 0 :], flags=re.MULTILINE):
        name = section.partition("\n")[0].strip() if section.startswith("## ") else _OPENING
        if section.strip():
            times[name] += 1
            parts[f"{name}#{times[name]}" if times[name] > 1 else name] = section.strip("\n").rstrip()
    return parts


def _joined(parts: Mapping[str, Any]) -> str:
    import yaml

    fields: dict[str, Any] = {}
    for name, value in parts.items():
        if not name.startswith("#"):
            fields |= value if name == "license" else {name: value}
    sections = [value for name, value in parts.items() if name.startswith("#") and name != _OPENING]
    sections[:0] = [parts[_OPENING]] if _OPENING in parts else []
    head = f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n\n" if fields else ""
    return head + "\n\n".join(sections) + "\n"


def _digest(value: Any) -> str:
    import yaml

    # As YAML, which repeats nothing that a hostile header refers to a million times.
    return hashlib.sha256(yaml.safe_dump(value).encode(errors="surrogatepass")).hexdigest()[:16]
