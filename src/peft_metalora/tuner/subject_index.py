# SPDX-License-Identifier: Apache-2.0
"""Which subject each sample of a batch shows, or each token of an image, as the layers of a model see it.

For samples it is one index, shared by all layers of a model and written in place: because its tensors stay where they
are, neither a swap of subjects nor another mix of them changes a compiled graph. For tokens it is one table for each
kind of layer (`TokenSlots`), which goes before the samples' index."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import SubjectIndexError

NO_SUBJECT = -1
Chosen = tuple[Tensor, Tensor]  # slot (rows,) int64, present (rows, 1, 1) bool


class SubjectIndex:
    """The subject of each sample; every Meta-LoRA layer of a model holds the same object.

    `slot` (n,) int64 is the slot to read, 0 where there is no subject, and `present` (n, 1, 1) bool says whether there
    is one. Both are None while every sample uses slot 0, which costs no gather. `complete`: no sample is without one.
    """

    def __init__(self) -> None:
        self.slot: Tensor | None = None
        self.present: Tensor | None = None
        self.values: tuple[int, ...] | None = None
        self.complete = True

    def write(self, values: tuple[int, ...] | None, device: torch.device) -> None:
        """Set the index; the tensors are overwritten in place if their length and device stay."""
        self.values = values
        self.complete = values is None or NO_SUBJECT not in values
        if values is None:
            self.slot = self.present = None
            return
        with torch.inference_mode(False):  # or tensors made inside inference_mode could not be overwritten outside
            # Pinned, or the host would wait here until the GPU has done all that is queued.
            index = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
            index = index.to(device, non_blocking=True)
            slot, present = index.clamp(min=0), (index >= 0).view(-1, 1, 1)
            if self.slot is None or self.present is None or self.slot.shape != slot.shape or self.slot.device != device:
                self.slot, self.present = slot, present
            else:
                self.slot.copy_(slot)
                self.present.copy_(present)

    def select(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return (slot (rows,), present (rows, 1, 1)) for a batch, or None if every sample uses slot 0.

        A batch of k times the index repeats it as a whole, as pipelines repeat their prompts for guidance.

        Raises:
            SubjectIndexError: the batch is no multiple of the index.
        """
        slot, present = self.slot, self.present
        if slot is None or present is None:
            return None
        if slot.device != device:
            slot, present = slot.to(device), present.to(device)
        length = slot.shape[0]
        if rows == length:
            return slot, present
        if rows % length:
            raise SubjectIndexError(
                f"The batch has {rows} samples, which is no multiple of the {length} subjects that were set. "
                "Give set_slots one subject for each sample."
            )
        return slot.repeat(rows // length), present.repeat(rows // length, 1, 1)


def gather(stacked: Tensor, chosen: Chosen | None, complete: bool = False) -> Tensor:
    """Each sample's slot of a stacked factor (slots, ...) -> (rows, ...), zero where there is no subject.

    `complete` says that each sample has one, which saves a kernel in each direction.

    Without an index (1, ...): the first slot, or the factor itself where there is only one, which costs nothing.
    """
    if chosen is None:
        return stacked if stacked.shape[0] == 1 else stacked[:1]
    slot, present = chosen
    own = stacked.index_select(0, slot)  # the gradient of stacked[slot] is a sort and more
    return own if complete else torch.where(present, own, 0)


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
