# SPDX-License-Identifier: Apache-2.0
"""What can be done on the page, without the page: `blocks.py` is what stands there.

A tab has a `Visit` of its own: the photos that were dropped there, and whom it polishes. The library is everybody's.
"""

from __future__ import annotations

import math
import shutil
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import size_of
from ..errors import ConfigError, NoImagesError, UnreadableImageError
from ..service.people import Person
from ..service.serve_settings import ServeConfig
from .hardware import Estimates
from .library import Library
from .polishing import Polishing
from .studio import Order, Seen, Studio

CONSENT = (
    "The person in these photos agrees that they are read, and that pictures of them are drawn; or it is me, and I do."
)
TOOLS = {"ComfyUI": "comfyui", "A1111, Forge, sd-scripts": "kohya", "diffusers": "diffusers"}
_PICTURES = 4  # on the way of polishing
_LOOK = 0.5  # seconds between two looks at how polishing stands


@dataclass
class Visit:
    """What one tab has.

    Attributes:
        photos: what was dropped and not forgotten since; in memory alone. uid: of the person who was read from them.
    """

    photos: list[bytes] = field(default_factory=list)
    uid: str = ""
    polishing: Polishing | None = None

    def leave(self) -> None:
        """The tab is gone."""
        self.photos = []
        if self.polishing is not None:
            self.polishing.cancel()

    def forget(self, uid: str) -> None:
        """Somebody is deleted."""
        if self.uid == uid:
            self.photos, self.uid = [], ""
        if self.polishing is not None and self.polishing.person.uid == uid:
            self.polishing.cancel()
            self.polishing = None


