# SPDX-License-Identifier: Apache-2.0
"""What a service is made of, and what it may be asked for: the settings of `metalora serve`."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..settings import (
    BASE_OF_DOWN,
    DEVICE,
    DOWN_REVISION,
    FACE_MODEL,
    GENERIC,
    LOCAL_FILES_ONLY,
    OFFLOAD,
    PRECISION,
    QUANTIZE,
    REVISION,
    below_one,
    setting,
)

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(kw_only=True)
class DrawConfig:
    """What a copy of the base is made of, and what it draws and reads at the most, whoever asks it."""

    people: str = setting(
        "Where the people are kept: a folder that is there, or a place that fsspec knows, such as "
        "s3://bucket/people. A place with a history (hf://) is read only."
    )
    down: str | None = setting(
        "The Down of all people: a folder or a repository id. Default with demo: the embedded one.", None
    )
    pretrained_model_name_or_path: str | None = setting(BASE_OF_DOWN, None)
    generic: str | None = setting(*GENERIC)
    quantize: str = setting(*QUANTIZE)
    offload: str = setting(*OFFLOAD)
    mixed_precision: str = setting(*PRECISION)
    device: str | None = setting(*DEVICE)
    revision: str | None = setting(*REVISION)
    down_revision: str | None = setting(*DOWN_REVISION)
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)
    face_model: str | None = setting(*FACE_MODEL)
    max_sequence_length: int | None = setting(
        "Tokens of a prompt. Default: what the tokenizer allows, at most 512.", None
    )
    max_inference_steps: int = setting("Most steps of an image.", 50)
    max_prompt: int = setting("Most characters of a prompt.", 2000)
    max_photos: int = setting("Most photos of a person.", 8)
    max_megapixels: float = setting("Largest photo, in millions of pixels.", 40.0)


@dataclass(kw_only=True)
class ServeConfig(DrawConfig):
    """Serve images of many people over HTTP, on Ray Serve.

    Raises:
        ConfigError: a value that cannot be.
    """

    demo: bool = setting("Serve the embedded base, small enough for a CPU.", False)
    tokens: str | None = setting(
        "YAML file with a bearer token for each tenant ('tenant: token', or a list of tokens), closed to other users. "
        "None: everybody is the tenant 'local', which only a loopback address allows.",
        None,
    )
    host: str = setting("Address that HTTP is answered on.", "127.0.0.1")
    port: int = setting("Port that HTTP is answered on.", 8000)
    replicas: int = setting("Copies of the base, each on a GPU of its own if there is one.", 1)
    max_replicas: int | None = setting("Under load, up to so many copies. Default: as replicas.", None)
    tuners: int = setting("Copies that tune people on request (stage 2), each on a GPU of its own.", 0)
    ray_address: str | None = setting(
        "A Ray cluster that runs already, for several machines; its token authentication must be on. Default: Ray is "
        "started here, on the loopback.",
        None,
    )
    batch_size: int = setting("Most images in one call of the pipeline.", 8)
    slots: int = setting("People on a replica's device at once.", 64)
    host_capacity: int = setting("People in a replica's host memory; who is not there is sent or read again.", 100_000)
    fold: bool = setting("Keep Mid @ Down of the people on the device, for the speed of a LoRA of their rank.", False)
    compile: bool = setting("Compile the denoiser (torch.compile).", False)
    resolution: int | None = setting("Width and height of an image that names none. Default: the pipeline's own.", None)
    max_resolution: int | None = setting("Largest width or height. Default: as resolution.", None)
    num_inference_steps: int = setting("Steps of an image that names none.", 28)
    max_guidance_scale: float = setting("Largest guidance of an image.", 20.0)
    max_subjects: int = setting("Most people in one image.", 4)
    max_body_mb: float = setting("Largest request, in megabytes.", 32.0)
    queue: int | None = setting(
        "Requests that may wait or be drawn at once, and beside them people who wait to be tuned; more are refused "
        "(429). Default: four batches for each copy.",
        None,
    )
    rate: float | None = setting("Requests a second of each tenant; more are refused (429). Default: no limit.", None)
    timeout: float = setting(
        "Seconds in which a request is answered; after that it is refused (503), or a change goes on (504).", 120.0
    )
    tune_steps: int = setting("Most steps of a person who is tuned.", 100)
    log_dir: str | None = setting("Folder for logs, a file of JSON lines for each process. Default: Ray's own.", None)

    def __post_init__(self) -> None:
        at_least_one = (
            "replicas", "batch_size", "host_capacity", "num_inference_steps", "max_inference_steps", "max_prompt",
            "max_subjects", "max_photos", "tune_steps",
        )  # fmt: skip
        optional = "max_replicas", "queue", "resolution", "max_resolution", "max_sequence_length"
        if fault := below_one(self, *at_least_one, *optional):
            raise ConfigError(fault)
        for name in ("rate", "timeout", "max_megapixels", "max_body_mb", "max_guidance_scale"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(f"{name} must be more than 0, found {value}")
        if self.tuners < 0:
            raise ConfigError(f"tuners must be at least 0, found {self.tuners}")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port must be between 1 and 65535, found {self.port}")
        if self.down is None and not self.demo:
            raise ConfigError("expected the Down of the people, found none: give down, or demo for the embedded one")
        if self.slots < max(self.batch_size, self.max_subjects):
            raise ConfigError(
                f"slots must hold a batch ({self.batch_size}) and the people of an image ({self.max_subjects}), found "
                f"{self.slots}"
            )
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas must be at least replicas, found {self.max_replicas} and {self.replicas}")
        if self.num_inference_steps > self.max_inference_steps:
            raise ConfigError(
                f"num_inference_steps must be at most max_inference_steps, found {self.num_inference_steps} and "
                f"{self.max_inference_steps}"
            )
        if self.tokens is None and self.host not in LOOPBACK:
            raise ConfigError(
                f"expected tokens for a service on {self.host}, found none: give tokens, or a loopback host"
            )

    @property
    def places(self) -> int:
        """Requests that may wait or be drawn at once."""
        return self.queue or 4 * self.batch_size * (self.max_replicas or self.replicas)
