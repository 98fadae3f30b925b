# SPDX-License-Identifier: Apache-2.0
"""What this machine can do with what settings, as far as that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .studio import Studio

_GIB = 1 << 30


@dataclass(frozen=True)
class Held:
    """A way to hold the base, and the GiB of GPU memory that a picture and polishing (None: refused) would take."""

    quantize: str
    offload: str
    drawing: float
    polishing: float | None


Estimates = Callable[[], Sequence[Held]]


def machine(studio: Studio, estimates: Estimates) -> str:
    """How the base is held here, what the last picture took, and what other settings would take; Markdown."""
    config, device = studio.config, studio.base.device
    base = Path(str(config.pretrained_model_name_or_path)).name
    lines = [
        f"- Base: `{base}`, pictures of {studio.side} x {studio.side} px",
        f"- Weights: `--quantize {config.quantize} --offload {config.offload}`, on `{device}`",
    ]
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / _GIB
        peak = torch.cuda.max_memory_allocated(device) / _GIB
        name = torch.cuda.get_device_name(device)
        lines.append(f"- {name}: {memory:.1f} GiB, of which this page has taken {peak:.1f} GiB at the most")
    last = "nothing was drawn yet" if studio.seconds is None else f"the last one took {studio.seconds:.1f} s"
    lines.append(f"- A picture: {last}")
    rows = [
        f"| `--quantize {one.quantize} --offload {one.offload}` | {one.drawing:.1f} GiB | "
        f"{'not in the page' if one.polishing is None else f'{one.polishing:.1f} GiB'} | {_fits(one, memory)} |"
        for one in estimates()
    ]
    head = ["", "How else the page could be started, and the GPU memory that it would take:", ""]
    table = ["| settings | a picture | polishing | on this GPU |", "|---|---|---|---|", *rows]
    end = ["", "The table is from shapes, nothing in it is measured: meant to be right within a quarter."]
    return "\n".join([*lines, *head, *table, *end])


def _fits(one: Held, memory: float | None) -> str:
    if memory is None:
        return "there is none"
    if one.drawing > memory:
        return "too much"
    return "fits" if one.polishing is None or one.polishing <= memory else "fits, but for polishing"
