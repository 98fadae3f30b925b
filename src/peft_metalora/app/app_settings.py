# SPDX-License-Identifier: Apache-2.0
"""What the page is made of, and what it may be asked for: the settings of `metalora app`."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..service.serve_settings import DrawConfig, ServeConfig
from ..settings import setting


@dataclass(kw_only=True)
class AppConfig(DrawConfig):
    """Open a page in the browser: people from photos, on a Down that reads them, and pictures of them.

    Raises:
        ConfigError: a value that cannot be.
    """

    demo: bool = setting("Open the page on the embedded base, small enough for a CPU.", False)
    people: str = setting("Folder of the library, made if there is none; or a place that fsspec knows.", "people")
    tokens: str | None = setting(
        "YAML file with a token for each user ('user: token'), closed to other users of the machine: they log in, and "
        "each has a library of their own. None: everybody is 'local', which only a loopback address allows.",
        None,
    )
    host: str = setting("Address that the page is at.", "127.0.0.1")
    port: int = setting("Port that the page is at.", 7860)
    resolution: int | None = setting("Width and height of a picture. Default: the pipeline's own.", None)
    num_inference_steps: int = setting("Steps of a picture, unless the page is told otherwise.", 28)
    max_body_mb: float = setting("Largest photo, in megabytes.", 32.0)
    queue: int = setting("Requests that may wait; more are refused.", 16)
    tune_steps: int = setting("Most steps of a person who is polished.", 100)

    def __post_init__(self) -> None:
        self.copy()

    def copy(self) -> ServeConfig:
        """The settings of one copy of the base, as the service has them; raises ConfigError, as they do."""
        return ServeConfig(**{one.name: getattr(self, one.name) for one in fields(self)})
