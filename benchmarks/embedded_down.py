# SPDX-License-Identifier: Apache-2.0
"""The Down of the embedded base at rank 4, which most results stand on, and how the committed one was made from it.

    python benchmarks/embedded_down.py --output build/rank-4
    python benchmarks/convergence.py --recipe demo-0:r=1,width=32,brief=1 --split held-out --compile --precision bf16 \
        --output DIR --save demo-0
    python benchmarks/embedded_down.py --reader DIR/demo-0 --output build/down

Stage 1 gave the Down subjects of rank 4. Their starts lie in `data/`; the factor that people share is in the package,
with starts that are cut to rank 1, so that the subject space beside it is small. Both have one fingerprint.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_metalora.bases import base_for
from peft_metalora.checkpoint import write_artefact
from peft_metalora.checkpoint.reader_files import ENCODER_CONFIG_FILE, ENCODER_FILE
from peft_metalora.checkpoint.space import load_space
from peft_metalora.checkpoint.untrusted import read_tensors
from peft_metalora.demo.embedded import DOWN, load_base
from peft_metalora.encoder import EncoderConfig, make_encoder, save_reader
from peft_metalora.hub import load_down
from peft_metalora.tuner.down import DownSource

STARTS = Path(__file__).parent / "data" / "embedded_rank_4.safetensors"
RESULTS = Path(__file__).parent / "results" / "convergence.json"


def embedded_down(r: int = 4) -> DownSource:
    """The Down as stage 1 gave it, without a reader, at rank 4 or cut to a lower one."""
    committed = load_down(str(DOWN))
    shared = {name: tensor for name, tensor in committed.tensors.items() if name.endswith(".metalora_down")}
    config = dataclasses.replace(
        committed.config, r=4, lora_alpha=4, format_version=1, space_fingerprint=None, encoder_fingerprint=None
    )
    return of_rank(DownSource(config, {**shared, **read_tensors(STARTS)}, committed.fingerprint), r)


def of_rank(down: DownSource, r: int) -> DownSource:
    """The Down with starts of a lower rank: the first rows of Mid and columns of Up."""
    if r == down.config.r:
        return down
    cuts: dict[str, Callable[[Tensor], Tensor]] = {
        "metalora_down": lambda tensor: tensor,
        "metalora_mid_init": lambda tensor: tensor[:r],
        "metalora_mid": lambda tensor: tensor[:, :r],
        "metalora_up": lambda tensor: tensor[:, :, :r],
    }
    tensors = {name: cuts[name.rpartition(".")[2]](tensor).contiguous() for name, tensor in down.tensors.items()}
    # The scale stays: lora_alpha / r.
    config = dataclasses.replace(down.config, r=r, lora_alpha=down.config.lora_alpha / down.config.r * r)
    return DownSource(config, tensors, down.fingerprint)


def write_down(folder: Path) -> Path:
    """The Down at rank 4 as a folder, for what loads subjects of that rank."""
    down = embedded_down()
    return write_artefact(folder, dataclasses.replace(down.config, down_fingerprint=down.fingerprint), down.tensors)


def save_with_reader(reader: Path, output: Path) -> None:
    """Write the Down at the rank of a space that `convergence.py --save` wrote, with it and its encoder in half."""
    space = load_space(reader)
    ranks = {shape[1] for name, shape in space.layout if name.endswith("_mid")}
    facts: dict[str, Any] = json.loads((reader / ENCODER_CONFIG_FILE).read_text())
    known = {field.name: facts[field.name] for field in dataclasses.fields(EncoderConfig) if field.name in facts}
    encoder = make_encoder(EncoderConfig(**known), base_for(load_base()).encode_images)
    encoder.load_state_dict(read_tensors(reader / ENCODER_FILE))
    down = embedded_down(*ranks)
    recipe = json.loads(RESULTS.read_text())["recipes"][reader.name]["recipe"]
    named = {"lr": "learning_rate", "space_lr": "space_learning_rate", "rows": "subjects_per_batch"}
    named |= {"targets": "images_per_subject", "seed": "seed"}
    trained = {
        "encoder_subjects": recipe["people"],
        "encoder_steps": recipe["steps"],
        "encoder_recipe": {fact: recipe[name] for name, fact in named.items()},
    }
    config = dataclasses.replace(down.config, facts={**(down.config.facts or {}), **trained})
    save_reader(output, space, encoder.half(), dataclasses.replace(down, config=config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", type=Path, help="folder of an encoder and its space, which are laid beside it")
    parser.add_argument("--output", type=Path, required=True, help="folder of the Down")
    args = parser.parse_args()
    if args.reader is None:
        write_down(args.output)
    else:
        save_with_reader(args.reader, args.output)


if __name__ == "__main__":
    main()
