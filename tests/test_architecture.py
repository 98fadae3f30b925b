# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: public names, weight of the import, direction of imports, licence lines."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import peft_metalora

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "peft_metalora"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Rooms from the ground up: a module imports from its own layer and those below. A new room is entered here.
LAYERS = (
    {"errors", "files", "settings"},
    {"bases", "data", "metrics", "tuner"},
    {"checkpoint", "encoder"},
    {"hub", "lora"},
    {"pipelines", "training"},
    {"demo", "evaluation"},
    {"commands", "app", "service"},
    {"cli"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
HEAVY = {"accelerate", "datasets", "diffusers", "huggingface_hub", "insightface", "matplotlib", "transformers"}
NETWORK = {"ftplib", "http", "httpx", "huggingface_hub", "requests", "socket", "ssl", "urllib"}
MOST_ROOMS, MOST_FLOORS = 19, 8
AT_THE_TOP = {"__init__", "cli", "errors", "files", "settings"}
# What each room does without, beyond the layers.
FORBIDDEN = {
    "errors": {*HEAVY, "peft", "torch"},
    "files": {*HEAVY, *NETWORK, "peft"},
    "tuner": HEAVY | NETWORK | {"peft_metalora.data", "peft_metalora.files", "peft_metalora.metrics"},
    "data": HEAVY | NETWORK | {"peft", "peft_metalora.metrics", "peft_metalora.tuner"},
    "metrics": {"accelerate", "diffusers", "peft", "peft_metalora.data", "peft_metalora.tuner"},
    **{room: NETWORK | {"accelerate", "diffusers", "insightface"} for room in ("checkpoint", "encoder")},
    "lora": NETWORK | {"accelerate", "insightface"},
}
# PEFT itself needs transformers; GPT-2's Conv1D, which PEFT adapts too, lives in this small module.
EXCEPTIONS = {("tuner", "transformers.pytorch_utils")}
NOT_THE_PACKAGE = {"benchmarks", "conftest", "examples", "pytest", "tests"}


def room_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> list[str]:
    """Absolute names of the modules that a file imports, anywhere in it."""
    return [*_imports(path)]


def _imports(path: Path) -> Iterator[str]:
    package = ("peft_metalora", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            # `from peft_metalora import tuner` imports a room, not a name of the top.
            yield from (f"{module}.{name.name}" for name in node.names) if module == "peft_metalora" else [module]


@cache
def rooms_imported() -> dict[str, set[str]]:
    """Of each room, a folder or a file at the top, the others that it imports."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        if (room := room_of(path)) != "__init__":
            names = {name.split(".")[1] for name in imports(path) if name.startswith("peft_metalora.")}
            found.setdefault(room, set()).update(names & LEVEL.keys() - {room})
    return found


def floor_of(room: str, imported: dict[str, set[str]], seen: tuple[str, ...] = ()) -> int:
    """The longest chain of imports down from a room, itself counted."""
    assert room not in seen, f"rooms import each other in a circle: {' -> '.join((*seen, room))}"
    return 1 + max((floor_of(other, imported, (*seen, room)) for other in imported[room]), default=0)


def within(name: str, parents: set[str]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


class TestImports:
    @pytest.mark.parametrize(
        "path", [path for path in MODULES if path.parent != PACKAGE or path.stem != "__init__"], ids=label
    )
    def test_they_go_downward(self, path: Path) -> None:
        room = room_of(path)
        assert room in LEVEL, f"{room} is in no layer: enter it in LAYERS"
        for name in imports(path):
            if name.startswith("peft_metalora."):
                other = name.split(".")[1]
                assert LEVEL.get(other, 0) <= LEVEL[room], f"{label(path)} imports {other}, which stands above it"
            assert not within(name, FORBIDDEN.get(room, set())) or (room, name) in EXCEPTIONS

    @pytest.mark.parametrize("path", MODULES, ids=label)
    def test_no_module_needs_tests_or_examples(self, path: Path) -> None:
        assert not [name for name in imports(path) if name.split(".")[0] in NOT_THE_PACKAGE]

    def test_one_file_touches_pefts_registry(self) -> None:
        touching = {path.name for path in MODULES if any(within(name, {"peft.mapping"}) for name in imports(path))}
        assert touching == {"registration.py"}

    def test_the_probe_sees_relative_and_absolute_imports(self) -> None:
        assert "peft_metalora.errors" in set(imports(PACKAGE / "data" / "folders.py"))
        assert "peft_metalora.errors" in set(imports(PACKAGE / "metrics" / "scores.py"))
        assert "peft_metalora.tuner" in set(imports(PACKAGE / "__init__.py"))
        assert "transformers" in set(imports(PACKAGE / "metrics" / "embedders.py"))


class TestRooms:
    def test_they_are_few_on_few_floors_and_in_no_circle(self) -> None:
        imported = rooms_imported()
        assert len(imported) <= MOST_ROOMS
        assert max(floor_of(room, imported) for room in imported) <= MOST_FLOORS

    def test_a_circle_is_seen(self) -> None:
        with pytest.raises(AssertionError, match="a -> b -> a"):
            floor_of("a", {"a": {"b"}, "b": {"a"}})

    def test_few_files_lie_outside_of_a_room(self) -> None:
        assert {path.stem for path in PACKAGE.glob("*.py")} <= AT_THE_TOP

    def test_no_two_files_have_one_name(self) -> None:
        """Bug: a `settings.py` in several rooms, which an editor's tab or a message does not tell apart."""
        names = [path.stem for path in MODULES if path.stem != "__init__"]
        assert sorted(names) == sorted(set(names))


HEAVY_AT_RUN_TIME = (
    "datasets",
    "diffusers",
    "transformers.pipelines",
    "insightface",
    "matplotlib",
    "onnxruntime",
    "cv2",
)
PROBE = f"""
import contextlib, importlib.util, io, sys
def show(*names): print("loaded", *(name for name in names if name in sys.modules))
import peft_metalora.cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    peft_metalora.cli.main(["--help"])
importlib.util.find_spec("peft")
show("torch", "numpy", "peft", "diffusers")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert "META_LORA" in PEFT_TYPE_TO_CONFIG_MAPPING and peft_metalora.tuner.down._loader is not None
import peft_metalora.data, peft_metalora.metrics
show(*{HEAVY_AT_RUN_TIME})
peft_metalora.pipelines
show(*{HEAVY_AT_RUN_TIME})
"""


@pytest.fixture(scope="module")
def loaded() -> list[set[str]]:
    """The heavy modules in a fresh interpreter after the command's help, after PEFT has come, and after pipelines."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return [set(line.split()[1:]) for line in done.stdout.splitlines() if line.startswith("loaded")]


class TestWeight:
    def test_the_package_and_the_commands_help_import_nothing(self, loaded: list[set[str]]) -> None:
        """Bug: `metalora --help` took the seconds that PEFT and torch take; the probe asks that PEFT knows us later."""
        assert loaded[0] == set()

    def test_importing_the_tuner_and_light_rooms_is_light(self, loaded: list[set[str]]) -> None:
        assert loaded[1] == set()

    def test_the_probe_can_fail(self, loaded: list[set[str]]) -> None:
        assert "diffusers" in loaded[2]

    def test_what_waits_for_a_module_is_done_once_after_it(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "some_module_that_comes.py").write_text("value = 3\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        seen, before = [], list(sys.meta_path)
        peft_metalora._after("some_module_that_comes", lambda: seen.append(sys.modules["some_module_that_comes"].value))
        assert importlib.util.find_spec("some_module_that_comes") is not None and seen == []
        importlib.import_module("some_module_that_comes")
        assert seen == [3] and sys.meta_path == before
        peft_metalora._after("some_module_that_comes", lambda: seen.append("at once"))
        assert seen == [3, "at once"]
        del sys.modules["some_module_that_comes"]
        peft_metalora._after("a_module_that_never_comes", lambda: seen.append("never"))
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("a_module_that_never_comes")
        sys.meta_path[:] = before

    def test_two_may_wait_for_one_module(self, tmp_path: Path, monkeypatch) -> None:
        """Bug: each asked the other who finds it, without end: so after a reload of the package before PEFT came."""
        (tmp_path / "some_module_for_two.py").write_text("", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        seen, before = [], list(sys.meta_path)
        for number in range(2):
            peft_metalora._after("some_module_for_two", lambda number=number: seen.append(number))
        importlib.import_module("some_module_for_two")
        assert sorted(seen) == [0, 1] and sys.meta_path == before


def public(module: ModuleType) -> set[str]:
    """Names defined by the package that stand in a module's namespace, submodules aside."""
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and getattr(value, "__module__", "").startswith("peft_metalora")
    }


class TestPublicNames:
    def test_every_name_is_there(self) -> None:
        for name in peft_metalora.__all__:
            assert getattr(peft_metalora, name) is not None
        assert set(dir(peft_metalora)) >= set(peft_metalora.__all__)

    def test_nothing_else_is(self) -> None:
        for name in peft_metalora.__all__:
            getattr(peft_metalora, name)
        assert public(peft_metalora) <= set(peft_metalora.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            peft_metalora.nothing  # noqa: B018

    def test_a_star_import_is_silent(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "peft_metalora")
            exec("from peft_metalora import *", {})

    @pytest.mark.parametrize("name", ["", ".tuner", ".metrics"])
    def test_all_is_sorted_and_true(self, name: str) -> None:
        module = importlib.import_module(f"peft_metalora{name}")
        assert module.__all__ == sorted(set(module.__all__))
        assert public(module) <= set(module.__all__)
        assert all(hasattr(module, entry) for entry in module.__all__)


def statements_of_text(tree: ast.Module) -> set[int]:
    """Ids of the strings that are statements of their own: docstrings, of modules, functions and names."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


NAMES_OF_FACTORS = PACKAGE / "tuner" / "down.py"


class TestNames:
    FACTOR = re.compile(r"metalora_(down|mid|mid_init|up|magnitude)\b")

    def spelt_out(self, text: str) -> list[str]:
        tree = ast.parse(text)
        docs = statements_of_text(tree)
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return [node.value for node in texts if self.FACTOR.search(node.value) and id(node) not in docs]

    @pytest.mark.parametrize("path", [path for path in MODULES if path != NAMES_OF_FACTORS], ids=label)
    def test_factors_are_named_by_the_tuners_constants(self, path: Path) -> None:
        """Bug: a name of a factor spelt out in another room, which renaming or a new factor would miss."""
        assert self.spelt_out(path.read_text(encoding="utf-8")) == []

    def test_the_probe_sees_names_in_any_text_but_docstrings(self) -> None:
        text = '"""metalora_up"""\na = f"{b}.metalora_mid" + c["metalora_down"]\nlayer.metalora_up\n'
        assert sorted(self.spelt_out(text)) == [".metalora_mid", "metalora_down"]
        assert len(self.spelt_out(NAMES_OF_FACTORS.read_text(encoding="utf-8"))) == 5


class TestFiles:
    SOURCES = sorted(
        path for folder in ("src", "tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )

    @pytest.mark.parametrize("path", SOURCES, ids=label)
    def test_licence_and_paragraph(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
        assert ast.get_docstring(ast.parse(text)), "a module begins with what it is"
