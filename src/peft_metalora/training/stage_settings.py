# SPDX-License-Identifier: Apache-2.0
"""What can be set in training: one dataclass a job, each field documented once, in its `help`.

Flags, YAML keys and the docs page are made from these fields; names are those of diffusers' training scripts where it
has one. Plain Python only, so that `metalora --help` loads no torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import (
    BASE_MODEL,
    BASE_OF_DOWN,
    DEVICE,
    DOWN_REVISION,
    FACE_MODEL,
    GENERIC,
    LOCAL_FILES_ONLY,
    OFFLOAD,
    OVERWRITE,
    PRECISION,
    QUANTIZE,
    REVISION,
    below_one,
    fault_of,
    is_revision,
    setting,
    shown,
)
from .examples.shapes import parse_shapes

_SUBJECTS = "Folder of subject folders: DIR/<subject>/*.png with metadata.jsonl or a .txt beside each image."
_FLIP = "Mirror half of the views; 'left' and 'right' in captions are swapped with them."
_VIEWS = (
    "Crops (and mirror images) of each photo that are encoded before training. 0: every batch cuts and encodes new "
    "ones, and the VAE stays on the device."
)

VALIDATION_FOLDER = "validation"
"""In output_dir: the pictures and scores of validation."""
ENCODER_FOLDER = "encoder"
"""In output_dir of `meta-train`: checkpoints, validation and logs of its second phase."""
INPUTS = (
    "pretrained_model_name_or_path", "dataset_name", "train_data_dir", "instance_data_dir", "validation_data_dir",
    "down", "generic",
)  # fmt: skip
"""Settings that may be paths of this machine, or name something elsewhere: a run only reads what they name."""
OUTPUTS = "output_dir", "cache_dir", "logging_dir", "resume_from_checkpoint"
"""Settings that are paths of this machine and say where a run keeps what."""
_LONGEST = 20_000  # characters; a configuration may have a quarter of a megabyte
_POLYNOMIAL_END = 1e-7  # the learning rate at which diffusers' schedule of that name ends


@dataclass(kw_only=True)
class TrainingConfig:
    """What all training shares.

    Raises:
        ConfigError: a value that cannot be.
    """

    pretrained_model_name_or_path: str = setting(BASE_MODEL)
    generic: str | None = setting(*GENERIC)
    output_dir: str = setting("Folder to write; it appears, or changes, all at once.")
    overwrite: bool = setting(*OVERWRITE)
    revision: str | None = setting(*REVISION)
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)
    instance_prompt: str | None = setting("Caption of images that have none of their own.", None)
    trigger: str | None = setting("Word that takes the place of {trigger} in captions and in instance_prompt.", None)
    dataset_name: str | None = setting(
        "Instead of a folder: a data set of the Hub, or a local folder or parquet file that the datasets library loads "
        "(needs the extra [data]).",
        None,
    )
    dataset_config_name: str | None = setting("Configuration of the data set.", None)
    image_column: str = setting("Column of the data set that holds the images.", "image")
    caption_column: str = setting("Column that holds the captions, if there is one.", "text")
    subject_column: str = setting("Column that says whom an image shows; stage 2 does without.", "subject")
    resolution: int = setting("Height and width of the training crops, in pixels.", 512)
    face_crop: str | None = setting(
        "Cut the views around the largest face of a photo, found by this detector: 'insightface' (needs the extra "
        "[face]), or module:function. Photos without a face are left out. Default: cut from the whole photo.",
        None,
    )
    face_margin: float = setting("Room around the face on every side, as a share of the longer side of its box.", 0.5)
    face_align: bool = setting("With face_crop, turn photos so that the eyes are level.", False)
    random_flip: bool = setting(_FLIP, True)
    cache_dir: str | None = setting(
        "Keep encoded photos and captions in this folder for later runs. Default: in memory only.", None
    )
    weighting_scheme: str | None = setting(
        "Density of the noise levels. Default: 'logit_normal' for rectified flow, 'none' (uniform) for other models.",
        None,
        choices=("logit_normal", "mode", "none"),
    )
    shift: float | None = setting(
        "Shift of the noise levels, t' = shift * t / (1 + (shift - 1) * t): above 1 to more noise. Default: as the "
        "base's own scheduler draws, 1 for other models than rectified flow.",
        None,
    )
    max_sequence_length: int | None = setting(
        "Tokens of a prompt. Default: what the tokenizer allows, at most 512.", None
    )
    gradient_accumulation_steps: int = setting("Batches whose gradients are summed before a step.", 1)
    gradient_checkpointing: bool = setting("Recompute activations in the backward pass: less memory, more time.", False)
    mixed_precision: str = setting(*PRECISION)
    quantize: str = setting(*QUANTIZE)
    offload: str = setting(*OFFLOAD)
    dynamo_backend: str | None = setting(
        "Compile the denoiser's blocks with this backend of torch.compile, for example 'inductor'; 'no': not. "
        "Default: what accelerate launch was told.",
        None,
    )
    device: str | None = setting(*DEVICE)
    seed: int = setting("Seed of everything random.", 0)
    checkpointing_steps: int | None = setting(
        "Write output_dir/checkpoint-<step> every so many steps: what the run needs to go on, in stage 2 with the "
        "subject as it is by then.",
        None,
    )
    checkpoints_total_limit: int | None = setting("Keep only so many checkpoints, the newest. Default: all.", None)
    resume_from_checkpoint: str | None = setting(
        "Go on from a checkpoint: its path, its name in output_dir (checkpoint-200), or the 'latest' there (from the "
        "start if there is none).",
        None,
    )

    report_to: str | None = setting(
        "Trackers, by accelerate's names and separated by commas (tensorboard, wandb, ...), or 'all' that are "
        "installed: they get losses, learning rates, validation scores and images.",
        None,
    )
    logging_dir: str = setting("Folder in output_dir for trackers that write files.", "logs")
    tracker_project_name: str = setting("Name of the project, or of the run in logging_dir.", "metalora")

    def __post_init__(self) -> None:
        if fault := fault_of(vars(self), type(self)):
            raise ConfigError(fault)
        for name in self._at_least_one():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, found {value!r}")
        for name in self._positive():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, found {value!r}")
        if self.face_align and self.face_crop is None:
            raise ConfigError("face_align needs face_crop, found none: give face_crop 'insightface'")
        for name in self._zero_or_more():
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must be 0 or more, found {value!r}")
        self._check_what_is_written()
        if Path(self.output_dir).is_file():
            raise ConfigError(f"output_dir must be a folder, found a file: {self.output_dir}")

    def _check_validation(self, often: int, *names: str) -> None:
        """Raise ConfigError where validation is described and never happens."""
        for name in (*names, "validation_embedder", "validation_prompt"):
            if getattr(self, name, None) and getattr(self, "validation_steps", None) is None:
                raise ConfigError(f"{name} needs validation_steps, found none: say how often, for example {often}")

    def _check_what_is_written(self) -> None:
        """Check what goes into the configuration of a result as it is, which could not be saved else."""
        for name in ("revision", "down_revision"):
            value = getattr(self, name, None)
            if value is not None and not is_revision(value):
                raise ConfigError(f"{name} must be a branch, a tag or a commit, found {shown(value)}: leave it out")
        for name in ("domain", "fits", "instance_prompt", "trigger"):
            length = len(repr(getattr(self, name, None)))
            if length > _LONGEST:
                raise ConfigError(
                    f"{name} must be of at most {_LONGEST} characters, as it is written beside the weights, found "
                    f"{length}: shorten it"
                )

    @property
    def noise_levels(self) -> dict[str, Any]:
        """What was asked of the noise levels, for the facts of what is trained; nothing where they are the base's."""
        asked = {"weighting_scheme": self.weighting_scheme, "shift": self.shift}
        return {name: value for name, value in asked.items() if value is not None}

    def _at_least_one(self) -> tuple[str, ...]:
        checkpoints = "checkpointing_steps", "checkpoints_total_limit"
        return "resolution", "max_sequence_length", "gradient_accumulation_steps", *checkpoints

    def _positive(self) -> tuple[str, ...]:
        return "learning_rate", "shift"

    def _zero_or_more(self) -> tuple[str, ...]:
        return "lr_warmup_steps", "views_per_image", "face_margin"


