# SPDX-License-Identifier: Apache-2.0
"""The exact fold of a subject: Mid @ Down and Up as the ordinary LoRA that lies beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import CorruptFileError, NonFiniteError
from ..files import save_tensors
from ..tuner import MetaLoraConfig
from ..tuner.down import DOWN, MID, UP, modules_in
from ..tuner.folding import without_autocast
from ..tuner.ranks import ranks_of
from .untrusted import open_tensors

FOLD_FILE = "pytorch_lora_weights.safetensors"


class LoraPair(NamedTuple):
    """An ordinary LoRA on one module: a (r, d_in) and b (d_out, r); convolutions keep their kernel in a."""

    a: torch.Tensor
    b: torch.Tensor


def fold_subject(
    config: MetaLoraConfig, down: Mapping[str, torch.Tensor], subject: Mapping[str, torch.Tensor]
) -> dict[str, LoraPair]:
    """Fold each module's three factors into two.

    Args:
        config: the subject's.
        down: `{module}.metalora_down` (meta_r, d_in), or a convolution's (meta_r, d_in, kh, kw).
        subject: `{module}.metalora_mid` (1, r, meta_r) and `{module}.metalora_up` (1, d_out, r).

    Returns:
        A pair a module, in the order of the modules' names and in Mid's dtype; products are taken in float32 or better.
        No pair with DoRA, which rescales the weight itself: no ordinary LoRA can say that.

    Raises:
        NonFiniteError: the product does not fit into that dtype.
    """
    pairs = {}
    for module in () if config.use_dora else modules_in(subject):
        mid, up = subject[f"{module}.{MID}"][0], subject[f"{module}.{UP}"][0]
        factor = down[f"{module}.{DOWN}"].to(mid.device)
        wide = torch.promote_types(mid.dtype, torch.float32)
        with without_autocast(mid.device):
            a = (mid.to(wide) @ factor.flatten(1).to(wide)).reshape(mid.shape[0], *factor.shape[1:])
        b = (up.to(wide) * ranks_of(config, module).scaling).reshape(*up.shape, *[1] * (factor.ndim - 2))
        pairs[module] = LoraPair(a.to(mid.dtype), b.to(mid.dtype))
        if not (torch.isfinite(pairs[module].a).all() and torch.isfinite(pairs[module].b).all()):
            raise NonFiniteError(
                f"expected a fold of {module} that {mid.dtype} can hold, found infinity. Save the subject in bfloat16 "
                "or float32, or leave the fold out (fold=False)."
            )
    return pairs


def component_name(config: MetaLoraConfig) -> str:
    """The name that a diffusers pipeline gives the adapted model: "unet" or "transformer"."""
    return "unet" if "UNet" in model_class(config) else "transformer"


def model_class(config: MetaLoraConfig) -> str:
    """The class of the adapted model, as the configuration names it; empty where it does not."""
    return (config.auto_mapping or {}).get("base_model_class", "")


def save_diffusers(path: Path, pairs: Mapping[str, LoraPair], component: str) -> None:
    """Write `pytorch_lora_weights.safetensors` in place; `component` is "unet" or "transformer"."""
    save_tensors(path, with_names(pairs, component + ".{}"))


def check_fold(path: Path, pairs: Mapping[str, LoraPair], component: str) -> None:
    """Check that a fold file, which plain diffusers would load, is that of the subject and nothing else.

    Raises:
        CorruptFileError, and what `untrusted.open_tensors` raises.
    """
    wanted = with_names(pairs, component + ".{}")
    with open_tensors(path) as file:
        same = {name: tuple(tensor.shape) for name, tensor in wanted.items()} == {
            name: entry.shape for name, entry in file.header.entries.items()
        }
        found = file.read() if same else {}
    for name, tensor in found.items():
        # Another machine rounds a product otherwise: a hundredth of the largest number is less than bfloat16's step.
        limit = 1e-2 * wanted[name].float().abs().max() + 1e-12
        same = same and bool(((tensor.float() - wanted[name].float()).abs() <= limit).all())
    if not same:
        raise CorruptFileError(
            f"{path}: expected the exact fold of the subject beside it, found something else. Do not use it: pull it "
            "from its author again, or load the subject with peft_metalora."
        )


def with_names(pairs: Mapping[str, LoraPair], name: str) -> dict[str, torch.Tensor]:
    """The tensors of pairs by the names of diffusers and PEFT; `name` formats a module's path."""
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"{name.format(module)}.lora_A.weight"] = pair.a
        tensors[f"{name.format(module)}.lora_B.weight"] = pair.b
    return tensors
