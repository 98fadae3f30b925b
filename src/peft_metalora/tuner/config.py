# SPDX-License-Identifier: Apache-2.0
"""`MetaLoraConfig`: ranks, targets, stage and slots of a Meta-LoRA adapter, with every check that needs no model.

A user of PEFT's LoRA has two new words to learn: `meta_r` (the rank of the shared Down, r1 in arXiv 2503.22352) and
`stage`. Each field is documented once, in its `help`; flags and docs are made from there."""

from __future__ import annotations

import copy
import functools
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from ..errors import ConfigError
from ..settings import setting
from .registration import MetaLoraType

STAGES = ("meta", "subject")
STARTS = ("stored", "mean", "fresh")
MAX_ALPHA = 65504  # of half precision
DOWN_INITS = ("uniform", "orthogonal", "pissa")
BIASES = ("none", "all", "meta_lora_only")


@dataclass
class MetaLoraConfig(PeftConfig):
    """Configuration of a Meta-LoRA adapter: `y = base(x) + scaling * Up @ Mid @ Down @ x`.

    Down is `meta_r x d_in` and shared by all subjects of a domain, Mid `r x meta_r` and Up `d_out x r` belong to one
    subject. Source: arXiv 2503.22352 (method); slots, starts and fingerprints are ours.

    Examples:
        >>> MetaLoraConfig(r=2, meta_r=16, target_modules=["to_q", "to_v"]).stage
        'meta'

    Raises:
        ConfigError: a rank, scale, probability, stage, start or pattern that cannot be.
    """

    r: int = setting("Rank of a subject: columns of Up, rows of Mid (r2).", 4)
    meta_r: int = setting("Rank of the shared Down: its rows (r1).", 64)
    target_modules: list[str] | str | None = setting(
        "Names (or one regular expression) of the modules to adapt, or 'all-linear'.", None
    )
    exclude_modules: list[str] | str | None = setting(
        "Names (or one regular expression) of modules to leave alone although target_modules names them.", None
    )
    lora_alpha: float = setting("Scale: the adapter's output is multiplied by lora_alpha / r.", 4)
    lora_dropout: float = setting("Probability of dropping an input feature of the adapter while training.", 0.0)
    use_rslora: bool = setting("Divide lora_alpha by sqrt(r) instead of r (rsLoRA, arXiv 2312.03732).", False)
    init_weights: bool = setting(
        "True: Up = 0, so that a new adapter changes nothing. False: Up is drawn too (for tests).", True
    )
    down_init: str = setting(
        "Start of a new Down: 'uniform', 'orthogonal' rows (arXiv 1312.6120) or 'pissa', the leading "
        "directions of the base weight (after arXiv 2404.02948; the base stays as it is).",
        "uniform",
    )
    use_dora: bool = setting(
        "Learn the length of each output row apart from its direction (DoRA, arXiv 2402.09353). "
        "Linear layers only; no ordinary LoRA expresses it, but it merges.",
        False,
    )
    fan_in_fan_out: bool = setting(
        "The targets store their weight as (d_in, d_out), as Conv1D does; set by itself for that.", False
    )
    bias: str = setting("Which biases of the base train along: 'none', 'all' or 'meta_lora_only'.", "none")
    modules_to_save: list[str] | None = setting("Further modules to train fully and save with the adapter.", None)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        "Rows of the embedding to train beside the adapter: indices, or by name of the embedding.", None
    )
    layers_to_transform: list[int] | int | None = setting("Adapt only the layers with these indices.", None)
    layers_pattern: list[str] | str | None = setting(
        "Name of the layer list that layers_to_transform counts in, if it is not the usual one.", None
    )
    rank_pattern: dict[str, int] = setting("Other values of r for modules whose name matches a pattern.", {})
    alpha_pattern: dict[str, float] = setting("Other values of lora_alpha for modules that match a pattern.", {})
    meta_rank_pattern: dict[str, int] = setting("Other values of meta_r for modules that match a pattern.", {})
    stage: str = setting("'meta': Down, Mid and Up train. 'subject': Down is given and never trains.", "meta")
    num_slots: int = setting("How many subjects the adapter holds; set_slots chooses one for each sample.", 1)
    start: str = setting(
        "Where a subject starts: 'stored' (the Mid that belongs to the Down, Up = 0), 'mean' (mean Mid and "
        "Up of stage 1) or 'fresh' (a new Mid, Up = 0; a control, less like the person).",
        "stored",
    )
    down: str | None = setting(
        "Stage 'subject': the Down, as an adapter name on this model, a local folder or a repository id.", None
    )
    down_revision: str | None = setting("Revision of the Down's repository.", None)
    down_fingerprint: str | None = setting("Hash that identifies the Down's tensors; set when a Down is bound.", None)
    space_fingerprint: str | None = setting(
        "Hash of a subject space: that of a Down that reads photos, or the one that a subject's code is of; set when "
        "files are written.",
        None,
    )
    encoder_fingerprint: str | None = setting(
        "Hash of the encoder of a Down that reads photos; set when files are written.", None
    )
    subject_name: str | None = setting(
        "Who a subject is, for the files: a save of somebody else, or of nobody by name, does not replace it unasked.",
        None,
    )
    tensors_digest: str | None = setting(
        "Hash of the tensors that a file of this configuration belongs to; set when one is written.", None
    )
    format_version: int = setting("Version of the file format (docs/format.md).", 1)
    facts: dict[str, Any] | None = setting(
        "What the publisher says about it: domain, subjects, steps, recipe; plain JSON.", None
    )

    # Where it was read: the arguments that found it, so that a Down named by a relative path can be found. Never saved.
    origin: ClassVar[dict[str, Any] | None] = None
    # Whether what it was read from has been checked and comes next: PEFT injects an adapter first. Never saved.
    awaits_file: ClassVar[bool] = False
    # Of a subject that was expanded from a code: the code, and a hash of the factors as they were then. Never saved.
    expanded_from: ClassVar[tuple[Any, str] | None] = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MetaLoraConfig:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return config.read_from(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields of a file, as PEFT reads it.

        Raises:
            ConfigError: it is no JSON object, or a field is of another type than here.
        """
        try:
            table = super().from_json_file(path_json_file, **kwargs)
        except (ValueError, RecursionError, TypeError) as error:
            raise ConfigError(
                f"{path_json_file}: expected a configuration in JSON, found: {error}. Fetch the file again."
            ) from error
        wrong = wrong_field(table)
        if wrong is not None:
            name, expected = wrong
            raise ConfigError(
                f"{path_json_file}: expected {name} to be {expected}, found {str(table[name])[:60]!r}. Fetch the file "
                "again, or save it again."
            )
        return table

    def read_from(self, name: str, *, folder: str | None = None, **origin: Any) -> MetaLoraConfig:
        """Remember where it was read.

        Args:
            name: a folder or a repository. folder: where that lies here.
            origin: `subfolder` and what else found it, as huggingface_hub calls it.
        """
        self.__dict__["origin"] = {"name": name, "folder": folder, **origin}
        return self

    def take_place(self, other: MetaLoraConfig) -> None:
        """Be who another configuration says, whose factors have come into the place of these."""
        for name in ("subject_name", "facts", "tensors_digest", "down", "down_revision"):
            setattr(self, name, getattr(other, name))
        self.__dict__["origin"] = other.origin

    def __getstate__(self) -> dict[str, Any]:
        origin = self.origin and {name: value for name, value in self.origin.items() if name != "token"}
        return {**vars(self), "origin": origin}

    def located_down(self) -> str | None:
        """The Down by a name that finds it from anywhere: an absolute path where it was a relative one."""
        if self.down is None or self.origin is None or os.path.isabs(self.down):
            return self.down
        origin = self.origin
        folder = origin["folder"] or os.path.join(origin["name"], origin.get("subfolder") or "")
        found = os.path.normpath(os.path.join(os.path.abspath(folder), self.down))
        return found if os.path.isdir(found) else self.down

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, as PEFT does; the Down is named as it is found from there."""
        written = copy.copy(self)
        written.down = reference_to_write(self.located_down(), save_directory)
        if self.stage == "meta":
            written.down_fingerprint = None  # of the tensors as they are, which only whoever reads them knows
        # PEFT writes factors alone, without what reads photos and not as a code.
        written.format_version, written.space_fingerprint, written.encoder_fingerprint = 1, None, None
        super(MetaLoraConfig, written).save_pretrained(save_directory, **kwargs)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:  # PEFT's word on the task
            raise ConfigError(f"{str(error)[:300]} Leave task_type out for images.") from error
        self.peft_type = MetaLoraType.META_LORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        self._check_numbers()
        self._check_words()

    def _check_numbers(self) -> None:
        for name in ("r", "meta_r", "num_slots"):
            _require_positive_int(name, getattr(self, name))
        for name in ("rank_pattern", "meta_rank_pattern"):
            setattr(self, name, getattr(self, name) or {})
            for pattern, value in getattr(self, name).items():
                _require_positive_int(f"{name}[{pattern!r}]", value)
        self.alpha_pattern = self.alpha_pattern or {}
        for name, value in {"lora_alpha": self.lora_alpha, **self.alpha_pattern}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= MAX_ALPHA:
                raise ConfigError(
                    f"lora_alpha must be a number above 0, got {str(value)[:20]} for {name}. Half precision must "
                    "hold it. Use alpha = r for 1."
                )
        if isinstance(self.lora_dropout, bool) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}. Use 0.0 for no dropout.")

    def _check_words(self) -> None:
        for name, allowed in (("stage", STAGES), ("start", STARTS), ("bias", BIASES), ("down_init", DOWN_INITS)):
            if getattr(self, name) not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ConfigError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ConfigError(
                    f"`{name}` cannot be used when `target_modules` is a str, got {self.target_modules!r}. Put the "
                    "layer numbers into the expression, or give a list."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. Give both or none."
            )
        if self.stage == "meta" and self.down is not None:
            raise ConfigError(
                f"stage 'meta' trains its own Down, but down={str(self.down)[:80]!r} was given. "
                "Use stage='subject' to start from an existing Down."
            )


