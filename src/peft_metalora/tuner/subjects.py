# SPDX-License-Identifier: Apache-2.0
"""Which subject each sample of a batch shows, or each token of an image.

For samples it is one index, shared by all layers of a model and written in place: because its tensors stay where they
are, neither a swap of subjects nor another mix of them changes a compiled graph. For tokens it is one table for each
kind of layer (`TokenSlots`), which goes before the samples' index. All work on anything with Meta-LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import SubjectIndexError

if TYPE_CHECKING:
    from .layer import MetaLoraLayer

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
                "Give set_subjects one subject for each sample."
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


def meta_lora_layers(model: nn.Module) -> Iterator[tuple[str, MetaLoraLayer]]:
    """Yield (path, layer) for each Meta-LoRA layer; the path is the base model's, without PEFT's wrappers."""
    from .layer import MetaLoraLayer

    for name, module in model.named_modules():
        if isinstance(module, MetaLoraLayer):
            yield module_path(name), module


def module_path(name: str) -> str:
    """Return a module's name in the bare base model: no PEFT, FSDP or compile wrappers in it."""
    for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "base_layer."):
        name = name.replace(wrapper, "")
    return name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.model.") else name


def set_subjects(model: nn.Module, index: Sequence[int] | Tensor | None) -> None:
    """Say which slot each sample of the coming batches uses.

    Args:
        model: anything that holds Meta-LoRA layers.
        index: one slot for each sample, -1 for no subject (exactly the base); None: every sample uses slot 0.

    Raises:
        SubjectIndexError: an index that no active adapter has, or an adapter is merged.
    """
    layers = [layer for _, layer in meta_lora_layers(model)]
    if not layers:
        raise SubjectIndexError("The model holds no Meta-LoRA layers. Add an adapter before choosing subjects.")
    values = _checked_values(layers, index)
    written: set[int] = set()
    for layer in layers:
        if id(layer.subject_index) not in written:
            written.add(id(layer.subject_index))
            layer.subject_index.write(values, layer.adapter_device())


def set_token_slots(model: nn.Module, tables: Mapping[str, TokenSlots] | None) -> None:
    """Say from which table each layer reads the slots of its tokens; the samples' index does not count meanwhile.

    Args:
        model: anything that holds Meta-LoRA layers.
        tables: by the path of a layer; layers without one show no subject. None: back to the index of samples.

    Raises:
        SubjectIndexError: an adapter is merged.
    """
    layers = list(meta_lora_layers(model))
    if tables is not None:
        _refuse_merged([layer for _, layer in layers])
    nobody = TokenSlots()
    for path, layer in layers:
        layer.token_slots = None if tables is None else tables.get(path, nobody)


def _refuse_merged(layers: list[MetaLoraLayer]) -> None:
    if any(layer.merged for layer in layers):
        raise SubjectIndexError(
            "A subject is merged into the base weights, so every sample shows it. Unmerge it before choosing subjects."
        )


def _checked_values(layers: list[MetaLoraLayer], index: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    if index is None:
        return None
    raw = index.tolist() if isinstance(index, Tensor) else list(index)
    if not raw or not all(isinstance(value, int) and not isinstance(value, bool) for value in raw):
        raise SubjectIndexError(f"The subject index must be whole numbers, one for each sample, got {raw!r}.")
    slots = min((layer.active_slots() for layer in layers), default=1)
    wrong = sorted({value for value in raw if not NO_SUBJECT <= value < slots})
    if wrong:
        raise SubjectIndexError(
            f"The active adapter holds {slots} slot(s), numbered 0 to {slots - 1} (-1 = no subject); got {wrong}. "
            "Raise num_slots or choose other subjects."
        )
    _refuse_merged(layers)
    return tuple(raw)


@contextmanager
def subjects(model: nn.Module, index: Sequence[int] | Tensor | None) -> Iterator[None]:
    """`set_subjects` for the length of a `with` block; the index before it comes back afterwards."""
    before = next((layer.subject_index.values for _, layer in meta_lora_layers(model)), None)
    set_subjects(model, index)
    try:
        yield
    finally:
        set_subjects(model, before)
