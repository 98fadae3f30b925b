# SPDX-License-Identifier: Apache-2.0
"""Scores of single images: who is it, and does it show what the prompt says? The embedded domain has its own judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from ..metrics import ClipEmbedder, DinoEmbedder, Embedder, clip_i, clip_t, dino, face_sim, r_facesim

if TYPE_CHECKING:
    from .protocol import EvaluateConfig


class Judge(Protocol):
    """Anything that scores images of one person."""

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], reference: Image.Image, others: list[Image.Image]
    ) -> list[dict[str, Any]]:
        """A dict for each image: found, r_facesim, face_sim, and what else this judge knows."""
        ...


class FaceJudge:
    """Face embeddings, and CLIP and DINO where they are given."""

    def __init__(self, faces: Embedder, clip: ClipEmbedder | None = None, dino: DinoEmbedder | None = None) -> None:
        self.faces, self.clip, self.dino = faces, clip, dino

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], reference: Image.Image, others: list[Image.Image]
    ) -> list[dict[str, Any]]:
        made = self.faces.embed(images)
        columns: dict[str, list[Any]] = {
            "found": made.found.tolist(),
            "r_facesim": r_facesim(made, self.faces.embed(others)).per_image.tolist(),
            "face_sim": face_sim(made, self.faces.embed([reference])).per_image.tolist(),
        }
        if self.clip is not None:
            seen = self.clip.embed(images)
            columns["clip_t"] = clip_t(seen, self.clip.embed_text(prompts)).per_image.tolist()
            columns["clip_i"] = clip_i(seen, self.clip.embed([reference])).per_image.tolist()
        if self.dino is not None:
            columns["dino"] = dino(self.dino.embed(images), self.dino.embed([reference])).per_image.tolist()
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


class DemoJudge(FaceJudge):
    """The embedded domain's face embedder, and its scene judge for `adherence` in [0, 1]."""

    def __init__(self) -> None:
        from ..demo.judges import load_embedder, load_judge

        super().__init__(load_embedder())
        self.scene = load_judge()

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], reference: Image.Image, others: list[Image.Image]
    ) -> list[dict[str, Any]]:
        from ..demo.judges import adherence
        from ..demo.scene import parse_caption

        rows = super().score(images, prompts, reference, others)
        for row, prompt, seen in zip(rows, prompts, self.scene.read(images), strict=True):
            row["adherence"] = adherence([parse_caption(prompt)], [seen]).get("all", 0.0)
        return rows


def judge_for(config: EvaluateConfig) -> Judge:
    """The judge that the settings name.

    Raises:
        ConfigError, EmbedderUnavailableError: a model is not there.
    """
    from ..training.adapters import choose_device
    from ..training.validation import load_embedder

    if config.base == "demo":
        return DemoJudge()
    device = choose_device(config.device)
    clip = ClipEmbedder.from_pretrained(config.clip_model, device=device) if config.clip_model else None
    dino_embedder = DinoEmbedder.from_pretrained(config.dino_model, device=device) if config.dino_model else None
    return FaceJudge(load_embedder(config.embedder), clip, dino_embedder)
