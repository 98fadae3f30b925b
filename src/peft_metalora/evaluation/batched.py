# SPDX-License-Identifier: Apache-2.0
"""Many subjects at once with any PEFT method: the adapter's tensors get a leading axis, the base model does not.

Comparing methods over dozens of subjects one by one leaves a GPU idle between tiny kernels. `AdapterStack` runs the
same model for all subjects in one call with `torch.func.vmap` over the adapter's parameters alone; it knows nothing of
the method (LoRA, DoRA, LoHa, OFT, Meta-LoRA, ...), so that every rival is trained by the very same code. Adam works
on single numbers, so a stacked optimiser equals one optimiser a subject.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from ..training.bases import Base, Text
from ..training.examples import Examples

_PER_SAMPLE = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance")


class AdapterStack:
    """`count` copies of the trainable parameters of `model`, all equal at first.

    Args:
        model: holds an adapter; its parameters with `requires_grad` are the ones that are copied, `model` itself stays
            as it is.
        count: number of subjects, S.

    Attributes:
        parameters: name to tensor (S, ...), leaves of autograd.

    Raises:
        ValueError: when nothing of the model is trainable.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "AdapterStack: expected a model with trainable parameters, found none; add an adapter and activate it"
            )
        self.model = model
        self.count = count
        self.parameters = {
            name: p.detach().unsqueeze(0).repeat(count, *[1] * p.ndim).contiguous() for name, p in trainable.items()
        }

    @contextmanager
    def installed_in(self, pipe: Any, name: str = "transformer") -> Iterator[None]:
        """While open, `pipe` denoises S * B samples: the first B are the first subject's, the next B the second's."""
        original = getattr(pipe, name)
        setattr(pipe, name, _StackedDenoiser(original, self))
        try:
            yield
        finally:
            setattr(pipe, name, original)


def train_stack(
    base: Base, stack: AdapterStack, examples: Examples, *, steps: int, batch_size: int, lr: float, seed: int
) -> Iterator[int]:
    """Stage 2 of all subjects of a stack, as `training.personalize` does it for one: Adam, each clipped to norm 1.

    Args:
        base: its denoiser is the model of `stack`.
        examples: views of `stack.count` subjects, an equal number of each.

    Yields:
        The number of steps done, after each.
    """
    positions = torch.stack(examples.by_subject())
    examples = examples.to(base.device)
    parameters = list(stack.parameters.values())
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=base.device.type == "cuda")
    generator = torch.Generator().manual_seed(seed)
    original = base.denoiser
    stand_in = _OneDenoiser(original, stack)

    def loss(values: dict[str, Tensor], latents: Tensor, text: Text, noise: Tensor, times: Tensor) -> Tensor:
        stand_in.values = values
        return base.loss(latents, text, noise, times).mean()

    for step in range(steps):
        pick = torch.randint(positions.shape[1], (stack.count, batch_size), generator=generator)
        latents, text = examples.pick(positions.gather(1, pick).flatten().to(base.device))
        noise = torch.randn(latents.shape, generator=generator).to(base.device)
        times = base.sample_times(latents, generator)
        split = {name: tensor.unflatten(0, (stack.count, -1)) for name, tensor in text.items()}
        parts = [tensor.unflatten(0, (stack.count, -1)) for tensor in (latents, noise, times)]
        setattr(base.pipeline, base.denoiser_name, stand_in)
        try:
            gradients, _ = vmap(grad_and_value(loss), randomness="different")(
                stack.parameters, parts[0], split, parts[1], parts[2]
            )
        finally:
            setattr(base.pipeline, base.denoiser_name, original)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        factor = (1 / (norms + 1e-6)).clamp(max=1)
        for name, parameter in stack.parameters.items():
            parameter.grad = gradients[name] * factor.view(-1, *[1] * (parameter.ndim - 1))
        optimizer.step()
        yield step + 1


class _StandIn(nn.Module):
    """Takes a denoiser's place in a pipeline and answers attribute look-ups for it."""

    def __init__(self, original: nn.Module, stack: AdapterStack) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple: not a submodule
        self._stack = stack

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self._original[0].parameters(recurse)


class _OneDenoiser(_StandIn):
    """The model with the adapter `values` of one subject; inside `vmap` these are the batched ones."""

    values: dict[str, Tensor]

    def forward(self, **kwargs: Any) -> Any:
        return functional_call(self._stack.model, self.values, kwargs=kwargs)


class _StackedDenoiser(_StandIn):
    """The model with the adapters of all subjects, on a batch that holds one block a subject."""

    @torch.no_grad()
    def forward(self, **kwargs: Any) -> tuple[Tensor]:
        stack, rows = self._stack, len(kwargs["hidden_states"])
        if rows % stack.count:
            raise ValueError(
                f"expected a multiple of {stack.count} samples (one block a subject), found {rows}; repeat the prompts"
            )
        stacked = {
            key: value.unflatten(0, (stack.count, -1))
            for key, value in kwargs.items()
            if key in _PER_SAMPLE and value is not None
        }
        shared = {key: value for key, value in kwargs.items() if key not in stacked and key != "return_dict"}

        def of_one(values: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
            return functional_call(stack.model, values, kwargs=inputs | shared | {"return_dict": False})[0]

        return (vmap(of_one, randomness="different")(stack.parameters, stacked).flatten(0, 1),)
