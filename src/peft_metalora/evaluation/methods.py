# SPDX-License-Identifier: Apache-2.0
"""Meta-LoRA and its rivals through one loop: the optimiser, examples, noise and steps of stage 2 for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data import Photo, Subject
from ..training.bases import Base
from ..training.examples import Examples, encode_subjects
from ..training.personalize import Personalization
from ..training.settings import PersonalizeConfig
from ..tuner import DownSource
from .adapters import adapter_config, put_adapter

if TYPE_CHECKING:
    from .protocol import EvaluateConfig, Method


class MethodRun(Personalization):
    """Stage 2 of any method; `remove()` leaves the denoiser as it was, also after full fine-tuning."""

    def __init__(
        self,
        base: Base,
        examples: Examples,
        config: PersonalizeConfig,
        method: Method,
        down: DownSource | None,
    ) -> None:
        self.method = method
        self._before: dict[str, Tensor] = {}
        super().__init__(base, examples, config, down)

    @property
    def trains_in_train_mode(self) -> bool:
        """LoHa and LoKr toss a coin in train mode, even for a dropout of 0."""
        return self.method.kind not in ("loha", "lokr")

    def _inject(self) -> list[nn.Parameter]:
        denoiser, kind = self.base.denoiser, self.method.kind
        if kind == "meta-lora":
            return super()._inject()
        if kind == "full":
            self._before = {name: tensor.detach().clone() for name, tensor in denoiser.state_dict().items()}
            denoiser.requires_grad_(True).train()
            return list(denoiser.parameters())
        rank, block = self.method.number("r", 256 if kind == "vera" else 1), self.method.number("block", 32)
        adapter = adapter_config(kind, self.base.target_modules, r=rank, block=block, down=self.down)
        parameters = put_adapter(self.base, adapter, self.config)
        denoiser.train(self.trains_in_train_mode)
        return parameters

    def remove(self) -> None:
        super().remove()
        if self._before:
            self.base.denoiser.load_state_dict(self._before)
        self.base.denoiser.requires_grad_(False)


def run_method(
    base: Base, method: Method, reference: Photo, config: EvaluateConfig, down: DownSource | None, resolution: int
) -> MethodRun:
    """A method put on the base, ready for its `steps()` on one reference.

    Raises:
        ConfigError, BaseModelMismatchError and what else the tuner raises; the denoiser is then as it was.
    """
    from .protocol import down_name

    settings: dict[str, Any] = {"method": "lora"}
    if method.kind == "meta-lora":
        start = method.options.get("start", "stored")
        settings = {"method": "meta-lora", "start": start, "down": down_name(config, method)}
    training = PersonalizeConfig(
        pretrained_model_name_or_path=config.base,
        output_dir=config.output,
        resolution=resolution,
        max_train_steps=max(config.steps),
        train_batch_size=config.train_batch_size,
        views_per_image=config.views_per_image,
        learning_rate=float(method.options.get("lr", config.learning_rate)),
        mixed_precision=config.mixed_precision,
        instance_prompt=config.instance_prompt,
        **settings,
    )
    views = config.views_per_image
    examples = encode_subjects(base, [Subject("person", [reference])], training, views, progress=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        return MethodRun(base, examples, training, method, down)
