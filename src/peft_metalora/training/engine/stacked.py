# SPDX-License-Identifier: Apache-2.0
"""Many subjects at once with any PEFT method: the adapter's tensors get a leading axis, the base model does not.

Comparing methods over dozens of subjects one by one leaves a GPU idle between tiny kernels. `AdapterStack` runs the
same model for all subjects in one call with `torch.func.vmap` over the adapter's parameters alone; it knows nothing of
the method (LoRA, DoRA, LoHa, OFT, Meta-LoRA, ...), so that every rival is trained by the very same code. Adam works
on single numbers, so a stacked optimiser equals one optimiser a subject.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...bases import Base
from ..examples.batches import Examples
from .replay import WARM_UP, after_failed_capture, capture, named, text_in

_PER_SAMPLE = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance")
_BETAS, _EPS = (0.9, 0.999), 1e-8
Result = TypeVar("Result")
Gradients = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


class Stack(Protocol):
    """What `train_stack` trains: `count` rows of numbers, `values` (S, N), of which `parameters` are views by name.

    `recordable`: whether a step launches kernels and nothing else.
    """

    recordable: ClassVar[bool]
    count: int
    values: Tensor
    parameters: dict[str, Tensor]

    def gradients(self, base: Base) -> Gradients:
        """What takes `denoising_inputs` and gives losses (S,) and gradients (S, N)."""
        ...


class AdapterStack:
    """`count` copies of the trainable parameters of `model`, all equal at first.

    Args:
        model: holds an adapter; its parameters with `requires_grad` are the ones that are copied, `model` itself stays
            as it is.
        count: number of rows, S: a subject each.
        starts: other values for each row, by parameter name (random starts differ from seed to seed).

    Attributes:
        values: (S, N), all numbers of a row in one line.
        parameters: name to tensor (S, ...), views of `values`.

    Raises:
        ValueError: when nothing of the model is trainable, or there is not one start for each row.
    """

    recordable: ClassVar[bool] = True

    def __init__(self, model: nn.Module, count: int, starts: Sequence[Mapping[str, Tensor]] | None = None) -> None:
        trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "AdapterStack: expected a model with trainable parameters, found none; add an adapter and activate it"
            )
        if starts is not None and len(starts) != count:
            raise ValueError(f"AdapterStack: expected one start for each of {count} rows, found {len(starts)}")
        self.model = model
        self.count = count
        first = next(iter(trainable.values()))
        size = sum(tensor.numel() for tensor in trainable.values())
        self.values = torch.empty(count, size, device=first.device)
        self.parameters: dict[str, Tensor] = {}
        at = 0
        for name, tensor in trainable.items():
            view = self.values[:, at : at + tensor.numel()].unflatten(1, tensor.shape or (1,))
            view = view if tensor.ndim else view.squeeze(1)
            for row in range(count if starts is not None else 0):
                view[row] = starts[row][name]  # type: ignore[index]
            if starts is None:
                view[:] = tensor
            self.parameters[name] = view
            at += tensor.numel()

    def gradients(self, base: Base) -> RowGradients:
        """Of the rows' training losses."""
        return RowGradients(base, self)

    @contextmanager
    def installed_in(self, pipe: Any) -> Iterator[None]:
        """While open, `pipe` denoises S * B samples: the first B are the first subject's, the next B the second's."""
        original = pipe.transformer
        pipe.transformer = _StackedDenoiser(original, self)
        try:
            yield
        finally:
            pipe.transformer = original


