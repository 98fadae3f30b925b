# SPDX-License-Identifier: Apache-2.0
"""The documentation is whole: pages are in the navigation, errors have their entries, quoted messages are ours."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shutil
from pathlib import Path

import pytest
import yaml

import peft_metalora
from peft_metalora import errors

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")
PAGE = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = re.findall(r"^### (.+)$", PAGE, re.MULTILINE)


def test_each_page_is_in_the_navigation() -> None:
    def names(entry):
        if isinstance(entry, str):
            return [entry]
        return [name for one in (entry if isinstance(entry, list) else entry.values()) for name in names(one)]

    nav = names(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(path.name for path in DOCS.glob("*.md"))


def test_each_error_has_its_entry_and_no_entry_is_of_another() -> None:
    classes = [name for name, value in vars(errors).items() if inspect.isclass(value)]
    assert sorted(ENTRIES) == sorted([*classes, "Out of memory"])


@pytest.mark.parametrize("name", ENTRIES)
def test_an_address_leads_to_its_entry(name: str) -> None:
    anchor = name.lower().replace(" ", "-")
    known = errors.OUT_OF_MEMORY if name == "Out of memory" else getattr(errors, name)("x").address
    assert known == f"{errors.PAGE}#{anchor}"


def test_an_address_is_a_file_of_this_machine_installed_or_not(tmp_path: Path) -> None:
    """Bug: it was `docs/troubleshooting.md`, which an installed package did not have, nor any other folder."""
    assert Path(errors.PAGE).is_absolute() and Path(errors.PAGE).read_text(encoding="utf-8") == PAGE
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"/docs/*.md"]' in settings and '\n"docs" = "peft_metalora/docs"' in settings  # of the wheel
    installed = tmp_path / "site-packages" / "peft_metalora"
    (installed / "docs").mkdir(parents=True)
    shutil.copy(errors.__file__, installed)
    spec = importlib.util.spec_from_file_location("installed_errors", installed / "errors.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.HubError("x").address == f"{installed / 'docs' / 'troubleshooting.md'}#huberror"


def test_an_error_of_somebody_elses_has_the_address_of_its_parent() -> None:
    class OwnError(errors.HubError):
        pass

    assert OwnError("x").address.endswith("#huberror")
    assert OwnError("x").__notes__ == [f"See {OwnError('x').address}"]


def texts_of_the_source() -> str:
    """All texts of the package, the values in them left out."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_that_are_quoted_are_those_of_the_code() -> None:
    """Bug: a message was reworded, and nobody finds its entry any more."""
    source = texts_of_the_source()
    quoted = [
        text for line in re.findall(r"^You see: (.+)\.$", PAGE, re.MULTILINE) for text in re.findall("`(.+?)`", line)
    ]
    assert len(quoted) > 60
    assert [text for text in quoted if text not in source] == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_files_that_pages_show_are_shown(page: Path) -> None:
    """Bug: a formatter took the line that shows a file for Python, and the page had `--8 < --` in its place."""
    shown = [line for line in page.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("--8")]
    found = [re.fullmatch(r'--8<-- "(.+)"', line) for line in shown]
    assert all(one and (ROOT / one[1]).is_file() for one in found), shown


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_what_pages_import_of_this_package_is_there(page: Path) -> None:
    """Bug: a function moved, and the Python of a page failed at its import."""
    found = re.findall(r"^ *(?:from|import) peft_metalora\b[^(\n]*$", page.read_text(encoding="utf-8"), re.MULTILINE)
    for line in found:
        exec(line.strip(), {})


def test_what_the_package_exports_is_explained() -> None:
    """Bug: `personalize`, `meta_train` and `generate` were on no page of the reference."""
    shown = re.findall(r"^ +- (\w+)$", API, re.MULTILINE)
    shown += [name for names in re.findall(r"members: \[(.+)\]", API) for name in names.split(", ")]
    for module, members in re.findall(r"^::: (\S+)\n((?: .+\n)+)", API, re.MULTILINE):
        found = importlib.import_module(module)
        if "members" not in members:
            shown += [name for name, value in vars(found).items() if getattr(value, "__module__", "") == module]
    settings = (DOCS / "settings.md").read_text(encoding="utf-8")
    exported = {name for name in peft_metalora.__all__ if callable(getattr(peft_metalora, name))}
    left = {name for name in exported - set(shown) if not re.search(rf"\.{name}`$", settings, re.MULTILINE)}
    assert left == {"MetaLoraError"}  # which has a page of its own


def test_no_page_holds_a_merge_that_was_not_ended() -> None:
    """Bug: marks of a merge landed in a page."""
    pages = [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
    assert [path.name for path in pages if re.search("^(<{7}|>{7}|={7}$)", path.read_text("utf-8"), re.MULTILINE)] == []


def links(page: Path) -> list[tuple[Path, str]]:
    """Files and anchors of a page's own links."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    targets = [one or other for one, other in found if not (one or other).startswith(("http", "mailto:"))]
    parts = [target.partition("#") for target in targets]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in parts]


def anchors(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    heads = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head) for head in re.findall("^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-") for head in heads}


PAGES = [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Bug: a page linked to a file of `examples`, which the site does not have, and `make docs` failed."""
    for target, anchor in links(page):
        assert target.exists(), target
        assert page.parent != DOCS or target.is_relative_to(DOCS), f"the site has no {target}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{target.name}#{anchor}"
