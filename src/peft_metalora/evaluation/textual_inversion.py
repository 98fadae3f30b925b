# SPDX-License-Identifier: Apache-2.0
"""Textual inversion (arXiv 2208.01618) as a rival: a new word is learned, and nothing of the models.

The new word has an embedding of its own in every text encoder of the pipeline (CLIP, T5, Qwen3). None of them grows:
their tokenizers are replaced by copies that know the word, and a hook on each encoder puts its vectors where the word
stands. `remove()` puts the tokenizers back and takes the hooks off. Many people learn a word each in a `WordStack`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..bases import Base, Text
from ..data import Photo
from ..errors import ConfigError
from ..training.engine.replay import text_in
from ..training.examples.batches import Batch, Examples
from ..training.examples.encoding import PhotoEncoder
from ..training.stage_settings import PersonalizeConfig


class NewWord:
    """A word of `tokens` tokens that prompts may use until it is removed.

    Args:
        base: its pipeline learns the word.
        tokens: vectors in each text encoder.
        init: known words whose mean embedding every new token starts from.
        rows: how many people the word is learned for at once; of n texts the first n / rows are about the first.

    Attributes:
        text: how a prompt says it.
        parameters: (tokens, width) float32 of each text encoder; with `rows` (rows * tokens, width).

    Raises:
        ConfigError: a pipeline without text encoders, or an `init` that has no token; the pipeline is as it was.
    """

    def __init__(self, base: Base, tokens: int, init: str, rows: int = 1) -> None:
        names = token_names(tokens)
        pairs = {
            suffix: (getattr(base.pipeline, f"tokenizer{suffix}"), encoder)
            for suffix in ("", "_2", "_3")
            if (encoder := getattr(base.pipeline, f"text_encoder{suffix}", None)) is not None
        }
        known = {
            suffix: tokenizer(init, add_special_tokens=False)["input_ids"] for suffix, (tokenizer, _) in pairs.items()
        }
        if not pairs or not all(known.values()):
            raise ConfigError(f"expected text encoders and a word that they know, found {init!r}: give another init")
        self.text, self.rows = " ".join(names), rows
        self.parameters: list[nn.Parameter] = []
        self._pipeline = base.pipeline
        self._tokenizers: dict[str, Any] = {}
        self._hooks: list[Any] = []
        for suffix, (tokenizer, encoder) in pairs.items():
            self._tokenizers[f"tokenizer{suffix}"] = tokenizer
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.add_tokens(names)
            setattr(base.pipeline, f"tokenizer{suffix}", tokenizer)
            self._speak(encoder, torch.tensor(tokenizer.convert_tokens_to_ids(names)), known[suffix])

    def _speak(self, encoder: Any, new: Tensor, known: list[int]) -> None:
        table = encoder.get_input_embeddings()
        weight = table.weight.detach()
        vectors = nn.Parameter(weight[known].float().mean(0).repeat(self.rows * len(new), 1))
        self.parameters.append(vectors)
        new = new.to(weight.device)
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # The encoder is shown known tokens: it has no row for the others, and older CLIP models find the end of a
            # text at its largest token (transformers, CLIPTextTransformer).
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            seen[:] = [ids[..., None] == new]
            ids = torch.where(seen[0].any(-1), known[0], ids)
            return (args, {**kwargs, "input_ids": ids}) if "input_ids" in kwargs else ((ids, *args[1:]), kwargs)

        def say(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
            of_row = torch.arange(len(seen[0]), device=new.device) // (len(seen[0]) // self.rows) * len(new)
            own = vectors[of_row[:, None] + seen[0].int().argmax(-1)].to(embedded.dtype)
            return torch.where(seen[0].any(-1, keepdim=True), own, embedded)

        self._hooks.append(encoder.register_forward_pre_hook(note, with_kwargs=True))
        # T5 looks tokens up in a second module that shares this weight.
        for module in encoder.modules():
            if isinstance(module, nn.Embedding) and module.weight is table.weight:
                self._hooks.append(module.register_forward_hook(say))

    def remove(self) -> None:
        """Forget the word; tokenizers and encoders are the ones they were."""
        for name, tokenizer in self._tokenizers.items():
            setattr(self._pipeline, name, tokenizer)
        for hook in self._hooks:
            hook.remove()
        self._tokenizers, self._hooks = {}, []


_learned: WeakKeyDictionary[Any, NewWord] = WeakKeyDictionary()


class WordStack:
    """A word of one token that each of `count` people learns, where an `AdapterStack` holds an adapter.

    The denoiser is the same for all of them, so that all rows are one batch of it. `WordStack.take_off` takes it off.

    Args:
        noun: what the word takes the place of, and starts as.

    Attributes:
        values: (count, N), the vectors of all text encoders in one line. parameters: views of it.
    """

    recordable: ClassVar[bool] = False  # texts are encoded anew in every step

    def __init__(self, base: Base, count: int, noun: str) -> None:
        self.take_off(base)
        self.base, self.count, self.noun = base, count, noun
        self.word = NewWord(base, 1, noun, count)
        _learned[base.pipeline] = self.word
        self.values = torch.cat([vectors.detach() for vectors in self.word.parameters], dim=1)
        parts = self.values.split([vectors.shape[1] for vectors in self.word.parameters], dim=1)
        self.parameters = {f"word_{number}": part for number, part in enumerate(parts)}
        for vectors, part in zip(self.word.parameters, parts, strict=True):
            vectors.data = part

    @staticmethod
    def take_off(base: Base) -> None:
        """Forget the words of a stack, if there is one."""
        word = _learned.pop(base.pipeline, None)
        if word is not None:
            word.remove()

    def examples(self, references: Sequence[Photo], config: PersonalizeConfig) -> SpokenExamples:
        """The views of some people's references; each step needs a block of them for every row."""
        return spoken_examples(self.base, references, config, self.noun, self.word.text, self.count)

    def gradients(self, base: Base) -> WordStack:
        """What gives the rows' losses and gradients."""
        return self

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """As `RowGradients`; the text in the inputs was encoded with gradients, as `SpokenExamples` does."""
        losses = self.base.loss(
            inputs["latents"], text_in(inputs), inputs["noise"], inputs["times"], inputs.get("mask")
        )
        of_rows = losses.unflatten(0, (self.count, -1)).mean(1)
        gradients = torch.autograd.grad(of_rows.sum(), self.word.parameters)
        return of_rows.detach(), torch.cat(gradients, dim=1)

    @torch.no_grad()
    def text_of(self, prompts: Sequence[str]) -> Text:
        """The prompts about each row in turn: count * n texts."""
        return self.base.text_of([replace_word(prompt, self.noun, self.word.text) for prompt in prompts] * self.count)


