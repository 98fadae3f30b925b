# SPDX-License-Identifier: Apache-2.0
"""A Down out of ordinary LoRAs of many people: what their changes of the weights share, layer by layer.

The rows of Down are the leading right singular vectors of everybody's B @ A, one below the other; its mean subject is
the Mid and Up that come nearest to the mean of all B @ A. No photo and no step of training is needed. The LoRAs are
read one after another, twice, so that no more than one is in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.base_model import check_layers, with_twins
from ..checkpoint.config_file import CONFIG_FILE
from ..checkpoint.factors import WEIGHTS_FILE, listed, require_finite
from ..checkpoint.folded import FOLD_FILE
from ..checkpoint.writing import require_replaceable, write_artefact
from ..errors import ArtefactNotFoundError, ConfigError, WrongKindError
from ..files import require_apart
from ..tuner import MetaLoraConfig
from ..tuner.down import DOWN, MID, MID_INIT, UP, fingerprint
from ..tuner.on_model import module_path
from ..tuner.ranks import whole_paths
from ..tuner.starts import ROW_LENGTH, set_rows
from .lora_file import read_lora
from .projection import nearest


@dataclass(frozen=True)
class Collection:
    """What `down_from_loras` did.

    Attributes:
        folder: where the Down was written.
        loras: how many LoRAs it was made of.
        kept: the share of what they do (of the squares of all B @ A) that lies in the rows of Down.
        rows: how many rows come from the LoRAs in the layer that has the fewest; the others are random.
        left_out: modules that not every LoRA has, or the base lacks.
    """

    folder: Path
    loras: int
    kept: float
    rows: int
    left_out: list[str]


def down_from_loras(
    loras: Iterable[str | os.PathLike[str]],
    denoiser: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str,
    base_revision: str | None = None,
    r: int = 4,
    meta_r: int = 64,
    domain: str | None = None,
    overwrite: bool = False,
) -> Collection:
    """Write the Down that ordinary LoRAs of people have in common, and their mean subject.

    Args:
        loras: .safetensors files that diffusers reads, folders of PEFT or diffusers that hold one, or folders of these.
        denoiser: of the base that all of them were made for; its weights may be on the meta device.
        folder: where the Down is written.
        base_model: repository id or path of the base. base_revision: its revision.
        r: rank of the mean subject. meta_r: rows of Down.
        domain: what the LoRAs show, in a few words, for the model card.
        overwrite: whether it may replace what is no Down.

    Raises:
        ArtefactNotFoundError: there is no LoRA. ConfigError: `folder` is one of theirs, or a rank that cannot be.
        WrongKindError: they share no layer, or change nothing. BaseModelMismatchError: one is for another base.
        OutputExistsError: something else lies there. Everything that `read_lora` raises.
    """
    given = list(loras)
    for path in given:
        require_apart(folder, loras=path)
    require_replaceable(folder, "meta", overwrite=overwrite)
    config = MetaLoraConfig(stage="meta", r=r, meta_r=meta_r, lora_alpha=r, inference_mode=True)
    files = find_loras(given)
    for path in files:  # a link in a folder leads elsewhere
        require_apart(folder, loras=path)
    rows, shapes, left_out = _leading_rows(files, denoiser, meta_r)
    widest = max(shape.numel() for shape in shapes.values())
    if meta_r > widest:
        raise ConfigError(f"expected at most as many rows as a layer has inputs, {widest}, found meta_r={meta_r}")
    means, kept = _means_in(files, rows, type(denoiser).__name__)
    if not kept:
        raise WrongKindError(f"expected LoRAs that change something, found {len(files)} of zeros. Train them first.")
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module, found in rows.items():
            down = torch.empty(meta_r, *shapes[module], device="cpu")
            set_rows(down, found)
            mid, up = mean_start(found, means[module], down, r, scaling=1.0)
            tensors |= {f"{module}.{DOWN}": down, f"{module}.{MID_INIT}": mid}
            tensors |= {f"{module}.{MID}": mid[None].clone(), f"{module}.{UP}": up[None]}
    fits = with_twins(base_model)
    config = replace(
        config,
        target_modules=whole_paths(rows),
        base_model_name_or_path=base_model,
        revision=base_revision,
        auto_mapping={"base_model_class": type(denoiser).__name__, "parent_library": "diffusers"},
        down_fingerprint=fingerprint(tensors),
        facts={
            **({"domain": domain} if domain else {}),
            **({"fits": fits} if fits else {}),
            "subjects": len(files),
            "recipe": {"made of": "ordinary LoRAs", "share of them that it holds": round(kept, 3)},
        },
    )
    path = write_artefact(Path(folder), config, tensors, overwrite=overwrite)
    return Collection(path, len(files), kept, min(map(len, rows.values())), left_out)


def find_loras(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The LoRAs among files and folders, those in a folder by name, each once by whatever path.

    Raises:
        ArtefactNotFoundError: a path without one. ConfigError: a folder in a folder that holds several.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        inside = [path] if _is_weights(path) else _loras_in(path)
        if not inside:
            raise ArtefactNotFoundError(
                f"{path}: expected LoRAs (.safetensors files, or folders that hold one), found none. Check the path."
            )
        for one in inside:
            weights = next((one / name for name in (WEIGHTS_FILE, FOLD_FILE) if (one / name).is_file()), one)
            found.setdefault(os.path.realpath(weights), one)
    return [*found.values()]


def mean_start(a: Tensor, b: Tensor, down: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Mid (r, meta_r) and Up (d_out, r) of the subject that is nearest to b @ a, as arguments of `nearest`.

    Rows of Mid are as long as drawn ones, and the size is in Up: Adam moves both by its rate, whatever their size.
    Where b @ a has a lower rank, the rows that are left are drawn: what is 0 on both sides never learns.
    """
    drawn = torch.empty(r, len(down), device="cpu")
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    mid, up, _, _ = nearest(a, b, down, r, scaling)
    length = mid.norm(dim=1, keepdim=True) / ROW_LENGTH
    there = length > 1e-6 * length.max().clamp(min=1e-30)
    mid = torch.where(there, mid / length.clamp(min=1e-30), drawn)
    return mid.float(), (up * torch.where(there, length, 0.0).T).float()


