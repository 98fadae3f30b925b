# SPDX-License-Identifier: Apache-2.0
"""Trains the LoRA that teaches the embedded base, which knows single portraits, to draw two people side by side.

    python -m peft_metalora.demo.make_two_people --output DIR

It is an ordinary LoRA, learned as `metalora personalize --method lora` learns one, from renders of pairs who are in no
split of the domain. Neither the base nor the Down changes. `docs/demo.md` has the figures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..bases import Base, base_for
from ..training.examples.batches import Examples
from ..training.examples.encoding import encode_captions
from ..training.stage_2 import Personalization
from ..training.stage_settings import PersonalizeConfig
from .embedded import BASE_NAME, load_base
from .faces import sample_identities
from .two_people import captions, render_pairs, sample_pairs

_CHUNK = 1024  # pairs rendered and encoded at a time
_RATE, _WARM_UP, _DECAY = 2e-3, 100, 0.6  # the rate falls over the last 0.6 of the time


def train_two_people(
    output: Path, seconds: float, device: torch.device, pairs: int = 32_768, batch: int = 256, rank: int = 16
) -> None:
    """Learn from `pairs` renders, encoded beforehand, and write the LoRA in diffusers' format, float16.

    Args:
        seconds: how long to train, without the rendering; the learning rate follows the clock.

    Raises:
        WriteFailedError: the folder cannot be written.
    """
    base = base_for(load_base())
    base.place(device, encoders=True)
    config = PersonalizeConfig(
        pretrained_model_name_or_path=BASE_NAME,
        output_dir=str(output),
        method="lora",
        rank=rank,
        learning_rate=_RATE,
        max_train_steps=1_000_000,
        train_batch_size=batch,
        mixed_precision="bf16" if device.type == "cuda" else "no",
    )
    run = Personalization(base, _examples(base, pairs), config)
    losses: list[float] = []
    start = time.perf_counter()
    for step in tqdm(run.steps(), desc="two people", mininterval=10):
        losses.append(step.loss)
        done = (time.perf_counter() - start) / seconds
        if done >= 1:
            break
        for group in run.optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, step.number / _WARM_UP, (1 - done) / _DECAY)
    few = max(1, len(losses) // 20)
    print(f"two people: {len(losses)} steps of {batch} in {seconds:.0f} s on {device}")
    print(f"loss {sum(losses[:few]) / few:.4f} at first, {sum(losses[-few:]) / few:.4f} at last")
    for parameter in run.parameters:
        parameter.data = parameter.data.half()
    run.save(output)


def _examples(base: Base, pairs: int) -> Examples:
    generator, words = torch.Generator(base.device).manual_seed(1_000_007), torch.Generator().manual_seed(1_000_008)
    latents: list[Tensor] = []
    texts: list[str] = []
    for start in tqdm(range(0, pairs, _CHUNK), desc="rendering", mininterval=10):
        count = min(_CHUNK, pairs - start)
        scenes = sample_pairs(count, generator)
        people = [sample_identities(count, generator, base.device) for _ in scenes]
        latents.append(base.encode_images(render_pairs((people[0], people[1]), scenes) * 2 - 1, batch_size=64))
        texts += captions(scenes, words)
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return Examples(
        latents=torch.cat(latents),
        text=encode_captions(base, list(rows), batch_size=256),
        caption=torch.tensor([rows[text] for text in texts]),
        subject=torch.zeros(pairs, dtype=torch.int64),
    )


def main(argv: list[str] | None = None) -> None:
    """Train and write what two people in one picture need, with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120, help="of training; the rendering comes before")
    parser.add_argument("--pairs", type=int, default=32_768, help="pairs rendered beforehand")
    parser.add_argument("--batch", type=int, default=256, help="pairs in a step")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    # cuDNN's attention crashed in its backward pass on these shapes (torch 2.11, H100).
    torch.backends.cuda.enable_cudnn_sdp(False)
    train_two_people(args.output, args.seconds, torch.device(args.device), args.pairs, args.batch)


if __name__ == "__main__":
    main()
