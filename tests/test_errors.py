# SPDX-License-Identifier: Apache-2.0
"""The tree drawn at the top of `errors` is the tree of the classes."""

from __future__ import annotations

import builtins
import inspect
import re

import pytest

from peft_metalora import errors

DRAWN = re.compile(r"^(?P<indent>[ |]*)(?:\+-- )?(?P<name>\w+Error)(?: \((?P<builtins>[\w, ]+)\))?")
CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}


def drawing() -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """Each drawn error with its parent and its built-ins."""
    found: dict[str, tuple[str | None, tuple[str, ...]]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = DRAWN.match(line)
        if match is None or not line.startswith("    "):
            continue
        depth = match.start("name")
        above = [(other, name) for other, name in above if other < depth]
        found[match["name"]] = (above[-1][1] if above else None, tuple(re.findall(r"\w+", match["builtins"] or "")))
        above.append((depth, match["name"]))
    return found


def test_every_error_is_drawn() -> None:
    assert set(drawing()) == set(CLASSES)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_it_stands_where_it_is_drawn(name: str) -> None:
    parent, known = drawing()[name]
    bases = [base.__name__ for base in CLASSES[name].__bases__]
    assert bases == [parent or "Exception", *known]


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"MetaLoraError"}))
def test_code_that_does_not_know_us_catches_it_too(name: str) -> None:
    known = [base for base in CLASSES[name].__mro__ if getattr(builtins, base.__name__, None) is base]
    is_branch = any(CLASSES[name] in other.__bases__ for other in CLASSES.values())
    assert is_branch or known[0] is not Exception


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_a_message_stays_a_sentence(name: str) -> None:
    assert str(CLASSES[name]("expected 'a', found 'b'")) == "expected 'a', found 'b'"
