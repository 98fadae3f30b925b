# SPDX-License-Identifier: Apache-2.0
"""A copy of the base that tunes people: stage 2 on the photos of one person after another, step by step."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..bases import Base
from ..checkpoint.reader_files import READER_FILES
from ..checkpoint.space import CodeSource, SubjectSpace, load_space
from ..data import Photo, Subject
from ..errors import MetaLoraError
from ..files import temporary_folder
from ..hub.loading import folder_of, load_down
from ..training.examples.encoding import encode_subjects
from ..training.stage_2 import Personalization
from ..training.stage_settings import PersonalizeConfig
from ..tuner import DownSource
from ..tuner.down import subject_config
from .artist import code_of, hub_of, load_copy
from .people import Person
from .serve_settings import ServeConfig
from .tasks import Progress, RefusedError, is_gone, to_its_end

_PROMPT = "a photo of a person"


class Tuner:
    """A pipeline that is trained on, never drawn with.

    Raises:
        As `load_down` and `load_space`.
    """

    def __init__(self, base: Base, config: ServeConfig) -> None:
        self._base, self._config = base, config
        hub = hub_of(config)
        self._down = load_down(str(config.down), **hub)
        self._space = load_space(folder_of(str(config.down), READER_FILES, **hub), self._down)
        self._turn = asyncio.Lock()
        self._run: Personalization | None = None
        self._here: Counter[str] = Counter()  # uids of who is tuned or waits for that
        self._gone: set[str] = set()
        self._left = asyncio.Event()

    async def tune(self, photos: Sequence[bytes], person: Person, prompt: str | None) -> AsyncIterator[Progress]:
        """Tune one person at a time; yields each step that is done, and at the end the files of a subject.

        Raises:
            RefusedError: photos that cannot be learned from, or somebody who was deleted.
        """
        self._here[person.uid] += 1
        try:
            async with self._turn:
                self._require_here(person)
                try:
                    run = await to_its_end(self._begin, photos, person, prompt)
                    steps = run.steps()
                    while (step := await to_its_end(next, steps, None)) is not None:
                        yield step.number
                        self._require_here(person)
                    files = await to_its_end(files_of, run, person)
                except MetaLoraError as error:
                    raise RefusedError(422, f"expected photos to learn from, found {type(error).__name__}") from error
                finally:
                    if self._run is not None:
                        self._run.remove()
                        self._run = None
            yield files
        finally:
            self._here -= Counter([person.uid])
            self._left.set()

    async def forget(self, uid: str) -> None:
        """End what is learned of a person; returns when nothing of them is here any more."""
        self._gone.add(uid)
        while self._here[uid]:
            self._left.clear()
            await self._left.wait()

    def _require_here(self, person: Person) -> None:
        if person.uid in self._gone:
            raise is_gone()

    def _begin(self, photos: Sequence[bytes], person: Person, prompt: str | None) -> Personalization:
        """`_run` is what there is to take off, whoever waits for it."""
        self._run = begin(self._base, self._config, self._down, self._space, person, photos, prompt)
        return self._run


def begin(
    base: Base,
    config: ServeConfig,
    down: DownSource,
    space: SubjectSpace,
    person: Person,
    photos: Sequence[bytes],
    prompt: str | None,
) -> Personalization:
    """Stage 2 of a person from who was read, ready for its first step.

    Args:
        base: without adapters. config: with the steps at most. prompt: of the photos.

    Raises:
        As `encode_subjects` and `Personalization`.
    """
    settings = PersonalizeConfig(
        pretrained_model_name_or_path=str(config.pretrained_model_name_or_path),
        output_dir="unused",
        generic=config.generic,
        down=config.down,
        instance_prompt=prompt or _PROMPT,
        resolution=config.resolution or 512,
        max_train_steps=config.tune_steps,
        mixed_precision=config.mixed_precision,
    )
    seen = [Photo(Path(f"photo {number}"), content=partial(bytes, photo)) for number, photo in enumerate(photos, 1)]
    examples = encode_subjects(base, [Subject(person.name, seen)], settings, settings.views_per_image, progress=False)
    read = CodeSource(subject_config(down), code_of(person), space, down)
    return Personalization(base, examples, settings, down, read=[read])


def files_of(run: Personalization, person: Person) -> dict[str, bytes]:
    """The files of the subject that a run has learned."""
    with temporary_folder() as folder:
        saved = run.save(folder / "subject", subject_name=person.name)
        return {file.name: file.read_bytes() for file in saved.iterdir()}


async def make_tuner(config: ServeConfig) -> Tuner:
    """Load base and Down where they are to be; raises as `make_artist`."""
    base, config = load_copy(replace(config, offload="none"), "train")
    return Tuner(base, config)
