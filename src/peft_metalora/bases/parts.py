# SPDX-License-Identifier: Apache-2.0
"""The models of a pipeline one by one: a hull without numbers until one is needed, and a hull again when it is done.

A hull is the model on the meta device, made from its configuration alone. It says all that can be asked without weights
(names, shapes, the VAE's factor), so that whatever does not fit is refused before gigabytes are read or fetched.
"""

from __future__ import annotations

import errno
import functools
import gc
import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedModel, ProcessorMixin

from ..errors import BaseModelMismatchError
from ..files import EMBEDDED
from .memory import Memory, Whole, quantization

_OF_TEXT = "tokenizer", "processor"  # may be a processor of text and images
_LEFT_OUT = {"prompt_upsampler"}  # steps of modular pipelines: this one has a language model write another prompt


def is_hull(part: Any) -> bool:
    """Whether a model has a configuration and no numbers."""
    first = next(part.parameters(), None) if isinstance(part, nn.Module) else None
    return first is not None and first.is_meta


@dataclass(frozen=True)
class _Files:
    """Where a model's files are: what its class's `from_pretrained` takes."""

    cls: Any
    repo: str
    place: dict[str, Any]


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
        self._files: dict[str, _Files] = {}

    def pipeline(self) -> Any:
        """The pipeline with its tokenizers and scheduler, each of its models a hull.

        Raises:
            BaseModelMismatchError: there is none.
        """
        import diffusers
        from diffusers import DiffusionPipeline, ModularPipeline

        with self._understood():
            try:
                index = DiffusionPipeline.load_config(self.name, **self._source)
            except OSError:
                if not _has_config(ModularPipeline, self.name, self._source):
                    raise
                return self._modular_pipeline()
            # Its own class: the general one reads what its class may do without, as Wan's transformer, beside the hull.
            own = getattr(diffusers, str(index.get("_class_name")), None)
            if own is None:
                raise ValueError(f"the installed diffusers has no {index.get('_class_name')}, but a newer one may")
            named = {name: _class_of(*value) for name, value in index.items() if _names_a_class(name, value)}
            for name, cls in named.items():
                if cls is not None:
                    self._add_hull(name, _Files(cls, self.name, {"subfolder": name, **self._source}))
            small = {
                name: _processor(value[1], self.name, {"subfolder": name, **self._source})
                for name, value in index.items()
                if name in _OF_TEXT and _names_a_class(name, value) and value[1].endswith("Processor")
            }
            halves = {name: part for name, part in small.items() if isinstance(part, _TextHalf)}
            # diffusers takes no half of one, but leaves out what is to be none.
            small |= dict.fromkeys(halves)
            kind = _with(own, halves)
            pipe = kind.from_pretrained(self.name, dtype=self._dtype, **self._hulls, **small, **self._source)
            pipe.__class__ = own
            return pipe

    def _modular_pipeline(self) -> Any:
        from diffusers import ModularPipeline

        found: Any = ModularPipeline.from_pretrained(self.name, **self._source)
        steps = found.blocks
        for name in _LEFT_OUT & steps.sub_blocks.keys():
            steps.sub_blocks.pop(name)
        pipe: Any = type(found)(steps, self.name, **self._source)
        small = {}
        for name in pipe.pretrained_component_names:
            spec = pipe.get_component_spec(name)
            repo, revision = spec.pretrained_model_name_or_path, spec.revision
            if repo is None:
                continue
            place = {
                "subfolder": spec.subfolder,
                **self._source,
                "revision": self.revision if repo == self.name else revision,
            }
            if isinstance(spec.type_hint, type) and issubclass(spec.type_hint, nn.Module):
                self._add_hull(name, _Files(spec.type_hint, repo, place))
            else:
                small[name] = _load_small(spec, place)
        pipe.update_components(**self._hulls, **small)
        return pipe

    def bring(self, pipeline: Any, names: Iterable[str], device: torch.device | str = "cpu") -> None:
        """Load those of these models that are hulls, frozen and in evaluation mode, to the CPU.

        Args:
            device: where they will compute: bitsandbytes quantises there, and leaves there what will not wait.

        Raises:
            BaseModelMismatchError: the weights are not there, not all of them, or not the configuration's.
        """
        on_it: Any = nullcontext()
        if torch.device(device).type == "cuda":
            on_it = torch.cuda.device(device)
            _make_workspaces(torch.device(device))
        for name in [name for name in names if is_hull(getattr(pipeline, name, None))]:
            hull, files = getattr(pipeline, name), self._files[name]
            # transformers says in a log alone which shapes are others; here it is said below.
            options = {"ignore_mismatched_sizes": True} if isinstance(hull, PreTrainedModel) else {}
            if name in self.quantized and self.memory.quantize != "none":
                options["quantization_config"] = quantization(self.memory, hull, self._dtype)
            with self._understood(), on_it, _in_every_process():
                model, found = files.cls.from_pretrained(
                    files.repo, dtype=self._dtype, output_loading_info=True, **files.place, **options
                )
            others = [one if isinstance(one, str) else one[0] for one in found["mismatched_keys"]]
            missing = sorted([*found["missing_keys"], *others])
            if missing:
                raise BaseModelMismatchError(
                    f"expected all weights of {name} at {files.repo!r}, found none that fit for {len(missing)}, "
                    f"{missing[0]!r} the first, which would be random: fetch the base again, or give a whole one"
                )
            setattr(pipeline, name, model.requires_grad_(False).eval())

    def has(self, name: str) -> bool:
        """Whether the weights of a model are on this machine."""
        files = self._files.get(name)
        if files is None:
            return True
        folder = Path(files.repo, files.place["subfolder"] or "")
        if not Path(files.repo).is_dir():
            within = PurePosixPath(files.place["subfolder"] or "", "config.json")
            config = try_to_load_from_cache(files.repo, str(within), revision=files.place["revision"])
            if not isinstance(config, str):
                return False
            folder = Path(config).parent
        return any(folder.glob("*.safetensors"))

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

    def _add_hull(self, name: str, files: _Files) -> None:
        with torch.device("meta"):
            if issubclass(files.cls, PreTrainedModel):
                hull = files.cls(files.cls.config_class.from_pretrained(files.repo, **files.place))
            else:
                hull = files.cls.from_config(files.cls.load_config(files.repo, **files.place))
                hull.register_to_config(_name_or_path=files.repo)  # as a model that is loaded has it
        self._hulls[name], self._files[name] = hull.requires_grad_(False).eval(), files

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


