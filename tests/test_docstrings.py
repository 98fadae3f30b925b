# SPDX-License-Identifier: Apache-2.0
"""Everything public says what it is, and the examples in docstrings show what really comes out."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MODULES = sorted(SOURCE.rglob("*.py"))
WITH_EXAMPLES = [path for path in MODULES if ">>> " in path.read_text(encoding="utf-8")]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def undocumented(tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Public functions, classes and methods without a docstring of their own."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if ast.get_docstring(node) is None:
                yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in undocumented(node))


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_everything_public_says_what_it_is(path: Path) -> None:
    """Bug: a public function without a docstring. A method may inherit that of the method which it overrides."""
    for name in undocumented(ast.parse(path.read_text(encoding="utf-8"))):
        owner, _, method = name.rpartition(".")
        assert owner, f"{name} has no docstring"
        assert inspect.getdoc(getattr(getattr(importlib.import_module(module_name(path)), owner), method)), name


def test_the_probe_sees_what_has_none() -> None:
    text = "class A:\n  def b(self): pass\n  def _c(self): pass\ndef d():\n  'text'\n"
    assert list(undocumented(ast.parse(text))) == ["A", "A.b"]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.name)
def test_examples(path: Path) -> None:
    failed, tried = doctest.testmod(importlib.import_module(module_name(path)))
    assert tried and not failed
