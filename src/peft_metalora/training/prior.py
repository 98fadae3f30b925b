# SPDX-License-Identifier: Apache-2.0
"""Prior preservation without class images.

DreamBooth (arXiv 2208.12242) keeps a class by training on pictures of it. Here the frozen base is the teacher: on the
noised training latents, with the prompt of the class, the adapted denoiser is to predict what the base predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bases import Base, Text
from ..data import TRIGGER_MARK
from ..errors import ConfigError
from ..tuner import using_slots
from ..tuner.on_model import meta_lora_layers
from ..tuner.subject_index import NO_SUBJECT
from .stage_settings import PersonalizeConfig, TrainingConfig


def class_prompt(config: TrainingConfig) -> str | None:
    """The prompt whose meaning is kept: `class_prompt`, or the instance prompt without the trigger; None: none is.

    Raises:
        ConfigError: the instance prompt has no trigger, so that it is itself what is learned.
    """
    if not isinstance(config, PersonalizeConfig) or not config.prior_loss_weight:
        return None
    if config.class_prompt is not None:
        return config.class_prompt
    words = (config.instance_prompt or "").split()
    kept = [word for word in words if TRIGGER_MARK not in word and word != config.trigger]
    if not kept or kept == words:
        raise ConfigError(
            f"prior_loss_weight needs the prompt of the class, found instance_prompt {config.instance_prompt!r} "
            "without a trigger to leave out: give class_prompt, for example 'a photo of a person'"
        )
    return " ".join(kept)


def distance_from_base(base: Base, text: Text, latents: Tensor, noise: Tensor, times: Tensor) -> Callable[[], Tensor]:
    """Ask the base, without its adapter, what it predicts for the class prompt.

    To be called before the passes that gradients flow through: it writes the index of subjects, which they read again.

    Args:
        text: of the class prompt, one row in each tensor. The others as `Base.loss` has them.

    Returns:
        A function that gives the mean square distance of the adapted denoiser's prediction: (n,) float32.
    """
    rows = {name: tensor.expand(len(latents), *tensor.shape[1:]) for name, tensor in text.items()}
    noisy = base.add_noise(latents, noise, times)
    with torch.no_grad(), _without_adapter(base.denoiser, len(latents)):
        wanted = base.predict(noisy, rows, times).float()

    def distance() -> Tensor:
        return F.mse_loss(base.predict(noisy, rows, times).float(), wanted, reduction="none").flatten(1).mean(1)

    return distance


@contextmanager
def _without_adapter(denoiser: Any, samples: int) -> Iterator[None]:
    if next(meta_lora_layers(denoiser), None) is not None:
        with using_slots(denoiser, [NO_SUBJECT] * samples):
            yield
        return
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()
