# SPDX-License-Identifier: Apache-2.0
"""Which subject each sample of a batch shows: one index, shared by all layers of a model and written in place.

Because the tensors of the index stay where they are, neither a swap of subjects nor another mix of them changes a
compiled graph. `set_subjects` and `subjects` work on anything that holds Meta-LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import SubjectIndexError

if TYPE_CHECKING:
    from .layer import MetaLoraLayer

NO_SUBJECT = -1


class SubjectIndex:
    """The subject of each sample; every Meta-LoRA layer of a model holds the same object.

    `slot` (n,) int64 is the slot to read, 0 where there is no subject, and `present` (n, 1, 1) bool says whether there
    is one. Both are None while every sample uses slot 0, which costs no gather.
    """

    def __init__(self) -> None:
        self.slot: Tensor | None = None
        self.present: Tensor | None = None
        self.values: tuple[int, ...] | None = None

    def write(self, values: tuple[int, ...] | None, device: torch.device) -> None:
        """Set the index; the tensors are overwritten in place if their length and device stay."""
        self.values = values
        if values is None:
            self.slot = self.present = None
            return
        with torch.inference_mode(False):  # or tensors made inside inference_mode could not be overwritten outside
            index = torch.tensor(values, dtype=torch.int64)
            slot, present = index.clamp(min=0), (index >= 0).view(-1, 1, 1)
            if self.slot is None or self.present is None or self.slot.shape != slot.shape or self.slot.device != device:
                self.slot, self.present = slot.to(device), present.to(device)
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
    if any(layer.merged for layer in layers):
        raise SubjectIndexError(
            "A subject is merged into the base weights, so every sample shows it. Unmerge it before choosing subjects."
        )
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
