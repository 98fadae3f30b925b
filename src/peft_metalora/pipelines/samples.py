# SPDX-License-Identifier: Apache-2.0
"""A subject for each sample of a call: names become slots of images, and those become slots of the denoiser's rows."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..errors import AdapterStateError
from ..tuner import set_slots
from ..tuner.subject_index import NO_SUBJECT
from .calls import each_pass

_MOST_PASSES = 4  # that guidance asks of one image: none and the prompt; also the image, or a perturbed one


def read_names(subjects: Any) -> list[str | None]:
    """What was given as `subjects=`, one after the other.

    Raises:
        AdapterStateError: neither a name nor a list of names and None.
    """
    names = [subjects] if isinstance(subjects, str) else subjects
    in_order = isinstance(names, Iterable) and not isinstance(names, (Mapping, Set))
    names = [*names] if in_order else [names]
    if not all(name is None or isinstance(name, str) for name in names):
        raise AdapterStateError(
            f"expected a name, or a list of names and None, as subjects, found {subjects!r}. Weights are given with "
            "set_adapters, several people of one image with regions=."
        )
    return names


def count_samples(call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Number of prompts, and of images for each, that a pipeline's own `call` is asked for."""
    given = inspect.signature(call).bind_partial(*args, **kwargs).arguments
    given = {**given, **given.get("kwargs", {})}
    prompt, embeds = given.get("prompt"), given.get("prompt_embeds")
    count = len(prompt) if isinstance(prompt, (list, tuple)) else 1
    return (count if embeds is None else len(embeds)), _per_prompt(given)


def _per_prompt(given: Mapping[str, Any]) -> int:
    """How many images, films or the like these arguments ask for of each prompt."""
    return next((count for name, count in given.items() if re.fullmatch(r"num_\w+_per_prompt", name) and count), 1)


def sample_slots(subjects: Sequence[str | None], slots: Mapping[str, int], prompts: int, images: int) -> list[int]:
    """The slot of each image of a call, or NO_SUBJECT, in the order in which pipelines repeat their prompts.

    Args:
        subjects: one for each prompt, or one for each image of each prompt, or a single one for all.
        slots: where each subject lies.
        prompts: number of prompts.
        images: images per prompt.

    Raises:
        AdapterStateError: another number of subjects.
    """
    index = [NO_SUBJECT if name is None else slots[name] for name in subjects]
    if len(index) == 1:
        return index * (prompts * images)
    if len(index) == prompts:
        return [slot for slot in index for _ in range(images)]
    if len(index) == prompts * images:
        return index
    raise AdapterStateError(
        f"expected one subject for each of {prompts} prompts (or of {prompts * images} images), found {len(index)}. "
        "Use None where nobody shall appear."
    )


def batch_slots(index: Sequence[int], rows: int, passes: int = _MOST_PASSES) -> list[int]:
    """The slot of each row of a denoiser's batch: the images, or all of them once for each pass of guidance.

    Args:
        index: the slot of each image.
        rows: size of the batch, 0 for one that is not known.
        passes: the most passes that there can be.

    Raises:
        AdapterStateError: the rows are something else, so that nobody knows whose they are.
    """
    if len(set(index)) == 1:
        return [index[0]] * (rows or 1)
    times, left = divmod(rows, len(index))
    if left or not 1 <= times <= passes:
        raise AdapterStateError(
            f"expected the denoiser's batch to be the {len(index)} images, or all of them once for each pass of "
            f"guidance, found {rows} rows, which this pipeline makes in its own way. Generate one subject at a time."
        )
    return [*index] * times


@contextmanager
def shown_in_samples(pipe: Any, model: nn.Module, index: Sequence[int]) -> Iterator[None]:
    """While it lasts, each row of the denoiser's batch, and what it flattens a row into, shows the slot of its image.

    Args:
        index: as `sample_slots` gives it.

    Raises:
        AdapterStateError: in the call, as `batch_slots`.
    """
    set_slots(model, index, each=True)
    first = [*inspect.signature(type(model).forward).parameters][1]
    rows = len(index)

    def look(args: tuple[Any, ...], kwargs: dict[str, Any], anew: bool) -> None:
        nonlocal rows
        given: Any = args[0] if args else kwargs.get(first)
        now = len(given) if isinstance(given, (list, tuple)) or getattr(given, "ndim", False) else 0
        if anew or now != rows:
            guided = getattr(pipe, "do_classifier_free_guidance", True)
            set_slots(model, batch_slots(index, now, passes=_MOST_PASSES if guided else 1), each=True)
            rows = now

    with each_pass(pipe, model, look):
        yield


@contextmanager
def embeddings_of_each_image(pipe: Any) -> Iterator[None]:
    """For the length of a `with` block embeddings that a call was given are repeated for each image of their prompt.

    Many pipelines (SD3's, FLUX.1's and Wan's among them) repeat those alone that they make of prompts.
    """
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        yield
        return

    @functools.wraps(encode)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        made = encode(*args, **kwargs)
        given = inspect.signature(encode).bind_partial(*args, **kwargs).arguments
        images = _per_prompt(given)
        as_given = {one.shape for one in given.values() if isinstance(one, Tensor)}
        if images == 1 or not isinstance(made, tuple):
            return made
        return tuple(
            one.repeat_interleave(images, 0) if isinstance(one, Tensor) and one.shape in as_given else one
            for one in made
        )

    own = vars(pipe)
    before = {name: own[name] for name in ("encode_prompt",) if name in own}
    own["encode_prompt"] = encode_prompt
    try:
        yield
    finally:
        del own["encode_prompt"]
        own.update(before)


def require_one_each(made: Any, index: Sequence[int]) -> None:
    """Check that a call made one image or film for each sample, where they show several people.

    Raises:
        AdapterStateError: another number, so that people may be mixed in them.
    """
    first: Any = made[0] if isinstance(made, (BaseOutput, tuple, list)) else None
    if len(set(index)) > 1 and hasattr(first, "__len__") and len(first) != len(index):
        raise AdapterStateError(
            f"expected an image or film for each of {len(index)} subjects, found that this pipeline makes "
            f"{len(first)} of such a call, in which people may be mixed. Generate one subject at a time."
        )
