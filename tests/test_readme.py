# SPDX-License-Identifier: Apache-2.0
"""The README does what it says: its Python, its commands and its requests run as printed on a tiny base."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from PIL import Image

from peft_metalora.bases import base_for
from peft_metalora.cli import COMMANDS, build_parser, main, make_config
from peft_metalora.commands.doctor import DISTRIBUTION, EXTRAS
from service_tiny import Service
from training_tiny import save_tiny_down, teach_to_read

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = {"height": 16, "width": 16, "num_inference_steps": 1, "max_sequence_length": 8}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def yours() -> dict[str, str]:
    """What the lines marked so stand for."""
    lines = re.findall("^(.+?) +# yours", "\n".join(blocks("bash")), re.MULTILINE)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))


def command_lines() -> list[list[str]]:
    """The words of each, variables filled in."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    for name, value in yours().items():
        text = text.replace(f"${name}", value)
    return [words for line in text.split("\n") if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base, and a Down on it that reads photos."""
    folder = tmp_path_factory.mktemp("readme")
    pipe = save_tiny_down(folder)
    teach_to_read(folder / "down", base=base_for(pipe), spread=4.0)
    return folder


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """An empty folder with what the README calls yours; pictures are drawn small."""
    (tmp_path / yours()["DOWN"]).symlink_to(home / "down")
    Image.new("RGB", (20, 24), "teal").save(tmp_path / yours()["PHOTO"])
    draw = FluxPipeline.__call__
    small = functools.wraps(draw)(lambda self, *args, **options: draw(self, *args, **{**options, **TINY}))
    monkeypatch.setattr(FluxPipeline, "__call__", small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_runs_as_it_is_printed(home, here, monkeypatch):
    """On another base; a CPU is the card."""
    (block,) = blocks("python")
    offload = functools.partialmethod(FluxPipeline.enable_model_cpu_offload, device="cpu")
    monkeypatch.setattr(FluxPipeline, "enable_model_cpu_offload", offload)
    named = '"black-forest-labs/FLUX.1-dev"'
    assert f'{named}, "{yours()["DOWN"]}", "{yours()["PHOTO"]}"  # yours' in block
    exec(block.replace(named, repr(str(home / "base"))), {})
    assert Image.open("ann.png").size == (16, 16)


def test_a_person_is_read_and_drawn(here):
    found = [words[1:] for words in command_lines() if words[0] == "metalora"]
    assert [words[0] for words in found] == ["read", "generate", "serve"]
    for words in found[:2]:
        assert main(words) == 0
    (picture,) = here.glob("images/*.png")
    assert Image.open(picture).size == (16, 16)
    given = vars(build_parser(["serve"]).parse_args(found[2]))
    command = COMMANDS[given.pop("command")]
    del given["parser"]
    assert make_config(command.config_class(), None, given).people == "people"


def test_the_service_does_what_it_is_asked(home, here):
    """The requests are those of curl, sent to a service in this process."""
    lines = [line for block in blocks("bash") for line in block.split("\n") if line.startswith(("mkdir", "printf"))]
    subprocess.run(["bash", "-ec", "\n".join(lines)], check=True, env={**os.environ, **yours()})
    requests = [words for words in command_lines() if words[0] == "curl"]

    async def ask():
        service = Service(home, here / "people", tenants=False)
        for words in requests:
            data = words[words.index("-d") + 1]
            body = json.loads(Path(data[1:]).read_text() if data[0] == "@" else data)
            answers.append(await service.ask("POST", words[1].removeprefix("127.0.0.1:8000"), body, tenant=None))

    answers = []
    asyncio.run(ask())
    assert [answer.status for answer in answers] == [201, 200], [answer.body[:300] for answer in answers]
    assert answers[1].pixels.shape == (16, 16, 3)


def test_what_is_installed_is_this_package():
    asked = [words[2] for words in command_lines() if words[:2] == ["pip", "install"]]
    assert len(asked) == 3
    for name in asked:
        package, extras = re.fullmatch(r"([\w-]+)(?:\[(\w+)\])?(?: @ git\+https://\S+)?", name).groups()
        assert package == DISTRIBUTION and (extras is None or extras in EXTRAS)


def test_ci_runs_the_very_commands():
    made = re.findall(r"^make \w+", "\n".join(blocks("bash")), re.MULTILINE)
    assert sorted(made) == ["make demo", "make test"]
    assert set(made) <= set((ROOT / ".ci" / "run").read_text(encoding="utf-8").split("\n"))


def test_links_lead_to_files():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 15 and [link for link in links if not (ROOT / link).is_file()] == []


def test_it_is_a_screen_or_two():
    assert len(README.splitlines()) <= 100
