# SPDX-License-Identifier: Apache-2.0
"""The file of an ordinary LoRA, whoever wrote it: two factors for each module, by the paths of diffusers' layers.

Names of diffusers and PEFT are read here. Those of kohya's scripts, ComfyUI and other trainers diffusers renames.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..checkpoint.base_model import PREFIX
from ..checkpoint.config_file import CONFIG_FILE, check_values
from ..checkpoint.factors import WEIGHTS_FILE, listed, require_finite
from ..checkpoint.folded import FOLD_FILE
from ..checkpoint.untrusted import open_tensors, read_json, read_tensors
from ..errors import ArtefactNotFoundError, CorruptFileError, ForeignKeysError, RankMismatchError, WrongKindError
from ..tuner.config import wrong_field
from ..tuner.ranks import from_pattern, scale_of

# module, factor, and the adapter's name where PEFT's state_dict was written as it is
_KEY = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.(?P<adapter>[^.]+))?\.weight|(?P<of>.+)\.alpha"
)
_PARTS = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_down": "a",
    "lora_up": "b",
    "lora.down": "a",
    "lora.up": "b",
}
_MOVING = r"pissa|olora|corda|loftq|lora_ga"
"""Starts of PEFT that take from the base what they put into the factors."""
_PREFIXES = (PREFIX, "transformer.", "unet.", "diffusion_model.")

# What reads the files of other trainers in diffusers, by the class of the denoiser.
LOADERS = {
    "UNet2DConditionModel": "StableDiffusionXLLoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "Flux3Transformer2DModel": "Flux3LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
    "Krea2Transformer2DModel": "Krea2LoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
}


def read_lora(
    path: str | os.PathLike[str], of: str = "", layers: Collection[str] = ()
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Read an ordinary LoRA: module path -> (a (k, d_in), b (d_out, k)), with alpha / rank folded into b.

    Args:
        of: class of the denoiser. Where none of its `layers` is named, the names are those of other tools, and
            diffusers says what they mean.

    Raises:
        As `project`.
    """
    file, config = _lora_file(Path(path))
    if config is None:
        config = _diffusers_metadata(file)
    config = {re.sub(r"^(transformer|unet)\.", "", key): value for key, value in config.items()}  # diffusers' copy
    config = {
        name: config[name] for name in ("lora_alpha", "alpha_pattern", "use_rslora") if config.get(name) is not None
    }
    if (wrong := wrong_field(config)) is not None:
        raise CorruptFileError(
            f"{file}: expected {wrong[0]} to be {wrong[1]}, found {str(config[wrong[0]])[:60]!r}. Fetch it again."
        )
    check_values(config, file, expressions=True)
    tensors = read_tensors(file)
    require_finite(tensors, file)
    if layers and not any(_module_of(key) in layers for key in map(_KEY.fullmatch, tensors) if key is not None):
        renamed = _named_by_diffusers(tensors, of, layers)
        tensors, config = (tensors, config) if renamed is None else (renamed, {})
    found: dict[str, dict[str, torch.Tensor]] = {}
    adapters = set()
    for name, tensor in tensors.items():
        key = _KEY.fullmatch(name)
        if key is None:
            raise ForeignKeysError(
                f"{file}: expected the factors of a plain LoRA, found {name}. DoRA and LoKr cannot be projected; other "
                "LoRAs that pipe.load_lora_weights takes can go through that and save_lora_weights."
            )
        adapters.add(key["adapter"])
        found.setdefault(_module_of(key), {})[_PARTS.get(key["part"], "alpha")] = tensor
    if len(adapters - {None}) > 1:
        raise ForeignKeysError(
            f"{file}: expected one LoRA, found {len(adapters - {None})}: {listed(filter(None, adapters))}. Save the "
            "one that is meant with PEFT's save_pretrained."
        )
    pairs = {}
    for module, parts in found.items():
        a, b, alpha = parts.get("a"), parts.get("b"), parts.get("alpha")
        if a is None or b is None or min(a.ndim, b.ndim) < 2 or not len(b) or b[0].numel() != len(a):
            raise RankMismatchError(
                f"{file}: expected two factors of one rank in {module}, found others. Fetch it again."
            )
        if alpha is not None and alpha.numel() != 1:
            raise RankMismatchError(
                f"{file}: expected one number as the alpha of {module}, found {tuple(alpha.shape)}. Fetch it again."
            )
        scale = _scale(config, module, len(a)) if alpha is None else float(alpha) / len(a)
        # In float16 what is multiplied by a small scale would lose its digits, by a large one be infinite.
        pairs[module] = (a, b.to(torch.promote_types(b.dtype, torch.float32)) * scale)
    if not pairs:
        raise WrongKindError(f"{file}: expected a LoRA, found no tensors. Check the path.")
    require_finite({module: b for module, (_, b) in pairs.items()}, file)
    return pairs


def _module_of(key: re.Match[str]) -> str:
    module = key["module"] or key["of"]
    return module.removeprefix(next((prefix for prefix in _PREFIXES if module.startswith(prefix)), ""))


