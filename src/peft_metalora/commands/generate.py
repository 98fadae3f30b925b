# SPDX-License-Identifier: Apache-2.0
"""Images or clips of subjects from prompts: load a base and subjects, draw, write PNG files or clips."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, MetaLoraError
from ..settings import (
    BASE_MODEL,
    DEVICE,
    FACE_MODEL,
    GENERIC,
    LOCAL_FILES_ONLY,
    OFFLOAD,
    PRECISION,
    QUANTIZE,
    READ_FACE_ALIGN,
    READ_FACE_CROP,
    READ_FACE_MARGIN,
    below_one,
    setting,
)
from . import Done
from .clips import CLIP_FORMATS


@dataclass(kw_only=True)
class GenerateConfig:
    """Which images to draw: every prompt for every subject.

    Raises:
        ConfigError: a value that cannot be.
    """

    pretrained_model_name_or_path: str | None = setting(
        f"{BASE_MODEL} Default: the one that the first subject or the Down names.", None
    )
    generic: str | None = setting(*GENERIC)
    output_dir: str = setting(
        "Folder for the images, <subject>-<prompt number>-<image number>.png; of clips, .webp or .mp4."
    )
    prompt: list[str] = setting("One or more prompts.")
    subject: list[str] = setting(
        "Subjects (or Downs, which show their mean subject): folders or repository ids. None: the base.", []
    )
    photo: list[str] = setting(
        "One photo of a person or several, or a folder of them, to be read and drawn; nothing of the person but the "
        "images is kept. Needs down.",
        [],
    )
    down: str | None = setting("Folder or repository of the Down that reads photo.", None)
    face_crop: str | None = setting(*READ_FACE_CROP)
    face_margin: float | None = setting(*READ_FACE_MARGIN)
    face_align: bool | None = setting(*READ_FACE_ALIGN)
    face_model: str | None = setting(*FACE_MODEL)
    num_images_per_prompt: int = setting("Images of each subject and prompt.", 1)
    num_inference_steps: int = setting("Steps of the sampler.", 28)
    guidance_scale: float | None = setting("Guidance. Default: the pipeline's own.", None)
    resolution: int | None = setting("Height and width in pixels. Default: the pipeline's own.", None)
    num_frames: int | None = setting(
        "Frames of a clip, on a base that draws clips; 1 is a picture. Default: the pipeline's own.", None
    )
    clip_format: str = setting(
        "File of a clip: an animated webp, or mp4, which needs the extra [video].", "webp", CLIP_FORMATS
    )
    max_sequence_length: int | None = setting(
        "Tokens of a prompt. Default: what the tokenizer allows, at most 512.", None
    )
    mixed_precision: str = setting(*PRECISION)
    quantize: str = setting(*QUANTIZE)
    offload: str = setting(*OFFLOAD)
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)
    device: str | None = setting(*DEVICE)
    seed: int = setting("Seed of the first image of a prompt; the next has the next seed. Equal for all subjects.", 0)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("prompt must name at least one prompt, found none")
        counts = "num_images_per_prompt", "num_inference_steps", "resolution", "num_frames", "max_sequence_length"
        if fault := below_one(self, *counts):
            raise ConfigError(fault)
        if bool(self.photo) != (self.down is not None):
            raise ConfigError(
                f"expected `photo` and `down`, found `{'photo' if self.photo else 'down'}` alone: a Down reads photos, "
                "so give both or none of them"
            )
        if not (self.pretrained_model_name_or_path or self.subject or self.down):
            raise ConfigError(
                "expected something to draw, found none: give `subject`, `photo` and `down`, or "
                "pretrained_model_name_or_path"
            )


def run_generate(config: GenerateConfig) -> Done:
    """Draw, and name the images."""
    images = generate(config)
    return Done(f"wrote {len(images)} image(s) to {config.output_dir}", {"images": images})


def generate(config: GenerateConfig, *, progress: bool = True) -> list[Path]:
    """Draw every prompt for every subject and write each image, whole or not at all.

    Returns:
        The files, in the order they were drawn.

    Raises:
        BaseModelMismatchError, CheckpointError: the base or a subject cannot be used.
        WriteFailedError: the disk refuses.
    """
    import torch
    from tqdm.auto import tqdm

    from ..bases import open_base
    from ..bases.memory import CPU, ready_to_draw, require_supported
    from ..bases.precision import choose_device, choose_dtype
    from ..checkpoint.base_model import base_to_load, require_class
    from ..checkpoint.config_file import read_config
    from ..data import read_photos
    from ..data.images import png
    from ..encoder.reader import no_encoder
    from ..encoder.sight import Sight
    from ..files import require_writable, write_bytes
    from ..hub.loading import HubOptions, folder_of, load
    from ..pipelines.loader import enable_meta_lora
    from ..training.examples.shapes import crop_shapes
    from ..tuner import DownSource
    from .clips import clip, require_clip_format

    hub: HubOptions = {"local_files_only": config.local_files_only}
    device = choose_device(config.device)
    require_supported(config, "draw", *([CPU] if device.type == "cpu" else []))
    require_writable(config.output_dir)
    require_clip_format(config.clip_format)
    for photo in config.photo:
        found = read_photos(photo)
        if not Path(photo).is_dir():
            found[0].load()
    Sight(config.face_crop, config.face_margin, config.face_align)
    named = [*config.subject, *([] if config.down is None else [config.down])]
    configs = [read_config(folder_of(name, **hub)) for name in named]
    if config.down is not None and configs[-1].encoder_fingerprint is None:
        raise no_encoder(config.down)
    for one, name in zip(configs, named, strict=True):
        require_class(one, config.generic, name)
    base_name, revision = config.pretrained_model_name_or_path, None
    if not base_name:
        base_name, revision = base_to_load(None, None, configs[0], named[0], config.generic)
    base = open_base(
        base_name,
        revision=revision,
        dtype=choose_dtype(config.mixed_precision, device),
        local_files_only=config.local_files_only,
        memory=config,
        generic=config.generic,
        max_sequence_length=config.max_sequence_length,
    )
    if config.resolution is not None:
        crop_shapes(None, config.resolution, base.pixel_multiple)
    if config.num_frames is not None and not base.frames_per_second:
        raise ConfigError(
            f"num_frames is for a base that draws clips, found a {type(base.pipeline).__name__}, which draws pictures: "
            "leave it out"
        )
    downs: dict[str, DownSource] = {}
    # What does not fit is refused before weights of the base are read.
    for name in named:
        source = load(name, model=base.denoiser, known_down=downs.get, **hub)
        down = source if isinstance(source, DownSource) else source.down
        downs[down.fingerprint] = down
    del downs
    base.load(device)
    pipe = enable_meta_lora(base.pipeline)
    ready_to_draw(pipe, config, device)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"max_sequence_length": base.max_sequence_length} if base.takes_sequence_length else {}
    if config.guidance_scale is not None:
        options["guidance_scale"] = config.guidance_scale
    if config.resolution is not None:
        options.update(height=config.resolution, width=config.resolution)
    if config.num_frames is not None:
        options["num_frames"] = config.num_frames
    adapters = [pipe.load_meta_lora(name, **hub) for name in config.subject]
    if config.down is not None:
        own = "face_crop", "face_margin", "face_align", "face_model", "generic"
        given = {name: getattr(config, name) for name in own}
        adapters.append(pipe.read_subject(config.photo, down=config.down, **given, **hub))
    names = _file_names([*config.subject, *(Path(photo).stem for photo in config.photo[:1])])
    written = []
    jobs = [(who, number) for who in range(len(names)) for number in range(len(config.prompt))]
    for who, number in tqdm(jobs, desc="generating", unit="prompt", disable=not progress):
        if adapters:
            pipe.set_adapters(adapters[who])
        seeds = range(config.seed, config.seed + config.num_images_per_prompt)
        try:
            clips = base.clips(
                prompt=config.prompt[number],
                num_images_per_prompt=config.num_images_per_prompt,
                num_inference_steps=config.num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                **options,
            )
        except MetaLoraError:
            raise
        except ValueError as error:
            raise ConfigError(f"expected what a {type(pipe).__name__} takes, found: {error}") from error
        for count, frames in enumerate(clips):
            kind = config.clip_format if len(frames) > 1 else "png"
            written.append(Path(config.output_dir) / f"{names[who]}-{number:02d}-{count:02d}.{kind}")
            content = png(frames[0]) if kind == "png" else clip(frames, base.frames_per_second, kind)
            write_bytes(written[-1], content)
    return written


def _file_names(subjects: Sequence[str]) -> list[str]:
    """A name for each subject's files: the last part of its path, with a number where two are equal."""
    names: list[str] = []
    for subject in subjects or ["base"]:
        last = subject.replace("\\", "/").rstrip("/").rpartition("/")[2]
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", last).lstrip(".") or "subject"
        taken = {name.casefold() for name in names}
        numbered = (f"{stem}_{number}" for number in itertools.count(len(names)))
        names.append(next(name for name in itertools.chain([stem], numbered) if name.casefold() not in taken))
    return names
