# SPDX-License-Identifier: Apache-2.0
"""What Meta-LoRA is compared with: every method as PEFT has it, on the same modules, ready to be stacked.

`RIVALS` and `FURTHER` name the methods with the learning rates that are tried for each. `vmap_ready` lets forward
passes that use custom autograd or in-place arithmetic (LoHa, OFT, ours) run under `torch.func.vmap`, with equal values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.loha import layer as loha
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor

from ..bases import Base
from ..training.engine.stacked import AdapterStack
from ..training.stage_settings import TrainingConfig
from ..tuner.down import DownSource, given, subject_config
from ..tuner.placing import restore
from .adapters import adapter_config, put_adapter
from .textual_inversion import WordStack
from .time_rank import TimeRank

_LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
_META_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Rival:
    """A method of the comparison.

    Attributes:
        label: for tables. config: makes its PEFT configuration from the modules to adapt and the Down; None trains the
            denoiser itself.
        rates: learning rates to choose from. note: what its row means.
        up_rate: factor on the rate of Up (LoRA+). moved: its start is not the base model.
        word: what textual inversion learns a word instead of; the denoiser stays as it is.
        least: of the components, how many take part in pure noise (T-LoRA); 0: all of them at all times.
    """

    label: str
    config: Callable[[Any, DownSource], PeftConfig] | None
    rates: tuple[float, ...] = _LORA_RATES
    note: str = ""
    up_rate: float = 1.0
    moved: bool = False
    word: str | None = None
    least: int = 0


def _peft(kind: str, r: int = 1) -> Callable[[Any, DownSource], PeftConfig]:
    return lambda modules, down: adapter_config(kind, modules, r=r, down=down)


def _t_lora(modules: Any, down: DownSource) -> PeftConfig:
    """As T-LoRA's authors have it for FLUX.1: of one component to all, from a normal start (not an orthogonal one)."""
    return LoraConfig(r=16, lora_alpha=16, target_modules=modules, init_lora_weights="gaussian")


def _subject(**options: Any) -> Callable[[Any, DownSource], PeftConfig]:
    return lambda modules, down: subject_config(down, down="in memory", inference_mode=False, **options)


RIVALS: dict[str, Rival] = {
    "lora_r1": Rival("LoRA, rank 1", _peft("lora", 1)),
    "meta_lora_stored": Rival("Meta-LoRA, stored Mid", _subject(start="stored"), _META_RATES),
    "meta_lora_mean": Rival("Meta-LoRA, mean", _subject(start="mean"), _META_RATES, moved=True),
    "lora_r4": Rival("LoRA, rank 4", _peft("lora", 4)),
    "random_down": Rival("Meta-LoRA, random Down", _peft("random-down"), note="the control for stage 1"),
    "mean_lora": Rival(
        "LoRA, rank 4, from a mean LoRA", _peft("lora", 4), _META_RATES, "the control for the mean", moved=True
    ),
    "lora_r16": Rival("LoRA, rank 16", _peft("lora", 16)),
    "vera": Rival(
        "VeRA, rank 256",
        _peft("vera", 256),
        (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "random projections, shared by all layers",
    ),
    "dora": Rival("DoRA, rank 4", _peft("dora", 4)),
    "oft": Rival(
        "OFT, blocks of 32",
        _peft("oft"),
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "lokr": Rival("LoKr, rank 4", _peft("lokr", 4)),
    "loha": Rival("LoHa, rank 4", _peft("loha", 4)),
    "full": Rival("full fine-tuning", None, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), "every weight of the denoiser"),
}

# Those of the convergence benchmark besides.
FURTHER: dict[str, Rival] = {
    "t_lora": Rival("T-LoRA, rank 1 to 16", _t_lora, note="fewer components in more noise", least=1),
    "meta_lora_time": Rival(
        "Meta-LoRA, mean, rank 1 to 4 by time",
        _subject(start="mean"),
        _META_RATES,
        "T-LoRA's mask on Mid",
        moved=True,
        least=1,
    ),
    "textual_inversion": Rival(
        "textual inversion",
        None,
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "a word's vectors, nothing of the denoiser",
        word="person",
    ),
}

VARIANTS: dict[str, Rival] = {
    "default": RIVALS["meta_lora_stored"],
    "rslora": Rival("rsLoRA scaling", _subject(start="stored", use_rslora=True), _META_RATES),
    "dora": Rival("weight-decomposed", _subject(start="stored", use_dora=True), _META_RATES),
    "lora_plus": Rival("LoRA+, Up x 16", _subject(start="stored"), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), up_rate=16.0),
    "fresh": Rival("new Mid", _subject(start="fresh"), _META_RATES, "the control for the stored Mid"),
}


