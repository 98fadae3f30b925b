# SPDX-License-Identifier: Apache-2.0
"""The models of a pipeline one by one: a hull without numbers until one is needed, and a hull again when it is done.

A hull is the model on the meta device, made from its configuration alone. It says all that can be asked without weights
(names, shapes, the VAE's factor), so that whatever does not fit is refused before gigabytes are read or fetched.
"""

from __future__ import annotations

import errno
import gc
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import BaseModelMismatchError
from ..files import EMBEDDED
from .memory import Memory, Whole, quantization


def is_hull(part: Any) -> bool:
    """Whether a model has a configuration and no numbers."""
    first = next(part.parameters(), None) if isinstance(part, nn.Module) else None
    return first is not None and first.is_meta


class Parts:
    """Loads and lets go of the models of one pipeline.

    Args:
        name_or_path: a folder or a repository id. revision, local_files_only: as `open_base`.
        dtype: of all weights, as they are held or, of quantised ones, computed with.
        memory: how weights are held.

    Attributes:
        quantized: names of the models that `memory.quantize` is for.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.name, self.memory = str(EMBEDDED.get(str(name_or_path), name_or_path)), memory or Whole()
        self.revision = revision
        self.quantized: tuple[str, ...] = ()
        self._source: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        self._dtype = dtype
        self._hulls: dict[str, nn.Module] = {}

    def pipeline(self) -> Any:
        """The pipeline with its tokenizers and scheduler, each of its models a hull.

        Raises:
            BaseModelMismatchError: there is none.
        """
        from diffusers import DiffusionPipeline

        with self._understood():
            index = DiffusionPipeline.load_config(self.name, **self._source)
            self._hulls = dict(self._make_hulls(index))
            return DiffusionPipeline.from_pretrained(self.name, dtype=self._dtype, **self._hulls, **self._source)

    def bring(self, pipeline: Any, names: Iterable[str], device: torch.device | str = "cpu") -> None:
        """Load those of these models that are hulls, frozen and in evaluation mode, to the CPU.

        Args:
            device: where they will compute: bitsandbytes quantises there, and leaves them there.

        Raises:
            BaseModelMismatchError: the weights are not there, or not the configuration's.
        """
        from diffusers import DiffusionPipeline

        wanted = [name for name in names if is_hull(getattr(pipeline, name, None))]
        if not wanted:
            return
        others = {name: part for name, part in pipeline.components.items() if name not in wanted}
        hulls = {name: getattr(pipeline, name) for name in wanted if name in self.quantized}
        options = {"quantization_config": quantization(self.memory, hulls, self._dtype), **others, **self._source}
        on_it = torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext()
        with self._understood(), on_it, _in_every_process():
            loaded = DiffusionPipeline.from_pretrained(self.name, dtype=self._dtype, **options)
        for name in wanted:
            setattr(pipeline, name, getattr(loaded, name).requires_grad_(False).eval())

    def release(self, pipeline: Any, names: Iterable[str]) -> None:
        """Make these models hulls again and give their memory back."""
        done = [name for name in names if not is_hull(getattr(pipeline, name, None)) and name in self._hulls]
        for name in done:
            setattr(pipeline, name, self._hulls[name])
        if not done:
            return
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _make_hulls(self, index: dict[str, Any]) -> Iterator[tuple[str, nn.Module]]:
        for name, value in index.items():
            # What is none of these libraries' models is small, and diffusers loads it with the rest; lists of other
            # things are settings.
            if name.startswith("_") or not isinstance(value, (list, tuple)):
                continue
            if len(value) != 2 or not all(isinstance(one, str) for one in value):
                continue
            cls = _class_of(*value)
            if cls is None:
                continue
            with torch.device("meta"):
                if issubclass(cls, PreTrainedModel):
                    hull = cls(cls.config_class.from_pretrained(self.name, subfolder=name, **self._source))
                else:
                    hull = cls.from_config(cls.load_config(self.name, subfolder=name, **self._source))
            yield name, hull.requires_grad_(False).eval()

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, ImportError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOMEM:
                raise MemoryError(str(error)) from error
            raise BaseModelMismatchError(
                f"expected a diffusers pipeline at {self.name!r}, found none that loads ({error}): give a folder or a "
                "repository id"
            ) from error


@contextmanager
def _in_every_process() -> Iterator[None]:
    """Keep transformers from loading zeros into all processes but the first, as it does for a trainer with FSDP.

    That trainer sends the weights later. Here encoders are never divided, and nobody would.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _class_of(library: str, name: str) -> Any:
    """The class of a model, as a pipeline's index names it; None for anything else."""
    inside = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    cls: Any = None
    with suppress(ImportError):
        cls = getattr(importlib.import_module(inside), name, None)
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) else None
