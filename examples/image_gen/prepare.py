# SPDX-License-Identifier: Apache-2.0
"""Writes our rows of PEFT's image-generation benchmark into a checkout: an experiment for each start, rate and seed.

    python prepare.py PEFT/method_comparison/image-gen --down DOWN --rates 1e-4 3e-4 1e-3 3e-3
    python prepare.py PEFT/method_comparison/image-gen --down DOWN --rates BEST --seeds 0 1 2

DOWN is of the benchmark's base. A Down with an encoder also gives the start that is read off the benchmark's training
photos, never its others. The benchmark knows no such start: a copy of the Down is written whose mean subject is the one
that was read. LoRA of rank 32 gets the same rates and seeds, so that its row is as well tuned. `rows.py` shows results.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from peft_metalora import DownSource, load_down, load_subject
from peft_metalora.checkpoint import write_artefact
from peft_metalora.cli import main as metalora
from peft_metalora.tuner.down import subject_config

WEIGHT_DECAY = 1e-4  # the benchmark's; a file that names a rate replaces both
LORA = Path("experiments", "lora", "flux2-klein-default", "adapter_config.json")
DOWNS = "metalora-downs"  # below experiments/ the benchmark would take a Down for an experiment


def training_photos(benchmark: Path, folder: Path) -> None:
    """Write the photos that the benchmark trains on, by its own division."""
    sys.path.insert(0, str(benchmark))
    from utils import get_train_config

    from data import get_train_valid_test_datasets

    config = get_train_config(str(benchmark / "none"))
    train, _, _ = get_train_valid_test_datasets(train_config=config, print_fn=lambda *_: None)
    for number, pixels in enumerate(train["pixel_values"]):
        image = ((pixels / 2 + 0.5) * 255).round().byte().permute(1, 2, 0)
        Image.fromarray(image.numpy()).save(folder / f"{number:02d}.png")


def read_start(benchmark: Path, name: str, down: DownSource) -> Path:
    """Write the Down with the subject that is read as its mean; where to."""
    target = benchmark / DOWNS / "read"
    with tempfile.TemporaryDirectory() as home:
        photos = Path(home, "photos")
        photos.mkdir()
        training_photos(benchmark, photos)
        arguments = ["read", "--down", name, "--photos", str(photos), "--output_dir", f"{home}/subject", "--whole"]
        if metalora(arguments) != 0:
            raise SystemExit(1)
        subject = load_subject(Path(home, "subject")).tensors
    return write_artefact(target, down.config, {**down.tensors, **subject}, overwrite=True)


def starts(benchmark: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """What a row is called, its start in PEFT's words, and its Down."""
    down = load_down(name)
    given = os.path.abspath(name) if os.path.isdir(name) else name
    yield from (("stored", "stored", given), ("mean", "mean", given))
    if down.config.encoder_fingerprint is not None:
        yield "read", "mean", str(read_start(benchmark, name, down))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", type=Path, help="PEFT's folder method_comparison/image-gen")
    parser.add_argument("--down", required=True, help="folder or repository of a Down")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    benchmark = given.benchmark.resolve()
    configs = {
        row: subject_config(load_down(down), start=start, down=down, inference_mode=False)
        for row, start, down in starts(benchmark, given.down)
    }
    for row in (*configs, "lora"):
        for rate in given.rates:
            for seed in given.seeds:
                folder = benchmark / "experiments" / "metalora" / f"flux2-klein-{row}-lr{rate:g}-seed{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                if row in configs:
                    configs[row].save_pretrained(str(folder))
                else:
                    shutil.copy(benchmark / LORA, folder)
                training = {"seed": seed, "optimizer_kwargs": {"lr": rate, "weight_decay": WEIGHT_DECAY}}
                (folder / "training_params.json").write_text(json.dumps(training, indent=2) + "\n")
                print(folder.relative_to(benchmark))


if __name__ == "__main__":
    main()