def train_stack(
    base: Base,
    stack: Stack,
    examples: Examples,
    *,
    steps: int,
    batch_size: int,
    lr: float | Tensor,
    seed: int,
    numbers: Sequence[int] | None = None,
    scale: Callable[[str], float] | None = None,
    schedule: Callable[[int], float] | None = None,
    graph: bool = False,
) -> Iterator[int]:
    """Stage 2 of all subjects of a stack, as `training.personalize` does it for one: Adam, each clipped to norm 1.

    Args:
        base: its denoiser is the model of `stack`.
        examples: views of subjects, an equal number of each.
        lr: one rate, or one for each row (S,).
        numbers: of the subject in `examples` that each row learns. Default: row n learns subject n.
        scale: factor on the rate by parameter name (LoRA+).
        schedule: factor on the rate by the number of steps done before (warm-up, decay).
        graph: replay the step as a CUDA graph, where the device can.

    Yields:
        The number of steps done, after each.
    """
    positions = torch.stack(examples.by_subject())
    if numbers is not None:
        positions = positions[list(numbers)]
    examples, positions = examples.to(base.device), positions.to(base.device)
    rates = torch.as_tensor(lr, dtype=torch.float32).expand(stack.count).to(base.device)[:, None]
    if scale is not None:
        factors = [
            torch.full((tensor[0].numel(),), scale(name), device=base.device)
            for name, tensor in stack.parameters.items()
        ]
        rates = rates * torch.cat(factors)
    generator = torch.Generator(base.device).manual_seed(seed)
    recorded = graph and stack.recordable and base.device.type == "cuda"
    step = Recorded(_Adam(stack, stack.gradients(base), rates), recorded)
    for number in range(steps):
        pick = torch.randint(
            positions.shape[1], (stack.count, batch_size), generator=generator, device=generator.device
        )
        inputs = denoising_inputs(base, examples, positions.gather(1, pick).flatten(), generator)
        factor = 1.0 if schedule is None else schedule(number)
        step({**inputs, "factor": torch.full((), factor, device=base.device)})
        yield number + 1


def denoising_inputs(
    base: Base, examples: Examples, index: Tensor, generator: torch.Generator, own: slice = slice(None)
) -> dict[str, Tensor]:
    """What `RowGradients` takes: the examples `index` (b,) with a noise and a noise level drawn for each.

    Args:
        own: which of them are returned; noise is drawn for all.
    """
    like = examples.like(0, len(index))
    noise = torch.randn(like.shape, generator=generator, device=generator.device)[own]
    times = base.sample_times(like, generator)[own]
    seeds = None
    if examples.fresh:
        seeds = torch.randint(1 << 62, index.shape, generator=generator, device=generator.device)[own].tolist()
    latents, text, mask = examples.batch(index[own], seeds)
    return named(text, latents=latents, noise=noise, times=times, mask=mask)


