# SPDX-License-Identifier: Apache-2.0
"""What an evaluation can be told, and how a method is named; plain Python, so that `metalora --help` loads no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..settings import DEVICE, FACE_MODEL, GENERIC, LOCAL_FILES_ONLY, OFFLOAD, PRECISION, QUANTIZE, below_one, setting

DEMO = "demo"
OPTIONS = {
    "base": (),
    "meta-lora": ("start", "down", "lr"),
    "random-down": ("down", "lr"),
    "lora": ("r", "lr"),
    "dora": ("r", "lr"),
    "loha": ("r", "lr"),
    "lokr": ("r", "lr"),
    "oft": ("block", "lr"),
    "vera": ("r", "lr"),
    "textual-inversion": ("tokens", "init", "lr"),
    "full": ("lr",),
}
_WHOLE = ("r", "block", "tokens")
_STARTS = ("encoder", "stored", "mean", "fresh")


@dataclass(kw_only=True)
class EvaluateConfig:
    """Compare methods on a folder of people: images, scores and a report.

    Raises:
        ConfigError: a value that cannot be.
    """

    data: str = setting("Folder of people: DIR/<person>/*.png, one reference each and other photos.")
    output: str = setting("Folder for images, scores and report; a rerun goes on where it stopped.")
    base: str = setting("Base model: a diffusers folder, a repository id, or 'demo' for the embedded one.", DEMO)
    generic: str | None = setting(*GENERIC)
    method: list[str] = setting(
        f"Methods, as 'lora:r=4,lr=1e-2'. Kinds: {', '.join(OPTIONS)}; full trains every weight.", []
    )
    images: list[str] = setting("Images made elsewhere, NAME=DIR with the file names of export_prompts.", [])
    degrade: list[str] = setting(
        "Also learn each reference made worse: NAME or NAME=STRENGTH,STRENGTH (blur, noise, jpeg, "
        "low_light, occlusion, low_resolution, sunglasses, grey, 'all' of them, or what DIR/<person>/conditions "
        "has photos of).",
        [],
    )
    export_prompts: str | None = setting("Write the prompts, seeds and file names to this JSONL file.", None)
    prompts: str | None = setting(
        "YAML file, lists of prompts by kind, {subject} for the person. Default: the set of this package.", None
    )
    subject_name: str = setting("What {subject} in prompts becomes.", "a person")
    down: str | None = setting("The Down: a folder or a repository id. Default: with base 'demo' its own.", None)
    face_model: str | None = setting(*FACE_MODEL)
    instance_prompt: str | None = setting("Caption of references that have none.", "a photo of a person")
    steps: list[int] = setting(
        "Numbers of steps to draw after. 0 is for meta-lora:start=encoder: the person as read from the reference.",
        [375],
    )
    seeds: int = setting("Images of each person and prompt, seeds 0, 1, ...", 1)
    learning_rate: float = setting("Learning rate of methods that name no lr.", 1e-3)
    train_batch_size: int = setting("Views in a batch.", 4)
    views_per_image: int = setting("Crops of a reference.", 32)
    edits: int = setting(
        "Also edit each image of seed 0 so many times, image to image with the next prompts, to see who it is then.", 0
    )
    edit_strength: float = setting("How much an edit changes, above 0 and at most 1.", 0.6)
    resolution: int | None = setting("Height and width in pixels. Default: 512; 64 with base 'demo'.", None)
    num_inference_steps: int = setting("Steps of the sampler.", 20)
    embedder: str | None = setting(
        "Face model: 'insightface', 'dlib', or module:function. Default: insightface; with base 'demo' its own.", None
    )
    match_threshold: float | None = setting(
        "R-FaceSim from which on an image counts as a match. Default: the face model's, if it has one.", None
    )
    face_pack: str = setting("Models of insightface: antelopev2, buffalo_l, or a folder of ONNX files.", "antelopev2")
    face_providers: list[str] = setting(
        "Providers of onnxruntime, e.g. CUDAExecutionProvider. Default: what insightface finds best.", []
    )
    clip_model: str | None = setting("CLIP model for CLIP-T and CLIP-I. Default: none.", None)
    dino_model: str | None = setting("DINO model, e.g. facebook/dino-vits16. Default: none.", None)
    dinov2_model: str | None = setting("DINOv2 model, e.g. facebook/dinov2-base. Default: none.", None)
    lpips: str | None = setting(
        "Distance for the diversity among seeds: LPIPS with this net (alex, vgg, squeeze; extra [lpips]), or "
        "module:function that returns one. Default: none.",
        None,
    )
    coverage: list[str] = setting(
        "A prompt is covered by an image that reaches these scores, where they are measured.",
        ["r_facesim=0.3", "clip_t=0.25", "adherence=0.75"],
    )
    mixed_precision: str = setting(*PRECISION)
    quantize: str = setting(*QUANTIZE)
    offload: str = setting(*OFFLOAD)
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)
    device: str | None = setting(*DEVICE)
    gallery: int = setting("People shown in the report's galleries.", 4)

    def __post_init__(self) -> None:
        counts = "seeds", "train_batch_size", "views_per_image", "num_inference_steps", "resolution", "gallery"
        if fault := below_one(self, *counts):
            raise ConfigError(fault)
        if not self.steps or min(self.steps) < 0:
            raise ConfigError(f"steps must be one or more numbers of at least 0, found {self.steps}")
        if not (self.method or self.images or self.export_prompts):
            raise ConfigError("expected something to do, found none: give `method`, `images` or `export_prompts`")
        if self.edits < 0 or not 0 < self.edit_strength <= 1:
            raise ConfigError(
                f"edits must be at least 0 and edit_strength in (0, 1], found {self.edits} and {self.edit_strength}"
            )
        if self.edits and self.num_inference_steps * self.edit_strength < 1:
            raise ConfigError(
                "edits take the share edit_strength of num_inference_steps, expected at least one step, found "
                f"{self.edit_strength} of {self.num_inference_steps}"
            )
        if self.lpips is not None and self.seeds < 2:
            raise ConfigError("lpips compares images of one prompt, which needs seeds of at least 2, found 1")
        if not self.subject_name.strip():
            raise ConfigError("subject_name must be a text, found none: give for example 'a person'")
        for text in self.images:
            name, folder = named(text)
            if not (name and folder and Path(folder).is_dir()):
                raise ConfigError(f"images must be NAME=DIR with a folder that is there, found {text!r}")
        methods = [Method.parse(text) for text in self.method]
        learning = [one.text for one in methods if one.kind != "base" and not one.reads]
        if max(self.steps) == 0 and learning:
            raise ConfigError(f"steps must hold a number of at least 1 for {', '.join(learning)}, found {self.steps}")
        names = [one.folder for one in methods]
        names += [safe(named(text)[0]) for text in self.images]
        plain = [name.casefold() for name in names]  # folders are one on file systems that ignore case
        if "degraded" in plain:
            raise ConfigError("images must have another name than 'degraded', whose folder is that of bad references")
        twice = sorted({name for name, key in zip(names, plain, strict=True) if plain.count(key) > 1})
        if twice:
            raise ConfigError(f"expected each method once, found {', '.join(twice)} twice: leave one out or rename it")
        self.thresholds()

    def thresholds(self) -> dict[str, float]:
        """`coverage` as numbers by score.

        Raises:
            ConfigError: something else than SCORE=NUMBER.
        """
        found = {}
        for text in self.coverage:
            name, value = named(text)
            if not (name and _is_number(value)):
                raise ConfigError(f"coverage must be SCORE=NUMBER, for example r_facesim=0.3, found {text!r}")
            found[name] = float(value)
        return found

    @property
    def side(self) -> int:
        """Height and width of images in pixels."""
        return self.resolution or (64 if self.base == DEMO else 512)


@dataclass(frozen=True)
class Method:
    """A method as the command line names it: kind, options, and the text itself."""

    text: str
    kind: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Method:
        """'lora:r=4,lr=1e-2' -> kind 'lora', r and lr.

        Raises:
            ConfigError: no such kind, or an option that it has not.
        """
        kind, _, rest = text.partition(":")
        if kind not in OPTIONS:
            raise ConfigError(f"method must be one of {', '.join(OPTIONS)}, found {text!r}")
        options = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        for name, value in options.items():
            if name not in OPTIONS[kind]:
                known = ", ".join(OPTIONS[kind]) or "none"
                raise ConfigError(f"method {text!r}: expected options {known}, found {name!r}")
            if name in _WHOLE and not (value.isdecimal() and int(value) > 0):
                raise ConfigError(f"method {text!r}: expected {name} to be a whole number above 0, found {value!r}")
            if name == "start" and value not in _STARTS:
                raise ConfigError(f"method {text!r}: expected start to be one of {', '.join(_STARTS)}, found {value!r}")
            if name == "lr" and not (_is_number(value) and float(value) > 0):
                raise ConfigError(f"method {text!r}: expected lr to be a number above 0, found {value!r}")
        return cls(text, kind, options)

    @property
    def folder(self) -> str:
        """Its name as a folder."""
        return safe(self.text)

    @property
    def reads(self) -> bool:
        """Whether it starts as the Down's encoder reads the reference."""
        return self.options.get("start") == "encoder"

    def number(self, name: str, default: int) -> int:
        """A whole-number option."""
        return int(self.options.get(name, default))


def named(text: str) -> tuple[str, str]:
    """NAME=VALUE."""
    name, _, value = text.partition("=")
    return name, value


def safe(name: str) -> str:
    """A name as a folder."""
    return re.sub(r"[^A-Za-z0-9_.=,-]+", "_", name).lstrip(".") or "_"


def _is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False
