# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects on a stock diffusers pipeline object: load, choose, delete, and undo to the last bit.

`enable_meta_lora(pipe)` gives one pipeline object a class with `MetaLoraLoaderMixin`; no diffusers class is changed.
The adapters sit on the denoiser (`pipe.transformer` or `pipe.unet`) as PEFT adapters do, beside ordinary LoRAs.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from diffusers import DiffusionPipeline, ModularPipeline
from PIL import Image
from torch import nn
from typing_extensions import Unpack

from .. import checkpoint
from ..bases import Base
from ..checkpoint.factors import SubjectSource, listed
from ..checkpoint.space import CodeSource, SubjectCode, code_on_model, know_code
from ..data import read_photos
from ..errors import AdapterStateError, ConfigError
from ..hub.loading import HubOptions, load
from ..tuner import DownSource, MetaLoraConfig, down_fingerprint
from ..tuner.down import subject_config
from ..tuner.merging import merged_or_as_before
from ..tuner.on_model import configs_of, know_down, meta_layers
from ..tuner.placing import (
    active_adapters,
    choice_kept,
    copy_factors,
    inject,
    remove_adapters,
    remove_other_methods,
    restore,
)
from ..tuner.registration import PREFIX
from ..tuner.subject_index import layers_changed
from .choosing import ChoosingMixin, choose, displace_ordinary, give_back, require_loaded
from .denoiser import (
    all_layers,
    books_of,
    denoiser,
    free_name,
    name_kept,
    named_denoiser,
    offload_paused,
    refuse_fused,
    uncompiled,
    while_idle,
)
from .readers import KEPT, forget_places, readers_of, remember_place
from .saving import refuse_to_save, saved_in_parts
from .table import down_known, drop_tables, tables_of

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline | ModularPipeline)
Photo = str | os.PathLike[str] | Image.Image


def enable_meta_lora(pipe: Pipeline) -> Pipeline:
    """Give a pipeline object the methods of `MetaLoraLoaderMixin`; calling it again changes nothing.

    Args:
        pipe: any diffusers pipeline, modular ones too, with a denoiser: `pipe.transformer`, `pipe.unet`, or the only
            model that takes a time.

    Returns:
        The same object, its class now a subclass of what it was, of the same name.

    Raises:
        PipelineError: there is no denoiser to adapt.
    """
    if not isinstance(pipe, MetaLoraLoaderMixin):
        denoiser(pipe)
        kind: Any = type(pipe)
        pipe.__class__ = _enabled(kind)
    return pipe


@functools.cache
def _enabled(cls: Any) -> type:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (MetaLoraLoaderMixin, cls), {**names, "__reduce_ex__": _reduce})


def _reduce(pipe: Any, protocol: Any) -> Any:
    # Copies and pickles find the class by the one that was enabled: under its name modules have that one.
    kept = {name: value for name, value in vars(pipe).items() if name != KEPT}
    return _blank, (type(pipe).__bases__[1],), kept


def _blank(cls: Any) -> Any:
    return object.__new__(_enabled(cls))


def _is_taken(model: nn.Module, name: str) -> bool:
    return name in configs_of(model) or any(table.is_own(name) for table in tables_of(model).values())


def _refuse_taken(model: nn.Module, name: str) -> None:
    if _is_taken(model, name):
        raise AdapterStateError(
            f"expected a new adapter name, found {name!r}, which this pipeline has already. "
            "Choose another one, or delete_adapters it first (evict it, if add_subject brought it)."
        )


