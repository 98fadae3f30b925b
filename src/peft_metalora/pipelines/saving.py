# SPDX-License-Identifier: Apache-2.0
"""A pipeline with a person on it is not saved whole: diffusers would write, and publish, the person beside the base."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import AdapterStateError
from ..tuner.on_model import meta_layers


def refuse_to_save(model: nn.Module) -> None:
    """Raise AdapterStateError if Downs or subjects are on the model."""
    if meta_layers(model):
        raise AdapterStateError(
            "expected no Down or subject on a model that is saved whole, found some: its files would hold the person, "
            "and diffusers could not load them. Use save_meta_lora, push_down and push_subject for adapters; for the "
            "base, unload_meta_lora first; for a plain pipeline that shows one person, fuse_meta_lora and then "
            "unload_meta_lora(keep_fused=True)."
        )


@contextmanager
def saved_in_parts(model: nn.Module) -> Iterator[None]:
    """After a block in which adapters come or go, the model refuses `save_pretrained` while it has any of ours.

    It is asked by pipelines of any class that share the model, and by diffusers' `push_to_hub`.
    """
    try:
        yield
    finally:
        if not meta_layers(model):
            vars(model).pop("save_pretrained", None)
        elif hasattr(type(model), "save_pretrained"):
            vars(model)["save_pretrained"] = functools.partial(_save_pretrained, model)


def _save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    refuse_to_save(model)
    return type(model).save_pretrained(model, *args, **kwargs)
