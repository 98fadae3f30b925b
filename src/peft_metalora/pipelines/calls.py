# SPDX-License-Identifier: Apache-2.0
"""Calls of pipelines on one denoiser: each shows its own people, one in a callback of another too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry
from torch import nn

from ..tuner.on_model import seen
from ..tuner.subject_index import SubjectIndex, Written
from .denoiser import named_denoiser

Look = Callable[[tuple[Any, ...], dict[str, Any], bool], None]
"""Before a pass of the denoiser: its arguments, and whether what the model shows has to be written anew."""


@dataclass(eq=False)
class _Call:
    """A call that runs.

    Attributes:
        before: what the model showed when it began. anew: nothing has been written since it began or went on.
    """

    before: list[tuple[SubjectIndex, tuple[str, ...] | None, bool, Written, torch.device]]
    anew: bool = True


_running: weakref.WeakKeyDictionary[nn.Module, list[_Call]] = weakref.WeakKeyDictionary()


@contextmanager
def call_on(model: nn.Module) -> Iterator[None]:
    """A call of a pipeline, which `lock_of` is held for.

    In a callback of another call the model is as before that one; afterwards that one goes on with its own people.
    """
    now = [(index, index.shown, index.by_tokens, index.written, device) for index, device in seen(model).homes()]
    running = _running.setdefault(model, [])
    if running:
        _show(running[0])
        _forget_passes(model)
    running.append(_Call(now))
    try:
        yield
    except BaseException:
        _forget_passes(model)  # as diffusers does where a call ends well
        raise
    finally:
        own = running.pop()
        if running:
            _show(own)
            running[-1].anew = True


def _show(call: _Call) -> None:
    """Let the model show what it did when a call began."""
    for index, shown, by_tokens, written, device in call.before:
        index.shown, index.by_tokens = shown, by_tokens
        index.write(written.values, device, written.each)


def _forget_passes(model: nn.Module) -> None:
    """Drop what caches of diffusers keep from pass to pass: the next image would be made of this one's people."""
    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()


@contextmanager
def each_pass(pipe: Any, model: nn.Module, look: Look) -> Iterator[None]:
    """For the length of a `with` block in `call_on`: look before each pass that this call makes, and no other one."""
    part, call = getattr(pipe, named_denoiser(pipe)[0]), _running[model][-1]

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _running[model][-1] is call:
            look(args, kwargs, call.anew)
            call.anew = False

    compiled = part._compiled_call_impl
    if compiled is None:
        hook = part.register_forward_pre_hook(before, with_kwargs=True)
    else:  # model.compile(): the graph is older than the hook would be

        def called(*args: Any, **kwargs: Any) -> Any:
            before(part, args, kwargs)
            return compiled(*args, **kwargs)

        part._compiled_call_impl = called
    try:
        yield
    finally:
        if compiled is None:
            hook.remove()
        else:
            part._compiled_call_impl = compiled
