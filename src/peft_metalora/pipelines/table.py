# SPDX-License-Identifier: Apache-2.0
"""A fixed number of subjects on the device, any number behind them: the table that serves many people on one model.

The table is one subject adapter with `capacity` slots. All its slots lie in one tensor, a row a subject, so that
bringing somebody in is one copy in place: no injection, no new module, nothing for torch.compile to see. Rows of those
who are not on the device wait in host memory; beyond `host_capacity` the least recently used are dropped and read again
from where they came when they are needed. Of subjects that are codes only the codes wait, and bringing one in is one
expansion into its slot.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..checkpoint.factors import SubjectSource
from ..checkpoint.space import CodeSource, SubjectCode, SubjectSpace
from ..errors import AdapterNotFoundError, AdapterStateError, FingerprintMismatchError
from ..tuner import DownSource, MetaLoraConfig, subject_state
from ..tuner.down import MID_INIT, subject_config
from ..tuner.folding import folds_follow
from ..tuner.on_model import Seen, configs_of, down_on_model, layers_of, seen
from ..tuner.placing import choice_kept, inject
from ..tuner.ranks import exceptions
from .codes import CodeBook
from .denoiser import books_of, is_adapter, lock_of, own_factors, while_idle
from .rows import Rows, SubjectRows

Read = Callable[[Callable[[str], DownSource | None]], SubjectSource]
"""Reads a subject anew, given what finds a Down that is known by its fingerprint."""


@dataclass(frozen=True)
class Statistics:
    """What a table has done: subjects found on the device, in host memory, read again; and put out of each.

    Codes count as in host memory.
    """

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
        host_capacity: rows in host memory, codes aside; None for no limit.

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
        # The Down's own ranks; its configuration may be that of a subject which has others.
        end = f".{MID_INIT}"
        ranks = {key.removesuffix(end): len(mid) for key, mid in down.tensors.items() if key.endswith(end)}
        r = max(ranks.values(), key=[*ranks.values()].count)
        own = {"num_slots": capacity, "start": "stored", "down": self.adapter_name, "inference_mode": True}
        self.config = subject_config(down, r=r, rank_pattern=exceptions(ranks, r), **own)
        with choice_kept(model):
            inject(model, self.config, self.adapter_name, down)
        self._model, self._lock, self._books = weakref.ref(model), lock_of(model), books_of(model)
        self._layers = layers_of(model, self.adapter_name)
        self._slots = SubjectRows(self._layers, self.adapter_name, self.config, down)
        self._device_order: OrderedDict[str, int] = OrderedDict()
        self._host: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._codes: dict[str, CodeBook] = {}  # by the fingerprint of their space
        self._read: dict[str, Read | None] = {}
        self._loaded: dict[str, tuple[Seen, Rows] | None] = {}  # adapters of the model, whose factors are their rows
        self._seen: Seen | None = None  # the model, when it was last made sure who is on it
        self._pinned: set[str] = set()
        self._replaced: set[str] = set()  # their slots hold what they were
        self._drawn: list[set[int]] = []  # slots of the image that is drawn, and of one that its callbacks draw
        self._written = False
        self._counts = dict.fromkeys(
            ("device_hits", "device_misses", "host_misses", "device_evictions", "host_evictions"), 0
        )

    @property
    def _flat(self) -> torch.Tensor:
        return self._slots.flat

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle of the model holds the table as well; locks are of the model that it comes to.
        own: dict[str, Any] = {"_model": self._model(), "_lock": None, "_books": None, "_seen": None, "_drawn": []}
        return {**vars(self), **own, "_loaded": dict.fromkeys(self._loaded)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state["_model"]
        vars(self).update(state, _model=weakref.ref(model), _lock=lock_of(model), _books=books_of(model))

    @contextmanager
    def _idle(self) -> Iterator[None]:
        with self._lock, self._books:
            yield

    # Subjects

    def __contains__(self, name: object) -> bool:
        return name in self._read or self._book_of(name) is not None

    def is_on(self, model: nn.Module) -> bool:
        """Whether the model still has the table's adapter; rows of adapters that it has not any more are dropped."""
        known = seen(model)
        if known is not self._seen:
            _, layer = self._layers[0]
            if not any(reference() is layer for _, reference in known.layers):
                return False
            for name in [*self._loaded]:
                if not self._is_loaded(name):
                    self._forget(name)
            self._seen = known
        return self.adapter_name in configs_of(model)

    def is_alone(self, without: Collection[str]) -> bool:
        """Whether no other adapter stands on the table's Down once these are gone."""
        _, layer = self._layers[0]
        key = layer.down_key[self.adapter_name]
        return all(used != key or name in {self.adapter_name, *without} for name, used in layer.down_key.items())

    def is_own(self, name: str) -> bool:
        """Whether a subject is in the table by itself, not as the row of a loaded adapter."""
        return name in self and name not in self._loaded

    def names(self) -> list[str]:
        """All subjects of the table, on the device or not."""
        with self._books:
            return [*self._read, *(name for book in self._codes.values() for name in book)]

    def register(
        self,
        name: str,
        config: MetaLoraConfig,
        tensors: Mapping[str, torch.Tensor],
        read: Read | None = None,
    ) -> None:
        """Put a subject into host memory; one of that name that is here already is replaced, for the next image on.

        Args:
            config: the subject's; its scale may differ from the Down's and is taken into Up.
            tensors: as `load_subject` gives them.
            read: reads the subject again after it has left host memory, as it is by then; without it, it never leaves.

        Raises:
            AdapterStateError: a loaded adapter's name, another rank, or DoRA in one and not in the other.
            MissingKeysError, ForeignKeysError, RankMismatchError: tensors of another Down.
        """
        row = self._slots.host_copy(name, self._slots.row(name, config, tensors))
        with self._books:
            self._enter(name)
            self._host[name] = row
            self._read[name] = read
            self._trim_host()

    def register_code(self, name: str, subject: SubjectCode, space: SubjectSpace) -> None:
        """Put a subject that is a code into host memory: its numbers alone, some hundred bytes, which never leave it.

        Args:
            subject: a code of `space`, with the ranks and scales of the table.

        Raises:
            AdapterStateError: a loaded adapter's name.
            FingerprintMismatchError: a code for another Down or space.
            MissingKeysError, ShapeMismatchError, NonFiniteError: what a slot of this table cannot hold.
        """
        if subject.down_fingerprint != self.down.fingerprint:
            raise FingerprintMismatchError(
                f"{name}: expected a code for the Down {self.down.fingerprint[:16]}…, found one for "
                f"{subject.down_fingerprint[:16]}…. Add it to the table of that Down."
            )
        book = self._codes.get(subject.space_fingerprint)
        if book is None:  # one without anybody is falsy
            book = CodeBook(self._slots.ordered(space))
        code = book.space.accept(subject)
        if self._flat.dtype == torch.float16:  # the one dtype that a sum in float32 may not fit into
            row = torch.empty_like(self._flat[0])
            book.space.expand_into(code, row)
            self._slots.require_finite(name, row)
        with self._books:
            self._enter(name)
            book = self._codes.get(subject.space_fingerprint, book)
            book.put(name, code)
            # A basis is large; the last one stays for whoever comes next. Who looks somebody up may be in the old one.
            others = {mark: other for mark, other in self._codes.items() if len(other) and other is not book}
            self._codes = {**others, subject.space_fingerprint: book}

    def add(self, name: str, source: SubjectSource, read: Read | None = None) -> None:
        """Put a subject that was read into host memory, one that is a code as its code; raises as the two above."""
        if isinstance(source, CodeSource) and self._slots.scales_alike(source.config):
            self.register_code(name, source.code, source.space)
        else:
            self.register(name, source.config, source.tensors, read)

    def code(self, name: str) -> SubjectCode | None:
        """The code of a subject that is one."""
        with self._books:
            for mark, book in self._codes.items():
                if name in book:
                    return SubjectCode(book.code(name), self.down.fingerprint, mark, name)
        return None

    def space(self, fingerprint: str) -> SubjectSpace | None:
        """A subject space of codes that are here, or were last."""
        book = self._codes.get(fingerprint)
        return None if book is None else book.space

    def _enter(self, name: str) -> None:
        """Let a name be free for a subject that comes, its older self gone."""
        if (model := self._model()) is not None and is_adapter(model, name):
            raise AdapterStateError(
                f"expected a new name for a subject, found {name!r}, which is a loaded adapter's. Give another "
                "name=, or delete_adapters it first."
            )
        self._drop(name)
        if name in self._device_order:
            self._replaced.add(name)

    def _drop(self, name: str) -> None:
        """Forget a subject's numbers in host memory."""
        self._host.pop(name, None)
        self._read.pop(name, None)
        if (book := self._book_of(name)) is not None:
            book.drop(name)

    def _book_of(self, name: object) -> CodeBook | None:
        return next((book for book in self._codes.values() if name in book), None)

    def _is_loaded(self, name: str) -> bool:
        """Whether an adapter of the model is a subject on this Down."""
        for _, layer in self._layers:
            down = layer.down_key.get(self.adapter_name)
            if down is not None and name != down and layer.down_key.get(name) == down:
                return True
        return False

    def _forget(self, name: str) -> int | None:
        """Forget a subject; returns the slot that it had."""
        self._drop(name)
        self._loaded.pop(name, None)
        for names in (self._pinned, self._replaced):
            names.discard(name)
        return self._device_order.pop(name, None)

    @while_idle
    def bring(self, names: str | Iterable[str]) -> dict[str, int]:
        """Have these subjects on the device; returns the slot of each. Least recently used others leave for them.

        Called by a callback while an image is drawn, it leaves the slots of that image as they are.

        Raises:
            AdapterNotFoundError: a name that was neither registered nor loaded.
            AdapterStateError: more than the capacity, or too many are pinned or in the image that is drawn.
        """
        wanted = _each(names)
        for name in wanted:
            if name not in self and self._is_loaded(name):
                self._read[name] = None
                self._loaded[name] = None
            elif name not in self:
                raise AdapterNotFoundError(
                    f"expected a subject of this table, found {name!r}. Add it with add_subject."
                )
        needed = set(wanted) | self._pinned
        drawn = len(self._in_image() - {self._device_order.get(name) for name in needed})
        if len(needed) + drawn > self.capacity:
            raise AdapterStateError(
                f"expected at most {self.capacity} subjects at once, the {len(self._pinned)} pinned and the {drawn} of "
                f"an image that is being drawn included, found {len(needed) + drawn}. Raise capacity, evict some, or "
                "generate them in turn."
            )
        self._repack_if_moved()
        for name in wanted:
            slot, row = self._device_order.get(name), self._adapter_row(name) if name in self._loaded else None
            if slot is not None and (slot in self._in_image() or self._holds(slot, name, row)):
                self._counts["device_hits"] += 1
            else:
                self._counts["device_misses"] += 1
                waiting = self._waiting(name) if row is None else row
                slot = self._free_slot(set(wanted)) if slot is None else slot
                self._write(slot, waiting)
                self._device_order[name] = slot
                self._replaced.discard(name)
            self._device_order.move_to_end(name)
        return {name: self._device_order[name] for name in wanted}

    def _holds(self, slot: int, name: str, row: torch.Tensor | None) -> bool:
        """Whether a subject's slot is what they are now; `row` is what a loaded adapter is."""
        if row is None:
            return name not in self._replaced
        return torch.equal(row.to(self._flat.device), self._flat[slot])

    def preload(self, names: str | Iterable[str]) -> None:
        """Bring subjects in before they are needed; raises as `bring`."""
        self.bring(names)

    @while_idle
    def pin(self, names: str | Iterable[str]) -> None:
        """Bring subjects in and keep them on the device; raises as `bring`."""
        names = _each(names)
        self.bring(names)
        self._pinned |= set(names)

    @while_idle
    def unpin(self, names: str | Iterable[str]) -> None:
        """Let pinned subjects leave again."""
        self._pinned -= {*_each(names)}

    @while_idle
    def evict(self, names: str | Iterable[str]) -> None:
        """Take subjects off the device and out of the table, and overwrite what was there.

        Raises:
            AdapterNotFoundError: a name that was not registered.
        """
        names = _each(names)
        for name in names:
            if name not in self:
                raise AdapterNotFoundError(f"expected a subject of this table, found {name!r}. See names().")
        self._repack_if_moved()
        for name in names:
            slot = self._forget(name)
            if slot is not None:
                self._write(slot, torch.zeros_like(self._flat[slot]))
        for _, layer in self._layers:
            layer.shown_subject = None

    def statistics(self) -> Statistics:
        """How full the table is and what it has done."""
        with self._books:
            codes = sum(map(len, self._codes.values()))
            in_host, registered = len(self._host) + codes, len(self._read) + codes
            return Statistics(self.capacity, len(self._device_order), in_host, registered, **self._counts)

    # Slots, and what fills them

    def _repack_if_moved(self) -> None:
        model = self._model()
        if model is not None and self._slots.moved():
            own_factors(model)
            self._slots.pack()

    def take_written(self) -> bool:
        """Whether rows were written since this was last asked."""
        written, self._written = self._written, False
        return written

    def _adapter_row(self, name: str) -> torch.Tensor:
        """A loaded adapter's factors as they are now; in one tensor, so that a call need not visit the layers."""
        model = cast(nn.Module, self._model())
        known, config, checked = seen(model), configs_of(model)[name], self._loaded[name]
        if checked is None or checked[0] is not known:
            scales = {path: layer.scaling[name] for path, layer in self._layers}  # with the weight of set_adapters
            row = self._slots.row(name, config, subject_state(model, name), scales)
            rows = self._slots.of_adapter(name)
            self._loaded[name] = None if rows is None else (known, rows)
            return row
        if checked[1].moved():
            own_factors(model)
            checked[1].pack()
        return checked[1].flat[0]

    def _waiting(self, name: str) -> torch.Tensor | Callable[[torch.Tensor], None]:
        """What fills a slot with a subject of the table's own."""
        book = self._book_of(name)
        return self._host_row(name) if book is None else partial(book.write, name)

    def _host_row(self, name: str) -> torch.Tensor:
        if name not in self._host:
            self._counts["host_misses"] += 1
            read = self._read[name]
            if read is None:  # rows that cannot be read again are never dropped
                raise AdapterNotFoundError(f"expected {name!r} in host memory, found nothing. Register it again.")
            source = read(self.down.named)
            if source.down.fingerprint != self.down.fingerprint:
                raise FingerprintMismatchError(
                    f"{name}: expected a subject on the Down {self.down.fingerprint[:16]} as when it was added, found "
                    f"one on {source.down.fingerprint[:16]}. Evict it and add_subject it again."
                )
            self._host[name] = self._slots.host_copy(name, self._slots.row(name, source.config, source.tensors))
        self._host.move_to_end(name)
        row = self._host[name]
        self._trim_host()
        return row

    def _write(self, slot: int, row: torch.Tensor | Callable[[torch.Tensor], None]) -> None:
        """Fill a slot: with a row, or by what writes into one."""
        # Whether somebody has folded the model, which is all layers: by themselves they keep no fold of a table.
        folded = self.adapter_name in self._layers[0][1].metalora_folded
        layers = [layer for _, layer in self._layers] if folded else []
        with torch.no_grad(), folds_follow(layers, self.adapter_name, slot):
            if callable(row):
                row(self._flat[slot])
            else:
                self._flat[slot].copy_(row, non_blocking=True)
        self._written = True
        self._layers[0][1].subject_index.factors = object()

    @contextmanager
    def drawing(self, slots: Iterable[int]) -> Iterator[None]:
        """For the length of a `with` block these slots are those of an image: nobody else comes into them."""
        self._drawn.append(set(slots))
        try:
            yield
        finally:
            self._drawn.pop()

    def _in_image(self) -> set[int]:
        return set().union(*self._drawn)

    def _free_slot(self, wanted: set[str]) -> int:
        kept = self._in_image()
        if free := set(range(self.capacity)) - set(self._device_order.values()) - kept:
            return min(free)
        staying = wanted | self._pinned
        leaving = next(name for name, slot in self._device_order.items() if name not in staying and slot not in kept)
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


