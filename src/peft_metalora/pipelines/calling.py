# SPDX-License-Identifier: Apache-2.0
"""A subject for each sample: `pipe(prompt=[...], subjects=["ann", None])`, and the table that stands behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from typing_extensions import Unpack

from ..checkpoint.base_model import check_fits
from ..checkpoint.factors import SubjectSource, listed
from ..checkpoint.space import CodeSource
from ..errors import AdapterNotFoundError, AdapterStateError, RegionError
from ..hub.loading import HubOptions, KnownDown, load_subject
from ..tuner import DownSource, MetaLoraConfig, down_fingerprint
from ..tuner.folding import renew_folds
from ..tuner.on_model import configs_of, down_on_model, meta_layers, seen
from ..tuner.placing import active_adapters, remove_adapters, shown_alone
from .calls import call_on
from .denoiser import (
    books_of,
    denoiser,
    free_name,
    is_adapter,
    lock_of,
    offload_paused,
    own_factors,
    refresh_offload,
    refuse_fused,
)
from .readers import fixed_place, readers_of, remember_place
from .regions import read_regions, shown_in_regions
from .samples import (
    count_samples,
    embeddings_of_each_image,
    read_names,
    require_one_each,
    sample_slots,
    shown_in_samples,
)
from .saving import saved_in_parts
from .table import Read, SubjectTable, drop_tables, loaded_configs, put_table, tables_of


class PerSampleMixin:
    """The call of a pipeline with `subjects=` or `regions=`, and the subjects it can name."""

    def __call__(
        self,
        *args: Any,
        subjects: str | Sequence[str | None] | None = None,
        regions: Sequence[tuple[str | None, Any]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as the pipeline does.

        Args:
            subjects: a name, or one name (None: nobody, exactly the base model) for each prompt or each image. Names
                are those of loaded subjects and of `add_subject`, all of one Down; which adapters are active does not
                count then, ordinary LoRAs aside, their weights do. Without it, the active adapters show, as always.
            regions: pairs of a subject (or None) and its place in every image of the call: a box (x0, y0, x1, y1) in
                pixels, or a mask of the image's size (a PIL image, or a tensor (h, w)). Image tokens show the subject
                of the region that holds most of them, the later one where regions meet; all else, text tokens too, is
                the base; of a clip, in every frame. For UNets and the transformers of FLUX, Qwen-Image, Z-Image, Krea 2
                and Wan.

        Raises:
            AdapterNotFoundError: a subject that is not loaded.
            AdapterStateError: a number of subjects that fits neither prompts nor images, subjects of several Downs, a
                denoiser's batch that is not the images as they are or once for each pass of guidance, something of ours
                that is fused, or adapters that are disabled.
            RegionError: a region that is empty or does not fit the image, or regions together with subjects or with
                `padding_mask_crop`.
            PipelineError: regions for another kind of denoiser.
        """
        with self._idle() as model, call_on(model):
            if regions is not None:
                if subjects is not None:
                    raise RegionError("expected subjects or regions, found both. Name the subjects in the regions.")
                if kwargs.get("padding_mask_crop") is not None:  # the denoiser sees a part of the image alone
                    raise RegionError(
                        "expected regions of the whole image, found padding_mask_crop, which draws a part of it at the "
                        "size of the whole. Leave it out, or use subjects= for who is in that part."
                    )
                places = read_regions(regions)
                names = [place.subject for place in places]
                with (
                    self._showing(model, names) as slots,
                    shown_in_regions(self, model, places, slots),
                    embeddings_of_each_image(self),
                ):
                    return super().__call__(*args, **kwargs)  # type: ignore[misc]
            if subjects is None:
                renew_folds(layer for _, known in seen(model).layers if (layer := known()) is not None)
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
            names = read_names(subjects)
            prompts, images = count_samples(super().__call__, args, kwargs)  # type: ignore[misc]
            with self._showing(model, names) as slots, embeddings_of_each_image(self):
                index = sample_slots(names, slots, prompts, images)
                with shown_in_samples(self, model, index) if slots else nullcontext():
                    made = super().__call__(*args, **kwargs)  # type: ignore[misc]
            require_one_each(made, index)
            return made

    @contextmanager
    def _idle(self) -> Iterator[nn.Module]:
        """The denoiser, once no other thread uses or changes it."""
        model = denoiser(self)
        with lock_of(model):
            own_factors(model)
            yield model

    @contextmanager
    def _showing(self, model: nn.Module, names: Sequence[str | None]) -> Iterator[dict[str, int]]:
        """Have the table of these subjects as the one adapter of ours; gives the slot of each."""
        chosen = list(dict.fromkeys(name for name in names if name is not None))
        known = seen(model)
        if known.merged:
            refuse_fused(meta_layers(model))
        if chosen and known.disabled:
            raise AdapterStateError(
                f"expected enabled adapters to show {', '.join(chosen)}, found them disabled. Use enable_meta_lora "
                "(or diffusers' enable_lora) first."
            )
        table, slots = self._table_with(model, chosen)
        if table and table.take_written():
            refresh_offload(model)
        drawing = table.drawing(slots.values()) if table else nullcontext()
        with shown_alone(model, table.adapter_name if table else None), drawing:
            yield slots

    def _table_with(self, model: nn.Module, names: list[str]) -> tuple[SubjectTable | None, dict[str, int]]:
        """The table that holds all these subjects, made or filled from loaded adapters if need be, and their slots."""
        tables = tables_of(model)
        homes = {}
        for name in names:
            own = next((mark for mark, table in tables.items() if name in table), None)
            homes[name] = own or self._adapter_home(model, name)
        if len(set(homes.values())) > 1:
            raise AdapterStateError(
                f"expected subjects of one Down in one batch, found {len(set(homes.values()))} Downs among {names}. "
                "Generate them in turn."
            )
        if not names:
            return None, {}
        fingerprint = homes[names[0]]
        if (table := tables.get(fingerprint)) is not None:
            return table, table.bring(names)
        with self._new_table(model, self._down_for_a_table(model, fingerprint), max(8, len(names))) as table:
            return table, table.bring(names)

    @contextmanager
    def _new_table(
        self, model: nn.Module, down: DownSource, capacity: int, host_capacity: int | None = None
    ) -> Iterator[SubjectTable]:
        """A table for this Down; it goes again if what it is made for in the block is refused."""
        refuse_fused(meta_layers(model))
        before = active_adapters(model)
        with offload_paused(self), saved_in_parts(model):
            table = SubjectTable(model, down, capacity, host_capacity)
        put_table(model, table)
        try:
            yield table
        except BaseException:
            drop_tables(model, down.fingerprint)
            with offload_paused(self), saved_in_parts(model):
                remove_adapters(model, [table.adapter_name], before)
            raise

    def _adapter_home(self, model: nn.Module, name: str) -> str:
        configs = loaded_configs(model).items()
        loaded = {n for n, c in configs if isinstance(c, MetaLoraConfig) and c.stage == "subject"}
        if name not in loaded:
            known = loaded.union(*(table.names() for table in tables_of(model).values()))
            raise AdapterNotFoundError(
                f"expected a loaded subject, found {name!r} among {listed(known, 8) or 'none'}. Load it with "
                "load_meta_lora or add_subject."
            )
        return down_fingerprint(model, name)

    def enable_subject_slots(
        self, capacity: int = 8, *, host_capacity: int | None = None, fingerprint: str | None = None
    ) -> SubjectTable:
        """Make the table of slots for a Down that is loaded; `subjects=` does so by itself with 8.

        Args:
            capacity: subjects on the device at once: the most that one batch can mix.
            host_capacity: subjects in host memory; None for no limit.
            fingerprint: which Down, if there are several.

        Raises:
            AdapterStateError: no Down, several of them, or a table that is there already.
        """
        with self._idle() as model:
            downs = {
                down_fingerprint(model, name) for name, c in configs_of(model).items() if isinstance(c, MetaLoraConfig)
            }
            if fingerprint is None and len(downs) != 1:
                raise AdapterStateError(
                    f"expected one Down on this pipeline, found {len(downs)}. Load one with load_meta_lora, or give "
                    "fingerprint= to say which."
                )
            fingerprint = fingerprint or downs.pop()
            with self._new_table(model, self._down_for_a_table(model, fingerprint), capacity, host_capacity) as table:
                return table

    def _down_for_a_table(self, model: nn.Module, fingerprint: str) -> DownSource:
        if fingerprint in tables_of(model):
            raise AdapterStateError(
                f"expected a Down without a table, found one for {fingerprint[:16]}: subjects= and add_subject make it "
                "by themselves. Make yours before them, or use unload_meta_lora first."
            )
        if (down := down_on_model(model, fingerprint)) is None:
            raise AdapterStateError(
                f"expected a loaded Down, found none for {fingerprint[:16]}. Load it with load_meta_lora."
            )
        return down

    def add_subject(
        self, path_or_repo: str | os.PathLike[str], name: str | None = None, **hub: Unpack[HubOptions]
    ) -> str:
        """Put a subject into the table of its Down, for `subjects=`: no adapter of its own, its Down loaded if need be.

        Waits for no image of another thread once the table is there.

        Args:
            name: by default the last part of the path or repository.
            hub: huggingface_hub's arguments, see `HubOptions`.

        Returns:
            The subject's name.

        Raises:
            As `load_meta_lora`.
        """
        model = denoiser(self)

        def known(fingerprint: str) -> DownSource | None:
            table = tables_of(model).get(fingerprint)
            if table is not None:
                return table.down
            with self._idle():
                return down_on_model(model, fingerprint)

        readers = readers_of(self)
        source = load_subject(path_or_repo, known_down=known, known_space=partial(readers.space, model), **hub)
        remember_place(model, source, path_or_repo, hub)
        last = hub.get("subfolder") or path_or_repo
        own = self._into_table(model, source, name, last, _Again(fixed_place(path_or_repo), hub))
        if isinstance(source, CodeSource):
            readers.keep(model, source.space)
        return own

    def _into_table(
        self,
        model: nn.Module,
        source: SubjectSource,
        name: str | None,
        path: str | os.PathLike[str],
        again: Read | None = None,
    ) -> str:
        """Put a subject into the table of its Down, which is made if there is none; returns its name.

        Args:
            path: what it is named after where no name is given.
            again: reads the subject anew.
        """

        def enter(table: SubjectTable) -> str:
            with books_of(model):
                others = [other for other in tables_of(model).values() if other is not table]

                def taken(wanted: str) -> bool:
                    return is_adapter(model, wanted) or any(wanted in each for each in (table, *others))

                own = name or free_name(taken, path)
                if any(own in other for other in others):
                    raise AdapterStateError(
                        f"expected a new name for a subject, found {own!r}, which a subject on another Down has. Give "
                        "another name=, or evict that one first."
                    )
                table.add(own, source, again)
                return own

        fingerprint = source.down.fingerprint
        with books_of(model):
            if (table := tables_of(model).get(fingerprint)) is not None:
                return enter(table)
        check_fits(model, source.down, name=str(path))
        with self._idle():
            if (table := tables_of(model).get(fingerprint)) is not None:
                return enter(table)
            with self._new_table(model, source.down, 8) as table:
                return enter(table)


@dataclass(frozen=True)
class _Again:
    """Reads a subject of `add_subject` from where it came; a token does not go into copies and pickles."""

    path_or_repo: str
    hub: HubOptions

    def __call__(self, known_down: KnownDown) -> SubjectSource:
        return load_subject(self.path_or_repo, known_down=known_down, **self.hub)

    def __reduce__(self) -> Any:
        return _Again, (self.path_or_repo, {key: value for key, value in self.hub.items() if key != "token"})
