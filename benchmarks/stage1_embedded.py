# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on the embedded base, with the settings that its Down was made with: samples a second.

    python benchmarks/stage1_embedded.py              prints a line of JSON; on a GPU if there is one
    PYTHONPATH=older/src python benchmarks/stage1_embedded.py        another version of the package

`python benchmarks/training.py --part embedded` runs it in turns on this version and on the one before steps were
recorded and slots stepped together. It imports only what both have; the settings are those that the Down names itself.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from peft_metalora.bases import base_for
from peft_metalora.demo.embedded import load_base
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_settings import MetaTrainConfig

DOWN = Path(__file__).parents[1] / "src" / "peft_metalora" / "demo" / "assets" / "down" / "adapter_config.json"
SETTINGS = ("rank", "meta_rank", "learning_rate", "down_learning_rate", "images_per_subject")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=256)
    made = json.loads(DOWN.read_text())["facts"]
    parser.add_argument("--subjects-per-batch", type=int, default=made["subjects_per_batch"])
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    base = base_for(load_base(), max_sequence_length=24)
    base.denoiser.requires_grad_(False).to(device)
    config, count = base.denoiser.config, 4 * arguments.people
    text = {
        "sequence": torch.randn(1, 24, config.joint_attention_dim),
        "pooled": torch.randn(1, config.pooled_projection_dim),
    }
    owners = torch.arange(arguments.people).repeat_interleave(4)
    examples = Examples(torch.randn(count, 8, 16, 16), text, torch.zeros(count, dtype=torch.int64), owners)
    settings = MetaTrainConfig(
        pretrained_model_name_or_path="embedded",
        output_dir="unused",
        bucket_size=256,
        warmup_steps=0,
        max_train_steps=10_000,
        subjects_per_batch=arguments.subjects_per_batch,
        mixed_precision="no",
        **{name: made[name] for name in SETTINGS},
    )
    steps = MetaTraining(base, examples, settings).steps()
    for _ in range(arguments.warmup):
        next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start, losses = time.perf_counter(), []
    for _ in range(arguments.steps):
        losses.append(next(steps).loss)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / arguments.steps
    print(
        json.dumps(
            {
                "samples_per_second": made["images_per_subject"] * arguments.subjects_per_batch / seconds,
                "losses": losses,
            }
        )
    )


if __name__ == "__main__":
    main()
