# SPDX-License-Identifier: Apache-2.0
"""Which subject each sample of a batch shows, or each token of an image, as the layers of a model see it.

For samples it is one index, shared by all layers of a model and written in place: because its tensors stay where they
are, neither a swap of subjects nor another mix of them changes a compiled graph. For tokens it is one table for each
kind of layer (`TokenSlots`), which goes before the samples' index. What holds for a call alone stands in the index too,
so that no call has to visit the layers."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SubjectIndexError

NO_SUBJECT = -1

state_of_layers = object()
"""Another object after every change of the layers of any model: adapters that come, go, are chosen or merged."""


def layers_changed() -> None:
    """Say that what was seen of a model's layers may hold no more."""
    global state_of_layers
    state_of_layers = object()  # no counter: two threads could count one


class Chosen(NamedTuple):
    """The slot of each row (rows,) int64, whether it has one (rows, 1, 1) bool, and whether all are known to have."""

    slot: Tensor
    present: Tensor
    complete: bool = False


class Written(NamedTuple):
    """An index: a slot for each sample, None for slot 0 everywhere, and how a larger batch repeats it."""

    values: tuple[int, ...] | None = None
    each: bool = False


_ELSEWHERE = Written((), each=True)  # the numbers are in a tensor alone


class SubjectIndex:
    """The subject of each sample; every Meta-LoRA layer of a model holds the same object.

    `slot` (n,) int64 is the slot to read, 0 where there is no subject, and `present` (n, 1, 1) bool says whether there
    is one. Both are None while every sample uses slot 0, which costs no gather. `complete`: no sample is without one.
    `one`: the slot that all samples show, -1 for nobody; None if they show several.
    `shown`: adapters that the layers show in the place of their active ones. `by_tokens`: each layer's table of tokens
    counts, not this index; `tables` are those that the layers have.
    """

    def __init__(self) -> None:
        self.shown: tuple[str, ...] | None = None
        self.by_tokens = False
        self.tables: Mapping[str, TokenSlots] | None = None
        self.tables_state: object = None  # of the layers, when they were given
        self.factors: object = None  # another one after a write that torch does not count on the factors themselves
        self.slot: Tensor | None = None
        self.present: Tensor | None = None
        self.written = Written()
        self.complete = True
        self.one: int | None = 0
        self._for_gradients: tuple[Tensor, Tensor] | None = None  # the same, never overwritten: autograd keeps them
        self.last = Written()  # of the last forward pass
        self._recalled: tuple[Written, Tensor, Tensor] | None = None

    @property
    def values(self) -> tuple[int, ...] | None:
        """The slot of each sample, None for slot 0 everywhere."""
        return self.written.values

    def write(self, values: tuple[int, ...] | None, device: torch.device, each: bool = False) -> None:
        """Set the index; the tensors are overwritten in place if their length and device stay.

        Args:
            values: the slot of each sample, -1 for no subject; None: slot 0 everywhere.
            device: where the layers are.
            each: how a batch of k times the index repeats it: each sample k times in a row, as a denoiser of videos
                flattens its frames, or else the index as a whole, as pipelines repeat their prompts for guidance.
        """
        written = Written(values, each)
        if written == self.written and (self.slot is None or self.slot.device == device):
            return
        if self.written == _ELSEWHERE:  # not to be overwritten
            self.slot = self.present = None
        self.written = written
        self.complete = values is None or NO_SUBJECT not in values
        self.one = 0 if values is None else values[0] if len(set(values)) == 1 else None
        if values is None:
            self.slot = self.present = self._for_gradients = None
            return
        with torch.inference_mode(False):  # or tensors made inside inference_mode could not be overwritten outside
            slot, present = self._for_gradients = _tensors(values, device)
            if self.slot is None or self.present is None or self.slot.shape != slot.shape or self.slot.device != device:
                self.slot, self.present = slot.clone(), present.clone()
            else:
                self.slot.copy_(slot)
                self.present.copy_(present)

    def read_from(self, slots: Tensor) -> None:
        """Take the slot of each sample from a tensor (n,) int64 on the device of the layers; all samples have one.

        The host never looks into it, so that a recorded pass serves any slots.
        """
        self.written, self.complete, self.one = _ELSEWHERE, True, None
        self.slot, self.present = self._for_gradients = slots, torch.ones_like(slots, dtype=torch.bool).view(-1, 1, 1)

    def select(self, rows: int, device: torch.device) -> Chosen | None:
        """Return each row's slot for a batch, or None if every sample uses slot 0 or there is none.

        A forward pass that activation checkpointing repeats sees what it saw the first time.

        Raises:
            SubjectIndexError: the batch is no multiple of the index.
        """
        slot, present, each, complete = self.slot, self.present, self.written.each, False
        if not torch.compiler.is_compiling():
            complete = self.complete
            if torch.is_grad_enabled() and self._for_gradients is not None:
                slot, present = self._for_gradients
            if (then := self._of_the_first_time()) is not None:
                each, complete = then.each, then.values is None or NO_SUBJECT not in then.values
                slot, present = self._again(then, device) if then.values is not None else (None, None)
        if slot is None or present is None or rows == 0:  # a batch without samples shows nobody
            return None
        if slot.device != device:
            slot, present = slot.to(device), present.to(device)
        length = slot.shape[0]
        if rows == length:
            return Chosen(slot, present, complete)
        if rows % length:
            raise SubjectIndexError(
                f"The batch has {rows} samples, which is no multiple of the {length} subjects that were set. "
                "Give set_slots one subject for each sample."
            )
        times = rows // length
        if each:
            return Chosen(slot.repeat_interleave(times), present.repeat_interleave(times, 0), complete)
        return Chosen(slot.repeat(times), present.repeat(times, 1, 1), complete)

    def _of_the_first_time(self) -> Written | None:
        """In a repeated forward pass: what it was given, if that is not what is written now.

        The pass is repeated during backward, when a `with` block around the loss has long ended."""
        if torch._C._current_graph_task_id() == -1:
            self.last = self.written
            if torch.is_grad_enabled() and (frame := _checkpoint()) is not None:
                _first_time.setdefault(frame, {})[id(self)] = self.written
            return None
        frame = _checkpoint()  # None with use_reentrant=True, which says nothing about the pass
        then = self.last if frame is None else _first_time.setdefault(frame, {}).setdefault(id(self), self.last)
        return None if then == self.written else then

    def _again(self, then: Written, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._recalled is None or self._recalled[0] != then or self._recalled[1].device != device:
            self._recalled = then, *_tensors(then.values or (), device)
        return self._recalled[1:]


_first_time: weakref.WeakKeyDictionary[Any, dict[int, Written]] = weakref.WeakKeyDictionary()
"""By checkpoint and index: what its forward pass was given. A checkpoint lives as long as the graph."""


def _checkpoint() -> Any:
    """The activation checkpoint whose forward pass runs, for the first time or again; None outside of one.

    torch names it nowhere; the hooks that it sets on saved tensors know it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    pack = None if hooks is None else inspect.unwrap(hooks[0])
    names, cells = getattr(getattr(pack, "__code__", None), "co_freevars", ()), getattr(pack, "__closure__", None)
    known = dict(zip(names, cells or (), strict=True))
    if "frame" in known:
        return known["frame"].cell_contents
    return known["target_frame_ref"].cell_contents() if "target_frame_ref" in known else None


def _tensors(values: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Pinned, or the host would wait here until the GPU has done all that is queued.
    index = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda", device="cpu")
    index = index.to(device, non_blocking=True)
    return index.clamp(min=0), (index >= 0).view(-1, 1, 1)


def gather(stacked: Tensor, chosen: Chosen | None, complete: bool = False) -> Tensor:
    """Each sample's slot of a stacked factor (slots, ...) -> (rows, ...), zero where there is no subject.

    `complete` says that each sample has one, which saves a kernel in each direction.

    Without an index (1, ...): the first slot, or the factor itself where there is only one, which costs nothing.
    """
    if chosen is None:
        return stacked if stacked.shape[0] == 1 else stacked[:1]
    own = stacked.index_select(0, chosen.slot)  # the gradient of stacked[slot] is a sort and more
    return own if complete else torch.where(chosen.present, own, 0)


Positions = list[tuple[int, Tensor]]  # a slot and the places of a flattened image or text that show it


class TokenSlots:
    """The slot of each token, the same for every sample of a batch; layers that see the same tokens share one object.

    Layers see an image in several shapes, so a table holds a map for each: (tokens,) for a linear layer's input
    (batch, tokens, d_in), (h, w) for what a convolution gives. While nothing is written, no token has a subject.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[int, ...], Positions] = {}

    def write(self, maps: Mapping[tuple[int, ...], Tensor], device: torch.device) -> None:
        """Set all maps at once.

        Args:
            maps: by shape, int64 of that shape: the slot of each token, -1 for no subject.
            device: where the layers are.
        """
        self._parts = {}
        for shape, slots in maps.items():
            flat = slots.flatten()
            present = sorted(set(flat.tolist()) - {NO_SUBJECT})
            self._parts[shape] = [(slot, torch.nonzero(flat == slot).flatten().to(device)) for slot in present]

    def positions(self, shape: tuple[int, ...], device: torch.device) -> Positions:
        """Where each subject is in an input of that shape; nowhere in one without tokens, such as a time embedding.

        Raises:
            SubjectIndexError: the shape is none of the image's.
        """
        if not self._parts or not shape:
            return []
        if shape not in self._parts:
            raise SubjectIndexError(
                f"A layer sees {shape} tokens, the image has {sorted(self._parts)}. Leave that layer out of "
                "target_modules, or out of the tables of tokens."
            )
        return [(slot, where.to(device)) for slot, where in self._parts[shape]]
