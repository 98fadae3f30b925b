# SPDX-License-Identifier: Apache-2.0
"""`MetaLoraConfig`: ranks, targets, stage and slots of a Meta-LoRA adapter, with every check that needs no model.

A user of PEFT's LoRA has two new words to learn: `meta_r` (the rank of the shared Down, r1 in arXiv 2503.22352) and
`stage`. Each field is documented once, in its `help`; flags and docs are made from there."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig

from ..errors import ConfigError
from .registration import MetaLoraType

STAGES = ("meta", "subject")
STARTS = ("stored", "mean", "fresh")
DOWN_INITS = ("uniform", "orthogonal", "pissa")
BIASES = ("none", "all", "meta_lora_only")


@dataclass
class MetaLoraConfig(PeftConfig):
    """Configuration of a Meta-LoRA adapter: `y = base(x) + scaling * Up @ Mid @ Down @ x`.

    Down is `meta_r x d_in` and shared by all subjects of a domain, Mid `r x meta_r` and Up `d_out x r` belong to one
    subject. Source: arXiv 2503.22352 (method); slots, starts and fingerprints are ours.

    Example:

    >>> MetaLoraConfig(r=2, meta_r=16, target_modules=["to_q", "to_v"]).stage
    'meta'

    Raises:
        ConfigError: a rank, scale, probability, stage, start or pattern that cannot be.
    """

    r: int = field(default=4, metadata={"help": "Rank of a subject: columns of Up, rows of Mid (r2)."})
    meta_r: int = field(default=64, metadata={"help": "Rank of the shared Down: its rows (r1)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names (or one regular expression) of the modules to adapt, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or one regular expression) of modules to leave alone although target_modules names them."
        },
    )
    lora_alpha: float = field(
        default=4, metadata={"help": "Scale: the adapter's output is multiplied by lora_alpha / r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Probability of dropping an input feature of the adapter while training."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Divide lora_alpha by sqrt(r) instead of r (rsLoRA, arXiv 2312.03732)."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: Up = 0, so that a new adapter changes nothing. False: Up is drawn too (for tests)."},
    )
    down_init: str = field(
        default="uniform",
        metadata={
            "help": "Start of a new Down: 'uniform', 'orthogonal' rows (arXiv 1312.6120) or 'pissa', the leading "
            "directions of the base weight (after arXiv 2404.02948; the base stays as it is)."
        },
    )
    use_dora: bool = field(
        default=False,
        metadata={
            "help": "Learn the length of each output row apart from its direction (DoRA, arXiv 2402.09353). "
            "Linear layers only; no ordinary LoRA expresses it, but it merges."
        },
    )
    fan_in_fan_out: bool = field(
        default=False,
        metadata={"help": "The targets store their weight as (d_in, d_out), as Conv1D does; set by itself for that."},
    )
    bias: str = field(
        default="none", metadata={"help": "Which biases of the base train along: 'none', 'all' or 'meta_lora_only'."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train fully and save with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Rows of the embedding to train beside the adapter: indices, or by name of the embedding."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Adapt only the layers with these indices."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the layer list that layers_to_transform counts in, if it is not the usual one."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other values of r for modules whose name matches a pattern."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Other values of lora_alpha for modules that match a pattern."}
    )
    meta_rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Other values of meta_r for modules that match a pattern."}
    )
    stage: str = field(
        default="meta", metadata={"help": "'meta': Down, Mid and Up train. 'subject': Down is given and never trains."}
    )
    num_slots: int = field(
        default=1, metadata={"help": "How many subjects the adapter holds; set_slots chooses one for each sample."}
    )
    start: str = field(
        default="stored",
        metadata={
            "help": "Where a subject starts: 'stored' (the Mid that belongs to the Down, Up = 0), 'mean' (mean Mid and "
            "Up of stage 1) or 'fresh' (a new Mid, Up = 0; a control, it loses the gain)."
        },
    )
    down: str | None = field(
        default=None,
        metadata={
            "help": "Stage 'subject': the Down, as an adapter name on this model, a local folder or a repository id."
        },
    )
    down_revision: str | None = field(default=None, metadata={"help": "Revision of the Down's repository."})
    down_fingerprint: str | None = field(
        default=None, metadata={"help": "Hash that identifies the Down's tensors; set when a Down is bound."}
    )
    subject_name: str | None = field(
        default=None,
        metadata={"help": "Who a subject is, for the files: a save of somebody else does not replace it unasked."},
    )
    tensors_digest: str | None = field(
        default=None,
        metadata={"help": "Hash of the tensors that a file of this configuration belongs to; set when one is written."},
    )
    format_version: int = field(default=1, metadata={"help": "Version of the file format (docs/format.md)."})
    facts: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "What the publisher says about it: domain, subjects, steps, recipe; plain JSON."},
    )

    # Where it was read: the arguments that found it, so that a Down named by a relative path can be found. Never saved.
    origin: ClassVar[dict[str, Any] | None] = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MetaLoraConfig:
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return config.read_from(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def read_from(self, name: str, *, folder: str | None = None, **origin: Any) -> MetaLoraConfig:
        """Remember where it was read.

        Args:
            name: a folder or a repository. folder: where that lies here.
            origin: `subfolder` and what else found it, as huggingface_hub calls it.
        """
        self.__dict__["origin"] = {"name": name, "folder": folder, **origin}
        return self

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
        super(MetaLoraConfig, written).save_pretrained(save_directory, **kwargs)

    def __post_init__(self) -> None:
        super().__post_init__()
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
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(
                    f"lora_alpha must be a number above 0, got {value!r} for {name}. Use alpha = r for 1."
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
                f"stage 'meta' trains its own Down, but down={self.down!r} was given. "
                "Use stage='subject' to start from an existing Down."
            )


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
