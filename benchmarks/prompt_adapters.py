# SPDX-License-Identifier: Apache-2.0
"""What `convergence.py` compares weights with: a base that looks at a photo, and keeps its weights.

An encoder's code expands to the numbers of these adapters as it expands to Mid and Up. `TokenAdapter` gives the base
further tokens beside the prompt's. `ImagePromptAdapter` gives each attention further keys and values, apart from those
of the prompt (decoupled cross-attention, as in IP-Adapter, arXiv 2308.06721).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn


class _Wrapper(nn.Module):
    """Takes a denoiser's place and answers attribute look-ups for it."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)


class TokenAdapter(_Wrapper):
    """A denoiser that sees `count` trained tokens of some width beside those of the prompt."""

    def __init__(self, denoiser: nn.Module, count: int, width: int) -> None:
        super().__init__(denoiser)
        self.tokens = nn.Parameter(0.02 * torch.randn(count, width, generator=torch.Generator().manual_seed(0)))

    def forward(self, encoder_hidden_states: Tensor, txt_ids: Tensor, **kwargs: Any) -> Any:
        own = self.tokens.to(encoder_hidden_states.dtype).expand(len(encoder_hidden_states), -1, -1)
        sequence = torch.cat([encoder_hidden_states, own], dim=1)
        ids = torch.cat([txt_ids, txt_ids.new_zeros(len(self.tokens), txt_ids.shape[1])])
        return self.denoiser(encoder_hidden_states=sequence, txt_ids=ids, **kwargs)


class ImagePromptAdapter(_Wrapper):
    """A FLUX.1 denoiser whose attentions also look at `count` keys and values of their own; `remove` takes them off."""

    def __init__(self, denoiser: nn.Module, count: int) -> None:
        super().__init__(denoiser)
        self.prompts = nn.ModuleList()
        generator = torch.Generator().manual_seed(0)
        for attention in _attentions(denoiser):
            self.prompts.append(_Prompt(count, attention.inner_dim, generator))
            attention.set_processor(_Decoupled(self.prompts[-1]))

    def forward(self, **kwargs: Any) -> Any:
        return self.denoiser(**kwargs)

    @staticmethod
    def remove(denoiser: nn.Module) -> None:
        """Let a denoiser attend as it did."""
        for attention in _attentions(denoiser):
            if isinstance(attention.processor, _Decoupled):
                attention.set_processor(FluxAttnProcessor())


def _attentions(denoiser: nn.Module) -> list[Any]:
    return [module for module in denoiser.modules() if hasattr(module, "set_processor")]


class _Prompt(nn.Module):
    """Keys and values of one attention. Values start at 0: nothing is changed until something is learned."""

    def __init__(self, count: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(count, width, generator=generator))
        self.values = nn.Parameter(torch.zeros(count, width))


class _Decoupled(FluxAttnProcessor):  # type: ignore[misc]
    def __init__(self, prompt: nn.Module) -> None:
        super().__init__()
        self.prompt = prompt

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        shown = super().__call__(attn, hidden_states, *args, **kwargs)
        query = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))).transpose(1, 2)
        keys, values = (
            tensor.to(query.dtype).unflatten(-1, (attn.heads, -1)).transpose(0, 1).expand(len(query), -1, -1, -1)
            for tensor in (self.prompt.keys, self.prompt.values)
        )
        seen = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
        if isinstance(shown, Tensor):  # one stream: the block projects what its attention gives
            return shown + seen
        image, text = shown
        return image + F.linear(seen, attn.to_out[0].weight), text