class Page:
    """What can be done on the page.

    Args:
        folder: where files to download lie; it goes with the page. estimates: what settings would take.

    Methods raise MetaLoraError with what to tell the user, and have changed nothing then.
    """

    def __init__(
        self, studio: Studio, library: Library, config: ServeConfig, folder: Path, estimates: Estimates
    ) -> None:
        self.studio, self.library, self.config = studio, library, config
        self.estimates = estimates
        self._folder = folder
        # Tabs with photos of somebody, or that polish them.
        self._visits: weakref.WeakValueDictionary[int, Visit] = weakref.WeakValueDictionary()

    # Somebody new

    def drop(self, visit: Visit, consent: bool, files: Sequence[str] | None) -> list[Seen]:
        """Take photos into a tab's memory, and see what is used of them; the files are gone in any case."""
        photos = _taken(files or [])
        self._require_consent(consent)
        self._require_photos(photos)
        seen = self.studio.see(photos)
        visit.photos, visit.uid = photos, ""
        return seen

    def read(self, tenant: str, visit: Visit, consent: bool, name: str, keep_photos: bool) -> Person:
        """Bring somebody in from the tab's photos."""
        self._require_consent(consent)
        photos = visit.photos
        if not photos:
            raise NoImagesError("expected at least one photo of the person, found none: drop one")
        self.library.require_new(tenant, name)
        read = self.studio.read(tenant, name, photos, CONSENT)
        person = self.library.enrol(read, photos if keep_photos else ())
        # The turn may have come late, and others been dropped, or these forgotten, meanwhile.
        if visit.photos is photos:
            visit.uid = person.uid
            self._visits[id(visit)] = visit
        return person

    def _require_consent(self, consent: bool) -> None:
        if not consent:
            raise ConfigError("expected the consent of the person, found the box not ticked: tick it if they agree")

    def _require_photos(self, photos: Sequence[bytes]) -> None:
        if len(photos) > self.config.max_photos:
            raise ConfigError(f"expected at most {self.config.max_photos} photos, found {len(photos)}: drop fewer")
        for number, photo in enumerate(photos, 1):
            if len(photo) > self.config.max_body_mb * 1e6:
                raise UnreadableImageError(
                    f"expected photos of at most {self.config.max_body_mb:g} MB, found photo {number} of "
                    f"{len(photo) / 1e6:.0f} MB: make it smaller"
                )
            width, height = size_of(photo, f"photo {number}")
            if width * height > self.config.max_megapixels * 1e6:
                raise UnreadableImageError(
                    f"expected photos of at most {self.config.max_megapixels:g} million pixels, found {width} x "
                    f"{height} in photo {number}: make it smaller"
                )

    # Pictures

    def draw(self, tenant: str, name: str | None, prompt: str, seed: float, steps: float) -> list[Image.Image]:
        """Somebody's picture, and the base's beside it."""
        person = self.library.person(tenant, name)
        return self._beside(person, [person], prompt, seed, steps)

    def blend(
        self, tenant: str, names: Sequence[str | None], share: float, prompt: str, seed: float, steps: float
    ) -> list[Image.Image]:
        """Somebody between two, and the base."""
        people = self._two(tenant, names)
        return self._beside(self._between(people, share), people, prompt, seed, steps)

    def keep_blend(self, tenant: str, names: Sequence[str | None], share: float, name: str) -> Person:
        """Enter somebody between two into the library."""
        self.library.require_new(tenant, name)
        people = self._two(tenant, names)
        person = replace(self._between(people, share), name=name)
        return self.library.enrol(person, between=people)

    def _two(self, tenant: str, names: Sequence[str | None]) -> list[Person]:
        return [self.library.person(tenant, name) for name in names]

    def _between(self, people: Sequence[Person], share: float) -> Person:
        first, second = people
        if first.name == second.name:
            raise ConfigError(f"expected two people to blend, found {first.name} twice: choose another one")
        return self.studio.between({first.name: (first, 1 - share), second.name: (second, share)})

    def two(
        self, tenant: str, names: Sequence[str | None], boxes: Sequence[Any], prompt: str, seed: float, steps: float
    ) -> list[Image.Image]:
        """Two people in one picture, each in a box, and the base's picture."""
        people = self._two(tenant, names)
        side, whole = self.studio.side, self._order(prompt, seed, steps)
        places = []
        for name, box in zip(names, boxes, strict=True):
            left, top, right, bottom = (round(min(100.0, max(0.0, float(edge))) / 100 * side) for edge in box)
            if right - left < side // 16 or bottom - top < side // 16:
                raise ConfigError(f"expected a box for {name} that can be seen, found a smaller one: draw it larger")
            places.append((left, top, right, bottom))
        return self._with_base(replace(whole, people=tuple(people), boxes=tuple(places)), people)

    def _beside(
        self, person: Person, known: Sequence[Person], prompt: str, seed: float, steps: float
    ) -> list[Image.Image]:
        """Somebody's picture, and the base's; `known` are those of the library whom it shows."""
        return self._with_base(replace(self._order(prompt, seed, steps), people=(person,)), known)

    def _with_base(self, order: Order, known: Sequence[Person]) -> list[Image.Image]:
        orders = order, replace(order, people=(None,), boxes=())
        return [self.studio.draw(one, partial(self.library.require_here, known)) for one in orders]

    def _order(self, prompt: str, seed: float, steps: float) -> Order:
        if not prompt.strip() or len(prompt) > self.config.max_prompt:
            raise ConfigError(
                f"expected a prompt of 1 to {self.config.max_prompt} characters, found {len(prompt.strip())}: say what "
                "the picture shall show"
            )
        if not 1 <= steps <= self.config.max_inference_steps:
            raise ConfigError(f"expected 1 to {self.config.max_inference_steps} steps, found {steps}")
        if not (math.isfinite(seed) and 0 <= seed < 2**63):
            raise ConfigError(f"expected a seed from 0 to 2**63, found {seed}")
        return Order(prompt, seed=int(seed), steps=int(steps))

    # Polishing

    def polish(
        self, tenant: str, visit: Visit, name: str | None, prompt: str, steps: float, seed: float
    ) -> Iterator[Polishing]:
        """Begin to polish somebody, and tell how it stands until it has ended; cancelled when nobody listens."""
        person = self.library.person(tenant, name)
        self._order(prompt, seed, 1)
        if not 1 <= steps <= self.config.tune_steps:
            raise ConfigError(f"expected 1 to {self.config.tune_steps} steps, found {steps}")
        if visit.polishing is not None and not visit.polishing.done:
            raise ConfigError("expected one person at a time to polish, found another one under way: cancel that first")
        photos = visit.photos if visit.uid == person.uid else self.library.photos(person)
        if not photos:
            raise NoImagesError(
                f"expected photos of {person.name} to polish from, found none kept: drop them in this tab and read "
                "them, or tick that photos are kept"
            )
        self.studio.require_polishing()
        every = max(1, int(steps) // _PICTURES)
        self._visits[id(visit)] = visit
        visit.polishing = work = Polishing(
            self.studio, self.library, person, photos, prompt, int(steps), every=every, seed=int(seed)
        )
        try:
            self.library.require_here([person])  # else whoever deleted them did not find this to cancel
            while not work.done:
                yield work
                work.wait(_LOOK)
            yield work
        finally:
            work.cancel()

    # The library

    def export(self, tenant: str, name: str | None, tool: str) -> str:
        """A file of somebody for another tool, to download."""
        person = self.library.person(tenant, name)
        folder = self._folder / person.uid
        folder.mkdir(parents=True, exist_ok=True)
        file = self.library.export(person, folder, TOOLS[tool])
        try:
            self.library.require_here([person])
        except ConfigError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return str(file)

    def push(self, tenant: str, name: str | None, repo_id: str, down: str, overwrite: bool) -> str:
        """Publish somebody as a private repository; says where."""
        person = self.library.person(tenant, name)
        commit = self.library.push(person, repo_id.strip(), down.strip() or None, overwrite)
        try:
            self.library.require_here([person])
        except ConfigError as error:
            raise ConfigError(
                f"{error}: they are at {repo_id.strip()} by now, so delete that repository, too"
            ) from error
        return f"{name} is at {repo_id.strip()}, private, commit {commit[:12]}"

    def delete(self, tenant: str, name: str | None) -> Person:
        """Delete somebody, with what was made of them here and the photos of them in any tab."""
        person = self.library.delete(tenant, name)
        shutil.rmtree(self._folder / person.uid, ignore_errors=True)
        for tab in [*self._visits.values()]:
            tab.forget(person.uid)
        return person


def _taken(files: Sequence[str]) -> list[bytes]:
    """The contents of files that were uploaded, which are gone then.

    Raises:
        NoImagesError: one is gone already. Gradio has one file for all who upload the same photo at once.
    """
    try:
        return [Path(file).read_bytes() for file in files]
    except FileNotFoundError as error:
        raise NoImagesError("expected the photos that were dropped, found one gone: drop them again") from error
    finally:
        for file in files:
            Path(file).unlink(missing_ok=True)