@contextmanager
def _seen_as_of_loras(model: nn.Module) -> Iterator[None]:
    """Within the block `state_dict` is what diffusers and PEFT take it for as they load a LoRA.

    Of FLUX.1 weights are looked for below one `base_layer`, where adapters of two methods have made two of it. A
    hotswap zeroes whatever the new file lacks: all with "lora_" and the LoRA's name in its path, as ours may have.
    """

    def change(_: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in [*state]:
            if f".{PREFIX}" in key:
                del state[key]
            elif ".base_layer.base_layer." in key:
                state[re.sub(r"(\.base_layer)+", ".base_layer", key)] = state[key]

    hook = model.register_state_dict_post_hook(change)
    try:
        yield
    finally:
        hook.remove()


class MetaLoraLoaderMixin(ChoosingMixin):
    """Methods for Downs and subjects, named as diffusers names those for LoRA; inherit it before a pipeline class."""

    @while_idle
    def load_meta_lora(
        self, path_or_repo: str | os.PathLike[str], adapter_name: str | None = None, **hub: Unpack[HubOptions]
    ) -> str:
        """Load a Down or a subject, from a local folder or the Hub; a subject brings its Down, once per model.

        A subject becomes the active adapter. A Down is added without being active, so that it changes no image;
        `set_adapters` with its name shows the mean of the subjects it was trained on.

        Args:
            adapter_name: by default the last part of the path or repository.
            hub: huggingface_hub's `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Returns:
            The adapter's name.

        Raises:
            BaseModelMismatchError: it was made for another base model.
            AdapterStateError: the name is taken, or something is fused.
            Everything that `hub.load` raises. The pipeline is then as it was.
        """
        model = denoiser(self)
        refuse_fused(all_layers(self))
        name = self._new_name(model, adapter_name, hub.get("subfolder") or path_or_repo)
        readers = readers_of(self)
        known_down, known_space = partial(down_known, model), partial(readers.space, model)
        source = load(path_or_repo, model=model, known_down=known_down, known_space=known_space, **hub)
        self._install(source, name)
        remember_place(model, source, path_or_repo, hub)
        if isinstance(source, CodeSource):
            readers.keep(model, source.space)
        return name

    @while_idle
    def read_subject(
        self,
        photos: Photo | Sequence[Photo],
        adapter_name: str | None = None,
        *,
        down: str | os.PathLike[str] | None = None,
        as_adapter: bool = True,
        face_crop: str | None = None,
        face_margin: float | None = None,
        face_align: bool | None = None,
        face_model: str | None = None,
        generic: str | type[Base] | None = None,
        **hub: Unpack[HubOptions],
    ) -> str:
        """Bring a person in from photos, without training: the Down's encoder reads them, in a fraction of a second.

        The person becomes the active adapter, as a subject that `load_meta_lora` brings.

        Args:
            photos: one photo of the person or several, as files (with masks beside them), folders or RGB images.
            adapter_name: by default the name of the first file or folder.
            down: folder or repository of a Down with an encoder; by default where the pipeline's one Down came from. On
                the model it is once, as ever; what reads is kept for the next photo until `unload_meta_lora`.
            as_adapter: False puts the person into the table of slots, as `add_subject` does, for `subjects=`: that is
                faster, because PEFT walks over the whole model for each adapter.
            face_crop, face_margin, face_align: read the part around the face, as `metalora read` takes them; by default
                as the encoder was trained.
            face_model: `module:function` of an encoder that reads through a face model of somebody's own: code that a
                Down's files do not start.
            generic: a class of your own for this pipeline, or its name, as `base_for` takes it; a Down that was made
                with one wants one.
            hub: huggingface_hub's arguments, for the Down.

        Returns:
            The name of the adapter or the subject.

        Raises:
            ArtefactNotFoundError: the Down has no encoder.
            BaseModelMismatchError: the Down was made for another base model, or the family of this one is not known.
            ConfigError: `face_model` is not the one that the encoder needs, or `generic` is none.
            NoImagesError, UnreadableImageError, NoFaceError: photos that cannot be read.
            AdapterStateError: the name is taken, or no `down` is given and the pipeline has not one of its own.
            Everything that `hub.load` and `encoder.load_reader` raise. The pipeline is then as it was.
        """
        several = [photos] if isinstance(photos, (str, os.PathLike, Image.Image)) else list(photos)
        model = denoiser(self)
        first = several[0] if several else ""
        named = "person" if isinstance(first, Image.Image) else Path(first).stem
        if as_adapter:
            adapter_name = self._new_name(model, adapter_name, named)
        seen = [found for one in several for found in ([one] if isinstance(one, Image.Image) else read_photos(one))]
        reader, source, (place, options) = readers_of(self).reader(self, down, hub, face_model, generic)
        sight = reader.encoder.sight(face_crop, face_margin, face_align)
        origin: dict[str, Any] = {"down": place, "down_revision": options.get("revision"), "inference_mode": True}
        subject = reader.read(seen, source, sight, subject_name=adapter_name or named, **origin)
        return self._bring_in(model, subject, adapter_name, named, as_adapter)

    @while_idle
    def blend_subjects(
        self, subjects: Mapping[str, float], adapter_name: str | None = None, *, as_adapter: bool = True
    ) -> str:
        """Bring in somebody between others, who are codes: read from photos, or loaded from folders of codes.

        Args:
            subjects: how much of whom, such as {"ann": 0.5, "bob": 0.5}; what counts are the shares of the sum.
            adapter_name, as_adapter: as `read_subject` takes them; the name is by default made of theirs.

        Returns:
            The name of the adapter or the subject.

        Raises:
            ConfigError: nobody, or weights that cannot be shares.
            AdapterNotFoundError: a subject that is not here.
            AdapterStateError: one that has a Mid and Up of their own, subjects of several spaces, or a name that is
                taken. The pipeline is then as it was.
        """
        weights = [*subjects.values()]
        if not all(0 <= weight < math.inf for weight in weights) or not sum(weights):
            raise ConfigError(
                f"expected a weight of at least 0 for each subject, and not 0 for all, found {dict(subjects)}: give "
                "for example {'ann': 0.5, 'bob': 0.5}"
            )
        model, readers, named = denoiser(self), readers_of(self), "-".join(subjects)
        if as_adapter:
            adapter_name = self._new_name(model, adapter_name, named)
        codes = [self._code_of(model, name) for name in subjects]
        marks = {(code.down_fingerprint, code.space_fingerprint) for code in codes}
        if len(marks) > 1:
            raise AdapterStateError(
                f"expected subjects of one subject space, found {len(marks)} among {', '.join(subjects)}. Read their "
                "photos with one Down."
            )
        fingerprint, mark = marks.pop()
        source, (place, hub) = readers.down(model, fingerprint)
        space = readers.space(model, mark)
        if space is None:
            raise AdapterStateError(
                f"expected the subject space of {', '.join(subjects)}, found it no longer at {place}. Load one of them "
                "from a folder again."
            )
        blended = space.coded(space.blend([code.code for code in codes], weights))
        origin: dict[str, Any] = {"down": place, "down_revision": hub.get("revision"), "inference_mode": True}
        config = subject_config(source, subject_name=adapter_name or named, **origin)
        child = CodeSource(config, blended, space, source)
        return self._bring_in(model, child, adapter_name, named, as_adapter)

    def _bring_in(
        self, model: nn.Module, source: CodeSource, adapter_name: str | None, named: str, as_adapter: bool
    ) -> str:
        """Install a subject as an adapter, whose name is known then, or put it into the table; returns its name."""
        if adapter_name is None or not as_adapter:
            return self._into_table(model, source, adapter_name, named)
        self._install(source, adapter_name)
        return adapter_name

    def _code_of(self, model: nn.Module, name: str) -> SubjectCode:
        for table in tables_of(model).values():
            if (code := table.code(name)) is not None:
                return code
        own = any(table.is_own(name) for table in tables_of(model).values())
        if not own and require_loaded(model, name).stage == "subject" and (code := code_on_model(model, name)):
            return code
        raise AdapterStateError(
            f"expected subjects that are codes, found {name!r} with a Mid and Up of their own. Blend people who were "
            "read from photos and not trained since."
        )

    def _new_name(self, model: nn.Module, wanted: str | None, path: str | os.PathLike[str]) -> str:
        name = wanted or free_name(partial(_is_taken, model), path)
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ParameterDict, name):
            raise AdapterStateError(
                f"expected an adapter name of letters, digits, '_' and '-', found {name!r}, which torch cannot hold or "
                "keeps for itself. Choose another one."
            )
        _refuse_taken(model, name)
        return name

    def _install(self, source: DownSource | SubjectSource, name: str) -> None:
        """Put it on the denoiser, a subject as the active adapter, or leave all as it was."""
        model = denoiser(self)
        down = source if isinstance(source, DownSource) else source.down
        before = active_adapters(model)
        disabled = any(layer.disable_adapters for layer in meta_layers(model))
        with name_kept(model, name), offload_paused(self), saved_in_parts(model):
            _refuse_taken(model, name)  # add_subject, which does not wait, may have come while files were read
            try:
                with choice_kept(model):
                    inject(model, source.config, name, down)
                copy_factors(model, source.tensors, name)
                if source is down:
                    know_down(model, name, down.fingerprint)
                elif isinstance(source, CodeSource):
                    know_code(model, name, source.code)
            except BaseException:
                remove_adapters(model, [name], before)
                raise
            if disabled:  # layers that are new to the model must not show alone
                self.disable_meta_lora()
            if source is not down:
                displace_ordinary(self)
                choose(self, [name])

    @while_idle
    def unload_meta_lora(self, keep_fused: bool = False) -> None:
        """Remove every Down and subject: the denoiser's modules, flags and weights are what they were, bit for bit.

        Ordinary LoRAs stay, and are active as they were before subjects took their place.

        Args:
            keep_fused: leave what `fuse_meta_lora` added to the base weights in them, for good. The pipeline is a plain
                one then, which `save_pretrained` writes and any diffusers loads.

        Raises:
            AdapterStateError: `keep_fused`, and nothing is fused.
        """
        model = denoiser(self)
        if keep_fused:
            fused = [layer for layer in meta_layers(model) if layer.merged]
            if not fused:
                raise AdapterStateError("expected a fused adapter to keep, found none. Use fuse_meta_lora first.")
            for layer in fused:
                layer.keep_merged()
        with offload_paused(self), saved_in_parts(model):
            give_back(self)
            drop_tables(model)
            restore(model)
        vars(self).pop(KEPT, None)
        forget_places(model)

    @while_idle
    def load_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers, for ordinary LoRAs.

        Raises:
            AdapterStateError: `adapter_name` is a Down's or a person's, whom `hotswap` would take off.
        """
        below, model = cast(Any, super()).load_lora_weights, denoiser(self)
        name: Any = inspect.signature(below).bind_partial(*args, **kwargs).arguments.get("adapter_name")
        ordinary = {own for own, config in configs_of(model).items() if not isinstance(config, MetaLoraConfig)}
        if name not in ordinary:  # what diffusers makes of one that is depends on `hotswap`
            _refuse_taken(model, name)
        # Offloading that is on diffusers would put back on the first accelerator, and after an error not at all.
        paused = offload_paused(self) if meta_layers(model) else nullcontext()
        with name_kept(model, name), paused, _seen_as_of_loras(model), uncompiled(self):
            below(*args, **kwargs)

    @while_idle
    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """Take ordinary LoRAs off, as diffusers does; Downs and subjects stay, but for what is fused.

        What is fused stays in the weights, ours too, and then our adapters go: diffusers' way to a plain pipeline.
        """
        model, below = denoiser(self), cast(Any, super())
        if any(layer.merged for layer in meta_layers(model)):
            self.unload_meta_lora(keep_fused=True)
        if not meta_layers(model):
            with uncompiled(self):
                below.unload_lora_weights(*args, **kwargs)
            return
        others = [name for name in self._lora_loadable_modules if name != named_denoiser(self)[0]]  # type: ignore[attr-defined]
        with offload_paused(self):
            remove_other_methods(model)
            vars(self)["_lora_loadable_modules"] = others  # diffusers would take ours off with the rest
            try:
                below.unload_lora_weights(*args, **kwargs)
            finally:
                del vars(self)["_lora_loadable_modules"]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As diffusers' pipelines; raises AdapterStateError while a Down or a subject is loaded."""
        refuse_to_save(denoiser(self))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' pipelines; raises AdapterStateError while a Down or a subject is loaded."""
        refuse_to_save(denoiser(self))
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    @while_idle
    def save_meta_lora(self, folder: str | os.PathLike[str], adapter_name: str, **options: Any) -> None:
        """Write an adapter as a Down or a subject; the options are those of `save_down` and `save_subject`.

        Raises:
            AdapterNotFoundError: there is no such adapter.
        """
        model = denoiser(self)
        is_down = require_loaded(model, adapter_name).stage == "meta"
        save = checkpoint.save_down if is_down else checkpoint.save_subject
        save(folder, model, adapter_name, **options)

    @while_idle
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Delete adapters; a Down that only they used goes with them, and after the last one the denoiser is restored.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
            AdapterStateError: a Down whose subjects are still loaded. Nothing has been deleted then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        model = denoiser(self)
        known = configs_of(model)
        others = [name for name in names if name in known and not isinstance(known[name], MetaLoraConfig)]
        ours = [name for name in names if name not in others]
        people = {table.adapter_name: set(table.names()) - set(ours) for table in tables_of(model).values()}
        for name in ours:
            require_loaded(model, name)
            users = {user for layer in meta_layers(model) for user in layer.subjects_of(name)} - set(ours)
            users = {person for user in users for person in people.get(user, {user})}
            if users:
                raise AdapterStateError(
                    f"expected no subject on the Down {name!r}, found {listed(users, 8)}. Delete them first "
                    "(evict them, if add_subject brought them)."
                )
        refuse_fused(all_layers(self))
        downs = {down_fingerprint(model, name) for name in ours}
        if others and hasattr(super(), "delete_adapters"):
            with uncompiled(self):
                super().delete_adapters(others)  # type: ignore[misc]
        with books_of(model):
            for fingerprint, table in tables_of(model).items():
                table.evict([name for name in ours if name in table])
                if fingerprint in downs and not table.names() and table.is_alone(ours):
                    # A table that holds nobody goes with the last adapter of its Down.
                    ours.append(table.adapter_name)
                    drop_tables(model, fingerprint)
        with offload_paused(self), saved_in_parts(model):
            if all(name in ours for name, config in known.items() if isinstance(config, MetaLoraConfig)):
                give_back(self)
                forget_places(model)
            active = [name for name in active_adapters(model) if name not in ours]
            remove_adapters(model, sorted(ours, key=lambda name: known[name].stage == "meta"), active)

    @while_idle
    def fuse_meta_lora(self, adapter_names: str | Sequence[str] | None = None, safe_fusing: bool = False) -> None:
        """Add adapters to the base weights, for the base's own speed; `unfuse_meta_lora` restores those to the bit.

        Args:
            adapter_names: by default the active ones.
            safe_fusing: refuse a sum that holds NaN or infinity.

        Raises:
            AdapterNotFoundError: an adapter that is not loaded.
            AdapterStateError: something is fused already, or nothing is to be.
            NonFiniteError: what `safe_fusing` found. Nothing is fused then.
        """
        model = denoiser(self)
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or active_adapters(model))
        names = [name for name in names if adapter_names or isinstance(configs_of(model)[name], MetaLoraConfig)]
        for name in names:
            require_loaded(model, name)
        layers = meta_layers(model)
        if not names or any(layer.merged for layer in layers):
            found = "nothing active" if not names else "adapters that are fused already"
            raise AdapterStateError(
                f"expected adapters to fuse, found {found}. Use set_adapters or unfuse_meta_lora first."
            )
        with offload_paused(self), merged_or_as_before(layers, safe_fusing, names):
            for layer in layers:
                layer.merge(safe_merge=safe_fusing, adapter_names=names)

    @while_idle
    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers, and `fuse_meta_lora` for what is ours.

        Raises:
            AdapterNotFoundError: `adapter_names` names the adapter of the slots, which is nobody's.
        """
        below, model = cast(Any, super()).fuse_lora, denoiser(self)
        for name in inspect.signature(below).bind_partial(*args, **kwargs).arguments.get("adapter_names") or ():
            if isinstance(configs_of(model).get(name), MetaLoraConfig):
                require_loaded(model, name)
        scales = [(layer, {**layer.scaling}) for layer in meta_layers(model)]
        try:
            with uncompiled(self):
                below(*args, **kwargs)
        finally:
            for layer, scaling in scales:  # `lora_scale` is of the fused weights, and would stay after unfuse_lora
                layer.scaling.update(scaling)
            layers_changed()

    @while_idle
    def unfuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers, and `unfuse_meta_lora` for what is ours."""
        with uncompiled(self):
            cast(Any, super()).unfuse_lora(*args, **kwargs)

    @while_idle
    def unfuse_meta_lora(self) -> None:
        """Undo `fuse_meta_lora`: the base weights are what they were, bit for bit."""
        with offload_paused(self):
            for layer in meta_layers(denoiser(self)):
                if layer.merged:
                    layer.unmerge()