MAX_LEVELS = 64
"""Of lists and objects in each other: what Python copies and writes by recursion stays far from its limit."""


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(MetaLoraConfig)


def wrong_field(table: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first field of a configuration's JSON that is not of its annotated type, and what it should be.

    Fields that `MetaLoraConfig` does not have are passed over, as PEFT does.
    """
    for name, value in table.items():
        hint = _hints().get(name)
        if hint is not None and not _is_shallow(value):
            return name, f"JSON of at most {MAX_LEVELS} levels"
        if hint is not None and not _matches(value, hint):
            return name, str(hint).replace("typing.", "")
    return None


def _is_shallow(value: Any) -> bool:
    level, levels = [value], 0
    while level and levels <= MAX_LEVELS:
        inside = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level, levels = [item for items in inside for item in items], levels + 1
    return levels <= MAX_LEVELS


def _matches(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; sets arrive as lists, floats may arrive as whole numbers."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, part) for part in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (list, set, tuple, frozenset) or hint in (list, set, tuple):
        return isinstance(value, list) and all(any(_matches(v, part) for part in inner or (Any,)) for v in value)
    if origin is dict or hint is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return isinstance(value, dict) and (
            not inner or all(_matches(k, inner[0]) and _matches(v, inner[1]) for k, v in pairs)
        )
    if isinstance(hint, type) and issubclass(hint, str):
        return isinstance(value, str)
    if hint in (int, float):
        return type(value) is int or (hint is float and type(value) is float)
    return isinstance(hint, type) and isinstance(value, hint)


def reference_to_write(reference: str | None, folder: str | os.PathLike[str]) -> str | None:
    """A Down that lies beside a subject or below it is named by a relative path, so that both can move together.

    It begins with a dot: a bare `parts/down` would be taken for the name of a repository.
    """
    if reference is None or not os.path.isdir(reference):
        return reference
    here, found = Path(os.path.abspath(folder)), Path(os.path.abspath(reference))
    if not found.is_relative_to(here.parent):
        return str(found)
    path = Path(os.path.relpath(found, here)).as_posix()
    return path if path.startswith("..") else f"./{path}"


def _require_positive_int(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")
