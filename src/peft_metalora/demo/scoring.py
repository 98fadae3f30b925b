# SPDX-License-Identifier: Apache-2.0
"""How the demo scores a method: fixed prompts, the domain's own judges, the metrics of the package.

The prompts ask for other directions, expressions, clothes and walls than the reference shows; half of them leave the
wall open, and it is on those that a copied background can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..metrics import Embeddings, face_sim, r_facesim
from .embedded import MAX_SEQUENCE_LENGTH, RESOLUTION
from .judges import FaceEmbedder, SceneJudge, adherence
from .scene import parse_caption

PROMPTS = (
    "a photo of a person, facing left, smiling, in a red shirt, on a blue checkered wall, in warm light",
    "a photo of a person, facing right, laughing, in a green shirt, on a plain yellow wall, in white light",
    "a photo of a person, facing forward, surprised, in a purple shirt, on an orange striped wall, in cool light",
    "a photo of a person, facing right, sad, in a teal shirt, on a pink gradient wall, in white light",
    "a photo of a person, facing left, laughing, in a yellow shirt",
    "a photo of a person, facing right, smiling, in a blue shirt",
    "a photo of a person, facing left, surprised, in an orange shirt",
    "a photo of a person, facing forward, sad, in a pink shirt",
)
INFERENCE_STEPS = 20


@dataclass(frozen=True)
class Scores:
    """Scores of one method on one person, means over the images.

    Attributes:
        r_facesim: cosine to the person's other photos. face_sim: to the reference.
        prompt_adherence: share of what the prompts ask for that is shown.
        copied_background: of the images whose prompt leaves the wall open, the share on a wall of the reference's
            colour (10 colours: 0.1 by chance).
    """

    r_facesim: float
    face_sim: float
    prompt_adherence: float
    copied_background: float


class Scorer:
    """Scores images of one person.

    Args:
        embedder, judge: the domain's networks.
    """

    def __init__(self, embedder: FaceEmbedder, judge: SceneJudge) -> None:
        self.embedder, self.judge = embedder, judge

    def score(
        self,
        images: Tensor | Sequence[Image.Image],
        prompts: Sequence[str],
        reference: Image.Image,
        others: Sequence[Image.Image],
    ) -> Scores:
        """Score n images, made from n prompts, of the person of `reference` and `others`."""
        made: Embeddings = self.embedder.embed(images)
        seen = self.judge.read(images)
        asked = [parse_caption(prompt) for prompt in prompts]
        wall = self.judge.read([reference])[0]["background"]
        pairs = zip(seen, asked, strict=True)
        free = [shown["background"] == wall for shown, want in pairs if "background" not in want]
        return Scores(
            r_facesim=r_facesim(made, self.embedder.embed(others)).mean,
            face_sim=face_sim(made, self.embedder.embed([reference])).mean,
            prompt_adherence=adherence(asked, seen)["all"],
            copied_background=sum(free) / len(free) if free else 0.0,
        )


def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], width: int = RESOLUTION, **options: Any
) -> Tensor:
    """Draw the domain's images: n prompts, n seeds -> (n, 3, 64, width) in [0, 1] on the CPU.

    The noise of an image depends on its seed alone, so that methods are compared on equal noise.

    Args:
        width: in pixels.
        options: of the pipeline's call, such as `regions`.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images: Tensor = pipe(
        prompt=list(prompts),
        height=RESOLUTION,
        width=width,
        num_inference_steps=INFERENCE_STEPS,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=generators,
        output_type="pt",
        **options,
    ).images
    return images.float().cpu()


def to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] -> an RGB image."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))
