# SPDX-License-Identifier: Apache-2.0
"""What `metalora estimate` does: say what a command would take before anything is loaded; and what less would take."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bases import Base, open_base
from ..bases.footprint import (
    CONTEXT,
    GIB,
    Pass,
    held,
    largest_layer,
    numbers_of_subject,
    of_autoencoder,
    one_pass,
    streamed,
)
from ..bases.memory import Memory, Whole, lighter
from ..bases.precision import choose_dtype, device_called
from ..checkpoint.base_model import base_to_load
from ..checkpoint.config_file import read_config
from ..data import read_subjects
from ..errors import ConfigError, MetaLoraError
from ..hub.loading import folder_of
from ..settings import setting
from ..training.stage_settings import MetaTrainConfig, PersonalizeConfig, TrainEncoderConfig, TrainingConfig
from ..tuner import MetaLoraConfig
from . import Done
from .generate import GenerateConfig
from .read import ReadConfig

_ASSUMED = 60e12  # operations a second, of a card of the middle
_WHOLE, _QUANTIZED = 0.4, 0.1  # share of a matrix product's speed that a step reached on an H100
_HOST = 20e9  # bytes a second from host memory
_DECIDE = "resolution", "quantize", "offload", "gradient_checkpointing", "train_batch_size", "num_images_per_prompt"


@dataclass(kw_only=True)
class EstimateConfig:
    """Say what a command would take: GPU memory, time, download and disk. Nothing but configurations is read."""

    arguments: list[str] = setting(
        "meta-train, train-encoder, read, personalize or generate, with its flags, as it would be run.",
        [],
        positional="COMMAND ...",
    )


@dataclass(frozen=True)
class Estimate:
    """What a command takes.

    Attributes:
        phases: the most GiB of GPU memory at a time of each. seconds: of its steps. operations_a_second: that these are
            reckoned with. download, disk: GiB that are still to fetch, and to have room for.
        measured: the most GiB that this took on the machine that it was measured on.
    """

    base: str
    phases: dict[str, float]
    seconds: float
    operations_a_second: float
    download: float
    disk: float
    measured: float | None = None
    measured_on: str | None = None

    @property
    def gib(self) -> float:
        """The most GPU memory."""
        return max(self.phases.values()) if self.measured is None else self.measured


def run_estimate(config: Any) -> Done:
    """Say what the command of these settings would take."""
    found = estimate(config)
    rate = "this GPU's own" if torch.cuda.is_available() else "assumed, for there is no GPU here"
    span = f"{found.seconds / 60:.0f} minutes" if found.seconds >= 60 else f"{found.seconds:.0f} seconds"
    phases = ", ".join(f"{name} {gib:.1f}" for name, gib in found.phases.items())
    most = f"about {found.gib:.1f} GiB at most ({phases})"
    how = "All from shapes, nothing is measured: meant"
    if found.measured is not None:
        most = f"{found.gib:.1f} GiB, measured ({found.measured_on}); from shapes {phases}"
        how = "All but the memory is from shapes: meant"
    lines = [
        f"GPU memory  {most}",
        f"time        about {span} of steps, at {found.operations_a_second / 1e12:.0f} TFLOP/s ({rate})",
        f"download    {found.download:.1f} GiB of {found.base}",
        f"disk        {found.disk:.1f} GiB",
        f"{how} to be right within a quarter, times within a factor of two.",
    ]
    return Done("\n".join(lines), {**asdict(found), "gib": found.gib})


def estimate(config: Any) -> Estimate:
    """What the command of these settings takes, from the configurations of its base and its Down.

    Raises:
        ConfigError: settings of another command. BaseModelMismatchError: there is no such base. As `read_config`.
    """
    if isinstance(config, (MetaTrainConfig, PersonalizeConfig, TrainEncoderConfig)):
        found, denoiser = _of_training(config)
    elif isinstance(config, GenerateConfig):
        found, denoiser = _of_drawing(config)
    elif isinstance(config, ReadConfig):
        found, denoiser = _of_reading(config)
    else:
        raise ConfigError(
            "expected meta-train, train-encoder, personalize, read or generate to be estimated, found another command: "
            "give one of these with its flags"
        )
    row = measured(config, denoiser)
    return found if row is None else replace(found, measured=row["gib"], measured_on=row["machine"])


def advice(config: Any) -> str:
    """What takes less than these settings, which were too much, and how much: the end of a sentence, never an error."""
    changes = lighter(config)
    try:
        now = estimate(config).gib
        told, all_together = [], config
        for change in changes:
            flags = re.fullmatch(r"--(\w+)(?: (\w+))?", change)
            if flags is None:
                told.append(change)
                continue
            values: dict[str, Any] = {flags[1]: flags[2] or True}
            all_together = replace(all_together, **values)
            told.append(f"{change} (about {estimate(replace(config, **values)).gib:.1f} GiB)")
        less = estimate(all_together).gib
    except (MetaLoraError, RuntimeError, OSError, ValueError, TypeError, LookupError, AttributeError, MemoryError):
        return ", ".join([*changes, "a device with more memory"])
    together = f"; these together about {less:.1f} GiB" if all_together is not config else ""
    return f"{', '.join([*told, 'a device with more memory'])}{together}; now about {now:.1f} GiB, from shapes"


# What was measured


def occasion(config: Any, denoiser: nn.Module) -> dict[str, Any] | None:
    """What the memory of a command depends on, as rows of `measured.json` say it; None: of others too."""
    others = getattr(config, "validation_prompt", None) or getattr(config, "max_sequence_length", None)
    if config.mixed_precision not in ("auto", "bf16") or others or config.device == "cpu":
        return None
    return {
        "command": type(config).__name__.removesuffix("Config").lower(),
        "denoiser": type(denoiser).__name__,
        "numbers": sum(parameter.numel() for parameter in denoiser.parameters()),
        **{name: getattr(config, name) for name in _DECIDE if hasattr(config, name)},
        **({"num_frames": frames} if (frames := getattr(config, "num_frames", None)) else {}),
    }


@functools.cache
def _rows() -> list[dict[str, Any]]:
    """What `benchmarks/memory.py` wrote."""
    rows: list[dict[str, Any]] = json.loads(Path(__file__).with_name("measured.json").read_text())["rows"]
    return rows


def measured(config: Any, denoiser: nn.Module) -> dict[str, Any] | None:
    """The `gib` that a command took with this base and these settings where it was measured, and the `machine`."""
    asked = occasion(config, denoiser)
    return next((row for row in _rows() if asked is not None and asked == row["occasion"]), None)


# What is opened


def _open(config: Any, base_name: str, revision: str | None, memory: Memory) -> tuple[Base, torch.dtype]:
    # Without a device of its own a command is estimated for the GPU that it is meant for.
    dtype = choose_dtype(config.mixed_precision, device_called(config.device or "cuda"))
    options = {"max_sequence_length": getattr(config, "max_sequence_length", None)}
    return open_base(
        base_name,
        revision=revision,
        dtype=dtype,
        local_files_only=config.local_files_only,
        memory=memory,
        generic=config.generic,
        **options,
    ), dtype


def _config_of(config: Any, name: str) -> MetaLoraConfig:
    return read_config(folder_of(name, local_files_only=config.local_files_only))


# Phases, in bytes


@dataclass(frozen=True)
class _Held:
    """How the models of a base are held, and what each takes so."""

    base: Base
    memory: Memory
    dtype: torch.dtype

    def _quantized(self, name: str) -> bool:
        return self.memory.quantize != "none" and name in (self.base.denoiser_name, *self.base.large_encoders)

    def _model(self, name: str) -> nn.Module | None:
        part = getattr(self.base.pipeline, name, None)
        return part if isinstance(part, nn.Module) else None

    def whole(self, *names: str) -> float:
        """Of these models, side by side."""
        there = [(name, part) for name in names if (part := self._model(name)) is not None]
        return sum(held(part, self.memory, self.dtype, quantized=self._quantized(name)) for name, part in there)

    def encoders(self) -> float:
        """Of VAE and text encoders: all of them, or the largest where they take turns."""
        names = self.base.encoder_names
        if self.memory.offload == "none":
            return self.whole(*names)
        by_layer = self.memory.offload in ("group", "sequential")
        return max(self._layer(name) if by_layer and not self._quantized(name) else self.whole(name) for name in names)

    def _layer(self, name: str) -> float:
        part = self._model(name)
        return 0.0 if part is None else largest_layer(part, self.memory, self.dtype, quantized=self._quantized(name))

    def denoiser(self) -> float:
        """Of the denoiser in training."""
        name = self.base.denoiser_name
        if self.memory.offload == "group":
            return streamed(self.base.denoiser, self.memory, self.dtype, quantized=self._quantized(name))
        return self.whole(name)

    def drawing(self) -> tuple[float, float, float]:
        """Of what is on the device while text is encoded, noise is taken away and a picture is decoded."""
        everything = (*self.base.encoder_names, self.base.denoiser_name)
        if self.memory.offload == "none":
            return (self.whole(*everything),) * 3
        if self.memory.offload == "model":
            text = max(self.whole(name) for name in self.base.encoder_names)
            return text, self.whole(self.base.denoiser_name), self.whole("vae")
        return (max(self._layer(name) for name in everything),) * 3

    def stored(self, *names: str) -> float:
        """As repositories hold these models, in 16 bits."""
        there = [part for name in names if (part := self._model(name)) is not None]
        return sum(held(part, Whole(), torch.bfloat16, quantized=False) for part in there)


def _of_training(config: TrainingConfig) -> tuple[Estimate, nn.Module]:
    assert isinstance(config, (MetaTrainConfig, PersonalizeConfig, TrainEncoderConfig))
    down = None if isinstance(config, MetaTrainConfig) or config.down is None else _config_of(config, config.down)
    if isinstance(config, PersonalizeConfig):
        config = config.settled(down is not None and down.encoder_fingerprint is not None)
    name, revision = config.pretrained_model_name_or_path, config.revision
    if down is not None:
        name, revision = base_to_load(name, revision, down, str(getattr(config, "down", None)), config.generic)
    base, dtype = _open(config, name, revision, config)
    at, own = _Held(base, config, dtype), one_pass(base, config.resolution)
    width = dtype.itemsize / 2
    samples, trained, frozen, saved = _numbers(config, base, down)
    adapters = 16.0 * trained + 4.0 * frozen  # number, gradient and two moments, in float32
    draws = bool(config.validation_steps and config.validation_prompt)
    checkpoints = config.gradient_checkpointing or config.offload == "group"
    encode = at.encoders() + width * _photos(base, config.resolution, max(1, config.views_per_image))
    train = at.denoiser() + adapters + samples * width * (own.checkpointed if checkpoints else own.kept)
    if draws:
        train += at.whole(*base.encoder_names)
    elif not config.views_per_image:
        train += at.whole("vae") + width * _photos(base, config.resolution, samples)
    steps = config.max_train_steps * config.gradient_accumulation_steps
    passes = 3 if checkpoints else 2
    seconds, rate = _seconds(at, own, steps, samples, passes)
    every, limit = config.checkpointing_steps, config.checkpoints_total_limit
    kept = 0 if every is None else min(config.max_train_steps // every, limit or config.max_train_steps)
    written = 4.0 * saved + kept * 12.0 * trained
    phases = {"encoding": encode, "training": train}
    return _told(at, phases, seconds, rate, (*base.encoder_names, base.denoiser_name), written), base.denoiser


def _numbers(
    config: MetaTrainConfig | PersonalizeConfig | TrainEncoderConfig, base: Base, down: MetaLoraConfig | None
) -> tuple[int, float, float, float]:
    """Samples of a batch, numbers that train, that are frozen, and that are written."""
    if isinstance(config, PersonalizeConfig):
        samples = config.train_batch_size * (2 if config.prior_loss_weight else 1)
        if down is None:
            layers = _adapted(base, config.modules or base.target_modules)
            rank = config.rank or 1
            trained = float(sum(rank * (one.weight.shape[0] + one.weight[0].numel()) for one in layers))
            return samples, trained, 0.0, trained
        each, shared = numbers_of_subject(_layers(base, down), down.r, down.meta_r)
        return samples, each, shared, each
    if isinstance(config, TrainEncoderConfig):
        assert down is not None
        each, shared = numbers_of_subject(_layers(base, down), down.r, down.meta_r)
        rows = config.subjects_per_batch
        space = float(config.code_size * each)
        return rows * config.images_per_subject, space + rows * each / 2, shared, space + shared
    each, shared = numbers_of_subject(
        _adapted(base, config.modules or base.target_modules), config.rank, config.meta_rank
    )
    subjects = 1 if config.train_data_dir is None else len(read_subjects(config.train_data_dir))
    slots = min(config.bucket_size or subjects, subjects)
    return config.subjects_per_batch * config.images_per_subject, slots * each + shared, 0.0, shared + each


def _layers(base: Base, down: MetaLoraConfig) -> list[Any]:
    names = down.target_modules or base.target_modules
    return _adapted(base, names if isinstance(names, str) else sorted(names))


def _adapted(base: Base, names: str | list[str]) -> list[Any]:
    """The layers that an adapter goes onto, by the names that PEFT takes."""

    def fits(path: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in names)

    return [
        one for path, one in base.denoiser.named_modules() if fits(path) and isinstance(one, (nn.Linear, nn.Conv2d))
    ]


def _of_drawing(config: GenerateConfig) -> tuple[Estimate, nn.Module]:
    name, revision = config.pretrained_model_name_or_path, None
    if not name:
        first = next(iter(config.subject), str(config.down))
        name, revision = base_to_load(None, None, _config_of(config, first), first, config.generic)
    base, dtype = _open(config, name, revision, config)
    side, frames = config.resolution or base.default_side, base.latent_frames(config.num_frames)
    at, own, width = _Held(base, config, dtype), one_pass(base, side, frames), dtype.itemsize / 2
    guided = 1 if config.guidance_scale is not None and config.guidance_scale <= 1 else 2
    text, denoise, decode = at.drawing()
    samples = config.num_images_per_prompt
    # Of a clip what one of its latents becomes is decoded at a time.
    decoded = samples * (base.pipeline.vae_scale_factor_temporal if frames > 1 else 1)
    phases = {
        "encoding": text,
        "drawing": denoise + guided * samples * width * own.alive,
        "decoding": decode + decoded * width * of_autoencoder(base.pipeline.vae, side, decoding=True),
    }
    pictures = max(1, len(config.subject) + bool(config.photo)) * len(config.prompt)
    seconds, rate = _seconds(at, own, pictures * config.num_inference_steps, guided * samples, 1)
    written = pictures * samples * frames * 2.0 * side**2
    return _told(at, phases, seconds, rate, (*base.encoder_names, base.denoiser_name), written), base.denoiser


def _of_reading(config: ReadConfig) -> tuple[Estimate, nn.Module]:
    down = _config_of(config, config.down)
    asked = config.pretrained_model_name_or_path
    name, revision = base_to_load(asked, config.revision, down, config.down, config.generic)
    base, dtype = _open(config, name, revision, Whole())
    at = _Held(base, Whole(), dtype)
    photos = at.whole("vae") + dtype.itemsize / 2 * _photos(base, 512, 8)
    return _told(at, {"reading": photos}, 0.0, _rate(), ("vae",), 1e6), base.denoiser


def _photos(base: Base, resolution: int, count: int) -> float:
    """Bytes of photos that are encoded together, a megapixel or one of them."""
    together = max(1, min(count, 16, 2**20 // resolution**2))
    return together * of_autoencoder(base.pipeline.vae, resolution)


# Time and disk


def _rate() -> float:
    """Operations a second of a product of two matrices: of this GPU, which is asked, or an assumed one."""
    if not torch.cuda.is_available():
        return _ASSUMED
    one = torch.zeros(4096, 4096, device="cuda", dtype=torch.float16)
    for _ in range(3):
        one @ one
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        one @ one
    torch.cuda.synchronize()
    return 10 * 2 * 4096**3 / (time.perf_counter() - start)


def _seconds(at: _Held, own: Pass, steps: int, samples: int, passes: int) -> tuple[float, float]:
    """Seconds of `steps` of so many passes (forward, backward, again), and the rate they are reckoned with."""
    rate = _rate()
    share = _WHOLE if at.memory.quantize == "none" else _QUANTIZED
    compute = passes * samples * own.operations / (rate * share)
    waits = 0.0
    if at.memory.offload in ("group", "sequential"):
        waits = min(2, passes) * at.whole(at.base.denoiser_name) / _HOST
    return steps * max(compute, waits), rate


def _told(
    at: _Held, phases: dict[str, float], seconds: float, rate: float, needed: Iterable[str], written: float
) -> Estimate:
    assert at.base.parts is not None
    download = at.stored(*[name for name in needed if not at.base.parts.has(name)])
    in_gib = {name: (size + CONTEXT) / GIB for name, size in phases.items()}
    return Estimate(at.base.parts.name, in_gib, seconds, rate, download / GIB, (download + written) / GIB)
