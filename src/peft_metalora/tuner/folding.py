# SPDX-License-Identifier: Apache-2.0
"""The part of an adapted layer that folds: Mid @ Down kept as one factor, so that inference never touches Down.

Two kinds. `fold` keeps one for all slots of an adapter, as a buffer that a compiled graph can read. And by itself a
layer keeps one of the frozen subject that a whole batch shows, from the first pass on. Either is used only while the
factors are those that it was made of, which torch's version counters tell; what trains is never folded by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .down import DOWN, MID, UP, Downs
from .ranks import scale_of
from .subject_index import SubjectIndex

transformed = torch._C._are_functorch_transforms_active  # as torch.autograd.Function asks: vmap, grad and their kin
autocast_somewhere = torch._C._is_any_autocast_enabled  # on any device: a device's name costs more than all else here


class Shown(NamedTuple):
    """The one subject that a whole batch shows: scale * up @ factor @ x.

    Attributes:
        mark: what it was made of; a pass that finds another one makes it anew.
        made_of: Mid and Down, held so that no other tensor takes their place in memory and passes for them.
        factor: Mid @ Down, (r, d_in). up: (1, d_out, r).
        adders: by shape and dtype of x, what adds the product onto y.
    """

    mark: tuple[Any, ...]
    made_of: tuple[Tensor, Tensor]
    factor: Tensor
    up: Tensor
    scale: float
    adders: dict[Any, Callable[[Tensor, Tensor], None]]


class Foldable(BaseTunerLayer, nn.Module):
    """Folding of the factors that `MetaLoraLayer` holds."""

    subject_index: SubjectIndex
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_rslora: dict[str, bool]
    fold_scale: dict[str, float]
    fold_mark: dict[str, tuple[Any, ...]]
    down_key: dict[str, str]
    metalora_down: Downs
    metalora_mid: nn.ParameterDict
    metalora_up: nn.ParameterDict
    metalora_folded: BufferDict
    shown_subject: Shown | None

    def _full_scale(self, adapter_name: str) -> float:
        return scale_of(self.lora_alpha[adapter_name], self.r[adapter_name], self.use_rslora[adapter_name])

    @torch.no_grad()
    def fold(self, adapter_name: str, slot: int | None = None) -> None:
        """Cache scaling * Mid @ Down, (slots * r, d_in), for all slots or anew for one: inference then spares Down."""
        self.shown_subject = None  # after a write that torch does not count this is what makes all folds anew
        down = self.metalora_down[self.down_key[adapter_name]]
        scale = self.scaling[adapter_name] or self._full_scale(adapter_name)  # a scale of 0 may be raised again
        if slot is None or adapter_name not in self.metalora_folded:
            with torch.inference_mode(False):  # so that a slot can be written again from anywhere
                folded = self.folded_factor(adapter_name).flatten(0, 1).mul_(scale)
                self.metalora_folded[adapter_name], self.fold_scale[adapter_name] = folded.to(down.dtype), scale
        else:
            rows = slice(slot * self.r[adapter_name], (slot + 1) * self.r[adapter_name])
            folded = self.folded_factor(adapter_name, slot).mul_(self.fold_scale[adapter_name])
            self.metalora_folded[adapter_name][rows].copy_(folded)
        self.fold_mark[adapter_name] = self._mark(adapter_name)

    def unfold(self, adapter_name: str | None = None) -> None:
        """Forget the fold of an adapter, or every fold."""
        self.shown_subject = None
        for name in [*self.metalora_folded] if adapter_name is None else [adapter_name]:
            if name in self.metalora_folded:
                del self.metalora_folded[name], self.fold_scale[name], self.fold_mark[name]

    def is_folded(self, adapter_name: str) -> bool:
        """Whether an adapter has a fold, and its factors are those that it was made of."""
        if adapter_name not in self.metalora_folded or transformed():
            return False
        if torch.compiler.is_compiling():  # once: what writes into factors has their folds follow, see `renew_folds`
            return True
        mark = self._mark(adapter_name)
        return self.fold_mark[adapter_name] == mark and len(mark) == _COUNTED

    def fold_of_slot(self, name: str, slot: int) -> Shown | None:
        """The fold for a batch that shows one subject alone, made if it is not there; None for what may train."""
        mid, up, down = self._held(name)
        mark = _mark_of(mid, up, down), name, slot, self.scaling[name], self.subject_index.factors
        known = self.shown_subject
        if known is not None and known.mark == mark and known.made_of[0] is mid and known.made_of[1] is down:
            return known
        if self.is_folded(name):
            rows = slice(slot * self.r[name], (slot + 1) * self.r[name])
            factor, scale = self.metalora_folded[name][rows], self.scaling[name] / self.fold_scale[name]
        elif any(tensor.requires_grad or tensor.is_inference() for tensor in (mid, up, down)):
            return None  # a write could go unseen
        else:
            with torch.no_grad():
                factor, scale = self.folded_factor(name, slot).mul_(self.scaling[name]).to(down.dtype), 1.0
        self.shown_subject = Shown(mark, (mid, down), factor, up.detach()[slot].unsqueeze(0), scale, {})
        return self.shown_subject

    def _mark(self, name: str) -> tuple[Any, ...]:
        return _mark_of(*self._held(name))

    def _held(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Mid, Up and Down of an adapter. nn.Module's dicts are read directly: every layer asks in every pass."""
        modules: Any = self._modules
        downs, key = modules[DOWN], self.down_key[name]
        try:
            down = downs._buffers[key] if key in downs._buffers else downs._parameters[key]
            return modules[MID]._parameters[name], modules[UP]._parameters[name], down
        except KeyError:  # FSDP with use_orig_params=False has attributes in the place of parameters
            return self.metalora_mid[name], self.metalora_up[name], self.metalora_down[key]

    def folded_factor(self, adapter_name: str, slot: int | None = None) -> Tensor:
        """Return A = Mid @ Down, at least in float32: (slots, r, *down.shape[1:]), or without `slots` for one slot."""
        mid, down = self.metalora_mid[adapter_name].detach(), self.metalora_down[self.down_key[adapter_name]].detach()
        mid = mid if slot is None else mid[slot]
        dtype = dtype_of_sums(mid, down)
        with without_autocast(mid.device):
            flat = mid.to(dtype) @ down.to(dtype).flatten(1)
        return flat.view(*mid.shape[:-1], *down.shape[1:])


