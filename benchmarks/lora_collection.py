# SPDX-License-Identifier: Apache-2.0
"""What `from_loras.py` makes of a collection of ordinary LoRAs: the rows of a Down, its mean subject, a space."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_metalora.checkpoint.space import SubjectSpace
from peft_metalora.lora.collection import mean_start
from peft_metalora.tuner.down import DOWN, MID, MID_INIT, UP, DownSource, fingerprint
from peft_metalora.tuner.ranks import ranks_of
from peft_metalora.tuner.starts import ROW_LENGTH


@dataclass
class Loras:
    """Ordinary LoRAs of n people: by module A (n, r, d_in) and B (n, d_out, r); their scale is 1."""

    a: dict[str, Tensor]
    b: dict[str, Tensor]

    def __getitem__(self, people: slice) -> Loras:
        return Loras(*({module: one[people] for module, one in part.items()} for part in (self.a, self.b)))

    def mean(self, module: str) -> Tensor:
        """The mean of what they add to a weight, (d_out, d_in)."""
        a, b = self.a[module].double(), self.b[module].double()
        return torch.einsum("nor,nri->oi", b, a) / len(a)

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Loras:
        """PEFT's parameters of many people, by name."""
        halves: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        for name, tensor in parameters.items():
            module, _, factor = name.partition(".lora_")
            halves[factor.startswith("B")][module] = tensor
        return cls(*halves)


def gram(loras: Loras, module: str, how: str) -> Tensor:
    """(d_in, d_in) float64: what `how` says, stacked over people, times itself.

    Args:
        how: `products`, B A; `equal`, B A over its norm; `factors`, A.
    """
    a, b = loras.a[module].double(), loras.b[module].double()
    weighted = a if how == "factors" else b.mT @ b @ a
    if how == "equal":
        squares = (weighted * a).sum((1, 2))
        weighted = weighted / squares.clamp(min=1e-24)[:, None, None]
    return a.flatten(0, 1).T @ weighted.flatten(0, 1)


def directions(loras: Loras, how: str) -> dict[str, Tensor]:
    """The rows of the largest Down, (d_in, d_in) for each module: orthogonal, the leading one first."""
    return {
        module: ROW_LENGTH * torch.linalg.eigh(gram(loras, module, how)).eigenvectors.flip(1).T.float()
        for module in loras.a
    }


def kept(loras: Loras, downs: Mapping[str, Tensor]) -> float:
    """The share of the LoRAs' squares that lies in the rows of Downs (meta_r, d_in)."""
    inside = whole = 0.0
    for module, down in downs.items():
        found, rows = gram(loras, module, "products"), torch.linalg.qr(down.double().T).Q
        inside += float((rows * (found @ rows)).sum())
        whole += float(found.trace())
    return inside / whole


def down_source(like: DownSource, downs: Mapping[str, Tensor], loras: Loras | None, r: int) -> DownSource:
    """A Down with these rows, whose mean subject is that of LoRAs; None: Mid as the library draws it, Up 0."""
    meta_r = len(next(iter(downs.values())))
    config = dataclasses.replace(like.config, r=r, lora_alpha=r, meta_r=meta_r)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module, rows in downs.items():
        down, outputs = rows.cpu(), like.tensors[f"{module}.{UP}"].shape[1]
        mid, up = torch.empty(r, meta_r), torch.zeros(outputs, r)
        mid.uniform_(-1 / math.sqrt(meta_r), 1 / math.sqrt(meta_r), generator=generator)
        if loras is not None:
            scaling = ranks_of(config, module).scaling
            mid, up = mean_start(loras.mean(module).cpu(), torch.eye(outputs), down, r, scaling)
        parts = {DOWN: down, MID_INIT: mid, MID: mid[None], UP: up[None]}
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    return DownSource(config, tensors, fingerprint(tensors))


def subjects_of(loras: Loras, down: DownSource, how: str) -> dict[str, Tensor]:
    """Mid and Up of every person by the name of the factor, (n, ...): their LoRAs brought onto a Down.

    Args:
        how: `factors`: A and B themselves; `turned`: the nearest of each person, turned towards the mean subject;
            `products`: B A in the coordinates of Down, which has as many rows as the subjects have ranks.
    """
    found = {}
    for module, a in loras.a.items():
        b, rows = loras.b[module], down.tensors[f"{module}.{DOWN}"].to(a)
        scaling, inverse = ranks_of(down.config, module).scaling, torch.linalg.pinv(rows)
        if how == "factors":
            mid, up = a @ inverse, b / scaling
        elif how == "products":
            mid = ROW_LENGTH * torch.eye(len(rows), device=a.device).expand(len(a), -1, -1)
            up = b @ (a @ inverse) / ROW_LENGTH / scaling
        else:
            mid, up = _turned(a @ inverse, b / scaling, *(down.tensors[f"{module}.{part}"][0] for part in (MID, UP)))
        found[f"{module}.{MID}"], found[f"{module}.{UP}"] = mid, up
    return found


def _turned(mid: Tensor, up: Tensor, mean_mid: Tensor, mean_up: Tensor) -> tuple[Tensor, Tensor]:
    """Of all (T^-1 Mid, Up T) with equally long rows and columns, those nearest to the mean subject's."""

    def balanced(mid: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        outer, small = torch.linalg.qr(up.double())
        u, s, v = torch.linalg.svd(small @ mid.double(), full_matrices=False)
        root = s.sqrt()[..., None, :]
        return v.mT * root, outer @ (u * root)

    # Thousands of small decompositions, which a GPU makes one by one.
    right, left = balanced(mid.cpu(), up.cpu())
    mean_right, mean_left = balanced(mean_mid, mean_up)
    u, _, v = torch.linalg.svd(right.mT @ mean_right + left.mT @ mean_left)
    turn = u @ v
    return (right @ turn).mT.to(mid), (left @ turn).to(up)


def space_of(subjects: Mapping[str, Tensor], k: int, down_fingerprint: str) -> SubjectSpace:
    """The mean of subjects (n, ...), by factor, and their k leading directions, each as long as they spread in it."""
    layout = [(name, tuple(tensor.shape[1:])) for name, tensor in subjects.items()]
    lines = torch.cat([tensor.flatten(1) for tensor in subjects.values()], dim=1)
    mean = lines.mean(0)
    apart = lines - mean
    among = sum(part.double() @ part.double().T for part in apart.split(1 << 16, dim=1))
    vectors = torch.linalg.eigh(among).eigenvectors.flip(1)[:, :k]
    return SubjectSpace(layout, mean, vectors.T.float() @ apart / math.sqrt(len(lines)), down_fingerprint)


def codes_of(space: SubjectSpace, subjects: Mapping[str, Tensor]) -> Tensor:
    """The codes (n, k) that come nearest to subjects."""
    lines = torch.cat([subjects[name].flatten(1) for name, _ in space.layout], dim=1)
    return (lines - space.mean) @ space.basis.T / space.basis.square().sum(1)
