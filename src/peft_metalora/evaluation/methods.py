# SPDX-License-Identifier: Apache-2.0
"""Meta-LoRA and its rivals through one loop: the optimiser, examples, noise and steps of stage 2 for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import Base
from ..checkpoint.space import CodeSource
from ..data import Photo, Subject
from ..errors import ConfigError
from ..training.examples.batches import Examples
from ..training.examples.encoding import encode_subjects
from ..training.stage_2 import Personalization
from ..training.stage_settings import PersonalizeConfig
from ..tuner import DownSource
from ..tuner.placing import remember
from .adapters import adapter_config, put_adapter
from .evaluation_settings import DEMO, EvaluateConfig, Method
from .textual_inversion import NewWord, replace_word, spoken_examples, token_names


class MethodRun(Personalization):
    """Stage 2 of any method; `remove()` leaves the pipeline as it was, also after full fine-tuning.

    Args:
        subject_name: who prompts ask for; its last word is the one that textual inversion learns anew.
    """

    def __init__(
        self,
        base: Base,
        examples: Examples,
        config: PersonalizeConfig,
        method: Method,
        down: DownSource | None,
        subject_name: str,
        read: Sequence[CodeSource] = (),
    ) -> None:
        self.method, self.subject_name = method, subject_name
        self._before: dict[str, Tensor] = {}
        self._word: NewWord | None = None
        super().__init__(base, examples, config, down, read=read)

    @property
    def trains_in_train_mode(self) -> bool:
        """Not LoHa and LoKr, which toss a coin in train mode, even for a dropout of 0; nor a frozen denoiser."""
        return self.method.kind not in ("loha", "lokr", "textual-inversion")

    def _inject(self) -> list[nn.Parameter]:
        denoiser, kind = self.base.denoiser, self.method.kind
        if kind == "meta-lora":
            return super()._inject()
        if kind == "textual-inversion":
            noun = _noun(self.subject_name)
            self._word = NewWord(self.base, self.method.number("tokens", 1), self.method.options.get("init", noun))
            self.subject_name = replace_word(self.subject_name, noun, self._word.text)
            return self._word.parameters
        if kind == "full":
            remember(denoiser)
            self._before = {name: tensor.detach().clone() for name, tensor in denoiser.state_dict().items()}
            denoiser.requires_grad_(True).train()
            return list(denoiser.parameters())
        rank, block = self.method.number("r", 256 if kind == "vera" else 1), self.method.number("block", 32)
        adapter = adapter_config(kind, self.base.target_modules, r=rank, block=block, down=self.down)
        parameters = put_adapter(self.base, adapter, self.config)
        denoiser.train(self.trains_in_train_mode)
        return parameters

    def remove(self) -> None:
        """Take the method off, a word of its own and full fine-tuning included; the denoiser is frozen."""
        super().remove()
        if self._word is not None:
            self._word.remove()
        if self._before:
            self.base.denoiser.load_state_dict(self._before)
        self.base.denoiser.requires_grad_(False)


def run_method(
    base: Base,
    method: Method,
    reference: Photo,
    config: EvaluateConfig,
    down: DownSource | None,
    *,
    steps: int,
    read: Sequence[CodeSource] = (),
) -> MethodRun:
    """A method put on the base, ready for its `steps()` on one reference.

    Args:
        read: the person as they were read from the reference, for a method that starts there.

    Raises:
        ConfigError, BaseModelMismatchError and what else the tuner raises; the pipeline is then as it was.
    """
    settings: dict[str, Any] = {"method": "lora"}
    if method.kind == "meta-lora":
        start = method.options.get("start", "stored")
        settings = {"method": "meta-lora", "start": start, "down": down_name(config, method)}
    if "lr" in method.options or not method.reads:  # a read start has a rate of its own
        settings["learning_rate"] = float(method.options.get("lr", config.learning_rate))
    training = PersonalizeConfig(
        pretrained_model_name_or_path=config.base,
        output_dir=config.output,
        resolution=config.side,
        max_train_steps=steps,
        train_batch_size=config.train_batch_size,
        views_per_image=config.views_per_image,
        mixed_precision=config.mixed_precision,
        instance_prompt=config.instance_prompt,
        **settings,
    )
    if method.kind == "textual-inversion":
        word = " ".join(token_names(method.number("tokens", 1)))
        examples: Examples = spoken_examples(base, [reference], training, _noun(config.subject_name), word)
    else:
        views = config.views_per_image
        examples = encode_subjects(base, [Subject("person", [reference])], training, views, progress=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        return MethodRun(base, examples, training, method, down, config.subject_name, read)


def down_name(config: EvaluateConfig, method: Method) -> str:
    """The Down of a method: its own, the run's, or the demo's.

    Raises:
        ConfigError: there is none.
    """
    name = method.options.get("down") or config.down
    if name is None and config.base == DEMO:
        from ..demo.embedded import DOWN

        name = str(DOWN)
    if name is None:
        raise ConfigError(f"method {method.text!r} needs a Down, found none: give `down`")
    return name


def _noun(subject_name: str) -> str:
    return subject_name.split()[-1]
