# SPDX-License-Identifier: Apache-2.0
"""What can be set in either stage: one dataclass a job, each field documented once, in its `help`.

Flags, YAML keys and the docs page are made from these fields; names are those of diffusers' training scripts where it
has one. Plain Python only, so that `metalora --help` loads no torch.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import fault_of, setting
from .examples.shapes import parse_shapes

_VIEWS = (
    "Crops (and mirror images) of each photo that are encoded before training. 0: every batch cuts and encodes new "
    "ones, and the VAE stays on the device."
)

VALIDATION_FOLDER = "validation"
"""In output_dir: the pictures and scores of validation."""
INPUTS = (
    "pretrained_model_name_or_path", "dataset_name", "train_data_dir", "instance_data_dir", "validation_data_dir",
    "down",
)  # fmt: skip
"""Settings that may be paths of this machine, or name something elsewhere: a run only reads what they name."""
OUTPUTS = "output_dir", "cache_dir", "logging_dir", "resume_from_checkpoint"
"""Settings that are paths of this machine and say where a run keeps what."""


@dataclass(kw_only=True)
class TrainingConfig:
    """What both stages share.

    Raises:
        ConfigError: a value that cannot be.
    """

    pretrained_model_name_or_path: str = setting("Base model: a diffusers folder or a repository id.")
    output_dir: str = setting("Folder to write; it appears, or changes, all at once.")
    overwrite: bool = setting("Replace another kind of artefact, or another person, that lies in output_dir.", False)
    revision: str | None = setting("Revision of the base model's repository.", None)
    local_files_only: bool = setting("Never ask the network for the base model or the Down.", False)
    target_modules: str | None = setting(
        "Modules to adapt: names separated by commas, or one regular expression. Default: the family's own choice.",
        None,
    )
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
    aspect_ratio_buckets: str | None = setting(
        "Cut each photo to the bucket nearest to its own ratio of sides: 'auto' (areas near resolution²), or "
        "'height,width;height,width'. Default: squares of resolution.",
        None,
    )
    face_crop: str | None = setting(
        "Cut the views around the largest face of a photo, found by this detector: 'insightface' (needs the extra "
        "[face]), or module:function. Photos without a face are left out. Default: cut from the whole photo.",
        None,
    )
    face_margin: float = setting("Room around the face on every side, as a share of the longer side of its box.", 0.5)
    face_align: bool = setting("With face_crop, turn photos so that the eyes are level.", False)
    random_flip: bool = setting("Mirror half of the views; 'left' and 'right' in captions are swapped with them.", True)
    cache_dir: str | None = setting(
        "Keep encoded photos and captions in this folder for later runs. Default: in memory only.", None
    )
    weighting_scheme: str | None = setting(
        "Density of the noise levels. Default: 'logit_normal' for rectified flow, 'none' (uniform) for other models.",
        None,
        choices=("logit_normal", "mode", "none"),
    )
    max_sequence_length: int | None = setting(
        "Tokens of a prompt. Default: what the tokenizer allows, at most 512.", None
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
    gradient_accumulation_steps: int = setting("Batches whose gradients are summed before a step.", 1)
    gradient_checkpointing: bool = setting("Recompute activations in the backward pass: less memory, more time.", False)
    mixed_precision: str = setting(
        "Precision of the frozen base and of the arithmetic; 'auto' is bf16 on a GPU and 'no' (float32) on a CPU.",
        "auto",
        choices=("auto", "no", "bf16"),
    )
    dynamo_backend: str | None = setting(
        "Compile the denoiser's blocks with this backend of torch.compile, for example 'inductor'; 'no': not. "
        "Default: what accelerate launch was told.",
        None,
    )
    device: str | None = setting("Device to train on. Default: a GPU when there is one.", None)
    seed: int = setting("Seed of everything random.", 0)
    checkpointing_steps: int | None = setting(
        "Write output_dir/checkpoint-<step> every so many steps: what the run needs to go on, in stage 2 with the "
        "subject as it is by then.",
        None,
    )
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
        if fault := fault_of(vars(self)):
            raise ConfigError(fault)
        for one in fields(self):
            choices = one.metadata.get("choices")
            value = getattr(self, one.name)
            if choices and value not in choices and (value is not None or one.default is not None):
                raise ConfigError(f"{one.name} must be one of {', '.join(map(repr, choices))}, found {value!r}")
        for name in self._at_least_one():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name} must be a whole number of at least 1, found {value!r}")
        for name in self._positive():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, found {value!r}")
        if self.aspect_ratio_buckets is not None:
            parse_shapes(self.aspect_ratio_buckets)
        if self.face_align and self.face_crop is None:
            raise ConfigError("face_align needs face_crop, found none: give face_crop 'insightface'")
        for name in self._zero_or_more():
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be 0 or more, found {getattr(self, name)!r}")
        if Path(self.output_dir).is_file():
            raise ConfigError(f"output_dir must be a folder, found a file: {self.output_dir}")

    @property
    def has_constant_rate(self) -> bool:
        """Whether the learning rate of a step does not depend on how many steps there are in all."""
        return self.lr_scheduler in ("constant", "constant_with_warmup")

    def _at_least_one(self) -> tuple[str, ...]:
        return "resolution", "max_sequence_length", "gradient_accumulation_steps", "checkpointing_steps"

    def _positive(self) -> tuple[str, ...]:
        return ("learning_rate",)

    def _zero_or_more(self) -> tuple[str, ...]:
        return "lr_warmup_steps", "weight_decay", "max_grad_norm", "views_per_image", "face_margin"


@dataclass(kw_only=True)
class MetaTrainConfig(TrainingConfig):
    """Stage 1: a Down from many subjects.

    The rates, sizes and lengths of the paper (arXiv 2503.22352) are not known; these defaults are ours.
    """

    train_data_dir: str | None = setting(
        "Folder of subject folders: DIR/<subject>/*.png with metadata.jsonl or a .txt beside each image.", None
    )
    domain: str | None = setting("What the subjects have in common ('women's faces'), for the model card.", None)
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
    validation_steps: int | None = setting(
        "Every so many steps, learn held-out subjects on the Down as it is by then, and score and draw them.", None
    )
    validation_data_dir: str | None = setting(
        "Folder of subject folders that are held out: each one's reference photo is learned, the others score.", None
    )
    validation_subjects: int | None = setting(
        "Subjects to validate on: the first ones of validation_data_dir (default: all), or, without it, the last ones "
        "of train_data_dir, which are then not trained on (default: 4).",
        None,
    )
    validation_train_steps: int = setting("Steps of stage 2 for each of these subjects.", 50)
    validation_embedder: str | None = setting(
        "Score by R-FaceSim with this face model: 'insightface', or module:function. Default: score by the loss on "
        "what is not learned from.",
        None,
    )
    validation_prompt: list[str] = setting(
        "Prompts to draw every held-out subject with, beside its reference, to output_dir/validation/<step>.png.", []
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_steps is None and (self.validation_data_dir or self.validation_subjects):
            raise ConfigError("held-out subjects need validation_steps, found none: say how often, for example 500")
        if self.validation_embedder is not None and not (self.validation_steps and self.validation_prompt):
            raise ConfigError("validation_embedder needs images: give validation_steps and validation_prompt too")

    def _at_least_one(self) -> tuple[str, ...]:
        own = "rank", "meta_rank", "max_train_steps", "bucket_size", "subjects_per_batch", "images_per_subject"
        looking = "validation_steps", "validation_subjects", "validation_train_steps"
        return *super()._at_least_one(), *own, "shards", *looking

    def _positive(self) -> tuple[str, ...]:
        return *super()._positive(), "lora_alpha", "down_learning_rate"

    def _zero_or_more(self) -> tuple[str, ...]:
        return *super()._zero_or_more(), "warmup_steps"


@dataclass(kw_only=True)
class PersonalizeConfig(TrainingConfig):
    """Stage 2: one subject from one image or a few, by Meta-LoRA or, as the baseline, by a plain LoRA."""

    instance_data_dir: str | None = setting("An image, or a folder of images of one subject.", None)
    method: str = setting(
        "'meta-lora': Mid and Up on a frozen Down. 'lora': a plain LoRA by PEFT on the same modules.",
        "meta-lora",
        choices=("meta-lora", "lora"),
    )
    down: str | None = setting("The Down (method 'meta-lora'): a folder or a repository id.", None)
    down_revision: str | None = setting("Revision of the Down's repository.", None)
    start: str = setting(
        "Where a subject starts: 'stored' (the Down's own Mid, Up = 0), 'mean' (stage 1's mean subject) or 'fresh' (a "
        "new Mid, Up = 0; the control).",
        "stored",
        choices=("stored", "mean", "fresh"),
    )
    rank: int | None = setting("Rank. Default: the Down's; for a plain LoRA 1.", None)
    lora_alpha: float | None = setting("Scale of a plain LoRA, lora_alpha / rank. Default: rank.", None)
    max_train_steps: int = setting("Steps.", 375)
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
        "Score by R-FaceSim on validation_data_dir with this face model: 'insightface', or module:function. Default: "
        "score by the loss, which needs no other model.",
        None,
    )
    validation_prompt: list[str] = setting(
        "Prompts to draw at every validation, to output_dir/validation/<step>-<number>.png.", []
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patience is not None and self.validation_steps is None:
            raise ConfigError("patience needs validation_steps, found none: say how often to look, for example 25")
        if self.validation_embedder is not None and not (self.validation_data_dir and self.validation_prompt):
            raise ConfigError(
                "validation_embedder needs photos and prompts: give validation_data_dir and validation_prompt too"
            )
        if self.method == "meta-lora" and self.lora_alpha is not None:
            raise ConfigError("lora_alpha belongs to method 'lora': with 'meta-lora' the Down's own scale is used")

    def _at_least_one(self) -> tuple[str, ...]:
        own = "rank", "max_train_steps", "train_batch_size", "validation_steps", "patience"
        return *super()._at_least_one(), *own

    def _positive(self) -> tuple[str, ...]:
        return *super()._positive(), "lora_alpha"

    def _zero_or_more(self) -> tuple[str, ...]:
        return *super()._zero_or_more(), "prior_loss_weight"


def public_settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings as they may leave this machine: of its paths only the last name."""
    values = asdict(config)
    for name in (*INPUTS, *OUTPUTS):
        value = values.get(name)
        if value and (os.path.isabs(value) or os.path.exists(value)):
            values[name] = os.path.basename(os.path.abspath(value))
    return values


