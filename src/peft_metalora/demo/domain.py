# SPDX-License-Identifier: Apache-2.0
"""A domain: a world of small pictures with people to learn, and the networks that draw and judge them.

`make_base.py` trains those networks for any domain, and the benchmarks compare methods on any. `FACES` is the one
that the package brings.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor

from . import faces, scene
from .embedded import ASSETS, RESOLUTION, load_base
from .judges import FaceEmbedder, SceneJudge, load_embedder, load_judge
from .render import render
from .scoring import PROMPTS


class Drawn(ABC):
    """Who can be shown, in which scenes, and in what words: what bases, Downs and encoders learn from.

    An identity is a row of numbers. Scenes are an object that holds n of them, is indexed by a slice or a tensor, and
    moves with `to(device)`.

    Class attributes:
        name: of what is drawn. vocabulary: every word of captions.
    """

    name: ClassVar[str]
    vocabulary: ClassVar[tuple[str, ...]]

    @abstractmethod
    def sample_identities(self, n: int, generator: torch.Generator, split: str = "base") -> Tensor:
        """Draw n identities (n, numbers) of a split, on the generator's device."""

    @abstractmethod
    def subject_identities(self, split: str, count: int) -> Tensor:
        """The first `count` subjects of a split, (count, numbers) on the CPU; as many as there are at the most."""

    @abstractmethod
    def sample_scenes(self, identities: Tensor, generator: torch.Generator, reference: bool = False) -> Any:
        """A random scene for each identity, on the generator's device.

        Args:
            reference: scenes of photos that people are learned from.
        """

    @abstractmethod
    def cat(self, scenes: Sequence[Any]) -> Any:
        """Scenes one behind the other."""

    @abstractmethod
    def render(self, identities: Tensor, scenes: Any) -> Tensor:
        """Draw identities in scenes: (n, 3, 64, 64) in [0, 1]."""

    @abstractmethod
    def captions(self, scenes: Any, generator: torch.Generator | None = None, drop: float = 0.0) -> list[str]:
        """A caption for each scene, each clause left out with probability `drop`."""

    def random_renders(
        self, n: int, generator: torch.Generator, identities: Tensor | None = None
    ) -> tuple[Tensor, Any, Tensor]:
        """Draw `n` people (or use `identities`) in random scenes -> (identities, scenes, images)."""
        if identities is None:
            identities = self.sample_identities(n, generator)
        scenes = self.sample_scenes(identities, generator)
        return identities, scenes, self.render(identities, scenes)


class Domain(Drawn):
    """What is drawn, with the networks that draw and judge it.

    Args:
        assets: folder of the networks. base_folder: the base that draws the domain, if it is not that of `assets`.

    Class attributes:
        labels: what a caption may ask for, with the values of each. prompts: what methods are judged on.
        backdrop: the label that half of the prompts leave open, to see whether it is copied from the reference.
        content: the label that says what is drawn of a person, if another photo shows something else of them.
    """

    labels: ClassVar[Mapping[str, tuple[str, ...]]]
    prompts: ClassVar[tuple[str, ...]]
    backdrop: ClassVar[str]
    content: ClassVar[str | None] = None

    def __init__(self, assets: Path, base_folder: Path | None = None) -> None:
        self.assets = assets
        self.base_folder = base_folder or assets / "base"

    def distinct_identities(self, n: int, generator: torch.Generator) -> Tensor:
        """Identities (at most n, numbers) of `base` that a judge can tell apart, on the generator's device."""
        return self.sample_identities(n, generator)

    @abstractmethod
    def scene_labels(self, scenes: Any) -> dict[str, Tensor]:
        """Of each label the indices (n,) into its values."""

    @abstractmethod
    def parse_caption(self, text: str) -> dict[str, str]:
        """The labels that a caption asks for."""

    @abstractmethod
    def write_dataset(self, folder: Path, split: str, count: int, photos: int) -> Path:
        """Write `photos` photos of each of `count` subjects, the first of each the reference."""

    @property
    def down_folder(self) -> Path:
        """The Down of the domain's own base, where the package has one."""
        return self.assets / "down"

    def load_base(self) -> FluxPipeline:
        """The domain's base, as `embedded.load_base`."""
        return load_base(self.base_folder)

    def load_embedder(self) -> FaceEmbedder:
        """The judge of who is shown."""
        return load_embedder(self.assets / "face_embedder.safetensors")

    def load_judge(self) -> SceneJudge:
        """The judge of what is shown."""
        return load_judge(self.assets / "judge.safetensors", self.labels)


class Faces(Domain):
    """The drawn faces of `faces.py`, `scene.py` and `render.py`."""

    name = "faces"
    labels = scene.LABELS
    vocabulary = scene.VOCABULARY
    prompts = PROMPTS
    backdrop = "background"

    def sample_identities(self, n: int, generator: torch.Generator, split: str = "base") -> Tensor:
        return faces.sample_identities(n, generator, generator.device)

    def subject_identities(self, split: str, count: int) -> Tensor:
        most = faces.SPLITS[split] or count
        return torch.stack([faces.subject_identity(split, number) for number in range(min(count, most))])

    def sample_scenes(self, identities: Tensor, generator: torch.Generator, reference: bool = False) -> scene.Scene:
        labels = {"yaw": "forward", "expression": "neutral"} if reference else {}
        return scene.scene_from_labels(len(identities), generator=generator, device=generator.device, **labels)

    def cat(self, scenes: Sequence[scene.Scene]) -> scene.Scene:
        return scene.Scene.cat(list(scenes))

    def render(self, identities: Tensor, scenes: scene.Scene) -> Tensor:
        return render(identities, scenes, RESOLUTION)

    def scene_labels(self, scenes: scene.Scene) -> dict[str, Tensor]:
        return scene.labels(scenes)

    def captions(self, scenes: scene.Scene, generator: torch.Generator | None = None, drop: float = 0.0) -> list[str]:
        return scene.captions(scenes, generator, drop)

    def parse_caption(self, text: str) -> dict[str, str]:
        return scene.parse_caption(text)

    def write_dataset(self, folder: Path, split: str, count: int, photos: int) -> Path:
        return faces.write_dataset(folder, split, count, photos)


FACES = Faces(ASSETS)
