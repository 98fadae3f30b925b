# SPDX-License-Identifier: Apache-2.0
"""A Down and subjects on a tiny or any model, written as the folders that tests read, break and compare."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from peft import inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_metalora import MetaLoraConfig, load_down, save_down, save_subject
from peft_metalora.checkpoint import write_artefact
from peft_metalora.checkpoint.space import SubjectCode, SubjectSpace
from peft_metalora.encoder import EncoderConfig, make_encoder, save_reader
from peft_metalora.tuner.down import subject_config

RANKS = {"r": 2, "meta_r": 4, "lora_alpha": 3}
TARGETS = ["to_q", "to_out"]


class Block(nn.Module):
    """Two linear layers of different shapes and one that is never adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 6)
        self.to_out = nn.Linear(6, 8)
        self.norm = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.to_out(torch.tanh(self.to_q(x))))


class TinyModel(nn.Module):
    """Two blocks; x (n, 8) -> (n, 8)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def with_down(slots: int = 1, seed: int = 1, **changes) -> nn.Module:
    """A model with a stage-`meta` adapter "faces" whose Up is not zero."""
    model = TinyModel()
    torch.manual_seed(seed)
    config = MetaLoraConfig(
        **{**RANKS, "target_modules": TARGETS, "num_slots": slots, "init_weights": False, **changes}
    )
    return inject_adapter_in_model(config, model, "faces")


def with_subject(model: nn.Module, name: str = "ann", slots: int = 1, seed: int = 2, **changes) -> nn.Module:
    """The model with a subject on the Down "faces", as if trained: its Up is not zero."""
    torch.manual_seed(seed)
    settings = {**RANKS, "target_modules": TARGETS, "num_slots": slots, "init_weights": False, **changes}
    return inject_adapter_in_model(MetaLoraConfig(**settings, stage="subject", down="faces"), model, name)


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Write a Down `folder/faces` and a subject `folder/ann` that names it by a relative path."""
    model = with_subject(with_down())
    save_down(folder / "faces", model, "faces", facts={"domain": "faces", "subjects": 2})
    save_subject(folder / "ann", model, "ann", down=folder / "faces")
    return folder / "faces", folder / "ann"


CODE_SIZE = 5


def shrink(pixels: torch.Tensor) -> torch.Tensor:
    """What stands for a VAE: every fourth pixel."""
    return pixels[:, :, ::4, ::4]


def add_reader(folder: Path, seed: int = 0, size: int = CODE_SIZE) -> SubjectSpace:
    """Lay a random subject space and a random encoder beside a Down, which reads photos of 16 px then."""
    space = SubjectSpace.around(load_down(folder), size)
    with torch.no_grad():
        space.basis.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    space = space.rounded()
    config = EncoderConfig(resolution=16, code_size=size, width=8, hidden=4)
    save_reader(folder, space, make_encoder(config, shrink, seed))
    return space


def a_code(space: SubjectSpace, seed: int = 1) -> SubjectCode:
    """A random code of a space."""
    return space.coded(torch.randn(space.code_size, generator=torch.Generator().manual_seed(seed)))


def write_code(folder: Path, space: SubjectSpace, seed: int = 1, **changes) -> Path:
    """Write `folder`, a subject that is a code, beside its Down `faces`.

    Args:
        changes: of its configuration.
    """
    down = load_down(folder.parent / "faces")
    config = subject_config(down, down="../faces", subject_name=folder.name)
    return write_artefact(folder, dataclasses.replace(config, **changes), a_code(space, seed))


def write_subjects(folder: Path, model: nn.Module, *names: str, seed: int = 1, **settings) -> Path:
    """Put a Down "faces" and subjects on a model, write each as `folder/<name>` and return the folder.

    Args:
        settings: of the Down and the subjects alike, beside small ranks and an Up that is not zero.
    """
    settings = {"r": 2, "meta_r": 3, "lora_alpha": 4, "init_weights": False, **settings}
    torch.manual_seed(seed)
    inject_adapter_in_model(MetaLoraConfig(**settings), model, "faces")
    save_down(folder / "faces", model, "faces")
    for name in names:
        inject_adapter_in_model(MetaLoraConfig(**settings, stage="subject", down="faces"), model, name)
        save_subject(folder / name, model, name, down=folder / "faces")
    return folder


def edit_config(folder: Path, **changes) -> None:
    """Change fields of adapter_config.json; None as a value removes nothing, it is written."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, edit) -> None:
    """Let `edit` change the dictionary of tensors in adapter_model.safetensors."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