def _make_workspaces(device: torch.device) -> None:
    """Have cuBLAS take its workspaces before weights come.

    Taken later, they lie in the large piece of memory that a quantised model was loaded into, and keep all of it.
    """
    one = torch.zeros(8, 8, device=device)
    torch.addmm(one[0], one, one)
    torch.mm(one, one)


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


def _with(pipeline_class: Any, parts: dict[str, Any]) -> Any:
    """A pipeline's class that is made with these parts, whatever it is given: some ask a processor as they are made."""

    @functools.wraps(pipeline_class.__init__)
    def init(self: Any, *args: Any, **options: Any) -> None:
        pipeline_class.__init__(self, *args, **{**options, **parts})

    return type(pipeline_class.__name__, (pipeline_class,), {"__init__": init})


class _TextHalf:
    """Of a processor what text needs: for the images that it also takes it wants torchvision."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: Any, **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        one = isinstance(conversation[0], dict)  # a processor makes a batch of it, and a tokenizer does not
        return self.tokenizer.apply_chat_template([conversation] if one else conversation, **options)


def _processor(cls: str, repo: str, place: dict[str, Any]) -> Any:
    """A processor of transformers; where what it needs for images is not installed, what it has for text."""
    try:
        return getattr(transformers, cls).from_pretrained(repo, **place)
    except (ImportError, ValueError):
        return _TextHalf(AutoTokenizer.from_pretrained(repo, **place))


def _load_small(spec: Any, place: dict[str, Any]) -> Any:
    """A tokenizer, a scheduler and the like."""
    try:
        return spec.load(**place)
    except ValueError:
        if not isinstance(spec.type_hint, type) or not issubclass(spec.type_hint, (ProcessorMixin, AutoProcessor)):
            raise
        return _TextHalf(AutoTokenizer.from_pretrained(spec.pretrained_model_name_or_path, **place))


def _has_config(cls: Any, name: str, source: dict[str, Any]) -> bool:
    with suppress(OSError):
        return bool(cls.load_config(name, **source))
    return False


def _names_a_class(name: str, value: Any) -> bool:
    """Whether an entry of a pipeline's index is a component's: lists of other things are settings."""
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and not name.startswith("_") and all(isinstance(one, str) for one in value)


def _class_of(library: str, name: str) -> Any:
    """The class of a model, as a pipeline's index names it; None for anything else, which is small."""
    inside = library if library in ("diffusers", "transformers") else f"diffusers.pipelines.{library}"
    cls: Any = None
    with suppress(ImportError):
        cls = getattr(importlib.import_module(inside), name, None)
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) else None
