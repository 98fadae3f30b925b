# SPDX-License-Identifier: Apache-2.0
"""What goes between the desk and the copies that draw: light, so that the desk needs no base model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from .people import Person

_Result = TypeVar("_Result")
Progress = int | dict[str, bytes]
"""Of a person who is tuned: a step that is done; at the end, the files."""


class RefusedError(Exception):
    """What a client is told instead of an answer: one sentence, without a path.

    Attributes:
        status: the HTTP status. retry_after: seconds, where asking again makes sense.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(status, message, retry_after)
        self.status, self.retry_after = status, retry_after

    def __str__(self) -> str:
        return str(self.args[1])


def is_gone() -> RefusedError:
    """What is said of somebody who was deleted meanwhile."""
    return RefusedError(404, "expected somebody who is here, found somebody who was deleted")


def cannot_be_reached(name: str) -> RefusedError:
    """What is said while the place of somebody's files does not let itself be read."""
    message = f"expected to be able to read where {name} is kept, found that this fails: ask again later"
    return RefusedError(503, message, retry_after=5)


@dataclass(frozen=True)
class Offer:
    """What of the settings depends on the pipeline.

    Attributes:
        resolution: width and height of an image that names none. multiple: what both are multiples of.
        negative: whether there are negative prompts.
    """

    resolution: int
    multiple: int
    negative: bool


@dataclass(frozen=True)
class Task:
    """An image to draw.

    Attributes:
        people: of one place each, None for nobody. boxes: theirs, empty for one person in the whole image.
    """

    people: tuple[Person | None, ...]
    boxes: tuple[tuple[int, ...], ...]
    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: float | None
    seed: int
    format: str

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all images of one batch have alike."""
        places = tuple(
            (None if one is None else one.uid, box) for one, box in zip(self.people, self.boxes, strict=False)
        )
        return self.width, self.height, self.steps, self.guidance, self.negative_prompt is None, places


@dataclass(frozen=True)
class Drawn:
    """An image as a file, and what it took.

    Attributes:
        batch: images that were drawn together. seconds: of the batch.
        hits, misses: people of the batch who were in a slot, and who had to be brought; 0 in all images but its first.
    """

    content: bytes
    batch: int
    seconds: float
    hits: int
    misses: int


async def to_its_end(work: Callable[..., _Result], *args: Any, **kwargs: Any) -> _Result:
    """Do something in another thread; whoever is cancelled meanwhile waits until it is done."""
    done = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        await asyncio.wait([done])
        raise
