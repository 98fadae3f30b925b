# SPDX-License-Identifier: Apache-2.0
"""Text of others inside Markdown and code: one line each, shown as it is, whatever it holds."""

from __future__ import annotations

import re

# What opens something in CommonMark or GFM: an emphasis, a code span, a link, an entity, a table's cell.
_OPENS = re.compile(r"[\\`*|~]|\](?=[(\[:])|(?<=\])\(|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|&(?=[#A-Za-z])")
# And at the start of a line: a heading, a list, a quotation, a rule.
_STARTS = re.compile(r"(?:[#+=-]+|[0-9]+[.)])(?=\s|$|[-=])")


def one_line(value: object) -> str:
    """A value as text without line breaks or control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def as_text(value: object) -> str:
    """A value that Markdown shows as it is, also in a table."""
    text = _OPENS.sub(lambda match: f"\\{match.group()}", one_line(value))
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    start = _STARTS.match(text)
    return text if start is None else f"{text[: start.end() - 1]}\\{text[start.end() - 1 :]}"


def as_code(value: object) -> str:
    """A value in a code span, or as text if it holds what does not belong into one."""
    text = one_line(value)
    return as_text(text) if re.search(r"[`<>|\[\]]", text) else f"`{text}`"


def as_literal(value: object) -> str:
    """A value as a Python string on one line: nothing of it ends the string, the line or the block of code."""
    return '"' + "".join(map(_in_literal, str(value))) + '"'


def _in_literal(character: str) -> str:
    if character in '"\\`<>[]':
        return f"\\x{ord(character):02x}"
    return character if character.isprintable() else character.encode("unicode_escape").decode()
