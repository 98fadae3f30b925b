# SPDX-License-Identifier: Apache-2.0
"""Speed of the face renderer in images a second; prints one JSON object with the machine it ran on.

Run as `python benchmarks/render.py [--device cuda] [--compile] [--batch 256] [--size 64]`.
"""

from __future__ import annotations

import argparse
import json

import torch
from clock import median_of
from origin import origin

from peft_metalora.demo.faces import sample_identities
from peft_metalora.demo.render import render
from peft_metalora.demo.scene import sample_scenes


def images_per_second(batch: int, size: int, device: str, compiled: bool, repeats: int) -> float:
    """Median over the repeats, after one unmeasured run."""
    generator = torch.Generator().manual_seed(0)
    identity = sample_identities(batch, generator, device)
    scene = sample_scenes(batch, generator, device)
    draw = torch.compile(render) if compiled else render
    return batch / median_of(lambda: draw(identity, scene, size), torch.device(device), repeats, warm_up=1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    speed = images_per_second(args.batch, args.size, args.device, args.compile, args.repeats)
    facts = {**origin(args.device), "threads": torch.get_num_threads()}
    print(json.dumps({"images_per_second": round(speed, 1), **vars(args), **facts}))


if __name__ == "__main__":
    main()
