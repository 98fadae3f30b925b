# SPDX-License-Identifier: Apache-2.0
"""A copy of the base that tunes people: stage 2 on the photos of one person after another, step by step."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..bases import Base
from ..checkpoint.reader_files import READER_FILES
from ..checkpoint.space import CodeSource, load_space
from ..data import Photo, Subject
from ..errors import MetaLoraError
from ..hub.loading import folder_of, load_down
from ..training.examples.encoding import encode_subjects
from ..training.stage_2 import Personalization
from ..training.stage_settings import PersonalizeConfig
from ..tuner.down import subject_config
from .artist import code_of, hub_of, load_copy
from .people import Person
from .serve_settings import ServeConfig
from .tasks import Progress, RefusedError, to_its_end

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

    async def tune(self, photos: Sequence[bytes], person: Person, prompt: str | None) -> AsyncIterator[Progress]:
        """Tune one person at a time; yields each step that is done, and at the end the files of a subject.

        Raises:
            RefusedError: photos that cannot be learned from.
        """
        async with self._turn:
            try:
                run = await to_its_end(self._begin, photos, person, prompt)
                steps = run.steps()
                while (step := await to_its_end(next, steps, None)) is not None:
                    yield step.number
                files = await to_its_end(_files_of, run, person)
            except MetaLoraError as error:
                raise RefusedError(422, f"expected photos to learn from, found {type(error).__name__}") from error
            finally:
                if self._run is not None:
                    self._run.remove()
                    self._run = None
            yield files

    def _begin(self, photos: Sequence[bytes], person: Person, prompt: str | None) -> Personalization:
        """From who was read; `_run` is what there is to take off, whoever waits for it."""
        config = PersonalizeConfig(
            pretrained_model_name_or_path=str(self._config.pretrained_model_name_or_path),
            output_dir="unused",
            down=self._config.down,
            instance_prompt=prompt or _PROMPT,
            resolution=self._config.resolution or 512,
            max_train_steps=self._config.tune_steps,
            mixed_precision=self._config.mixed_precision,
        )
        seen = [Photo(Path(f"photo {number}"), content=partial(bytes, photo)) for number, photo in enumerate(photos, 1)]
        examples = encode_subjects(
            self._base, [Subject(person.name, seen)], config, config.views_per_image, progress=False
        )
        read = CodeSource(subject_config(self._down), code_of(person), self._space, self._down)
        self._run = Personalization(self._base, examples, config, self._down, read=[read])
        return self._run


def _files_of(run: Personalization, person: Person) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        saved = run.save(Path(folder) / "subject", subject_name=person.name)
        return {file.name: file.read_bytes() for file in saved.iterdir()}


async def make_tuner(config: ServeConfig) -> Tuner:
    """Load base and Down where they are to be; raises as `make_artist`."""
    base, config = load_copy(replace(config, offload="none"), "train")
    return Tuner(base, config)
