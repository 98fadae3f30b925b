# SPDX-License-Identifier: Apache-2.0
"""What a pipeline reads photos and codes with, kept so that the second person waits for no file.

A subject space lies on the denoiser's device, an encoder on the VAE's; both go with `unload_meta_lora`. Copies and
pickles of a pipeline come without, and read the files again when they need them: the model knows where they lie, and
so does each pipeline that shares it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bases import Base, base_for
from ..checkpoint.artefacts import open_artefact
from ..checkpoint.base_model import check_fits, require_class
from ..checkpoint.config_file import read_config
from ..checkpoint.factors import SubjectSource
from ..checkpoint.reader_files import READER_FILES
from ..checkpoint.space import SPACE_FILE, SubjectSpace, load_space
from ..encoder import Reader, SubjectEncoder, load_reader
from ..errors import AdapterStateError, MetaLoraError, WrongKindError
from ..hub.loading import HubOptions, folder_of
from ..tuner import DownSource, MetaLoraConfig
from .denoiser import denoiser
from .table import down_known, tables_of

KEPT = "_meta_lora_readers"
_PLACES = "_meta_lora_places"
Place = tuple[str, HubOptions]


class _Places(dict[str, Place]):
    """Where Downs lie, by their fingerprints; a token does not go into copies and pickles of the model."""

    def __reduce__(self) -> Any:
        without = {mark: (place, {k: v for k, v in hub.items() if k != "token"}) for mark, (place, hub) in self.items()}
        return _Places, (without,)


def _places_of(model: nn.Module) -> _Places:
    places: _Places = vars(model).setdefault(_PLACES, _Places())
    return places


def forget_places(model: nn.Module) -> None:
    """As the last adapter of ours goes: nobody asks any more where its Down lies."""
    vars(model).pop(_PLACES, None)


@dataclass(frozen=True)
class _Opened:
    """An encoder with the configuration of its Down: as the file had it then, and with its modules spelt out."""

    file: MetaLoraConfig
    config: MetaLoraConfig
    encoder: SubjectEncoder


class Readers:
    """What one pipeline has read so far; see `readers_of`."""

    def __init__(self) -> None:
        self._folders: dict[Any, Path] = {}  # of repositories, so that not every photo asks the Hub
        self._spaces: dict[str, SubjectSpace] = {}
        self._opened: dict[tuple[Path, str | None, str | type[Base] | None], _Opened] = {}

    def space(self, model: nn.Module, fingerprint: str) -> SubjectSpace | None:
        """A subject space that a table holds, that was read before, or that lies beside a Down that was loaded."""
        if (known := self._known(model, fingerprint)) is not None:
            return known
        for place, hub in [*_places_of(model).values()]:
            with suppress(MetaLoraError):  # moved or gone by now: there may be another
                if read_config(self._folder(place, hub, [])).space_fingerprint == fingerprint:
                    folder = self._folder(place, hub, [SPACE_FILE])
                    return self.keep(model, load_space(folder, None, fingerprint))
        return None

    def keep(self, model: nn.Module, space: SubjectSpace) -> SubjectSpace:
        """Have a space for the next one who needs it, on the denoiser's device, unless it is there already."""
        if (known := self._known(model, space.fingerprint)) is not None:
            return known
        self._spaces[space.fingerprint] = space.to(_device(model))
        return space

    def _known(self, model: nn.Module, fingerprint: str) -> SubjectSpace | None:
        for table in tables_of(model).values():
            if (space := table.space(fingerprint)) is not None:
                self._spaces.pop(fingerprint, None)
                return space
        known = self._spaces.get(fingerprint)
        return None if known is None else known.to(_device(model))

    def reader(
        self,
        pipe: Any,
        down: str | os.PathLike[str] | None,
        hub: HubOptions,
        face_model: str | None = None,
        generic: str | type[Base] | None = None,
    ) -> tuple[Reader, DownSource, Place]:
        """The reader of a Down, the Down as the model has it or as its file does, and where that lies.

        Args:
            down: its folder or repository; None: that of the one Down that was loaded on this pipeline.
            face_model: as `encoder.load_reader`. generic: as `base_for`.

        Raises:
            AdapterStateError: None, and there is no such one. WrongKindError: it is a subject.
            ConfigError: as `require_class` and `base_for`.
            Everything that `hub.load` and `encoder.load_reader` raise.
        """
        model = denoiser(pipe)
        place, hub = self._place_of_one(model) if down is None else (os.fspath(down), hub)
        folder = self._folder(place, hub, READER_FILES)
        file = read_config(folder)
        require_class(file, generic, place)
        opened, known = self._opened.get((folder, face_model, generic)), down_known(model, file.down_fingerprint)
        if opened is not None and opened.file != file:
            opened = None
        if opened is not None and known is not None:
            source = replace(known, config=opened.config)
        else:
            with open_artefact(folder) as found:
                if not found.is_down:
                    raise WrongKindError(f"{place}: expected a Down that reads photos, found a subject. Give its Down.")
                check_fits(model, found, name=place)
                source = found.down(known=known)
        space = None if file.space_fingerprint is None else self.space(model, file.space_fingerprint)
        if opened is not None and space is not None:
            reader = Reader(space, opened.encoder)
        else:
            reader = load_reader(folder, source, base_for(pipe, generic=generic).encode_images, face_model, space)
            reader.encoder.to(_device(getattr(pipe, "vae", None) or model))
            self._opened[folder, face_model, generic] = _Opened(file, source.config, reader.encoder)
            self.keep(model, reader.space)
        _places_of(model).setdefault(source.fingerprint, (fixed_place(place), hub))
        return reader, source, (os.path.abspath(folder) if os.path.isdir(place) else place, hub)

    def down(self, model: nn.Module, fingerprint: str) -> tuple[DownSource, Place]:
        """A Down of the model with the configuration of its own file, and where that lies.

        Raises:
            AdapterStateError: nobody knows where it came from.
        """
        if (known := _places_of(model).get(fingerprint)) is None:
            raise AdapterStateError(
                f"expected a Down that came from a folder or a repository, found {fingerprint[:16]}…, which came from "
                "neither. Load it with load_meta_lora."
            )
        place, hub = known
        folder = self._folder(place, hub, [])
        with open_artefact(folder) as found:
            return found.down(fingerprint, known=down_known(model, fingerprint)), (place, hub)

    def _place_of_one(self, model: nn.Module) -> Place:
        here = [place for mark, place in _places_of(model).items() if down_known(model, mark) is not None]
        if len(here) != 1:
            raise AdapterStateError(
                f"expected down=, or one Down on this pipeline that came from a folder or a repository, found "
                f"{len(here)}. Give down=<folder or repository of the Down that shall read>."
            )
        return here[0]

    def _folder(self, place: str, hub: HubOptions, also: Iterable[str]) -> Path:
        if os.path.isdir(place):
            return folder_of(place, **hub)
        key = place, *(str(item) for item in sorted(hub.items())), *also
        if key not in self._folders:
            self._folders[key] = folder_of(place, [*also], **hub)
        return self._folders[key]


def readers_of(pipe: Any) -> Readers:
    """What a pipeline keeps."""
    kept: Readers = vars(pipe).setdefault(KEPT, Readers())
    return kept


def remember_place(
    model: nn.Module, source: DownSource | SubjectSource, path: str | os.PathLike[str], hub: HubOptions
) -> None:
    """Know where the Down of what was loaded lies.

    Args:
        path, hub: where `source` was loaded from.
    """
    if isinstance(source, DownSource):
        _places_of(model)[source.fingerprint] = fixed_place(path), hub
    elif (place := source.config.located_down()) is not None:
        of_down: HubOptions = {**hub, "subfolder": None, "revision": source.config.down_revision}
        _places_of(model).setdefault(source.down.fingerprint, (fixed_place(place), of_down))


def fixed_place(place: str | os.PathLike[str]) -> str:
    """A place that means the same from another working directory."""
    return os.path.abspath(place) if os.path.isdir(place) else os.fspath(place)


def _device(part: nn.Module) -> torch.device:
    """Where a model computes, as far as that can be seen: parked weights without data count as the CPU's."""
    device = next(part.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
