# SPDX-License-Identifier: Apache-2.0
"""A subject as an ordinary LoRA, exactly: A = Mid @ Down, B = scaling * Up, alpha = rank, for every other tool.

The scale is folded into B, so that no reader can misread it. Nothing is approximated: a Meta-LoRA of rank r is a LoRA
of rank r (method: Meta-LoRA, arXiv 2503.22352; the fold is ours).
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoint.artefacts import MAIN_FILES, SIDE_FILES
from ..checkpoint.base_model import REPO_ID
from ..checkpoint.config_file import CONFIG_FILE
from ..checkpoint.factors import WEIGHTS_FILE, SubjectSource
from ..checkpoint.folded import FOLD_FILE, LoraPair, component_name, fold_subject, model_class, with_names
from ..checkpoint.writing import require_replaceable
from ..errors import ExportError, OutputExistsError
from ..files import require_apart, save_tensors, staged_folder, write_tensors
from ..tuner import MetaLoraConfig
from ..tuner.convert import lora_config
from .original_names import OriginalName, has_depth, is_elsewhere, original_names


def export_subject(
    source: SubjectSource, path: str | os.PathLike[str], format: str = "diffusers", *, overwrite: bool = False
) -> Path:
    """Write a subject as an ordinary LoRA that another tool reads, exactly.

    Args:
        source: as `load_subject` gives it.
        path: a file that ends in .safetensors, or a folder for the file; for "peft" the folder.
        format: "diffusers" (`pipe.load_lora_weights`), "kohya" (sd-scripts, A1111, Forge), "comfyui" (the original
            model's names) or "peft" (a LoRA folder for `PeftModel.from_pretrained` and servers).
        overwrite: whether it may replace a LoRA, which does not say whose it is, or an adapter of another kind.

    Returns:
        The file or folder that was written.

    Raises:
        ExportError: an unknown format, or a layer that the format has no name for.
        ConfigError: `path` is the subject's own folder or its Down's.
        OutputExistsError: a LoRA lies there, a Down, a subject or an adapter of another kind.
        WriteFailedError: the disk refuses.
    """
    _require_sayable(source, format)
    target = Path(path)
    is_file = target.suffix == ".safetensors" and format != "peft"
    folder = target.parent if is_file else target
    require_apart(target, subject=(source.config.origin or {}).get("name"), down=source.config.located_down())
    if format == "peft":
        replaced = [target / name for name in (CONFIG_FILE, *MAIN_FILES, *SIDE_FILES)]
    else:
        file = target if is_file else target / (FOLD_FILE if format == "diffusers" else f"{format}.safetensors")
        replaced = [file]
    _require_free(folder, replaced, overwrite)
    pairs = fold_subject(source.config, source.down.tensors, source.tensors)
    tensors, metadata = _FILES[format](source.config, pairs)
    if format != "peft":
        write_tensors(file, tensors, metadata)
        return file
    with staged_folder(target, SIDE_FILES, MAIN_FILES) as stage:
        save_tensors(stage / WEIGHTS_FILE, tensors)
        (stage / CONFIG_FILE).write_text(json.dumps(_config_file(source.config, pairs), indent=2))
    return target


def _require_free(folder: Path, replaced: list[Path], overwrite: bool) -> None:
    """Raise OutputExistsError for what an export would replace: an ordinary LoRA does not say whose it is."""
    require_replaceable(folder, None, overwrite=overwrite)
    there = [path for path in replaced if path.exists()]
    if there and not overwrite:
        raise OutputExistsError(
            f"{there[0]}: expected a new file, found one, and a LoRA does not say whose it is. Choose another name, or "
            "give overwrite=True to replace it."
        )


def lora_tensors(source: SubjectSource, format: str = "diffusers") -> dict[str, torch.Tensor]:
    """A subject as the tensors of an ordinary LoRA, by the names of another tool: what `export_subject` would write.

    For a tool that runs in this process and takes a LoRA without a file.

    Raises:
        ExportError: as `export_subject`.
    """
    _require_sayable(source, format)
    return _FILES[format](source.config, fold_subject(source.config, source.down.tensors, source.tensors))[0]


def _require_sayable(source: SubjectSource, format: str) -> None:
    if format not in FORMATS:
        raise ExportError(f"expected a format of {', '.join(FORMATS)}, found {format!r}. Choose one of those.")
    if source.config.use_dora:
        raise ExportError(
            "expected a subject without DoRA, found use_dora=True: it rescales the weights themselves, which "
            "no ordinary LoRA can say. "
            "Use it through peft_metalora, or train without use_dora."
        )


def _diffusers(config: MetaLoraConfig, pairs: Mapping[str, LoraPair]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return with_names(pairs, component_name(config) + ".{}"), {}


def _comfyui(config: MetaLoraConfig, pairs: Mapping[str, LoraPair]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return with_names(in_original_layers(config, pairs), "diffusion_model.{}"), {}


def _peft(config: MetaLoraConfig, pairs: Mapping[str, LoraPair]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return with_names(pairs, "base_model.model.{}"), {}


def _kohya(config: MetaLoraConfig, pairs: Mapping[str, LoraPair]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if model_class(config) and not is_elsewhere(model_class(config)):
        raise ExportError(
            f"expected a model that kohya's scripts know, found a {model_class(config)}. Export to "
            "diffusers or peft instead."
        )
    is_sd15 = component_name(config) == "unet" and not has_depth(pairs)
    # sd-scripts trains SD 1.5 on diffusers' UNet and everything else on the original models.
    layers = pairs if is_sd15 else in_original_layers(config, pairs)
    tensors = {}
    for name, pair in layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = pair.a
        tensors[f"{key}.lora_up.weight"] = pair.b
        tensors[f"{key}.alpha"] = torch.tensor(float(pair.a.shape[0]), dtype=pair.a.dtype, device="cpu")
    rank = str(max(pair.a.shape[0] for pair in layers.values()))
    return tensors, {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def in_original_layers(config: MetaLoraConfig, pairs: Mapping[str, LoraPair]) -> dict[str, LoraPair]:
    """Rename the layers to those of the original checkpoint; parts of one matrix become one LoRA of their summed rank.

    Of parts with factors (a1, b1), (a2, b2) the whole has a = [a1; a2], and b has b1 and b2 in their parts' rows and
    in columns of their own, zero elsewhere: still exact.

    Raises:
        ExportError: a layer without a known original name.
    """
    names = original_names(model_class(config), pairs)
    unknown = sorted(module for module, name in names.items() if name is None)
    if unknown:
        raise ExportError(
            f"expected layers with a name in the original model, found {unknown[0]} ({len(unknown)} of {len(names)}) "
            f"of a {model_class(config) or 'model of unknown class'}. Export to diffusers or peft instead."
        )
    whole: dict[str, LoraPair] = {}
    groups: dict[str, list[tuple[OriginalName, LoraPair]]] = defaultdict(list)
    for module, name in names.items():
        if name is not None:
            groups[name.name].append((name, pairs[module]))
    for original, members in sorted(groups.items()):
        parts = members[0][0].parts
        whole[original] = members[0][1] if parts is None else _join(parts, members)
    return whole


def _join(parts: tuple[int, ...], members: list[tuple[OriginalName, LoraPair]]) -> LoraPair:
    name, pair = members[0]
    unit = pair.b.shape[0] // parts[name.part]
    members = sorted(members, key=lambda member: member[0].part)
    ranks = [pair.a.shape[0] for _, pair in members]
    b = pair.b.new_zeros(unit * sum(parts), sum(ranks))
    for index, (name, pair) in enumerate(members):
        top, left = unit * sum(parts[: name.part]), sum(ranks[:index])
        b[top : top + pair.b.shape[0], left : left + ranks[index]] = pair.b
    return LoraPair(torch.cat([pair.a for _, pair in members]), b)


def _config_file(config: MetaLoraConfig, pairs: Mapping[str, LoraPair]) -> dict[str, object]:
    """`adapter_config.json` of an ordinary LoRA, with the fields that readers of every age know."""
    lora = lora_config({module: pair.a.shape[0] for module, pair in pairs.items()})
    same = "base_model_name_or_path", "revision", "auto_mapping", "fan_in_fan_out"
    new = "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "use_rslora"
    modules = "target_modules", "rank_pattern", "alpha_pattern"
    own = {name: getattr(lora, name) for name in (*new, *modules)}
    given = {name: getattr(config, name) for name in same} | {"inference_mode": True}
    if not REPO_ID.fullmatch(config.base_model_name_or_path or ""):
        given["base_model_name_or_path"] = None  # a path says something about this machine and nothing to others
    return own | given


_FILES = {"diffusers": _diffusers, "kohya": _kohya, "comfyui": _comfyui, "peft": _peft}
FORMATS = tuple(_FILES)
