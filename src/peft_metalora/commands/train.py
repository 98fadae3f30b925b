# SPDX-License-Identifier: Apache-2.0
"""`metalora meta-train`, `personalize` and `train-encoder`; their settings are those of training."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.config_file import read_config
from ..training.meta_train import meta_train
from ..training.personalize import personalize
from ..training.stage_settings import MetaTrainConfig, PersonalizeConfig, TrainEncoderConfig
from ..training.train_encoder import train_encoder
from . import Done
from .next_steps import in_words, next_steps, size_of


def run_meta_train(config: MetaTrainConfig) -> Done:
    """Train a Down, and say of how many subjects."""
    result = meta_train(config)
    values = {"folder": config.output_dir, "facts": result.facts}
    reader = " with its encoder" if config.encoder else ""
    return Done(f"wrote the Down of {result.facts['subjects']} subjects{reader} to {config.output_dir}", values)


def run_personalize(config: PersonalizeConfig) -> Done:
    """Learn a subject, and say where it lies and what can be done next."""
    folder = personalize(config)
    if config.method == "lora":
        return Done(f"wrote {folder}, which pipe.load_lora_weights loads", {"folder": folder})
    facts, size = read_config(folder).facts or {}, size_of(folder)
    steps = facts.get("steps", 0)
    told = f"wrote the subject {Path(folder).resolve().name!r} to {folder} after {steps} step(s) ({in_words(size)})"
    values = {"folder": folder, "steps": steps, "bytes": size}
    return Done(f"{told}\n{next_steps(folder, facts.get('trigger'), config.down, config.generic)}", values)


def run_train_encoder(config: TrainEncoderConfig) -> Done:
    """Teach a Down to read photos, and say where it lies."""
    folder = train_encoder(config)
    return Done(f"wrote the Down with its encoder to {folder}", {"folder": folder})