def put_on(
    base: Base,
    rival: Rival,
    down: DownSource,
    config: TrainingConfig,
    rows: int,
    seeds: list[int],
    start: dict[str, Tensor] | None = None,
) -> AdapterStack | WordStack:
    """Put a method on the denoiser and stack it; `take_off` takes it off again.

    Args:
        rows: number of rows; row n has the random start of seed `seeds[n % len(seeds)]`.
        start: where every row starts instead, by parameter name.
    """
    denoiser = base.denoiser
    if rival.word is not None:
        return WordStack(base, rows, rival.word)
    if rival.config is None:
        denoiser.requires_grad_(True)
        return AdapterStack(denoiser, rows)
    starts: list[dict[str, Tensor]] = []
    for seed in reversed(seeds):  # what is frozen is that of the first seed, for all rows
        restore(denoiser, every=True)
        with given(down):
            put_adapter(base, rival.config(base.target_modules, down), replace(config, seed=seed))
        starts.insert(0, {name: p.detach().clone() for name, p in denoiser.named_parameters() if p.requires_grad})
    if rival.least:
        TimeRank(denoiser, rival.least)
    denoiser.eval()  # LoHa and LoKr toss a coin in training, even for a dropout of 0
    if start is not None:
        starts = [start]
    return AdapterStack(denoiser, rows, [starts[row % len(starts)] for row in range(rows)])


def take_off(base: Base) -> None:
    """The base as it was, all of the denoiser frozen."""
    WordStack.take_off(base)
    TimeRank.take_off(base.denoiser)
    restore(base.denoiser, every=True)
    base.denoiser.requires_grad_(False)


@contextmanager
def vmap_ready() -> Iterator[None]:
    """While open, LoHa and OFT run without custom autograd and in-place arithmetic, with equal values."""
    replaced = [
        (loha, "make_weight", _loha_weight),
        (OFTRotationModule, "_pytorch_skew_symmetric", _skew_symmetric),
        (OFTRotationModule, "_cayley_batch", _cayley),
    ]
    kept = [getattr(owner, name) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(replaced, kept, strict=True):
            setattr(owner, name, function)


def _loha_weight(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor, scale: Tensor) -> Tensor:
    return ((w1a @ w1b) * (w2a @ w2b)) * scale


def _skew_symmetric(self: Any, vec: Tensor, block_size: int) -> Tensor:
    # Entry (i, j) of the result is taken from [vec, -vec, 0].
    count = vec.shape[-1]
    where = torch.full((block_size, block_size), 2 * count, device=vec.device)
    numbers = torch.arange(count, device=vec.device)
    where[self.rows, self.cols], where[self.cols, self.rows] = numbers, numbers + count
    parts = torch.cat([vec, -vec, torch.zeros_like(vec[:, :1])], dim=1)
    return parts.index_select(1, where.flatten()).unflatten(1, (block_size, block_size))


def _cayley(
    self: Any, vec: Tensor, block_size: int, use_cayley_neumann: bool = True, num_neumann_terms: int = 5
) -> Tensor:
    if not use_cayley_neumann or num_neumann_terms < 3:
        raise NotImplementedError("expected the Cayley-Neumann series with 3 terms or more")
    skew = self._pytorch_skew_symmetric(vec, block_size)
    power = skew @ skew
    result = torch.eye(block_size, device=vec.device, dtype=vec.dtype) + 2 * skew + 2 * power
    for _ in range(3, num_neumann_terms - 1):
        power = power @ skew
        result = result + 2 * power
    return (result + power @ skew).to(vec.dtype)
