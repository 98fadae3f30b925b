# SPDX-License-Identifier: Apache-2.0
"""The README does what it says: its Python runs as printed on a tiny base, its commands are commands, its extras exist."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxPipeline
from PIL import Image

from peft_metalora import MetaLoraConfig, save_down
from peft_metalora.cli import COMMANDS, build_parser, make_config
from peft_metalora.commands.doctor import DISTRIBUTION, EXTRAS
from pipelines_tiny import save_tiny_flux, tiny_flux_pipeline
from training_tiny import teach_to_read

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TINY = {"height": 16, "width": 16, "num_inference_steps": 1, "max_sequence_length": 8}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def command_lines() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").split("\n")
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with what the README speaks of: a Down that reads photos, on a tiny base, and a photo."""
    save_tiny_flux(tmp_path / "base")
    pipe = tiny_flux_pipeline()
    torch.manual_seed(0)
    config = MetaLoraConfig(r=2, meta_r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_weights=False)
    pipe.transformer.add_adapter(config, "faces")
    save_down(tmp_path / "faces-reading", pipe.transformer, "faces", base_model=str(tmp_path / "base"))
    teach_to_read(tmp_path / "faces-reading")
    Image.new("RGB", (20, 24), "teal").save(tmp_path / "ann.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_runs_as_it_is_printed(here, monkeypatch):
    """On another base, which is drawn small; a CPU is the card."""
    (block,) = blocks("python")
    offload, draw = FluxPipeline.enable_model_cpu_offload, FluxPipeline.__call__
    monkeypatch.setattr(FluxPipeline, "enable_model_cpu_offload", functools.partialmethod(offload, device="cpu"))
    small = functools.wraps(draw)(lambda self, *args, **options: draw(self, *args, **{**TINY, **options}))
    monkeypatch.setattr(FluxPipeline, "__call__", small)
    assert '"black-forest-labs/FLUX.1-dev"' in block
    exec(block.replace('"black-forest-labs/FLUX.1-dev"', '"base"'), {})
    assert Image.open("ann.png").size == (16, 16)


def test_the_commands_are_commands():
    found = [words[1:] for words in command_lines() if words[0] == "metalora"]
    assert {words[0] for words in found} == {"train-encoder", "read", "generate", "serve"}
    for words in found:
        given = vars(build_parser([words[0]]).parse_args(words))
        command = COMMANDS[given.pop("command")]
        assert given.pop("parser")
        make_config(command.config_class(), None, given)


def test_an_order_to_the_service_is_one():
    from peft_metalora.service.orders import ImageOrder

    (curl,) = (words for words in command_lines() if words[0] == "curl")
    order = yaml.safe_load(curl[curl.index("-d") + 1])
    assert order.keys() <= ImageOrder.model_fields.keys() and order["subject"] == "ann"


def test_what_is_installed_is_this_package():
    asked = [words[2] for words in command_lines() if words[:2] == ["pip", "install"]]
    assert len(asked) >= 3
    for name in asked:
        package, extras = re.fullmatch(r"([\w-]+)(?:\[(\w+)\])?(?: @ git\+\$REPOSITORY)?", name).groups()
        assert package == DISTRIBUTION and (extras is None or extras in EXTRAS)


def test_it_is_a_screen_or_two():
    assert len(README.splitlines()) <= 100