def _loras_in(folder: Path) -> list[Path]:
    """A folder that is a LoRA; or its files, and the LoRA of each folder in it."""
    there = sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
    files = [path for path in there if _is_weights(path)]
    if (folder / CONFIG_FILE).is_file() or files == [folder / FOLD_FILE]:
        return [folder]
    return [one for path in there for one in ([path] if path in files else _lora_in(path))]


def _lora_in(folder: Path) -> list[Path]:
    if any((folder / name).is_file() for name in (CONFIG_FILE, FOLD_FILE)):
        return [folder]
    files = sorted(filter(_is_weights, folder.iterdir() if folder.is_dir() else []))
    if len(files) > 1:
        raise ConfigError(
            f"expected one LoRA in {folder}, found {len(files)}: {listed(path.name for path in files)}. Take the "
            "others out, or give the files that are meant as `loras`."
        )
    return files


def _is_weights(path: Path) -> bool:
    return path.suffix == ".safetensors" and path.name[0] != "." and path.is_file()


def _leading_rows(
    files: list[Path], denoiser: nn.Module, meta_r: int
) -> tuple[dict[str, Tensor], dict[str, torch.Size], list[str]]:
    """Orthonormal rows (at most meta_r, d_in) of each module that all have, the shape of one, and what is left out."""
    layers = {module_path(path) for path, _ in denoiser.named_modules()}
    rows: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    named: set[str] = set()
    for number, file in enumerate(files):
        pairs = read_lora(file, type(denoiser).__name__, layers)
        factors = {f"{module}.{DOWN}": a for module, (a, _) in pairs.items()}
        factors |= {f"{module}.{UP}": b.flatten(1)[None] for module, (_, b) in pairs.items()}
        check_layers(denoiser, factors, str(file))
        named |= pairs.keys()
        shared = pairs.keys() & (rows.keys() if number else layers)
        if not shared:
            raise WrongKindError(
                f"{file}: expected a LoRA on layers of this base that the others have too, found {listed(pairs)}. "
                "Use LoRAs of one base model, in a format that diffusers reads."
            )
        own = {module: _rows_of(*pairs[module]) for module in shared}
        require_finite(own, file)
        rows = {module: _with(rows.get(module), own[module], most=4 * meta_r) for module in shared}
        shapes = {module: pairs[module][0].shape[1:] for module in shared}
    found = {module: _leading(rows[module], meta_r) for module in sorted(rows)}
    return (
        {module: F.normalize(one.double(), dim=1).float() for module, one in found.items()},
        shapes,
        sorted(named - found.keys()),
    )


def _rows_of(a: Tensor, b: Tensor) -> Tensor:
    """The rows of b @ a, turned into as few as its rank."""
    return torch.linalg.qr(b.flatten(1).float()).R @ a.flatten(1).float()


def _with(rows: Tensor | None, own: Tensor, most: int) -> Tensor:
    """Rows and below them those of one more; where they are too many, half as many."""
    rows = own if rows is None else torch.cat([rows, own])
    return rows if len(rows) <= most else _leading(rows, most // 2)


def _leading(rows: Tensor, count: int) -> Tensor:
    """The `count` leading right singular vectors of rows, each times its singular value, without those of value 0."""
    exact = rows.double()
    squares, turns = torch.linalg.eigh(exact @ exact.T)
    there = squares > 1e-10 * squares[-1]
    return (turns[:, there].flip(1)[:, :count].T @ exact).float()


def _means_in(files: list[Path], rows: Mapping[str, Tensor], of: str) -> tuple[dict[str, Tensor], float]:
    """The mean of all B @ A in the rows of each module, (d_out, rows), and the share of all that lies in them."""
    means: dict[str, Tensor] = {}
    inside = whole = 0.0
    for file in files:
        pairs = read_lora(file, of, rows)
        for module, found in rows.items():
            a, b = (factor.flatten(1).float() for factor in pairs[module])
            reached = b @ (a @ found.T)
            means[module] = means.get(module, 0) + reached / len(files)
            inside += float(reached.double().square().sum())
            # The square of B @ A, from the products of each factor with itself.
            whole += float(((b.double().T @ b.double()) * (a.double() @ a.double().T)).sum())
    return means, min(1.0, inside / whole) if whole else 0.0
