# SPDX-License-Identifier: Apache-2.0
"""`metalora meta-train` and `metalora personalize`; their settings are those of training."""

from __future__ import annotations

from ..training.meta_train import meta_train
from ..training.personalize import personalize
from ..training.stage_settings import MetaTrainConfig, PersonalizeConfig, TrainEncoderConfig
from ..training.train_encoder import train_encoder


def run_meta_train(config: MetaTrainConfig) -> str:
    """Train a Down, and say of how many subjects."""
    result = meta_train(config)
    return f"wrote the Down of {result.facts['subjects']} subjects to {config.output_dir}"


def run_personalize(config: PersonalizeConfig) -> str:
    """Learn a subject, and say where it lies."""
    return f"wrote {personalize(config)}"


def run_train_encoder(config: TrainEncoderConfig) -> str:
    """Teach a Down to read photos, and say where it lies."""
    return f"wrote the Down with its encoder to {train_encoder(config)}"
