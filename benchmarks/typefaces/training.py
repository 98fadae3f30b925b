# SPDX-License-Identifier: Apache-2.0
"""Trains the networks of the domain: with `demo/make_base.py` all that the demo has, and here the second judge."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from peft_metalora.demo import make_base
from peft_metalora.files import write_tensors

from .domain import SECOND_EMBEDDER, SecondEmbedder, Typefaces

_SECOND_SEED = 1_000_101


def train(argv: Sequence[str]) -> None:
    """One job, with the arguments of `make_base`; `second` is the second judge.

    On a CPU fonts are few, so that it is done in seconds.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("job")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args, _ = parser.parse_known_args(argv)
    device = torch.device(args.device)
    domain = Typefaces(args.output, device)
    if args.job != "second":
        make_base.main(list(argv), domain)
        return
    torch.backends.cuda.matmul.allow_tf32 = True
    judge = make_base.train_embedder(args.steps, device, network=SecondEmbedder, seed=_SECOND_SEED, domain=domain)
    write_tensors(args.output / SECOND_EMBEDDER, {name: one.half() for name, one in judge.state_dict().items()})
