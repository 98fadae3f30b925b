# SPDX-License-Identifier: Apache-2.0
"""An ordinary LoRA brought onto a Down: the Mid and Up that come nearest to it, layer by layer, in closed form.

A LoRA changes a weight by W' = scale * B @ A; a subject by scaling * Up @ Mid @ Down. Only what lies in the row space
of Down can be reached, and there only rank r: with Down^T = Q R, the best choice is the truncated SVD of W' @ Q
(Eckart-Young), mapped back through R. Nothing larger than the factors is ever formed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..checkpoint.base_model import PREFIX
from ..checkpoint.config_file import CONFIG_FILE, check_values
from ..checkpoint.factors import WEIGHTS_FILE, listed, require_finite
from ..checkpoint.folded import FOLD_FILE, fold_subject, model_class
from ..checkpoint.untrusted import open_tensors, read_json, read_tensors
from ..checkpoint.writing import require_replaceable, write_artefact
from ..errors import (
    ArtefactNotFoundError,
    CorruptFileError,
    ForeignKeysError,
    RankMismatchError,
    WrongKindError,
)
from ..files import require_apart
from ..tuner import DownSource
from ..tuner.config import reference_to_write, wrong_field
from ..tuner.down import DOWN, MID, MID_INIT, UP, modules_in, subject_config
from ..tuner.ranks import from_pattern, ranks_of, scale_of

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
_LOADERS = {
    "UNet2DConditionModel": "StableDiffusionXLLoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "Flux3Transformer2DModel": "Flux3LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
    "Krea2Transformer2DModel": "Krea2LoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
}


@dataclass(frozen=True)
class Projection:
    """What `project` did.

    Attributes:
        folder: where the subject was written.
        relative_error: by module, ||W' - projected|| / ||W'||, in Frobenius norms: 0 exact, 1 nothing kept.
        dropped: modules of the LoRA that the Down does not have; all of what they did is lost.
        total_error: the same over all modules together, the dropped ones included.
    """

    folder: Path
    relative_error: dict[str, float]
    dropped: list[str]
    total_error: float


def project(
    lora: str | os.PathLike[str],
    down: DownSource,
    folder: str | os.PathLike[str],
    *,
    down_reference: str | None = None,
    down_revision: str | None = None,
    overwrite: bool = False,
) -> Projection:
    """Write the subject on a Down that comes nearest to an ordinary LoRA of the same base.

    Args:
        lora: a .safetensors file that diffusers reads, or a folder of PEFT or diffusers that holds one.
        down: as `load_down` gives it; the subject gets its rank.
        folder: where the subject is written.
        down_reference: what the subject names as its Down: a repository id or a folder.
        down_revision: the revision of that repository.
        overwrite: whether it may replace an adapter of another kind, or another person.

    Raises:
        ConfigError: `folder` is the LoRA's or the Down's.
        OutputExistsError: something else lies there.
        WrongKindError: the file holds no LoRA in a known format, or one for another model.
        NonFiniteError: it holds NaN or infinity.
        Everything that reading a file raises.
    """
    require_apart(folder, lora=lora, down=down_reference)
    require_replaceable(folder, "subject", overwrite=overwrite)
    modules = modules_in(down.tensors)
    pairs = read_lora(lora, model_class(down.config), modules)
    if not set(modules) & set(pairs):
        raise WrongKindError(
            f"{lora}: expected a LoRA on layers of this Down, such as {modules[0]}, found {sorted(pairs)[0]}. "
            "Use a LoRA of the same base model, in a format that diffusers reads."
        )
    config = subject_config(
        down,
        inference_mode=True,
        use_dora=False,  # a LoRA says nothing of the lengths of rows
        down=reference_to_write(down_reference, Path(folder)),
        down_revision=down_revision,
        facts={"projected from": Path(lora).name},
    )
    tensors: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    lost = whole = 0.0
    for module in modules:
        factor, start = down.tensors[f"{module}.{DOWN}"], down.tensors[f"{module}.{MID_INIT}"]
        outputs = down.tensors[f"{module}.{UP}"].shape[1]
        tensors[f"{module}.{MID}"] = start.unsqueeze(0).clone()
        tensors[f"{module}.{UP}"] = torch.zeros(1, outputs, start.shape[0], dtype=start.dtype, device="cpu")
        if module in pairs:
            a, b = pairs[module]
            _require_shapes(module, a, b, factor, outputs)
            mid, up, residual, norm = nearest(a, b, factor, start.shape[0], ranks_of(config, module).scaling)
            tensors[f"{module}.{MID}"] = mid.unsqueeze(0).to(start.dtype)
            tensors[f"{module}.{UP}"] = up.unsqueeze(0).to(start.dtype)
            errors[module] = residual / norm if norm else 0.0
            lost, whole = lost + residual**2, whole + norm**2
    dropped = sorted(set(pairs) - set(modules))
    for module in dropped:
        a, b = (factor.flatten(1).double() for factor in pairs[module])
        norm = float(torch.linalg.norm(torch.linalg.qr(b).R @ a))
        lost, whole = lost + norm**2, whole + norm**2
    fold = fold_subject(config, down.tensors, tensors)
    path = write_artefact(Path(folder), config, tensors, fold, overwrite=overwrite)
    return Projection(path, errors, dropped, (lost / whole) ** 0.5 if whole else 0.0)


def nearest(
    a: torch.Tensor, b: torch.Tensor, down: torch.Tensor, rank: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """The Mid and Up nearest to a LoRA, in the least-squares sense.

    Args:
        a: (k, d_in) or a convolution's (k, d_in, kh, kw). b: (d_out, k), the LoRA's scale in it.
        down: (meta_r, d_in), or a convolution's.
        rank: r of the subject.
        scaling: the subject's.

    Returns:
        Mid (r, meta_r), Up (d_out, r), ||W' - projected||, ||W'||.
    """
    a, b, down = a.flatten(1).double(), b.flatten(1).double(), down.flatten(1).double()
    q, r = torch.linalg.qr(down.T)
    outer, small = torch.linalg.qr(b)
    u, s, v = torch.linalg.svd(small @ (a @ q), full_matrices=False)
    kept = min(rank, s.shape[0])
    root = s[:kept].sqrt()
    # Mid @ R^T = sqrt(S) V^T; the pseudo-inverse also serves a Down whose rows depend on each other.
    mid = torch.zeros(rank, down.shape[0], dtype=torch.float64, device="cpu")
    up = torch.zeros(b.shape[0], rank, dtype=torch.float64, device="cpu")
    mid[:kept] = root.unsqueeze(1) * v[:kept] @ torch.linalg.pinv(r.T)
    up[:, :kept] = outer @ (u[:, :kept] * root) / scaling
    norm = float(torch.linalg.norm(small @ a))
    inside = small @ (a @ q) - (u[:, :kept] * s[:kept]) @ v[:kept]
    outside = small @ (a - (a @ q) @ q.T)
    residual = float((inside.square().sum() + outside.square().sum()).sqrt())
    return mid, up, residual, norm


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
    loader = _LOADERS.get(of)
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


def _require_shapes(module: str, a: torch.Tensor, b: torch.Tensor, down: torch.Tensor, outputs: int) -> None:
    if a.shape[1:] != down.shape[1:] or b.shape[0] != outputs:
        raise WrongKindError(
            f"expected {module} to map {tuple(down.shape[1:])} to {outputs}, found a LoRA of {tuple(a.shape[1:])} to "
            f"{b.shape[0]}. Use a LoRA of the Down's base model."
        )