@dataclass(kw_only=True)
class StageConfig(TrainingConfig):
    """What both stages share.

    Raises:
        ConfigError: a value that cannot be.
    """

    target_modules: str | None = setting(
        "Modules to adapt: names separated by commas, or one regular expression. Default: the family's own choice.",
        None,
    )
    aspect_ratio_buckets: str | None = setting(
        "Cut each photo to the bucket nearest to its own ratio of sides: 'auto' (areas near resolution²), or "
        "'height,width;height,width'. Default: squares of resolution.",
        None,
    )
    learning_rate: float = setting("Learning rate of Mid and Up (of a plain LoRA: of both its factors).", 1e-3)
    lr_scheduler: str = setting(
        "Shape of the learning rate over the run, after lr_warmup_steps.",
        "constant",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_warmup_steps: int = setting("Steps over which the learning rate rises from 0.", 0)
    optimizer: str = setting(
        "Optimiser: adamw, adafactor, sgd, adamw8bit (needs bitsandbytes), prodigy (prodigyopt; learning_rate 1), "
        "a class of torch.optim, or module:Class of any installed package.",
        "AdamW",
    )
    weight_decay: float = setting("Weight decay of the optimiser.", 0.0)
    max_grad_norm: float = setting(
        "Gradients are clipped to this norm, each subject's by its own; 0: not clipped.", 1.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aspect_ratio_buckets is not None:
            parse_shapes(self.aspect_ratio_buckets)
        try:
            fault = "no name" if self.modules == [] else ""
            re.compile(self.modules if isinstance(self.modules, str) else "")
        except (re.error, OverflowError, RecursionError) as error:
            fault = str(error)
        if fault:
            raise ConfigError(
                "target_modules must be names separated by commas, or one regular expression, found "
                f"{shown(self.target_modules)}: {fault}"
            )

    @property
    def modules(self) -> list[str] | str | None:
        """The modules to adapt, as PEFT takes them: names, or one expression; None: the family's own choice."""
        if self.target_modules is None or any(sign in self.target_modules for sign in r"\^$*+?()[]{}|"):
            return self.target_modules
        return [name.strip() for name in self.target_modules.split(",") if name.strip()]

    @property
    def has_constant_rate(self) -> bool:
        """Whether the learning rate of a step does not depend on how many steps there are in all."""
        return self.lr_scheduler in ("constant", "constant_with_warmup")

    def _zero_or_more(self) -> tuple[str, ...]:
        return *super()._zero_or_more(), "weight_decay", "max_grad_norm"

    def _check_schedule(self, steps: int | None) -> None:
        """Check that diffusers can make the schedule over so many steps; what is not known yet is no matter.

        Raises:
            ConfigError
        """
        if self.lr_scheduler != "polynomial":
            return
        if self.learning_rate is not None and self.learning_rate <= _POLYNOMIAL_END:
            raise ConfigError(
                f"lr_scheduler 'polynomial' ends at {_POLYNOMIAL_END} and needs a learning_rate above it, found "
                f"{self.learning_rate}: raise it, or give lr_scheduler 'linear', which ends at 0"
            )
        # It divides by the steps after the warm-up, once the last is done.
        if steps is not None and self.lr_warmup_steps == steps:
            raise ConfigError(
                f"lr_scheduler 'polynomial' needs steps after those of the warm-up, found lr_warmup_steps {steps} and "
                f"max_train_steps {steps}: lower lr_warmup_steps"
            )


@dataclass(kw_only=True)
class HeldOutConfig(TrainingConfig):
    """How runs over many subjects look at some that they do not train on.

    Raises:
        ConfigError: a value that cannot be.
    """

    validation_steps: int | None = setting(
        "Every so many steps, score and draw held-out subjects: stage 1 learns each on the Down as it is by then, an "
        "encoder reads each from its reference photo, and is written as it was at its best score.",
        None,
    )
    validation_data_dir: str | None = setting(
        "Folder of subject folders that are held out: the reference of each is learned or read, the others score.",
        None,
    )
    validation_subjects: int | None = setting(
        "Subjects to validate on: the first ones of validation_data_dir (default: all), or, without it, the last ones "
        "of train_data_dir, which are then not trained on (default: 4).",
        None,
    )
    validation_embedder: str | None = setting(
        "Score by R-FaceSim with this face model: 'insightface', 'dlib', or module:function. Default: score by the "
        "loss on what is not learned from.",
        None,
    )
    validation_prompt: list[str] = setting(
        "Prompts to draw every held-out subject with, beside its reference, to output_dir/validation/<step>.png.", []
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_validation(500, "validation_data_dir", "validation_subjects")
        if self.validation_embedder is not None and not (self.validation_steps and self.validation_prompt):
            raise ConfigError("validation_embedder needs images: give validation_steps and validation_prompt too")

    def _at_least_one(self) -> tuple[str, ...]:
        return *super()._at_least_one(), "validation_steps", "validation_subjects"


@dataclass(frozen=True)
class EncoderTrainingConfig:
    """How a space and its encoder are trained, apart from where photos come from.

    Attributes:
        steps: of the optimiser. targets: photos of a person in a step, beside the one that is read.
        learning_rate: of the encoder (AdamW). space_learning_rate: of mean and basis (Adam).
        warmup_steps: over which the rates rise from 0. decay: share of the steps, the last, over which they fall to 0.
        weight_decay: of the encoder. seed: of everything that is drawn. accumulation: batches in a step.

    Raises:
        ConfigError: a value that cannot be.
    """

    steps: int = 9000
    targets: int = 4
    learning_rate: float = 1e-3
    space_learning_rate: float = 3e-4
    warmup_steps: int = 100
    decay: float = 0.6
    weight_decay: float = 0.01
    seed: int = 0
    accumulation: int = 1

    def __post_init__(self) -> None:
        if fault := below_one(self, "steps", "targets", "accumulation"):
            raise ConfigError(fault)
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"decay must be a share of the steps from 0 to 1, found {self.decay}")

    def factor(self, number: int) -> float:
        """What the rates are multiplied with in step `number`, from 0."""
        rise = min(1.0, (number + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = (self.steps - number) / (self.decay * self.steps) if self.decay else 1.0
        return min(rise, fall)


_ENCODER = "Where an encoder looks: latents (the base's own VAE), transformers:<vision model>, or face."
_ENCODER_STEPS = "Steps of the training of space and encoder.", EncoderTrainingConfig.steps
_ENCODER_RATE = "Learning rate of the encoder.", EncoderTrainingConfig.learning_rate
_ENCODER_PEOPLE = "People in a batch of the encoder's training.", 8
_ENCODER_TARGETS = (
    "Photos of each of these people in a batch, beside the one that is read.",
    EncoderTrainingConfig.targets,
)


@dataclass(kw_only=True)
class ReaderConfig(TrainingConfig):
    """What an encoder is made of and how it is taught, alike in both commands that teach one.

    Raises:
        ConfigError: a value that cannot be.
    """

    code_size: int = setting("Numbers of a person's code.", 128)
    encoder_width: int = setting("Channels of the encoder's first layer.", 64)
    encoder_hidden: int = setting("Width of the encoder's head.", 512)
    # Beside 0.2 on tune people of the embedded domain (benchmarks/results/encoder_choices.json): 0.687 and 0.673.
    encoder_dropout: float = setting("Dropout of the encoder's head.", 0.1)
    bad_versions: int = setting(
        "Bad versions (blurred, dark, covered, ...) of each photo that is read; the good one is read three times as "
        "often as all of them.",
        3,
    )
    space_learning_rate: float = setting(
        "Learning rate of the subject space.", EncoderTrainingConfig.space_learning_rate
    )

    def _at_least_one(self) -> tuple[str, ...]:
        return *super()._at_least_one(), "code_size", "encoder_width", "encoder_hidden"

    def _positive(self) -> tuple[str, ...]:
        return *super()._positive(), "space_learning_rate"

    def _zero_or_more(self) -> tuple[str, ...]:
        return *super()._zero_or_more(), "encoder_dropout", "bad_versions"


@dataclass(kw_only=True)
class MetaTrainConfig(ReaderConfig, HeldOutConfig, StageConfig):
    """Stage 1: a Down from many subjects; with `encoder`, then a subject space and the encoder that reads it.

    The rates, sizes and lengths of the paper (arXiv 2503.22352) are not known; these defaults are ours.
    """

    train_data_dir: str | None = setting(_SUBJECTS, None)
    domain: str | None = setting("What the subjects have in common ('women's faces'), for the model card.", None)
    fits: list[str] = setting(
        "Other base models that the Down is for, too: repositories of the same architecture, such as a distilled twin. "
        "Twins of known bases are named by themselves.",
        [],
    )
    rank: int = setting("Rank r of a subject (columns of Up, rows of Mid).", 4)
    meta_rank: int = setting("Rank of the shared Down (its rows).", 64)
    lora_alpha: float | None = setting("Scale: the output is multiplied by lora_alpha / rank. Default: rank.", None)
    down_learning_rate: float | None = setting("Learning rate of Down. Default: learning_rate.", None)
    max_train_steps: int = setting("Steps of the whole run, divided equally among the buckets.", 3000)
    bucket_size: int | None = setting(
        "Subjects that are trained together; the next bucket starts with fresh Mid and Up. Default: all at once.", None
    )
    warmup_steps: int = setting("Steps at the start of a bucket in which Down is frozen.", 50)
    subjects_per_batch: int = setting("Subjects in a batch; each is seen equally often.", 16)
    images_per_subject: int = setting("Images of each of these subjects in a batch.", 1)
    shards: int | None = setting(
        "Groups of subjects that a batch takes equally from; each process owns some. Runs with the same number draw "
        "the same batches on any number of processes. Default: the number of processes.",
        None,
    )
    balance_by: str | None = setting(
        "A tag of the subjects ('sex'), from people.json, metadata.jsonl or a column of the data set: subjects of each "
        "of its values are seen equally often, however many they are.",
        None,
    )
    views_per_image: int = setting(_VIEWS, 1)
    validation_train_steps: int = setting("Steps of stage 2 for each of these subjects.", 50)
    encoder: str | None = setting(f"Second phase: train an encoder, too. {_ENCODER} Default: a Down alone.", None)
    encoder_train_steps: int = setting(*_ENCODER_STEPS)
    encoder_learning_rate: float = setting(*_ENCODER_RATE)
    encoder_subjects_per_batch: int = setting(*_ENCODER_PEOPLE)
    encoder_images_per_subject: int = setting(*_ENCODER_TARGETS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bad := [one for one in self.fits if not re.fullmatch(r"[\w.-]+/[\w.-]+", one)]:
            raise ConfigError(f"fits must name repositories of the Hub, owner/name, found {bad[0]!r}")
        self._check_schedule(self.max_train_steps)

    def _at_least_one(self) -> tuple[str, ...]:
        own = "rank", "meta_rank", "max_train_steps", "bucket_size", "subjects_per_batch", "images_per_subject"
        second = "encoder_train_steps", "encoder_subjects_per_batch", "encoder_images_per_subject"
        return *super()._at_least_one(), *own, "shards", "validation_train_steps", *second

    def _positive(self) -> tuple[str, ...]:
        return *super()._positive(), "lora_alpha", "down_learning_rate", "encoder_learning_rate"

    def _zero_or_more(self) -> tuple[str, ...]:
        return *super()._zero_or_more(), "warmup_steps"


@dataclass(kw_only=True)
class PersonalizeConfig(StageConfig):
    """Stage 2: one subject from one image or a few, by Meta-LoRA or, as the baseline, by a plain LoRA."""

    pretrained_model_name_or_path: str = setting(BASE_OF_DOWN, "")
    instance_data_dir: str | None = setting("An image, or a folder of images of one subject.", None)
    method: str = setting(
        "'meta-lora': Mid and Up on a frozen Down. 'lora': a plain LoRA by PEFT on the same modules.",
        "meta-lora",
        choices=("meta-lora", "lora"),
    )
    down: str | None = setting("The Down (method 'meta-lora'): a folder or a repository id.", None)
    target_modules: str | None = setting(
        "Modules to adapt (method 'lora'): names separated by commas, or one regular expression. Default: the family's "
        "own choice; with 'meta-lora' they are those of the Down.",
        None,
    )
    down_revision: str | None = setting(*DOWN_REVISION)
    start: str | None = setting(
        "Where a subject starts: 'encoder' (as the Down's encoder reads the photos), 'stored' (the Down's own Mid, "
        "Up = 0), 'mean' (stage 1's mean subject) or 'fresh' (a new Mid, Up = 0; the control). Default: 'encoder' on a "
        "Down that has one, else 'stored'.",
        None,
        choices=("encoder", "stored", "mean", "fresh"),
    )
    # None until the start is known: see `settled`.
    learning_rate: float = setting(
        "Learning rate of Mid and Up (of a plain LoRA: of both its factors). Default: 1e-3; from start 'encoder' 3e-4.",
        None,
    )
    lr_warmup_steps: int = setting(
        "Steps over which the learning rate rises from 0. Default: 0; from start 'encoder' 10.", None
    )
    max_train_steps: int = setting(
        "Steps. Default: 375; from start 'encoder' 100, most of which max_drift spares. 0 with start 'encoder': the "
        "person as read.",
        None,
    )
    max_drift: float | None = setting(
        "From start 'encoder': stop when Mid and Up have moved by this share of the way from the mean subject to the "
        "one that was read; 0: never. Default: 0.03.",
        None,
    )
    face_model: str | None = setting(*FACE_MODEL)
    rank: int | None = setting("Rank. Default: the Down's; for a plain LoRA 1.", None)
    lora_alpha: float | None = setting("Scale of a plain LoRA, lora_alpha / rank. Default: rank.", None)
    train_batch_size: int = setting("Views in a batch.", 4)
    views_per_image: int = setting(_VIEWS, 32)
    prior_loss_weight: float = setting(
        "Prior preservation without class images: weight of the distance between what the adapted model and the base "
        "predict for class_prompt. A step then costs a pass of the base and a second training pass.",
        0.0,
    )
    class_prompt: str | None = setting(
        "Prompt whose meaning prior_loss_weight keeps. Default: instance_prompt without the trigger.", None
    )
    validation_steps: int | None = setting(
        "Compute a score, and draw the validation prompts, every so many steps; the best step is what is written.", None
    )
    patience: int | None = setting(
        "Stop when the score has not risen for so many validations. Default: train to max_train_steps.", None
    )
    validation_data_dir: str | None = setting(
        "Other photos of the subject, for the score; never trained on. Default: crops that are not trained on.", None
    )
    validation_embedder: str | None = setting(
        "Score by R-FaceSim on validation_data_dir with this face model: 'insightface', 'dlib', or "
        "module:function. Default: score by the loss, which needs no other model.",
        None,
    )
    validation_prompt: list[str] = setting(
        "Prompts to draw at every validation, to output_dir/validation/<step>-<number>.png.", []
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_validation(25, "validation_data_dir", "patience")
        if self.validation_embedder is not None and not (self.validation_data_dir and self.validation_prompt):
            raise ConfigError(
                "validation_embedder needs photos and prompts: give validation_data_dir and validation_prompt too"
            )
        if self.method == "meta-lora" and self.lora_alpha is not None:
            raise ConfigError("lora_alpha belongs to method 'lora': with 'meta-lora' the Down's own scale is used")
        if self.method == "meta-lora" and self.target_modules is not None:
            raise ConfigError("target_modules belongs to method 'lora': with 'meta-lora' they are those of the Down")
        steps = self.max_train_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
            raise ConfigError(f"max_train_steps must be a whole number of at least 0, found {steps!r}")
        if steps == 0 and self.resume_from_checkpoint is not None:
            raise ConfigError(
                "max_train_steps 0 writes the person as read and goes on from no checkpoint, found "
                f"resume_from_checkpoint {self.resume_from_checkpoint!r}: leave one of them out"
            )
        if self.method == "lora" and self.start == "encoder":
            raise ConfigError("start 'encoder' belongs to method 'meta-lora', found 'lora': leave one of them out")
        self._check_schedule(steps)

    def settled(self, reads: bool) -> PersonalizeConfig:
        """The same with every default that depends on the start.

        Args:
            reads: whether the Down has an encoder.

        Raises:
            ConfigError: what belongs to start 'encoder', with another one.
        """
        start = self.start or ("encoder" if reads and self.method == "meta-lora" else "stored")
        reading = start == "encoder"
        if not reading and self.max_drift is not None:
            raise ConfigError(f"max_drift belongs to start 'encoder', found {start!r}: leave it out")
        if not reading and self.max_train_steps == 0:
            raise ConfigError(f"max_train_steps 0 writes the person as read, with start 'encoder', found {start!r}")
        own = _FROM_READ if reading else _FROM_DOWN
        missing = {name: value for name, value in own.items() if getattr(self, name) is None}
        return replace(self, start=start, **missing)

    def _at_least_one(self) -> tuple[str, ...]:
        return *super()._at_least_one(), "rank", "train_batch_size", "validation_steps", "patience"

    def _positive(self) -> tuple[str, ...]:
        return *super()._positive(), "lora_alpha"

    def _zero_or_more(self) -> tuple[str, ...]:
        return *super()._zero_or_more(), "prior_loss_weight", "max_drift"


_FROM_DOWN: dict[str, Any] = {"learning_rate": 1e-3, "lr_warmup_steps": 0, "max_train_steps": 375}
# From what benchmarks/results/stopping.json shows of people read from good and from bad photos. Adam's first steps are
# as large as its rate: without warm-up they destroy the start. The likeness rises up to a drift of 0.05 on good photos
# and of 0.02 to 0.03 on people in sunglasses, and on blurred photos falls from 0.02 on, at any rate alike; the loss on
# crops that are not trained on falls all the while, and tells nothing.
_FROM_READ: dict[str, Any] = {
    "learning_rate": 3e-4, "lr_warmup_steps": 10, "max_train_steps": 100, "max_drift": 0.03,
}  # fmt: skip


def public_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings as they may leave this machine: of its paths only the last name."""
    values = asdict(config)
    for name in (*INPUTS, *OUTPUTS):
        value = values.get(name)
        if value and (os.path.isabs(value) or os.path.exists(value)):
            values[name] = os.path.basename(os.path.abspath(value))
    return values


@dataclass(kw_only=True)
class TrainEncoderConfig(ReaderConfig, HeldOutConfig):
    """Teach a Down to read photos: a subject space and an encoder, from photos of many people.

    Raises:
        ConfigError: a value that cannot be.
    """

    pretrained_model_name_or_path: str = setting(BASE_OF_DOWN, "")
    down: str = setting("The Down: a folder or a repository id.")
    down_revision: str | None = setting(*DOWN_REVISION)
    train_data_dir: str | None = setting(f"{_SUBJECTS} People with one photo are left out.", None)
    views_per_image: int = setting(_VIEWS, 1)
    # What is read is not mirrored, and faces are not symmetric.
    random_flip: bool = setting(_FLIP, False)
    encoder: str = setting(_ENCODER, "latents")
    max_train_steps: int = setting(*_ENCODER_STEPS)
    learning_rate: float = setting(*_ENCODER_RATE)
    lr_warmup_steps: int = setting(
        "Steps over which the learning rates rise from 0.", EncoderTrainingConfig.warmup_steps
    )
    subjects_per_batch: int = setting(*_ENCODER_PEOPLE)
    images_per_subject: int = setting(*_ENCODER_TARGETS)

    def _at_least_one(self) -> tuple[str, ...]:
        return *super()._at_least_one(), "max_train_steps", "subjects_per_batch", "images_per_subject"


def second_phase(config: MetaTrainConfig, down: str, output_dir: str) -> TrainEncoderConfig:
    """The settings of `train-encoder` for the second phase of a `meta-train`."""
    other: dict[str, Any] = {
        "max_train_steps": config.encoder_train_steps,
        "learning_rate": config.encoder_learning_rate,
        "subjects_per_batch": config.encoder_subjects_per_batch,
        "images_per_subject": config.encoder_images_per_subject,
        "lr_warmup_steps": TrainEncoderConfig.lr_warmup_steps,
        "random_flip": TrainEncoderConfig.random_flip,
        "down": down,
        "down_revision": None,
        "output_dir": output_dir,
    }
    shared = {one.name: getattr(config, one.name) for one in fields(TrainEncoderConfig) if one.name not in other}
    return TrainEncoderConfig(**shared, **other)