def _each(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else [*dict.fromkeys(names)]


_TABLES = "_meta_lora_tables"


def tables_of(model: nn.Module) -> dict[str, SubjectTable]:
    """The tables on a model, by the fingerprint of their Down; all pipelines that share the model share them.

    What others took off is not among them: diffusers' `unload_lora_weights` takes every adapter off.
    """
    with books_of(model):
        tables: dict[str, SubjectTable] = vars(model).get(_TABLES, {})
        for fingerprint, table in [*tables.items()]:
            if not table.is_on(model):
                drop_tables(model, fingerprint)
        return dict(tables)


def loaded_configs(model: nn.Module) -> dict[str, Any]:
    """PEFT's configurations of the adapters that somebody loaded, by name: one that holds slots is nobody's."""
    slots = {table.adapter_name for table in tables_of(model).values()}
    return {name: config for name, config in configs_of(model).items() if name not in slots}


def down_known(model: nn.Module, fingerprint: str | None) -> DownSource | None:
    """The Down of this fingerprint if the model has it: a table's, or as `down_on_model` finds it."""
    table = tables_of(model).get(fingerprint or "")
    return down_on_model(model, fingerprint) if table is None else table.down


def put_table(model: nn.Module, table: SubjectTable) -> None:
    """Let a table be the one of its Down on this model."""
    with books_of(model):
        vars(model).setdefault(_TABLES, {})[table.down.fingerprint] = table


def drop_tables(model: nn.Module, fingerprint: str | None = None) -> None:
    """Forget the table of a Down, or all; their adapters are the caller's to remove."""
    with books_of(model):
        tables = vars(model).get(_TABLES, {})
        tables.pop(fingerprint, None)
        if fingerprint is None or not tables:
            vars(model).pop(_TABLES, None)