def renew_folds(layers: Iterable[Foldable]) -> None:
    """Make anew what folds are not those of the factors as they are: a compiled graph reads them without asking."""
    for layer in layers:
        for name in [*layer.metalora_folded]:
            trains = layer.metalora_mid[name].requires_grad or layer.metalora_up[name].requires_grad
            if trains or not layer.is_folded(name):
                layer.fold(name)
            if trains:  # a compiled step of a fused optimiser leaves no trace
                layer.fold_mark[name] = ()


@contextmanager
def folds_follow(layers: Sequence[Foldable], adapter_name: str, slot: int) -> Iterator[None]:
    """Let a block write the factors of a slot, and the folds of these layers follow."""
    folded = [(layer, layer.is_folded(adapter_name)) for layer in layers if adapter_name in layer.metalora_folded]
    yield
    for layer in layers:
        layer.shown_subject = None
    for layer, is_current in folded:
        layer.fold(adapter_name, slot if is_current else None)


_COUNTED = 6  # of a mark of tensors whose writes torch counts


def _mark_of(mid: Tensor, up: Tensor, down: Tensor) -> tuple[int, ...]:
    """How often factors were written and where they are; of what was made in inference mode only the latter."""
    try:
        return mid._version, up._version, down._version, mid.data_ptr(), up.data_ptr(), down.data_ptr()
    except RuntimeError:
        return mid.data_ptr(), up.data_ptr(), down.data_ptr()


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For products of factors: autocast would form them in 16 bits, and a fold or a merged weight outlives it."""
    off = autocast_somewhere() and torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if off else nullcontext()


def dtype_of_sums(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where a tensor has it; torch promotes no eight-bit floats, which are for storage."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