def token_names(tokens: int) -> list[str]:
    """The new tokens. diffusers writes `<subject>` out as `<subject> <subject>_1 ...` by itself, but not these."""
    return [f"<subject-{number}>" for number in range(tokens)]


@dataclass(frozen=True)
class SpokenExamples(Examples):
    """Examples whose captions are encoded anew in every step, with gradients.

    Attributes:
        base: what encodes. captions: m texts; `caption` has their numbers and `text` is empty.
        rows: of a word that several people learn: a batch holds a block for each of them, and each has own vectors.
    """

    base: Any = None
    captions: list[str] = field(default_factory=list)
    rows: int = 1

    def batch(self, index: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        """The examples `index` (b,), all of one shape."""
        latents, _, mask = super().batch(index)
        if self.rows > 1:
            return Batch(latents, self.base.text_of([self.captions[row] for row in self.caption[index].tolist()]), mask)
        rows, back = self.caption[index].unique(return_inverse=True)
        text = self.base.text_of([self.captions[row] for row in rows.tolist()])
        return Batch(latents, {name: tensor[back] for name, tensor in text.items()}, mask)


def spoken_examples(
    base: Base, references: Sequence[Photo], config: PersonalizeConfig, noun: str, word: str, rows: int = 1
) -> SpokenExamples:
    """The views of people's references, the new word in their captions.

    Args:
        noun: what the word takes the place of; where a caption has none, the word is put before it.
        rows: of the word.

    Raises:
        As `training.examples.PhotoEncoder`.
    """
    encode = PhotoEncoder(base, config, config.views_per_image)
    latents, captions, masks = zip(*map(encode, references), strict=True)
    said = [replace_word(caption, noun, word) for part in captions for caption in part]
    unique = list(dict.fromkeys(said))
    number = torch.tensor([unique.index(caption) for caption in said])
    person = torch.arange(len(references)).repeat_interleave(config.views_per_image)
    mask = None if masks[0] is None else torch.cat(masks)
    return SpokenExamples(torch.cat(latents), {}, number, person, mask, base=base, captions=unique, rows=rows)


def replace_word(caption: str, noun: str, word: str) -> str:
    """The caption with the word instead of the noun's first occurrence, or else before it all."""
    said, found = re.subn(rf"\b{re.escape(noun)}\b", lambda _: word, caption, count=1, flags=re.IGNORECASE)
    return said if found else f"{word}, {caption}"
