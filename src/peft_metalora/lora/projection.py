# SPDX-License-Identifier: Apache-2.0
"""An ordinary LoRA brought onto a Down: the Mid and Up that come nearest to it, layer by layer, in closed form.

A LoRA changes a weight by W' = scale * B @ A; a subject by scaling * Up @ Mid @ Down. Only what lies in the row space
of Down can be reached, and there only rank r: with Down^T = Q R, the best choice is the truncated SVD of W' @ Q
(Eckart-Young), mapped back through R. Nothing larger than the factors is ever formed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoint.folded import fold_subject, model_class
from ..checkpoint.writing import require_replaceable, write_artefact
from ..errors import WrongKindError
from ..files import require_apart
from ..tuner import DownSource
from ..tuner.config import reference_to_write
from ..tuner.down import DOWN, MID, MID_INIT, UP, modules_in, subject_config
from ..tuner.ranks import ranks_of
from .lora_file import read_lora


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


def _require_shapes(module: str, a: torch.Tensor, b: torch.Tensor, down: torch.Tensor, outputs: int) -> None:
    if a.shape[1:] != down.shape[1:] or b.shape[0] != outputs:
        raise WrongKindError(
            f"expected {module} to map {tuple(down.shape[1:])} to {outputs}, found a LoRA of {tuple(a.shape[1:])} to "
            f"{b.shape[0]}. Use a LoRA of the Down's base model."
        )
