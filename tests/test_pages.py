# SPDX-License-Identifier: Apache-2.0
"""The Python of pages runs as it is printed, on the embedded base, with fewer pixels and steps."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest
from diffusers import FluxInpaintPipeline, FluxPipeline
from PIL import Image

from peft_metalora import enable_meta_lora, export_subject, load_subject
from peft_metalora.cli import COMMANDS, build_parser
from peft_metalora.demo.embedded import BASE, DOWN
from peft_metalora.demo.faces import write_dataset
from peft_metalora.hub.loading import HubOptions
from peft_metalora.pipelines import MetaLoraLoaderMixin

DOCS = Path(__file__).parents[1] / "docs"
PAGES = "quick_start", "several_people", "pipelines", "other_tools", "training", "responsible_use"
SMALL = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 24}
SMALLER = (
    (r'"black-forest-labs/FLUX.1-dev"', "base"),
    (r'"base"', "base"),
    (r"resolution=512", "resolution=64, max_train_steps=1, views_per_image=1"),
    (r"\b1024\b", "64"),
    (r"\b512\b", "32"),
)


def blocks() -> list[object]:
    found = []
    for page in PAGES:
        texts = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
        assert texts, page
        found += [pytest.param(text, id=f"{page}-{number}") for number, text in enumerate(texts)]
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The folders and photos that pages name: ann was learned, all others are codes."""
    folder = tmp_path_factory.mktemp("pages")
    write_dataset(str(folder / "people"), "held-out", 2, 2)
    pipe = enable_meta_lora(FluxPipeline.from_pretrained(BASE))
    for number, name in enumerate(("ann", "bob")):
        photo = folder / "people" / f"held-out-000{number}" / "0.png"
        for copy in (f"{name}.jpg", f"{name}-1.jpg", f"{name}-2.jpg"):
            Image.open(photo).convert("RGB").save(folder / copy, quality=90 + len(copy))
        pipe.read_subject(photo, name, down=DOWN)
        pipe.save_meta_lora(folder / name, name, whole=name == "ann")
    pipe.save_meta_lora(folder / "ann" / "me", "ann")
    for place in (folder / "ann" / "faces", folder / "down"):
        place.symlink_to(DOWN)
    export_subject(load_subject(folder / "bob"), folder / "style.safetensors")
    return folder


@pytest.mark.parametrize("text", blocks())
def test_the_python_of_a_page_runs(text, home, monkeypatch):
    """Bug: one page wrote somebody into the folder `people`, where another one then found a person without photos."""
    monkeypatch.chdir(home)
    for cls in (FluxPipeline, FluxInpaintPipeline):
        draw = cls.__call__
        small = functools.wraps(draw)(lambda pipe, *args, draw=draw, **given: draw(pipe, *args, **{**given, **SMALL}))
        monkeypatch.setattr(cls, "__call__", small)
    offload = functools.partialmethod(FluxPipeline.enable_model_cpu_offload, device="cpu")
    monkeypatch.setattr(FluxPipeline, "enable_model_cpu_offload", offload)
    pipe = enable_meta_lora(FluxPipeline.from_pretrained(BASE))
    if "load_meta_lora" not in text:
        for folder in [name for name in ("ann", "ann/me", "bob") if f'"{Path(name).name}"' in text]:
            pipe.load_meta_lora(folder)
    prompt, mask = "a photo of a person", Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    given = {"pipe": pipe, "base": str(BASE), "prompt": prompt, "mask": mask, "picture": Image.open("bob.jpg")}
    given |= {"one": prompt, "two": prompt, "three": prompt, "prompts": [prompt] * 2}
    given |= {"folders": ["ann/me", "bob"], "names": ["me", "bob"]}
    given["peft_metalora"] = __import__("peft_metalora")
    for pattern, instead in SMALLER:
        text = re.sub(pattern, instead, text)
    exec(text, given)


def test_methods_are_listed_with_their_own_arguments():
    """Bug: a page listed `fuse_meta_lora(names=None)`; the argument is called `adapter_names`, as in diffusers."""
    page = (DOCS / "pipelines.md").read_text("utf-8")
    listed = [call for line in re.findall(r"^(`.+`)\n:   ", page, re.MULTILINE) for call in re.findall("`(.+?)`", line)]
    calls = [re.fullmatch(r"(\w+)\((.*)\)", call) for call in listed]
    calls = [call for call in calls if call and hasattr(MetaLoraLoaderMixin, call[1])]
    assert len(calls) > 12
    for name, arguments in [call.groups() for call in calls]:
        taken = dict(inspect.signature(getattr(MetaLoraLoaderMixin, name)).parameters)
        if "hub" in taken:
            taken.update(dict.fromkeys(HubOptions.__annotations__))
        passed_on = name in ("save_pretrained", "push_to_hub")  # to diffusers
        for argument in [one for one in arguments.split(", ") if one not in ("", "*", "...")]:
            word, _, default = argument.strip("*").partition("=")
            assert word in taken or passed_on, f"{name}({argument})"
            assert not default or ast.literal_eval(default) == taken[word].default, f"{name}({argument})"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_the_commands_of_a_page_have_the_flags_that_it_gives(page):
    """Bug: a flag was renamed, and a page went on to show the old one."""
    shown = re.findall(r"^ *```(?:bash|sh)\n(.*?)^ *```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    text = "\n".join(shown).replace("\\\n", " ")
    for name, value in re.findall(r'^(\w+)="(--[^"]*)"$', text, re.MULTILINE):
        text = text.replace(f"${name}", value)
    for line in re.findall(r"^ *(?:.* -m peft_metalora\.cli|metalora) (.*)$", text, re.MULTILINE):
        words = shlex.split(line, comments=True)
        if words[0] in COMMANDS and "..." not in words:
            build_parser([words[0]]).parse_args(words)
