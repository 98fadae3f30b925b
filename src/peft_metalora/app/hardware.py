# SPDX-License-Identifier: Apache-2.0
"""What this machine can do with what settings, as far as that is known."""

from __future__ import annotations

from pathlib import Path

import torch

from .studio import Studio

RECIPES = (
    ("sdxl-1024-6gb", 6, "a person on SDXL at 1024 px"),
    ("flux1-512-8gb", 8, "a person on FLUX.1-dev at 512 px"),
    ("flux1-generate-8gb", 8, "pictures by FLUX.1-dev at 1024 px"),
    ("klein-1024-8gb", 8, "a person on FLUX.2 klein at 1024 px"),
    ("flux1-1024-12gb", 12, "a person on FLUX.1-dev at 1024 px"),
)
"""Files of examples/recipes, the gigabytes of the cards that they are made for, and what they do."""


def machine(studio: Studio) -> str:
    """How the base is held here, what the last picture took, and which recipes are made for this card; Markdown."""
    config, device = studio.config, studio.base.device
    base = Path(str(config.pretrained_model_name_or_path)).name
    lines = [
        f"- Base: `{base}`, pictures of {studio.side} x {studio.side} px",
        f"- Weights: `--quantize {config.quantize} --offload {config.offload}`, on `{device}`",
    ]
    memory = None
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 1e9
        peak = torch.cuda.max_memory_allocated(device) / 1e9
        name = torch.cuda.get_device_name(device)
        lines.append(f"- {name}: {memory:.0f} GB, of which this page has taken {peak:.1f} GB at the most")
    last = "nothing was drawn yet" if studio.seconds is None else f"the last one took {studio.seconds:.1f} s"
    lines.append(f"- A picture: {last}")
    lines.append(_possible(studio))
    rows = [
        f"| `examples/recipes/{name}.yaml` | {card} GB | {does} | {_fits(card, memory)} |"
        for name, card, does in RECIPES
    ]
    head = ["", "Recipes for the command line, made for cards of a size:", "", "| recipe | card | does | here |"]
    return "\n".join([*lines, *head, "|---|---|---|---|", *rows])


def _possible(studio: Studio) -> str:
    if studio.config.offload == "none":
        return "- Polishing trains on the same copy of the base: everybody else waits meanwhile"
    return "- Polishing needs the whole base on the device: start without `--offload`, or use a recipe below"


def _fits(card: int, memory: float | None) -> str:
    if memory is None:
        return "no GPU here"
    return "is made for it" if memory >= card else "too small"
