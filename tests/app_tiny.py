# SPDX-License-Identifier: Apache-2.0
"""A page without a browser: a tiny base, a Down that reads photos, a library in a folder."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from peft_metalora.app.app_settings import AppConfig
from peft_metalora.app.hardware import Held
from peft_metalora.app.library import Library
from peft_metalora.app.page import Page, Visit
from peft_metalora.app.studio import Studio
from peft_metalora.service.people import Place


def estimates() -> list[Held]:
    return [Held("none", "none", 1.0, 3.0), Held("none", "model", 0.5, None)]


class Tried:
    """A page with its library in a folder, and what a tab does there."""

    def __init__(self, home: Path, base, folder: Path, **changes) -> None:
        given = {"down": str(home / "down"), "people": str(folder / "people"), "device": "cpu", "resolution": 16}
        given |= {"pretrained_model_name_or_path": str(home / "base"), "num_inference_steps": 1, "tune_steps": 8}
        (folder / "people").mkdir(exist_ok=True)
        self.config = AppConfig(**{**given, **changes}).copy()
        self.folder, self.place = folder, Place(self.config.people)
        self.studio = Studio(base, self.place, self.config)
        self.library = Library(self.place, self.studio)
        self.page = Page(self.studio, self.library, self.config, folder / "exports", estimates)

    def files(self, *contents: bytes) -> list[str]:
        """Photos as an upload leaves them."""
        places = [self.folder / f"upload-{number}.png" for number in range(len(contents))]
        for place, content in zip(places, contents, strict=True):
            place.write_bytes(content)
        return [str(place) for place in places]

    def enrol(self, name: str, seed: int = 0, visit: Visit | None = None, keep: bool = False, tenant: str = "local"):
        visit = Visit() if visit is None else visit
        self.page.drop(visit, True, self.files(photo(seed)))
        return self.page.read(tenant, visit, True, name, keep)

    def draw(self, name: str | None, seed: int = 0, tenant: str = "local") -> np.ndarray:
        return np.asarray(self.page.draw(tenant, name, "a photo of a person", seed, 1)[0], dtype=np.int16)

    def kept(self) -> list[str]:
        """The files of the library, without its index."""
        root = self.folder / "people"
        return sorted(
            str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "index" not in path.parts
        )


def photo(seed: int = 0, size: tuple[int, int] = (40, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()
