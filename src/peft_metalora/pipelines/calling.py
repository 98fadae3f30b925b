# SPDX-License-Identifier: Apache-2.0
"""A subject for each sample: `pipe(prompt=[...], subjects=["ann", None])`, and the table that stands behind it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from ..checkpoint.base_model import check_fits
from ..errors import AdapterNotFoundError, AdapterStateError, RegionError
from ..hub.loading import HubOptions, load_subject
from ..tuner import DownSource, MetaLoraConfig, down_fingerprint, set_slots, subject_state
from ..tuner.on_model import configs_of, down_on_model
from ..tuner.placing import activate, active_adapters
from .denoiser import books_of, denoiser, free_name, lock_of, offload_paused, own_factors, refresh_offload
from .regions import read_regions, shown_in_regions
from .table import SubjectTable, sample_slots, tables_of


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
                are those of loaded subjects and of `add_subject`, all of one Down; the active adapters do not count
                then, ordinary LoRAs aside. Without it, the active adapters show, as always.
            regions: pairs of a subject (or None) and its place in every image of the call: a box (x0, y0, x1, y1) in
                pixels, or a mask of the image's size (a PIL image, or a tensor (h, w)). Image tokens show the subject
                of the region that holds most of them, the later one where regions meet; all else, text tokens too, is
                the base. For FLUX-type transformers and UNets.

        Raises:
            AdapterNotFoundError: a subject that is not loaded.
            AdapterStateError: a number of subjects that fits neither prompts nor images, or subjects of several Downs.
            RegionError: a region that is empty or does not fit the image, or regions together with subjects.
            PipelineError: regions for another kind of denoiser.
        """
        with self._idle() as model:
            if regions is not None:
                if subjects is not None:
                    raise RegionError("expected subjects or regions, found both. Name the subjects in the regions.")
                places = read_regions(regions)
                names = [place.subject for place in places]
                with self._showing(model, names) as slots, shown_in_regions(self, model, places, slots):
                    return super().__call__(*args, **kwargs)  # type: ignore[misc]
            if subjects is None:
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
            names = [subjects] if isinstance(subjects, str) else [*subjects]
            prompts, images = self._batch(args, kwargs)
            with self._showing(model, names) as slots:
                index = sample_slots(names, slots, prompts, images)
                if slots:
                    set_slots(model, index)
                return super().__call__(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _idle(self) -> Iterator[nn.Module]:
        """The denoiser, once no other thread uses or changes it."""
        model = denoiser(self)
        with lock_of(model):
            own_factors(model)
            yield model

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
        """Number of prompts, and of images for each."""
        given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments  # type: ignore[misc]
        given = {**given, **given.get("kwargs", {})}
        prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
        count = len(prompt) if isinstance(prompt, (list, tuple)) else 1
        return (count if embeds is None else embeds.shape[0]), given.get("num_images_per_prompt") or 1

    @contextmanager
    def _showing(self, model: nn.Module, names: Sequence[str | None]) -> Iterator[dict[str, int]]:
        """Have the table of these subjects as the one adapter of ours; gives the slot of each."""
        chosen = list(dict.fromkeys(name for name in names if name is not None))
        table = self._table_with(model, chosen)
        before = active_adapters(model)
        ordinary = [name for name in before if not isinstance(configs_of(model)[name], MetaLoraConfig)]
        slots = table.bring(chosen) if table else {}
        if table and table.take_written():
            refresh_offload(model)
        try:
            activate(model, [*ordinary, *([table.adapter_name] if table else [])])
            yield slots
        finally:
            if table:
                set_slots(model, None)
            activate(model, before)

    def _table_with(self, model: nn.Module, names: list[str]) -> SubjectTable | None:
        """The table that holds all these subjects, made or filled from loaded adapters if need be."""
        tables = tables_of(model)
        homes = {}
        for name in names:
            found = next((mark for mark, table in tables.items() if name in table), None)
            homes[name] = found or self._adapter_home(model, name)
        if len(set(homes.values())) > 1:
            raise AdapterStateError(
                f"expected subjects of one Down in one batch, found {len(set(homes.values()))} Downs among {names}. "
                "Generate them in turn."
            )
        if not names:
            return None
        fingerprint = homes[names[0]]
        if fingerprint not in tables:
            self.enable_subject_slots(max(8, len(names)), fingerprint=fingerprint)
        table = tables[fingerprint]
        for name in names:
            if name not in table:
                table.register(name, configs_of(model)[name], subject_state(model, name))
        return table

    def _adapter_home(self, model: nn.Module, name: str) -> str:
        config = configs_of(model).get(name)
        if not isinstance(config, MetaLoraConfig) or config.stage != "subject":
            tables = tables_of(model).values()
            known = [n for n, c in configs_of(model).items() if isinstance(c, MetaLoraConfig) and c.stage == "subject"]
            known = [n for n in known if n not in {table.adapter_name for table in tables}]
            known += [n for table in tables for n in table.names()]
            raise AdapterNotFoundError(
                f"expected a loaded subject, found {name!r} among {sorted(set(known)) or 'none'}. Load it with "
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
            down, tables = down_on_model(model, fingerprint), tables_of(model)
            if down is None or fingerprint in tables:
                raise AdapterStateError(
                    f"expected a loaded Down without a table, found {'a table' if down else 'no Down'} for "
                    f"{fingerprint[:16]}. Load the Down, or unload_meta_lora first."
                )
            with offload_paused(self):
                tables[fingerprint] = SubjectTable(model, down, capacity, host_capacity)
            return tables[fingerprint]

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
        tables = tables_of(model)

        def known(fingerprint: str) -> DownSource | None:
            table = tables.get(fingerprint)
            if table is not None:
                return table.down
            with self._idle():
                return down_on_model(model, fingerprint)

        def read() -> dict[str, torch.Tensor]:
            return load_subject(path_or_repo, known_down=known, **hub).tensors

        source = load_subject(path_or_repo, known_down=known, **hub)

        def enter(table: SubjectTable) -> str:
            taken = [n for table in list(tables.values()) for n in table.names()]
            own = name or free_name(taken, path_or_repo, hub.get("subfolder"))
            table.register(own, source.config, source.tensors, read)
            return own

        fingerprint = source.down.fingerprint
        with books_of(model):
            if (table := tables.get(fingerprint)) is not None:
                return enter(table)
        check_fits(model, source.down, name=str(path_or_repo))
        with self._idle():
            if fingerprint not in tables:
                with offload_paused(self):
                    tables[fingerprint] = SubjectTable(model, source.down, 8)
            return enter(tables[fingerprint])