@dataclass(kw_only=True)
class TrainEncoderConfig:
    """Teach a Down to read photos: a subject space and an encoder, from photos of many people.

    Raises:
        ConfigError: a value that cannot be.
    """

    down: str = setting("Folder or repository of the Down.")
    train_data_dir: str = setting("Folder that holds a folder for each person, with at least two photos.")
    output_dir: str = setting("Folder for the Down with its space and encoder.")
    pretrained_model_name_or_path: str | None = setting(
        "Base model: a diffusers folder or a repository id. Default: the one that the Down names.", None
    )
    revision: str | None = setting("Revision of the base model's repository.", None)
    down_revision: str | None = setting("Revision of the Down's repository.", None)
    local_files_only: bool = setting("Never ask the network for the base model or the Down.", False)
    encoder: str = setting(
        "Where the encoder looks: latents (the base's own VAE), transformers:<vision model>, or face.", "latents"
    )
    code_size: int = setting("Numbers of a person's code.", 128)
    width: int = setting("Channels of the encoder's first layer.", 64)
    hidden: int = setting("Width of the encoder's head.", 512)
    dropout: float = setting("Dropout of the encoder's head.", 0.2)
    bad_versions: int = setting(
        "Bad versions (blurred, dark, covered, ...) of each photo; the good one is read as often as all of them.", 3
    )
    resolution: int = setting(
        "Height and width in pixels of the photos that are drawn, and of those that are read.", 512
    )
    instance_prompt: str | None = setting("Caption of images that have none of their own.", None)
    random_flip: bool = setting(
        "Mirror half of the views; 'left' and 'right' in captions are swapped with them.", False
    )
    views_per_image: int = setting("Crops of each photo that are drawn.", 1)
    cache_dir: str | None = setting("Keep encoded photos and captions in this folder for later runs.", None)
    max_train_steps: int = setting("Steps.", 9000)
    subjects_per_batch: int = setting("People in a step.", 8)
    images_per_subject: int = setting("Photos of each person in a step, beside the one that is read.", 4)
    learning_rate: float = setting("Learning rate of the encoder.", 1e-3)
    space_learning_rate: float = setting("Learning rate of the space.", 3e-4)
    lr_warmup_steps: int = setting("Steps over which the learning rates rise from 0.", 100)
    gradient_checkpointing: bool = setting("Recompute activations in the backward pass: less memory, more time.", False)
    mixed_precision: str = setting(
        "Precision of the base; 'auto' is bf16 on a GPU and none on a CPU.", "auto", choices=("auto", "no", "bf16")
    )
    device: str | None = setting("Device to train on. Default: a GPU when there is one.", None)
    seed: int = setting("Seed of everything random.", 0)
    overwrite: bool = setting("Replace another kind of artefact that lies in output_dir.", False)

    def __post_init__(self) -> None:
        for name in ("subjects_per_batch", "images_per_subject", "views_per_image"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.bad_versions < 0:
            raise ConfigError(f"bad_versions must be at least 0, found {self.bad_versions}")