def _named_by_diffusers(
    tensors: Mapping[str, torch.Tensor], of: str, layers: Collection[str]
) -> dict[str, torch.Tensor] | None:
    """Tensors in the names of kohya's scripts, ComfyUI or other trainers as diffusers renames them; None: it does not.

    Scales are in the factors before it sees them, as it rounds them, forgets one or counts up to it for ever. What it
    leaves out keeps its own name. Of DoRA it would leave the magnitudes out, and the rest would be another LoRA.
    """
    loader = LOADERS.get(of)
    given = _with_scales_inside(tensors)
    # It counts up to the largest number of a block, and doubles the alpha that is left without a factor.
    endless = any(name.endswith(".alpha") and (one.numel() != 1 or not one > 0) for name, one in given.items())
    foreign = any(re.search(r"dora_scale|magnitude|lokr_|hada_|[0-9]{4}", name) for name in tensors)
    if loader is None or endless or foreign:
        return None
    blocks = {}
    if of == "UNet2DConditionModel":  # its original has one list of what are blocks of so many layers here
        numbers = [int(number) for number in re.findall(r"down_blocks\.\d+\.attentions\.(\d+)\.", "\n".join(layers))]
        blocks = {"unet_config": SimpleNamespace(layers_per_block=1 + max(numbers, default=1))}
    numbered = {
        name: tensor.clone() if name.endswith(".alpha") else torch.full_like(tensor, 1 + number)
        for number, (name, tensor) in enumerate(given.items())
    }
    try:
        found = _renamed(given, loader, blocks)
        there = {value for tensor in _renamed(numbered, loader, blocks).values() for value in _largest_in_rows(tensor)}
    except (ValueError, LookupError, RuntimeError, AttributeError, TypeError, NameError, AssertionError):
        return None
    lost = {
        name
        for name, tensor in numbered.items()
        if not name.endswith(".alpha") and not there & {*_largest_in_rows(tensor)}
    }
    # Changes of norms and biases are often written, and are zeros.
    return found | {name: given[name] for name in lost if _KEY.fullmatch(name) or given[name].any()}


def _with_scales_inside(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in which each alpha is the rank, what it was before in the factor beside it."""
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        key = _KEY.fullmatch(name)
        if key is not None and _PARTS.get(key["part"]) == "b" and tensor.ndim > 1:
            alpha = copies.get(f"{key['module']}.alpha")
            if alpha is not None and alpha.numel() == 1:
                copies[name] *= float(alpha) / tensor.shape[1]
                alpha.fill_(tensor.shape[1])
    return copies


def _renamed(tensors: Mapping[str, torch.Tensor], loader: str, blocks: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from diffusers.loaders import lora_pipeline
    from diffusers.utils.state_dict_utils import DIFFUSERS_TO_PEFT, UNET_TO_DIFFUSERS, convert_state_dict

    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # some loaders scale in place
    renamed = getattr(lora_pipeline, loader).lora_state_dict(copies, **blocks)
    state, scales = renamed if isinstance(renamed, tuple) else (renamed, None)
    whole = {**state, **{name: torch.as_tensor(scale, device="cpu") for name, scale in (scales or {}).items()}}
    found = convert_state_dict(whole, {**UNET_TO_DIFFUSERS, **DIFFUSERS_TO_PEFT})  # those of UNets have older names
    return {name.replace(".lora_A.weight.alpha", ".alpha"): tensor for name, tensor in found.items()}


def _largest_in_rows(tensor: torch.Tensor) -> list[float]:
    return tensor.reshape(len(tensor), -1).amax(1).tolist() if tensor.ndim else [float(tensor)]


def _lora_file(path: Path) -> tuple[Path, dict[str, Any] | None]:
    """The tensors' file, and PEFT's configuration if there is one."""
    if path.is_file():
        return path, None
    if (path / WEIGHTS_FILE).is_file() and (path / CONFIG_FILE).is_file():
        config = read_json(path / CONFIG_FILE)
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            kind = str(config.get("peft_type"))[:40]
            raise WrongKindError(
                f"{path}: expected a plain LoRA, found {kind!r}. A subject is one after `metalora export`."
            )
        if re.match(_MOVING, start := str(config.get("init_lora_weights"))[:40]):
            raise WrongKindError(
                f"{path}: expected a LoRA on the base as it is, found the start {start!r}, which moved the base. "
                "Save it with path_initial_model_for_weight_conversion of PEFT's save_pretrained."
            )
        return path / WEIGHTS_FILE, config
    if (path / FOLD_FILE).is_file():
        return path / FOLD_FILE, None
    raise ArtefactNotFoundError(
        f"{path}: expected a .safetensors file or a LoRA folder, found neither. Check the path."
    )


def _diffusers_metadata(file: Path) -> dict[str, Any]:
    """diffusers' copy of PEFT's configuration in the header, empty where there is none."""
    with open_tensors(file) as opened:
        text = opened.header.metadata.get("lora_adapter_metadata", "{}")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CorruptFileError(f"{file}: expected lora_adapter_metadata in JSON, found other text. Fetch it again.")
    return values


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank as the configuration says; 1 without one."""
    alpha = from_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    return scale_of(float(alpha), rank, config.get("use_rslora", False))
