# SPDX-License-Identifier: Apache-2.0
"""One copy of the base that reads, draws and polishes, one thing at a time.

Who is drawn comes with the request and leaves with it: between two pictures the copy knows nobody.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..bases import Base
from ..bases.memory import CPU, require_supported
from ..checkpoint.factors import SubjectSource
from ..checkpoint.reader_files import READER_FILES
from ..checkpoint.space import CodeSource
from ..data.images import decode_image
from ..encoder import load_reader
from ..encoder.sources.source import middle_square
from ..errors import ConfigError
from ..hub.loading import folder_of, load_subject
from ..metrics.face_crop import Region
from ..pipelines import enable_meta_lora
from ..service.artist import code_of, hub_of, load_copy
from ..service.people import Person, Place
from ..service.serve_settings import ServeConfig
from ..service.tuning import begin, files_of
from ..tuner import DownSource
from ..tuner.down import subject_config

_MOST_PLAIN = 16
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Seen:
    """What is used of a photo: the photo, the part of it around the face (None: all), and the square that is read."""

    photo: Image.Image
    region: Region | None
    square: Image.Image


@dataclass(frozen=True)
class Order:
    """A picture to draw.

    Attributes:
        people: one in the whole picture, or of one box each; None for nobody, so that the base draws.
        boxes: (left, top, right, bottom) in pixels; empty for one person in the whole picture.
    """

    prompt: str
    people: tuple[Person | None, ...] = (None,)
    boxes: tuple[Box, ...] = ()
    seed: int = 0
    steps: int = 28


@dataclass(frozen=True)
class Look:
    """A step of polishing that is done: its loss, or the picture that was drawn after it; of step 0 neither."""

    step: int
    loss: float | None = None
    picture: Image.Image | None = None


class Studio:
    """Methods may be called in any thread; each waits for its turn.

    Args:
        base: where it is to be. place: where those with files are kept. config: with the base's and the Down's names.

    Raises:
        As `load_meta_lora` and `load_reader`.
    """

    def __init__(self, base: Base, place: Place, config: ServeConfig) -> None:
        self.base, self.config, self._place = base, config, place
        self._turn = threading.Lock()
        self.polishing: Person | None = None
        """Who is being polished, for which everybody else waits."""
        self.seconds: float | None = None
        """What the last picture took."""
        self._plain: OrderedDict[Order, Image.Image] = OrderedDict()  # of the base alone, the last few
        self._pipe: Any = enable_meta_lora(base.pipeline)
        self._pipe.set_progress_bar_config(disable=True)
        self._accepts = base.call_arguments
        self._come_in()
        folder = folder_of(str(config.down), READER_FILES, **hub_of(config))
        self._reader = load_reader(folder, self.down, base.encode_images, config.face_model)
        side = config.resolution or base.default_side
        self.side = side // base.pixel_multiple * base.pixel_multiple
        """Width and height of a picture, in pixels."""

    @property
    def down(self) -> DownSource:
        """The Down that all people are on."""
        down: DownSource = self._table.down
        return down

    def _come_in(self) -> None:
        """Put the Down onto the base, with slots for the people of a picture."""
        self._pipe.load_meta_lora(self.config.down, "down", **hub_of(self.config))
        self._table = self._pipe.enable_subject_slots(self.config.slots)

    # Photos

    def see(self, photos: Sequence[bytes]) -> list[Seen]:
        """What is used of photos.

        Raises:
            UnreadableImageError, NoFaceError: one that cannot be used.
        """
        sight, side = self._reader.encoder.sight(), self._reader.encoder.config.resolution
        found = []
        for number, content in enumerate(photos, 1):
            name = f"photo {number}"
            image = decode_image(content, name)
            region = sight.region(image, name)
            crop = image if region is None else region.cut(image)
            found.append(Seen(image, region, middle_square(crop, side)))
        return found

    def read(self, tenant: str, name: str, photos: Sequence[bytes], consent: str) -> Person:
        """Somebody in zero steps, for whom there is no record yet; raises as `see`, and NoImagesError."""
        images = [decode_image(content, f"photo {number}") for number, content in enumerate(photos, 1)]
        with self._turn:
            code = self._reader.read(images, self.down).code
        marks = code.down_fingerprint, code.space_fingerprint
        return _somebody(tenant, name, consent, *marks, _bytes(code.code))

    # People

    def subject(self, person: Person) -> SubjectSource:
        """Somebody as files have them.

        Raises:
            CheckpointError: they belong to another Down, or their files are damaged.
        """
        if person.code is not None:
            config = subject_config(
                self.down,
                subject_name=person.name,
                down=self.config.down,
                down_revision=self.config.down_revision,
                base_model_name_or_path=self.config.pretrained_model_name_or_path,
                inference_mode=True,
            )
            accepted = self._reader.space.coded(self._reader.space.accept(code_of(person)))
            return CodeSource(config, accepted, self._reader.space, self.down)
        with self._place.files(person) as folder:
            return load_subject(folder, known_down=self.down.named)

    def between(self, people: Mapping[str, tuple[Person, float]]) -> Person:
        """Somebody between others, for whom there is no record.

        Args:
            people: by name, who and how much of them.

        Raises:
            ConfigError: somebody who was polished, or shares that are none.
        """
        polished = [name for name, (person, _) in people.items() if person.code is None]
        if polished:
            raise ConfigError(
                f"expected people as they were read, found {polished[0]}, who was polished: read their photos again "
                "under another name, and blend that one"
            )
        shares = [share for _, share in people.values()]
        if not all(share >= 0 for share in shares) or not sum(shares) > 0:
            raise ConfigError("expected a share of at least 0 for each, and not 0 for all, found others")
        space = self._reader.space
        code = space.blend([space.accept(code_of(person)) for person, _ in people.values()], shares)
        first = next(iter(people.values()))[0]
        consent = "; ".join(f"{name}: {person.consent}" for name, (person, _) in people.items())
        return _somebody(first.tenant, "-".join(people)[:64], consent, first.down, first.space, _bytes(code))

    @contextmanager
    def _here(self, people: Sequence[Person | None]) -> Iterator[None]:
        """People are on the copy for as long as the block lasts."""
        known = {person.uid: person for person in people if person is not None}
        try:
            for uid, person in known.items():
                if person.code is None:
                    self._table.add(uid, self.subject(person))
                else:
                    self._table.register_code(uid, code_of(person), self._reader.space)
            yield
        finally:
            here = [uid for uid in known if uid in self._table]
            if here:
                self._table.evict(here)

    # Pictures

    def draw(self, order: Order, require_here: Callable[[], None]) -> Image.Image:
        """A picture.

        Args:
            require_here: raises if somebody in it has been deleted; asked when the turn has come, and when it is drawn.

        Raises:
            RegionError, PipelineError: boxes that do not fit, or a base that draws one person only.
            CheckpointError: as `subject`.
        """
        with self._turn:
            require_here()
            image = self._drawn(order)
        require_here()
        return image

    def _drawn(self, order: Order) -> Image.Image:
        names = [None if person is None else person.uid for person in order.people]
        with self._here(order.people):
            start = time.monotonic()
            if order in self._plain:
                return self._plain[order]
            if order.boxes:
                image = self._draw(order, regions=[*zip(names, order.boxes, strict=True)])
            else:
                image = self._draw(order, subjects=names)
            if not any(names):
                self._plain[order] = image
                while len(self._plain) > _MOST_PLAIN:
                    self._plain.popitem(last=False)
            self.seconds = time.monotonic() - start
            return image

    def _draw(self, order: Order, **who: Any) -> Image.Image:
        options: dict[str, Any] = {"max_sequence_length": self.base.max_sequence_length}
        images = self.base.draw(
            prompt=[order.prompt],
            width=self.side,
            height=self.side,
            num_inference_steps=order.steps,
            generator=[torch.Generator().manual_seed(order.seed)],
            **{name: value for name, value in options.items() if name in self._accepts},
            **who,
        )
        image: Image.Image = images[0]
        return image

    # Polishing

    def require_polishing(self) -> None:
        """Raises ConfigError where the base is held in a way that cannot be trained on."""
        if self.config.offload != "none":
            raise ConfigError(
                f"expected a base that is whole on the device to polish on, found offload {self.config.offload!r}: "
                "start the page without it, or polish with metalora personalize"
            )
        require_supported(self.config, "train", *([CPU] if self.base.device.type == "cpu" else []))

    def polish(
        self, person: Person, photos: Sequence[bytes], prompt: str, steps: int, *, every: int, seed: int = 0
    ) -> Generator[Look | dict[str, bytes], None, None]:
        """Train somebody from who was read (stage 2); yields steps, pictures, and at the end the files of a subject.

        Step 0 is that the turn has come. Everybody else waits from then until the iterator has ended or is closed.

        Args:
            prompt: of the photos, and of the pictures on the way. every: steps from one picture to the next.

        Raises:
            ConfigError: somebody who was polished before, or as `require_polishing`.
            MetaLoraError: what stage 2 raises. The copy then draws as before.
        """
        self.require_polishing()
        if person.code is None:
            raise ConfigError(
                f"expected somebody as they were read, found {person.name}, who was polished: read their photos again "
                "under another name"
            )
        with self._turn:
            self.polishing, down = person, self.down
            try:
                yield Look(0)
                self._pipe.unload_meta_lora()
                try:
                    config = replace(self.config, tune_steps=steps)
                    run = begin(self.base, config, down, self._reader.space, person, photos, prompt)
                    try:
                        order = Order(prompt, seed=seed, steps=self.config.num_inference_steps)
                        for step in run.steps():
                            yield Look(step.number, step.loss)
                            if step.number % every == 0:
                                yield Look(step.number, picture=self._draw(order))
                        if run.steps_done % every:
                            yield Look(run.steps_done, picture=self._draw(order))
                        files = files_of(run, person)
                    finally:
                        run.remove()
                finally:
                    self._come_in()
            finally:
                self.polishing = None
        yield files


def _bytes(code: torch.Tensor) -> bytes:
    return code.numpy().astype(np.float32).tobytes()


def _somebody(tenant: str, name: str, consent: str, down: str, space: str, code: bytes) -> Person:
    return Person(tenant, name, secrets.token_hex(16), time.time_ns(), consent, time.time(), down, space, code)


def open_studio(config: ServeConfig, place: Place) -> Studio:
    """Load base and Down where they are to be; raises as `load_copy` and `Studio`."""
    base, config = load_copy(config, "draw")
    return Studio(base, place, config)
