# SPDX-License-Identifier: Apache-2.0
"""A training step's loss and gradient as CUDA graphs: at batch 1 a GPU waits for the host most of the time.

A graph repeats kernels on the same addresses, so that inputs of a step are copied into those of the recorded one, and
gradients lie where the recorded backward pass left them. It holds as long as shapes repeat and weights stay where they
are; both are looked at in each step, and whatever does not fit runs as it is written, with the same result.
"""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...bases import Base, Text
from ..stage_settings import StageConfig
from .compiling import backend_of
from .processes import Processes
from .sharding import wants_shards

WARM_UP = 3  # real steps before a recording, so that every library has made its workspace
MOST_RECORDINGS = 4  # shapes and phases of a run, each with memory for its gradients
MOST_LOSSES = 2  # recordings that no longer held, before no other one is made
Result = TypeVar("Result")


class ReplayedLoss:
    """A loss of named tensors, for `backward()`, that is replayed with its gradient from the fourth time on.

    Args:
        loss: takes named tensors and a phase, and returns a scalar; launches kernels and nothing else, and reads no
            tensor that changes between two calls but those that it is given and the parameters.
        model: holds the weights that it reads.
        parameters: whose `grad` a backward pass fills; those that require a gradient when a phase is recorded.
        accumulation: backward passes between two steps of the optimiser.
        why_not: why nothing is recorded; None: it is, on a GPU.
    """

    def __init__(
        self,
        loss: Callable[[dict[str, Tensor], Any], Tensor],
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        *,
        accumulation: int = 1,
        why_not: str | None = None,
    ) -> None:
        self._loss, self._model, self._parameters = loss, model, parameters
        self._accumulation, self.why_not = accumulation, why_not
        self._times: Counter[Hashable] = Counter()
        self._lost = 0
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, inputs: dict[str, Tensor], phase: Hashable = None) -> Tensor:
        """The loss.

        Args:
            phase: what else the recorded kernels depend on, such as which parameters train.
        """
        if self.why_not is not None:
            return self._loss(inputs, phase)
        key = phase, tuple((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())
        recording = self._recordings.get(key)
        if recording is not None and not recording.holds():
            self.forget()
            recording, self._lost = None, self._lost + 1
            if self._lost > MOST_LOSSES:
                self._give_up("weights move from step to step")
                return self._loss(inputs, phase)
        if recording is None:
            self._times[key] += 1
            if self._times[key] <= WARM_UP or len(self._recordings) == MOST_RECORDINGS:
                return aside(lambda: self._loss(inputs, phase), next(iter(inputs.values())).device)
            recording = self._record(inputs, phase)
            if recording is None:
                return self._loss(inputs, phase)
            self._recordings[key] = recording
        return recording.loss_of(inputs)

    def forget(self) -> None:
        """Free what was recorded, for example before pictures are drawn; the steps that follow record anew."""
        self._recordings.clear()
        self._times.clear()

    def _record(self, inputs: dict[str, Tensor], phase: Hashable) -> _Recording | None:
        gc.collect()  # what is dead and still holds memory, or would be freed while the GPU records
        device = next(iter(inputs.values())).device
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return _Recording(
                    lambda given: self._loss(given, phase), inputs, self._model, self._parameters, self._accumulation
                )
        except RuntimeError as error:  # nothing ran while it was recorded: the run goes on where it was
            first = error.__context__ or error  # of a broken recording torch says in the end only that it is broken
            reason = str(first).partition("\n")[0]
            logging.getLogger(__name__).debug("a step could not be recorded", exc_info=error)
        self._give_up(reason)
        self.forget()
        gc.collect()
        after_failed_capture(device)
        return None

    def _give_up(self, reason: str) -> None:
        self.why_not = reason
        say_why_not(reason)


class _Recording:
    """A recorded forward pass and the backward pass that belongs to it."""

    def __init__(
        self,
        loss: Callable[[dict[str, Tensor]], Tensor],
        inputs: dict[str, Tensor],
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        accumulation: int,
    ) -> None:
        self._inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        self._trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._share = 1 / accumulation
        self._anchor = torch.zeros((), device=next(iter(inputs.values())).device, requires_grad=True)
        weights = [*model.parameters(), *model.buffers()]
        self._quantised = [weight for weight in weights if hasattr(weight, "__tensor_flatten__")]
        self._plain = [weight for weight in weights if not hasattr(weight, "__tensor_flatten__")]
        self._places = self._now()
        passes = _Passes(loss, self._inputs, self._trained)
        self._forward, self._loss = capture(passes.forward)
        self._backward, self._grads = capture(passes.backward, self._forward)

    def holds(self) -> bool:
        """Whether all weights are where they were."""
        return self._places == self._now()

    def _now(self) -> list[int]:
        pieces = [piece for weight in self._quantised for piece in _pieces(weight)]
        return [tensor.data_ptr() for tensor in (*self._plain, *pieces)]

    def loss_of(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of other inputs of these shapes."""
        torch._foreach_copy_(list(self._inputs.values()), [inputs[name] for name in self._inputs])
        self._forward.replay()
        return _Replayed.apply(self._anchor, self)

    def loss(self) -> Tensor:
        """Of the forward pass that ran last."""
        return self._loss.clone()

    def run_backward(self) -> None:
        """Add the gradient of the last loss to what the parameters have."""
        self._backward.replay()
        if self._share == 1:
            for parameter, grad in zip(self._trained, self._grads, strict=True):
                parameter.grad = grad
            return
        sums, parts = [], []
        for parameter, part in zip(self._trained, torch._foreach_mul(self._grads, self._share), strict=True):
            if parameter.grad is None:
                parameter.grad = part
            else:
                sums.append(parameter.grad)
                parts.append(part)
        if sums:
            torch._foreach_add_(sums, parts)


class _Passes:
    """What is recorded: two functions without arguments, the second of which needs the first's autograd graph."""

    def __init__(
        self, loss: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], trained: list[nn.Parameter]
    ) -> None:
        self._function, self._inputs, self._trained = loss, inputs, trained
        self._loss: Tensor | None = None

    def forward(self) -> Tensor:
        self._loss = self._function(self._inputs)
        return self._loss.detach()

    def backward(self) -> list[Tensor]:
        assert self._loss is not None
        loss, self._loss = self._loss, None
        grads = torch.autograd.grad(loss, self._trained, allow_unused=True)
        return [_laid_out(grad, own) for own, grad in zip(self._trained, grads, strict=True)]


def _laid_out(grad: Tensor | None, own: Tensor) -> Tensor:
    """A gradient as `backward()` leaves it: with the strides of its parameter, which fused optimisers ask for."""
    if grad is None:
        return torch.zeros_like(own)
    long = [size > 1 for size in own.shape]
    alike = all(a == b for a, b, counts in zip(grad.stride(), own.stride(), long, strict=True) if counts)
    return grad if alike and grad.dtype == own.dtype else torch.empty_like(own).copy_(grad)


class _Replayed(torch.autograd.Function):
    """The loss of a recording; its backward pass is the recorded one. `anchor` is there for autograd to call it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, recording: _Recording) -> Tensor:
        ctx.recording = recording
        return recording.loss()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.recording.run_backward()
        return None, None


def capture(function: Callable[[], Result], after: Any = None) -> tuple[Any, Result]:
    """Record a function as a CUDA graph; nothing of it is computed until the graph is replayed.

    Args:
        after: a graph that is always replayed before this one, with which it shares memory.

    Returns:
        The graph, and what the function returned: tensors that each replay writes into.

    Raises:
        RuntimeError: something in it cannot be recorded. `after_failed_capture` brings the device back.
    """
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    options: dict[str, Any] = {"pool": None if after is None else after.pool(), "stream": _stream_aside(here.device)}
    # Of a broken recording torch leaves the stream current. Other threads may do what they like meanwhile: trackers,
    # and the watchdog of several processes, look at the GPU.
    with torch.cuda.stream(here), torch.cuda.graph(graph, **options, capture_error_mode="thread_local"):
        result = function()
    return graph, result


def aside(function: Callable[[], Result], device: torch.device) -> Result:
    """Call a function on the stream that recordings are made on, in its turn.

    What makes a parameter's gradient belongs to the stream on which it was first asked for, and lives as long as any
    loss does that somebody still holds: made elsewhere, it would draw that stream into the recording and break it.
    """
    if device.type != "cuda":
        return function()
    stream, here = _stream_aside(device), torch.cuda.current_stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = function()
    here.wait_stream(stream)
    return result


@cache
def _stream_aside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def after_failed_capture(device: torch.device) -> None:
    """End what a broken recording left open: torch's random numbers still wait for a graph to be finished."""
    with suppress(RuntimeError):
        capture(lambda: torch.zeros(1, device=device))


def _pieces(tensor: Tensor) -> list[Tensor]:
    """The tensors with storage that a tensor consists of: quantised weights are made of several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [piece for name in names for piece in _pieces(getattr(tensor, name))]


def why_not_recorded(base: Base, config: StageConfig, processes: Processes, further: str | None = None) -> str | None:
    """Why the steps of a run are not recorded, on a GPU said once; None: they are.

    Args:
        further: what else speaks against it.
    """
    if base.device.type != "cuda":
        return "there is no GPU"
    modules = list(base.denoiser.modules())
    kinds = {cls.__name__ for module in modules for cls in type(module).__mro__}
    reason = further
    if base.stream is not None:
        reason = "the base's blocks are streamed"
    elif backend_of(config) is not None:
        reason = "the base's blocks are compiled"
    elif wants_shards(processes, config):
        reason = "the base is divided over processes"
    elif config.mixed_precision == "fp16":
        reason = "the scale of gradients in float16 changes"
    elif base.host_looks:
        reason = f"the host looks {base.host_looks}"
    elif any(_has_hooks(module) for module in modules):
        reason = "hooks move or cast the base's weights"
    elif "Linear8bitLt" in kinds:
        reason = "the 8-bit layers of bitsandbytes have the host look for outliers"
    if reason is not None:
        say_why_not(reason)
    return reason


def say_why_not(reason: str) -> None:
    """Tell a user who could have faster steps."""
    logging.getLogger(__name__).warning(
        "steps run as they are written, not as a CUDA graph, with the same result: %s", reason
    )


def _has_hooks(module: nn.Module) -> bool:
    registry: Any = vars(module).get("_diffusers_hook")
    return "_hf_hook" in vars(module) or bool(registry is not None and registry.hooks)


def named(text: Text, **tensors: Tensor | None) -> dict[str, Tensor]:
    """Text and tensors as the inputs of a step; what is None is left out."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {**given, **{f"text.{name}": tensor for name, tensor in text.items()}}


def text_in(inputs: dict[str, Tensor]) -> Text:
    """The text among the inputs of a step."""
    return {name.removeprefix("text."): tensor for name, tensor in inputs.items() if name.startswith("text.")}
