# SPDX-License-Identifier: Apache-2.0
"""Text of others inside Markdown and code: one line each, shown as it is, whatever it holds."""

from __future__ import annotations

import re

# What opens something in CommonMark or GFM: an emphasis, a code span, a link, HTML, an entity, a table's cell.
_OPENS = re.compile(r"[\\`*\[\]<>|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|&(?=[#A-Za-z])")
# And at the start of a line: a heading, a list, a quotation, a rule.
_STARTS = re.compile(r"(?:[#+=-]+|[0-9]+[.)])(?=\s|$|[-=])")


def one_line(value: object) -> str:
    """A value as text without line breaks or control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def as_text(value: object) -> str:
    """A value that Markdown shows as it is, also in a table."""
    text = _OPENS.sub(lambda match: f"\\{match.group()}", one_line(value))
    start = _STARTS.match(text)
    return text if start is None else f"{text[: start.end() - 1]}\\{text[start.end() - 1 :]}"


def as_code(value: object) -> str:
    """A value in a code span that it cannot end."""
    text = one_line(value).replace("|", "\\|")
    runs = [len(run) for run in re.findall("`+", text)]
    fence = "`" * (max(runs, default=0) + 1)
    return f"{fence} {text} {fence}" if runs else f"`{text}`"


def as_literal(value: object) -> str:
    """A value as a Python string on one line of code."""
    text = str(value)
    return f'"{text}"' if text.isprintable() and not re.search(r'["\\]', text) else repr(text)
