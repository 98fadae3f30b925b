# SPDX-License-Identifier: Apache-2.0
"""The prompts of an evaluation: read from YAML, said with the person's name, exported for other systems."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..files import read_yaml
from .evaluation_settings import DEMO, EvaluateConfig

_MARK = "{subject}"


@dataclass(frozen=True)
class Prompt:
    """A prompt of the set, with `{subject}` in it, what kind of thing it asks for, and who the subject is."""

    kind: str
    template: str
    subject_name: str

    @property
    def text(self) -> str:
        """The prompt as it is scored, and said to all methods that learn no word of their own."""
        return self.about(self.subject_name)

    def about(self, subject_name: str) -> str:
        """The prompt with another name for the subject."""
        return self.template.replace(_MARK, subject_name)


def read_prompts(path: str | Path | None, subject_name: str) -> list[Prompt]:
    """The prompts of a YAML file (lists by kind), or of the set in this package.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    if path is None:
        with importlib.resources.as_file(importlib.resources.files(__package__).joinpath("prompts.yaml")) as own:
            return read_prompts(own, subject_name)
    found = read_yaml(path)
    if not (found and isinstance(found, dict)) or not all(
        isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in found.values()
    ):
        raise ConfigError(f"{path}: expected lists of prompts by kind ('scenes: [...]'), found something else")
    return [Prompt(str(kind), text, subject_name) for kind, texts in found.items() for text in texts]


def prompts_of(config: EvaluateConfig) -> list[Prompt]:
    """The prompts that the settings name; the embedded base has its own.

    Raises:
        ConfigError: as `read_prompts`, or prompts that the judge of the embedded base does not understand.
    """
    if config.base != DEMO:
        return read_prompts(config.prompts, config.subject_name)
    from ..demo.scene import parse_caption
    from ..demo.scoring import PROMPTS

    if config.prompts is None:
        prompts = [Prompt("demo", text.replace("a person", _MARK), config.subject_name) for text in PROMPTS]
    else:
        prompts = read_prompts(config.prompts, config.subject_name)
    for prompt in prompts:
        parse_caption(prompt.text)
    return prompts


def image_name(prompt: int, seed: int) -> str:
    """File name of the image of a prompt (by its number) and a seed."""
    return f"{prompt:03d}-{seed:03d}.png"


def export_prompts(config: EvaluateConfig, prompts: Sequence[Prompt]) -> Path:
    """Write what another system needs to draw the same images: a JSON line an image, with the file to write."""
    from ..data import read_subjects
    from ..files import write_bytes

    lines = []
    for subject in read_subjects(config.data, min_photos=2):
        reference = subject.split()[0]
        for number, prompt in enumerate(prompts):
            for seed in range(config.seeds):
                line = {
                    "file_name": f"{subject.name}/{image_name(number, seed)}",
                    "subject": subject.name,
                    "reference": str(reference.path.absolute()),
                    "kind": prompt.kind,
                    "prompt": prompt.text,
                    "template": prompt.template,
                    "seed": seed,
                    "resolution": config.side,
                }
                lines.append(json.dumps(line) + "\n")
    path = Path(str(config.export_prompts))
    write_bytes(path, "".join(lines).encode())
    return path
