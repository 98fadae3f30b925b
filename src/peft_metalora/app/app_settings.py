# SPDX-License-Identifier: Apache-2.0
"""What the page is made of, and what it may be asked for: the settings of `metalora app`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..service.serve_settings import ServeConfig
from ..settings import (
    BASE_OF_DOWN,
    DEVICE,
    DOWN_REVISION,
    FACE_MODEL,
    LOCAL_FILES_ONLY,
    OFFLOAD,
    PRECISION,
    QUANTIZE,
    REVISION,
    setting,
)


@dataclass(kw_only=True)
class AppConfig:
    """Open a page in the browser: people from photos, and pictures of them.

    Raises:
        ConfigError: a value that cannot be.
    """

    down: str | None = setting(
        "A Down that reads photos: a folder or a repository id. Default with demo: the embedded one.", None
    )
    pretrained_model_name_or_path: str | None = setting(BASE_OF_DOWN, None)
    demo: bool = setting("Open the page on the embedded base, small enough for a CPU.", False)
    people: str = setting("Folder of the library, made if there is none; or a place that fsspec knows.", "people")
    tokens: str | None = setting(
        "YAML file with a token for each user ('user: token'), closed to other users of the machine: they log in, and "
        "each has a library of their own. None: everybody is 'local', which only a loopback address allows.",
        None,
    )
    host: str = setting("Address that the page is at.", "127.0.0.1")
    port: int = setting("Port that the page is at.", 7860)
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
    resolution: int | None = setting("Width and height of a picture. Default: the pipeline's own.", None)
    num_inference_steps: int = setting("Steps of a picture, unless the page is told otherwise.", 28)
    max_inference_steps: int = setting("Most steps of a picture.", 50)
    max_prompt: int = setting("Most characters of a prompt.", 2000)
    max_photos: int = setting("Most photos of a person.", 8)
    max_megapixels: float = setting("Largest photo, in millions of pixels.", 40.0)
    max_body_mb: float = setting("Largest photo, in megabytes.", 32.0)
    queue: int = setting("Requests that may wait; more are refused.", 16)
    tune_steps: int = setting("Most steps of a person who is polished.", 100)

    def __post_init__(self) -> None:
        self.copy()

    def copy(self) -> ServeConfig:
        """The settings of one copy of the base, as the service has them; raises ConfigError, as they do."""
        return ServeConfig(**{one.name: getattr(self, one.name) for one in fields(self)})
