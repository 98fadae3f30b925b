# SPDX-License-Identifier: Apache-2.0
"""A fixed number of subjects on the device, any number behind them: the table that serves many people on one model.

The table is one subject adapter with `capacity` slots. All its slots lie in one tensor, a row a subject, so that
bringing somebody in is one copy in place: no injection, no new module, nothing for torch.compile to see. Rows of those
who are not on the device wait in host memory; beyond `host_capacity` the least recently used are dropped and read again
from where they came when they are needed.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.factors import check_subject_on_down
from ..errors import AdapterNotFoundError, AdapterStateError, NonFiniteError
from ..tuner import DownSource, MetaLoraConfig
from ..tuner.down import MAGNITUDE, MID, UP, subject_config
from ..tuner.on_model import meta_lora_layers
from ..tuner.placing import activate, active_adapters, inject
from ..tuner.ranks import ranks_of
from .denoiser import books_of, lock_of, own_factors, while_idle

_PARTS = (MID, UP, MAGNITUDE)


@dataclass(frozen=True)
class Statistics:
    """What a table has done: subjects found on the device, in host memory, read again; and put out of each."""

    capacity: int
    on_device: int
    in_host_memory: int
    registered: int
    device_hits: int
    device_misses: int
    host_misses: int
    device_evictions: int
    host_evictions: int


class SubjectTable:
    """Slots on one model for the subjects of one Down.

    What changes a slot waits while the model generates in another thread; `register` fills host memory and does not.

    Args:
        model: a diffusers model or any other; the adapter is added to it, not active.
        down: the Down of all subjects here.
        capacity: subjects on the device at once.
        host_capacity: rows in host memory; None for no limit.

    Raises:
        AdapterStateError: a capacity below 1.
    """

    def __init__(self, model: nn.Module, down: DownSource, capacity: int, host_capacity: int | None = None) -> None:
        if capacity < 1 or (host_capacity is not None and host_capacity < 1):
            raise AdapterStateError(
                f"expected room for a subject, found {capacity=}, {host_capacity=}. Give at least 1."
            )
        self.down, self.capacity, self.host_capacity = down, capacity, host_capacity
        self.adapter_name = f"slots-{down.fingerprint[:8]}"
        self.config = subject_config(
            down, num_slots=capacity, start="stored", down=self.adapter_name, inference_mode=True
        )
        before = active_adapters(model)
        inject(model, self.config, self.adapter_name, down)
        activate(model, before)
        self._model, self._lock, self._books = weakref.ref(model), lock_of(model), books_of(model)
        self._layers = [(path, layer) for path, layer in meta_lora_layers(model) if self._has(layer)]
        self._device_order: OrderedDict[str, int] = OrderedDict()
        self._host: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._read: dict[str, Callable[[], Mapping[str, torch.Tensor]] | None] = {}
        self._pinned: set[str] = set()
        self._replaced: set[str] = set()  # their slots hold what they were
        self._written = False
        self._counts = dict.fromkeys(
            ("device_hits", "device_misses", "host_misses", "device_evictions", "host_evictions"), 0
        )
        self._pack()

    def _has(self, layer: Any) -> bool:
        return self.adapter_name in layer.metalora_mid

    @contextmanager
    def _idle(self) -> Iterator[None]:
        with self._lock, self._books:
            yield

    # Subjects

    def __contains__(self, name: object) -> bool:
        return name in self._read

    def is_own(self, name: str) -> bool:
        """Whether a subject is in the table by itself, not as the row of a loaded adapter."""
        return self._read.get(name) is not None

    def names(self) -> list[str]:
        """All subjects of the table, on the device or not."""
        return list(self._read)

    def register(
        self,
        name: str,
        config: MetaLoraConfig,
        tensors: Mapping[str, torch.Tensor],
        read: Callable[[], Mapping[str, torch.Tensor]] | None = None,
    ) -> None:
        """Put a subject into host memory; one of that name that is here already is replaced, for the next image on.

        Args:
            config: the subject's; its scale may differ from the Down's and is taken into Up.
            tensors: as `load_subject` gives them.
            read: gives the tensors again after they have left host memory; without it they never leave.

        Raises:
            AdapterStateError: another rank, or DoRA in one and not in the other.
            MissingKeysError, ForeignKeysError, RankMismatchError: tensors of another Down.
        """
        check_subject_on_down({k: v for k, v in tensors.items() if not k.endswith(_PARTS[2])}, self.down.tensors, name)
        row = self._row(name, config, tensors)
        with self._books:
            self._host[name] = row
            self._host.move_to_end(name)
            self._read[name] = None if read is None else lambda: self._scaled(config, read())
            if name in self._device_order:
                self._replaced.add(name)
            self._trim_host()

    @while_idle
    def bring(self, names: Iterable[str]) -> dict[str, int]:
        """Have these subjects on the device; returns the slot of each. Least recently used others leave for them.

        Raises:
            AdapterNotFoundError: a name that was not registered.
            AdapterStateError: more than the capacity, or too many are pinned.
        """
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            if name not in self._read:
                raise AdapterNotFoundError(
                    f"expected a subject of this table, found {name!r}. Add it with add_subject."
                )
        if len(set(wanted) | self._pinned) > self.capacity:
            raise AdapterStateError(
                f"expected at most {self.capacity} subjects at once, the {len(self._pinned)} pinned included, found "
                f"{len(set(wanted) | self._pinned)}. Raise capacity, evict some, or generate them in turn."
            )
        self._repack_if_moved()
        for name in wanted:
            if name in self._device_order and name not in self._replaced:
                self._counts["device_hits"] += 1
            else:
                self._counts["device_misses"] += 1
                row, slot = self._host_row(name), self._device_order.get(name)
                slot = self._free_slot(set(wanted)) if slot is None else slot
                self._write(slot, row)
                self._device_order[name] = slot
                self._replaced.discard(name)
            self._device_order.move_to_end(name)
        return {name: self._device_order[name] for name in wanted}

    def preload(self, names: Iterable[str]) -> None:
        """Bring subjects in before they are needed; raises as `bring`."""
        self.bring(names)

    @while_idle
    def pin(self, names: Iterable[str]) -> None:
        """Bring subjects in and keep them on the device; raises as `bring`."""
        names = list(names)
        self.bring(names)
        self._pinned |= set(names)

    @while_idle
    def unpin(self, names: Iterable[str]) -> None:
        """Let pinned subjects leave again."""
        self._pinned -= set(names)

    @while_idle
    def evict(self, names: Iterable[str]) -> None:
        """Take subjects off the device and out of the table, and overwrite what was there.

        Raises:
            AdapterNotFoundError: a name that was not registered.
        """
        names = list(dict.fromkeys(names))
        for name in names:
            if name not in self._read:
                raise AdapterNotFoundError(f"expected a subject of this table, found {name!r}. See names().")
        self._repack_if_moved()
        for name in names:
            slot = self._device_order.pop(name, None)
            if slot is not None:
                self._write(slot, torch.zeros_like(self._flat[slot]))
            self._host.pop(name, None)
            self._pinned.discard(name)
            self._replaced.discard(name)
            del self._read[name]

    def statistics(self) -> Statistics:
        """How full the table is and what it has done."""
        with self._books:
            return Statistics(self.capacity, len(self._device_order), len(self._host), len(self._read), **self._counts)

    # Rows

    def _pack(self) -> None:
        """Move all slots of all layers into one tensor (capacity, size of a subject) that the layers look into."""
        pieces = [
            (layer, part) for _, layer in self._layers for part in _PARTS if self.adapter_name in getattr(layer, part)
        ]
        parameters = [getattr(layer, part)[self.adapter_name] for layer, part in pieces]
        self._flat = torch.cat([parameter.detach().flatten(1) for parameter in parameters], dim=1)
        start = 0
        for parameter in parameters:
            stop = start + parameter[0].numel()
            parameter.data = self._flat[:, start:stop].view(parameter.shape)
            start = stop

    def _repack_if_moved(self) -> None:
        parameter = self._layers[0][1].metalora_mid[self.adapter_name]
        if parameter.untyped_storage().data_ptr() != self._flat.untyped_storage().data_ptr():
            if (model := self._model()) is not None:
                own_factors(model)
            self._pack()

    def take_written(self) -> bool:
        """Whether rows were written since this was last asked."""
        written, self._written = self._written, False
        return written

    def _row(self, name: str, config: MetaLoraConfig, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if config.use_dora != self.config.use_dora:
            raise AdapterStateError(
                f"{name}: expected use_dora={self.config.use_dora}, as its Down has, found {config.use_dora}. Load it "
                "with load_meta_lora instead."
            )
        return self._flatten(name, self._scaled(config, tensors))

    def _flatten(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pieces = []
        for path, layer in self._layers:
            for part in _PARTS:
                if self.adapter_name not in getattr(layer, part):
                    continue
                tensor, shape = tensors[f"{path}.{part}"], getattr(layer, part)[self.adapter_name].shape[1:]
                if tensor.shape[1:] != shape:
                    raise AdapterStateError(
                        f"{name}: expected {path}.{part} of shape {tuple(shape)}, as all of the table have, found "
                        f"{tuple(tensor.shape[1:])}. Load it with load_meta_lora instead."
                    )
                pieces.append(tensor[0].flatten().to(self._flat.dtype))
        row = torch.cat(pieces).cpu()
        if not torch.isfinite(row).all():
            raise NonFiniteError(
                f"{name}: expected numbers that {row.dtype} can hold, found more than that. Load the base model in "
                "bfloat16 or float32."
            )
        return row.pin_memory() if self._flat.is_cuda else row

    def _scaled(self, config: MetaLoraConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The subject's own scale taken into Up, relative to the table's."""
        scaled = dict(tensors)
        for path, _ in self._layers:
            ratio = ranks_of(config, path).scaling / ranks_of(self.config, path).scaling
            if ratio != 1 and f"{path}.{UP}" in scaled:
                scaled[f"{path}.{UP}"] = scaled[f"{path}.{UP}"] * ratio
        return scaled

    def _host_row(self, name: str) -> torch.Tensor:
        if name not in self._host:
            self._counts["host_misses"] += 1
            read = self._read[name]
            if read is None:  # rows that cannot be read again are never dropped
                raise AdapterNotFoundError(f"expected {name!r} in host memory, found nothing. Register it again.")
            self._host[name] = self._flatten(name, read())
        self._host.move_to_end(name)
        row = self._host[name]
        self._trim_host()
        return row

    def _write(self, slot: int, row: torch.Tensor) -> None:
        with torch.no_grad():
            self._flat[slot].copy_(row, non_blocking=True)
        self._written = True
        for _, layer in self._layers:
            if self.adapter_name in layer.metalora_folded:
                layer.fold(self.adapter_name, slot)

    def _free_slot(self, wanted: set[str]) -> int:
        if len(self._device_order) < self.capacity:
            return min(set(range(self.capacity)) - set(self._device_order.values()))
        leaving = next(name for name in self._device_order if name not in wanted and name not in self._pinned)
        self._counts["device_evictions"] += 1
        self._replaced.discard(leaving)
        return self._device_order.pop(leaving)

    def _trim_host(self) -> None:
        over = 0 if self.host_capacity is None else len(self._host) - self.host_capacity
        if over <= 0:
            return
        for name in [name for name in self._host if self._read.get(name) is not None][:over]:
            del self._host[name]
            self._counts["host_evictions"] += 1


_tables: weakref.WeakKeyDictionary[nn.Module, dict[str, SubjectTable]] = weakref.WeakKeyDictionary()
_guard = threading.Lock()


def tables_of(model: nn.Module) -> dict[str, SubjectTable]:
    """The tables on a model, by the fingerprint of their Down; all pipelines that share the model share them."""
    with _guard:
        return _tables.setdefault(model, {})


def sample_slots(subjects: Sequence[str | None], slots: Mapping[str, int], prompts: int, images: int) -> list[int]:
    """The slot of each sample of a batch, -1 for none, in the order in which pipelines repeat their prompts.

    Args:
        subjects: one for each prompt, or one for each image of each prompt, or a single one for all.
        slots: where each subject lies.
        prompts: number of prompts.
        images: images per prompt.

    Raises:
        AdapterStateError: another number of subjects.
    """
    index = [-1 if name is None else slots[name] for name in subjects]
    if len(index) == 1:
        return index * (prompts * images)
    if len(index) == prompts:
        return [slot for slot in index for _ in range(images)]
    if len(index) == prompts * images:
        return index
    raise AdapterStateError(
        f"expected one subject for each of {prompts} prompts (or of {prompts * images} images), found {len(index)}. "
        "Use None where nobody shall appear."
    )
