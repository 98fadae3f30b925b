# SPDX-License-Identifier: Apache-2.0
"""What a run reports to trackers (TensorBoard, Weights & Biases and others), through accelerate's classes for them.

Reported are the settings (of paths the last name alone), the loss and the learning rate of every step, the validation
score and the validation images.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType
from PIL import Image

from ...errors import ConfigError
from ..engine.loop import Step
from ..engine.processes import Processes
from ..stage_settings import TrainingConfig, public_settings

# What pip knows by another name.
_PACKAGES = {"comet_ml": "comet-ml"}
# These take one image of a name, the others a list.
_ONE_BY_ONE = "aim", "clearml"


class Trackers:
    """The trackers that `report_to` names; none on other processes than the main one.

    A class of one's own counts too, once `accelerate.tracking.register_tracker_class` knows it.

    Raises:
        ConfigError: accelerate knows no such tracker, or its package is missing.
    """

    def __init__(self, config: TrainingConfig, processes: Processes) -> None:
        self.config = config
        self._trackers: list[Any] = []
        there = [str(name) for name in get_available_trackers()]
        asked = [name.strip() for name in (config.report_to or "").split(",") if name.strip()]
        # Each once: two of a kind would write into one place.
        wanted = list(dict.fromkeys(name for one in asked for name in (there if one == "all" else [one])))
        for name in wanted:
            if name not in LOGGER_TYPE_TO_CLASS:
                known = ", ".join(["all", *sorted(LOGGER_TYPE_TO_CLASS)])
                raise ConfigError(f"report_to must be of {known}, found {name!r}")
            if name in LoggerType.list() and name not in there:
                package = _PACKAGES.get(name, name)
                raise ConfigError(f"expected the package of the tracker {name!r}, found none: pip install {package}")
        self._names = wanted if processes.is_main else []

    def start(self, done: int = 0) -> None:
        """Open the trackers.

        Args:
            done: steps of the run so far; TensorBoard drops what an interrupted run reported after them.
        """
        config, folder = self.config, Path(self.config.output_dir, self.config.logging_dir)
        if self._names:
            PartialState()  # accelerate's trackers ask it which process this is
        for name in self._names:
            cls = LOGGER_TYPE_TO_CLASS[name]
            options = {"purge_step": done + 1} if name == "tensorboard" and done else {}
            if cls.requires_logging_directory:
                folder.mkdir(parents=True, exist_ok=True)
                tracker = cls(config.tracker_project_name, str(folder), **options)
            else:
                tracker = cls(config.tracker_project_name, **options)
            tracker.start()
            tracker.store_init_configuration({key: _plain(value) for key, value in public_settings(config).items()})
            self._trackers.append(tracker)

    def step(self, step: Step) -> None:
        """Report a finished step."""
        self.log(step.number, {"loss": step.loss, "lr": step.lr})

    def log(self, step: int, values: dict[str, float]) -> None:
        """Report numbers by name."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def images(self, step: int, images: Sequence[Image.Image]) -> None:
        """Report validation images, to those trackers that take any; all of one size."""
        if images:
            self._each(lambda tracker: _show(tracker, step, images))

    def finish(self) -> None:
        """Close the trackers."""
        self._each(lambda tracker: tracker.finish())
        self._trackers = []

    def _each(self, do: Callable[[Any], object]) -> None:
        """Have each tracker do something; one whose disk or server refuses is left, and a run does not end for it."""
        for tracker in list(self._trackers):
            try:
                do(tracker)
            except OSError as error:
                self._trackers.remove(tracker)
                warnings.warn(f"the tracker {tracker.name!r} failed: {error}. The run goes on without it", stacklevel=4)


def _show(tracker: Any, step: int, images: Sequence[Image.Image]) -> None:
    if tracker.name == "tensorboard":
        pixels = np.stack([np.asarray(one) for one in images])
        tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
    elif tracker.name in _ONE_BY_ONE:
        tracker.log_images({f"validation/{number}": one for number, one in enumerate(images)}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({"validation": list(images)}, step=step)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, float, str)) else str(value)
