# SPDX-License-Identifier: Apache-2.0
"""Somebody who is being polished, in a thread of its own, so that it ends cleanly whatever becomes of the tab."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from PIL import Image

from ..errors import MetaLoraError
from ..service.people import Person
from .library import Library
from .studio import Studio

log = logging.getLogger(__name__)


class Polishing:
    """Begins at once. The person stays who they were unless it ends well.

    Args:
        photos, prompt, steps, every, seed: as `Studio.polish`.

    Attributes:
        person: who they were. said: how it stands, in a sentence. done: whether it has ended. losses: of each step.
        pictures: step and picture.
    """

    def __init__(
        self,
        studio: Studio,
        library: Library,
        person: Person,
        photos: Sequence[bytes],
        prompt: str,
        steps: int,
        *,
        every: int,
        seed: int = 0,
    ) -> None:
        self.said, self.done = f"{person.name}: waits for its turn", False
        self.losses: list[float] = []
        self.pictures: list[tuple[int, Image.Image]] = []
        self._library, self.person, self._steps = library, person, steps
        self._work = studio.polish(person, photos, prompt, steps, every=every, seed=seed)
        self._news, self._cancelled = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name="polishing", daemon=True).start()

    def cancel(self) -> None:
        """End it after the step that is being done."""
        self._cancelled.set()

    def wait(self, seconds: float) -> None:
        """Until there is news, or so long."""
        self._news.wait(seconds)
        self._news.clear()

    def _run(self) -> None:
        name = self.person.name
        try:
            self.said = self._train()
        except MetaLoraError as error:
            self.said = f"{name} is who they were: {error}"
        except Exception:
            log.exception("polishing failed")
            self.said = f"{name} is who they were: polishing failed, and the log of metalora app says why"
        finally:
            self._work.close()
            self.done = True
            self._news.set()

    def _train(self) -> str:
        name = self.person.name
        for found in self._work:
            if self._cancelled.is_set():
                return f"cancelled: {name} is who they were"
            if isinstance(found, dict):
                self._library.polished(self.person, found)
                return f"{name} is polished, in {len(self.losses)} steps"
            if found.picture is not None:
                self.pictures.append((found.step, found.picture))
            if found.loss is not None:
                self.losses.append(found.loss)
                self.said = f"{name}: step {found.step} of {self._steps}, loss {found.loss:.4f}"
            self._news.set()
        raise RuntimeError("no files came")
