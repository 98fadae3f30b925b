# SPDX-License-Identifier: Apache-2.0
"""Find the Meta-LoRA layers of a model, and say which subjects it shows; works on anything with such layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import SubjectIndexError
from .layer import MetaLoraLayer
from .subject_index import NO_SUBJECT, TokenSlots


def meta_lora_layers(model: nn.Module) -> Iterator[tuple[str, MetaLoraLayer]]:
    """Yield (path, layer) for each Meta-LoRA layer; the path is the base model's, without PEFT's wrappers."""
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
