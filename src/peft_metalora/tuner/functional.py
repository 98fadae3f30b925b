# SPDX-License-Identifier: Apache-2.0
"""What a user does with the subjects of a model: choose, read, write, fold; works on anything with Meta-LoRA layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import AdapterStateError, SubjectIndexError
from .config import STARTS
from .down import MAGNITUDE, MID, UP
from .folding import folds_follow
from .merging import MERGE_BACKUPS
from .on_model import Seen, layers_of, meta_lora_layers, require_slot, seen
from .subject_index import NO_SUBJECT, TokenSlots


def set_slots(model: nn.Module, slots: Sequence[int] | Tensor | None, *, each: bool = False) -> None:
    """Say which slot each sample of the coming batches uses.

    Args:
        model: anything that holds Meta-LoRA layers.
        slots: one number for each sample, -1 for no subject (exactly the base); None: every sample uses slot 0.
        each: a batch of k times these samples holds each of them k times in a row, as frames are flattened; by default
            all of them k times, as for guidance.

    Raises:
        SubjectIndexError: a slot that no active adapter has, or others than now while an adapter is merged.
    """
    known = seen(model)
    if not known.layers:
        raise SubjectIndexError("The model holds no Meta-LoRA layers. Add an adapter before choosing subjects.")
    values = _checked_values(known, slots)
    for index, device in known.homes():
        index.write(values, device, each)


def set_token_slots(model: nn.Module, tables: Mapping[str, TokenSlots] | None) -> None:
    """Say from which table each layer reads the slots of its tokens; the samples' index does not count meanwhile.

    Args:
        model: anything that holds Meta-LoRA layers.
        tables: by the path of a layer; layers without one show no subject. None: back to the index of samples.

    Raises:
        SubjectIndexError: an adapter is merged.
    """
    known = seen(model)
    if tables is not None:
        _refuse_merged(known)
        known.give_tables(tables)
    for index, _ in known.homes():
        index.by_tokens = tables is not None


def _refuse_merged(known: Seen) -> None:
    if known.merged:
        raise SubjectIndexError(
            "A subject is merged into the base weights, so every sample shows it. Unmerge it before choosing subjects."
        )


def _checked_values(known: Seen, slots: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    if slots is None:
        if any(index.values is not None for index, _ in known.homes()):
            _refuse_merged(known)
        return None
    raw = slots.tolist() if isinstance(slots, Tensor) else list(slots)
    if not raw or not all(isinstance(value, int) and not isinstance(value, bool) for value in raw):
        raise SubjectIndexError(f"The subject index must be whole numbers, one for each sample, got {raw!r}.")
    count = known.slots()
    wrong = sorted({value for value in raw if not NO_SUBJECT <= value < count})
    if wrong:
        raise SubjectIndexError(
            f"The active adapter holds {count} slot(s), numbered 0 to {count - 1} (-1 = no subject); got {wrong}. "
            "Raise num_slots or choose other subjects."
        )
    _refuse_merged(known)
    return tuple(raw)


@contextmanager
def using_slots(model: nn.Module, slots: Sequence[int] | Tensor | None) -> Iterator[None]:
    """`set_slots` for the length of a `with` block; what was set before it comes back afterwards."""
    before = [(index, index.written, device) for index, device in seen(model).homes()]
    set_slots(model, slots)
    try:
        yield
    finally:  # unchecked: what was merged in the block stays merged, whatever the index says
        for index, written, device in before:
            index.write(written.values, device, written.each)


def set_warmup(model: nn.Module, enabled: bool, adapter_name: str = "default") -> None:
    """Freeze (or release) the Down of a stage 'meta' adapter while fresh Mids and Ups settle.

    Raises:
        AdapterNotFoundError: no such adapter.
        AdapterStateError: the adapter is a subject, whose Down is always frozen.
    """
    layers = layers_of(model, adapter_name)
    if any(layer.stage[adapter_name] != "meta" for _, layer in layers):
        raise AdapterStateError(f"Adapter {adapter_name!r} is a subject: its Down never trains. Warm-up is for 'meta'.")
    for _, layer in layers:
        layer.warmup[adapter_name] = enabled
        layer.sync_down()


def reset_slots(
    model: nn.Module, adapter_name: str = "default", start: str = "stored", slots: Sequence[int] | None = None
) -> None:
    """Start slots anew, in place: 'stored' (the Down's Mid, the same in each; Up = 0), 'mean' or 'fresh'.

    Raises:
        AdapterNotFoundError: no such adapter.
        AdapterStateError: an unknown start or slot.
    """
    if start not in STARTS:
        raise AdapterStateError(f"start must be one of {', '.join(map(repr, STARTS))}, got {start!r}.")
    layers = layers_of(model, adapter_name)
    for slot in slots or ():
        require_slot(layers[0][1], adapter_name, slot)
    for _, layer in layers:
        layer.start_slots(adapter_name, start, None if slots is None else list(slots))


def subject_state(model: nn.Module, adapter_name: str, slot: int = 0) -> dict[str, Tensor]:
    """Return one subject: `{module}.metalora_mid` (r, meta_r) and `{module}.metalora_up` (d_out, r) as (1, ...) views.

    Raises:
        AdapterNotFoundError: no such adapter.
        AdapterStateError: no such slot.
    """
    layers = layers_of(model, adapter_name)
    require_slot(layers[0][1], adapter_name, slot)
    state: dict[str, Tensor] = {}
    for path, layer in layers:
        state[f"{path}.{MID}"] = layer.metalora_mid[adapter_name].detach()[slot : slot + 1]
        state[f"{path}.{UP}"] = layer.metalora_up[adapter_name].detach()[slot : slot + 1]
        if adapter_name in layer.metalora_magnitude:
            state[f"{path}.{MAGNITUDE}"] = layer.metalora_magnitude[adapter_name].detach()[slot : slot + 1]
    return state


@torch.no_grad()
def write_subject(model: nn.Module, adapter_name: str, state: dict[str, Tensor], slot: int = 0) -> None:
    """Copy a subject (as from `subject_state`) into a slot, in place; a cached fold of the slot follows.

    Raises:
        AdapterNotFoundError: no such adapter.
        AdapterStateError: no such slot, or keys or shapes that differ; nothing is written then.
    """
    layers = layers_of(model, adapter_name)
    require_slot(layers[0][1], adapter_name, slot)
    pairs: list[tuple[Tensor, Tensor]] = []
    wanted: set[str] = set()
    for path, layer in layers:
        for part in (MID, UP, MAGNITUDE):
            if adapter_name not in getattr(layer, part):
                continue
            wanted.add(f"{path}.{part}")
            target, source = getattr(layer, part)[adapter_name][slot], state.get(f"{path}.{part}")
            if source is None or source.shape[-target.dim() :] != target.shape or source.numel() != target.numel():
                found = "nothing" if source is None else tuple(source.shape)
                raise AdapterStateError(
                    f"{path}.{part} must be {(1, *target.shape)}, found {found}. The subject belongs to another Down."
                )
            pairs.append((target, source.view(target.shape)))
    foreign = sorted(set(state) - wanted)
    if foreign:
        raise AdapterStateError(f"The subject has {len(foreign)} key(s) the adapter lacks, for example {foreign[0]!r}.")
    with folds_follow([layer for _, layer in layers], adapter_name, slot):
        for target, source in pairs:
            target.copy_(source)


def fold(model: nn.Module, adapter_names: Sequence[str] | None = None) -> None:
    """Cache Mid @ Down of every slot, so that inference costs what a rank-r LoRA costs and never touches Down.

    Layers fold by themselves what is frozen and shown to a whole batch; this folds for batches of several subjects and
    for compiled graphs. `write_subject` and `load_state_dict` keep a fold up to date; other writes put it out of use,
    and so does training. A compiled graph does not notice those: fold again then. A pipeline does so by itself.

    Args:
        adapter_names: which adapters; all of them by default.
    """
    for _, layer in meta_lora_layers(model):
        for name in layer.metalora_mid if adapter_names is None else adapter_names:
            if name in layer.metalora_mid:
                layer.fold(name)


def set_merge_backup(model: nn.Module, where: str) -> None:
    """Say where `merge` keeps the weight from before, from which `unmerge` restores it bit for bit.

    Args:
        where: 'device' (default; one more copy of the merged weights where they are, nothing to compute), 'host' (in
            main memory; a transfer each way) or 'none' (no memory; `unmerge` raises).

    Raises:
        AdapterStateError: another word, or an adapter is merged already.
    """
    if where not in MERGE_BACKUPS:
        raise AdapterStateError(f"The merge backup must be one of {MERGE_BACKUPS}, got {where!r}.")
    layers = [layer for _, layer in meta_lora_layers(model)]
    if any(layer.merged for layer in layers) and where != "none":
        raise AdapterStateError("An adapter is merged. Unmerge it before choosing where its weight is kept.")
    for layer in layers:
        layer.merge_backup = where


def unfold(model: nn.Module) -> None:
    """Forget every fold."""
    for _, layer in meta_lora_layers(model):
        layer.unfold()
