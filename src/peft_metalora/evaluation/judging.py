# SPDX-License-Identifier: Apache-2.0
"""Scores of single images: who is it, and does it show what the prompt says? The embedded domain has its own judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..bases.precision import choose_device
from ..metrics import (
    ClipEmbedder,
    DinoEmbedder,
    Embedder,
    Embeddings,
    Lpips,
    clip_i,
    clip_t,
    copy_paste,
    dino,
    distances_to_others,
    face_embedder,
    face_sim,
    pose_difference,
    r_facesim,
    real_ceiling,
)
from ..metrics.by_name import made_by
from .evaluation_settings import DEMO, EvaluateConfig

Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Known:
    """A person as a judge sees them on their photos.

    Attributes:
        faces: of the reference. others: of the other photos. models: the reference to each further model, by name.
    """

    faces: Embeddings
    others: Embeddings
    models: dict[str, Embeddings]


class Judge(Protocol):
    """Anything that scores images of one person."""

    def know(self, reference: Image.Image, others: list[Image.Image]) -> Known:
        """Look at a person's photos, once for all that is scored."""
        ...

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], person: Known) -> list[dict[str, Any]]:
        """A dict for each image: found, r_facesim, face_sim, and what else this judge knows."""
        ...

    def real_ceiling(self, person: Known) -> float:
        """R-FaceSim of the person's real photos among themselves."""
        ...


class FaceJudge:
    """Face embeddings, and what else there are models for.

    Args:
        match_threshold: R-FaceSim from which on an image counts as the person; None: as the embedder says, if it does.
        clip: for clip_t and clip_i. dino, dinov2: DINO of either version. distance: for the diversity among seeds.
    """

    def __init__(
        self,
        faces: Embedder,
        clip: ClipEmbedder | None = None,
        dino: DinoEmbedder | None = None,
        dinov2: DinoEmbedder | None = None,
        distance: Distance | None = None,
        *,
        match_threshold: float | None = None,
    ) -> None:
        self.faces, self.clip, self.distance = faces, clip, distance
        self._match = getattr(faces, "match_threshold", None) if match_threshold is None else match_threshold
        self.dinos = {name: one for name, one in (("dino", dino), ("dinov2", dinov2)) if one is not None}

    def know(self, reference: Image.Image, others: list[Image.Image]) -> Known:
        """Look at a person's photos, once for all that is scored."""
        models = {name: embedder.embed([reference]) for name, embedder in self.dinos.items()}
        if self.clip is not None:
            models["clip"] = self.clip.embed([reference])
        return Known(self.faces.embed([reference]), self.faces.embed(others), models)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], person: Known) -> list[dict[str, Any]]:
        """A dict for each image: found, r_facesim, face_sim, and a figure of each further model."""
        made, learned, real = self.faces.embed(images), person.faces, person.others
        likeness = r_facesim(made, real)
        columns: dict[str, list[Any]] = {
            "found": made.found.tolist(),
            "r_facesim": likeness.per_image.tolist(),
            "face_sim": face_sim(made, learned).per_image.tolist(),
            "copy_paste": copy_paste(made, learned, real).tolist(),
        }
        if self._match is not None:
            columns["match"] = (likeness.found & (likeness.per_image >= self._match)).float().tolist()
        if made.sizes is not None:
            columns["face_size"] = made.sizes.tolist()
        if made.landmarks is not None and learned.landmarks is not None:
            # An image without a face has no pose: 0, as if it were copied.
            columns["pose_difference"] = pose_difference(made.landmarks, learned.landmarks).nan_to_num(0.0).tolist()
        if self.clip is not None:
            seen = self.clip.embed(images)
            columns["clip_t"] = clip_t(seen, self.clip.embed_text(prompts)).per_image.tolist()
            columns["clip_i"] = clip_i(seen, person.models["clip"]).per_image.tolist()
        for name, embedder in self.dinos.items():
            columns[name] = dino(embedder.embed(images), person.models[name]).per_image.tolist()
        if self.distance is not None:
            columns["diversity"] = _diversities(images, prompts, self.distance)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def real_ceiling(self, person: Known) -> float:
        """Of the other photos among themselves; where there is but one, of it and the reference."""
        faces, others = person.faces, person.others
        if len(others) > 1:
            return real_ceiling(others)
        vectors, found = (torch.cat(two) for two in ((faces.vectors, others.vectors), (faces.found, others.found)))
        return real_ceiling(Embeddings(vectors, found, compared=others.compared))


class DemoJudge(FaceJudge):
    """The embedded domain's scene judge besides, for `adherence` in [0, 1], and by default its face embedder."""

    def __init__(
        self,
        faces: Embedder | None = None,
        *models: Any,
        match_threshold: float | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        from ..demo.judges import MATCH_THRESHOLD, load_embedder, load_judge

        if faces is None and match_threshold is None:
            match_threshold = MATCH_THRESHOLD
        super().__init__(faces or load_embedder().to(device), *models, match_threshold=match_threshold)
        self.scene = load_judge().to(device)

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str], person: Known) -> list[dict[str, Any]]:
        """As `FaceJudge.score`, with `adherence`."""
        from ..demo.judges import adherence
        from ..demo.scene import parse_caption

        rows = super().score(images, prompts, person)
        for row, prompt, seen in zip(rows, prompts, self.scene.read(images), strict=True):
            row["adherence"] = adherence([parse_caption(prompt)], [seen]).get("all", 0.0)
        return rows


def judge_for(config: EvaluateConfig) -> Judge:
    """The judge that the settings name.

    Raises:
        ConfigError, EmbedderUnavailableError: a model is not there.
    """
    device = choose_device(config.device)
    models = (
        ClipEmbedder.from_pretrained(config.clip_model, device=device) if config.clip_model else None,
        DinoEmbedder.from_pretrained(config.dino_model, device=device) if config.dino_model else None,
        DinoEmbedder.from_pretrained(config.dinov2_model, device=device) if config.dinov2_model else None,
        _distance(config.lpips, device) if config.lpips else None,
    )
    if config.base == DEMO:
        faces = _faces(config) if config.embedder else None
        return DemoJudge(faces, *models, device=device, match_threshold=config.match_threshold)
    return FaceJudge(_faces(config), *models, match_threshold=config.match_threshold)


def _faces(config: EvaluateConfig) -> Embedder:
    return face_embedder(
        config.embedder or "insightface", pack=config.face_pack, providers=config.face_providers or None
    )


def _distance(name: str, device: torch.device) -> Distance:
    if ":" not in name:
        return Lpips(name, device=device)
    distance: Distance = made_by(name, "lpips", "__call__", "alex, vgg, squeeze")
    return distance


def _diversities(images: Sequence[Image.Image], prompts: Sequence[str], distance: Distance) -> list[float]:
    """Of each image the mean distance to the others of its prompt, 0 for an only one."""
    scores = [0.0] * len(images)
    for prompt in dict.fromkeys(prompts):
        rows = [row for row, one in enumerate(prompts) if one == prompt]
        if len(rows) > 1:
            size = images[rows[0]].size
            same = np.stack([np.asarray(images[row].convert("RGB").resize(size)) for row in rows])
            pixels = torch.from_numpy(same).permute(0, 3, 1, 2) / 255
            for row, value in zip(rows, distances_to_others(pixels, distance).tolist(), strict=True):
                scores[row] = value
    return scores