class RowGradients:
    """The training loss of each row of a stack, and its gradient with respect to that row alone.

    The base may compute in bfloat16: the rows stay in float32 and are cast, their gradients come back in float32.

    Args:
        base: its denoiser is the model of `stack`.
        compiled: compile the pass, which takes a minute or more and is worth it for thousands of calls.
    """

    def __init__(self, base: Base, stack: AdapterStack, compiled: bool = False) -> None:
        self.base, self.stack = base, stack
        self._pass: Callable[..., tuple[Tensor, Tensor]] = self._gradients
        self._compiled = torch.compile(self._gradients) if compiled else self._gradients
        self._original = base.denoiser
        self._dtype = base.dtype
        self._stand_in = _OneDenoiser(self._original, stack)

    @property
    def names(self) -> list[str]:
        """Of the factors, as `SlotGradients.names`: those of the parameters without the adapter's."""
        return [name.rpartition(".")[0] for name in self.stack.parameters]

    @property
    def values(self) -> Tensor:
        """(S, N): the rows that the next call is about, to be written in place."""
        return self.stack.values

    def __call__(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """One pass over a batch that holds a block of samples for each row.

        Args:
            inputs: as `denoising_inputs` gives them, S * b samples: the first b are the first row's.

        Returns:
            Losses (S,), each the mean over a block, and gradients (S, N), as `stack.values`.
        """
        base, stack = self.base, self.stack
        blocks = {name: tensor.unflatten(0, (stack.count, -1)) for name, tensor in inputs.items()}
        setattr(base.pipeline, base.denoiser_name, self._stand_in)
        try:
            return self._pass(stack.parameters, blocks)
        finally:
            # What a base makes once is made by a first pass as it is written: the compiler cannot read how, and would
            # give up the whole of it.
            self._pass = self._compiled
            setattr(base.pipeline, base.denoiser_name, self._original)

    @torch.no_grad()
    def show(self, subject: Tensor) -> None:
        """Have the denoiser by itself show a subject (N,)."""
        parts = subject.split([tensor[0].numel() for tensor in self.stack.parameters.values()])
        for name, part in zip(self.stack.parameters, parts, strict=True):
            parameter = self.stack.model.get_parameter(name)
            parameter.copy_(part.view_as(parameter))

    def _gradients(self, parameters: dict[str, Tensor], blocks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the others run row by row under vmap
            gradients, losses = vmap(grad_and_value(self._loss), randomness="different")(parameters, blocks)
        return losses, torch.cat([gradients[name].flatten(1) for name in parameters], dim=1)

    def _loss(self, values: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        self._stand_in.values = {name: tensor.to(self._dtype) for name, tensor in values.items()}
        text = text_in(inputs)
        losses = self.base.loss(inputs["latents"], text, inputs["noise"], inputs["times"], inputs.get("mask"))
        self._stand_in.values = {}  # outside of vmap and grad these tensors mean nothing
        return losses.mean()


class Recorded(Generic[Result]):
    """A function of named tensors that is replayed as a CUDA graph after a few eager calls.

    A replay writes into the tensors that the recorded call returned: read them before the next call.

    Args:
        function: launches kernels and nothing else; what it changes it changes in place.
        wanted: False calls it as it is.
    """

    def __init__(self, function: Callable[[dict[str, Tensor]], Result], wanted: bool) -> None:
        self.function, self.wanted = function, wanted
        self.calls = 0
        self.graph: Any = None
        self.inputs: dict[str, Tensor] = {}
        self.result: Result

    def __call__(self, inputs: dict[str, Tensor]) -> Result:
        self.calls += 1
        if self.wanted and self.calls == WARM_UP + 1:
            self._record(inputs)
        if self.graph is None:
            return self.function(inputs)
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        return self.result

    def _record(self, inputs: dict[str, Tensor]) -> None:
        self.inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        try:
            self.graph, self.result = capture(lambda: self.function(self.inputs))
        except RuntimeError as error:
            # Nothing ran while it was recorded, so that the eager calls go on where they were.
            warnings.warn(f"no CUDA graph of this step, it runs eagerly: {error}", stacklevel=3)
            self.wanted = False
            after_failed_capture(next(iter(inputs.values())).device)


class _Adam:
    """A step of Adam for every row, each clipped to norm 1; `factor` of the inputs multiplies the rates."""

    def __init__(self, stack: Stack, gradients: Gradients, rates: Tensor) -> None:
        self.stack, self.gradients, self.rates = stack, gradients, rates
        self.mean, self.square = torch.zeros_like(self.stack.values), torch.zeros_like(self.stack.values)
        self.number = torch.zeros((), device=self.stack.values.device, dtype=torch.float64)

    def __call__(self, inputs: dict[str, Tensor]) -> None:
        factor = inputs["factor"]
        _, gradient = self.gradients({name: tensor for name, tensor in inputs.items() if name != "factor"})
        gradient *= (1 / (gradient.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
        self.number += 1
        self.mean.lerp_(gradient, 1 - _BETAS[0])
        self.square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        first, second = (1 - torch.exp(self.number * math.log(beta)) for beta in _BETAS)
        denominator = (self.square / second.float()).sqrt_().add_(_EPS)
        self.stack.values -= factor * self.rates * (self.mean / first.float()) / denominator


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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._stack.model, self.values, args, kwargs)


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

        with sdpa_kernel(SDPBackend.MATH):
            return (vmap(of_one, randomness="different")(stack.parameters, stacked).flatten(0, 1),)
