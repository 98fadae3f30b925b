# SPDX-License-Identifier: Apache-2.0
"""Images to vectors, behind one small interface; CLIP, and DINO v1 and v2, which see any image.

A metric is its preprocessing, so it is written out here (resize, crop, mean and deviation) and does not change with
the version of somebody's image processor. Networks are loaded when an embedder is made, never on import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import EmbedderUnavailableError, MetricInputError

Images = Sequence[Image.Image] | Tensor

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Comparison:
    """How an embedder's vectors are compared: both functions take (n, d) and (m, d) and give (n, m).

    Attributes:
        similarity: 1 for equal vectors, less for others. distance: 0 for equal vectors, more for others.
    """

    similarity: Callable[[Tensor, Tensor], Tensor]
    distance: Callable[[Tensor, Tensor], Tensor]


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return torch.nn.functional.normalize(first, dim=-1) @ torch.nn.functional.normalize(second, dim=-1).T


BY_ANGLE = Comparison(_cosines, lambda first, second: torch.acos(_cosines(first, second).clamp(-1, 1)))
"""Cosine, and angle in radians."""


@dataclass(frozen=True)
class Embeddings:
    """What an embedder saw in n images.

    Attributes:
        vectors: (n, d) float32 on the CPU, as a rule of length 1; zeros where nothing was found.
        found: (n,) bool; a face embedder says False where it saw no face.
        landmarks: (n, 5, 2), x and y in pixels of eyes, nose and corners of the mouth (see `scores.head_pose`), nan
            where nothing was found, or where a model knows no mouth; None from an embedder that has none.
        sizes: (n,) height of the face as a share of the image's, 0 where nothing was found; None from an embedder that
            does not know.
        compared: how the vectors are compared.
    """

    vectors: Tensor
    found: Tensor
    landmarks: Tensor | None = None
    sizes: Tensor | None = None
    compared: Comparison = BY_ANGLE

    def __len__(self) -> int:
        return len(self.vectors)


class Embedder(Protocol):
    """Anything that turns images into vectors.

    It may have a number `match_threshold`, the similarity from which on two photos are taken for one person.
    """

    def embed(self, images: Images) -> Embeddings:
        """Embed n images: RGB PIL images of any sizes, or a tensor (n, 3, h, w) in [0, 1]."""
        ...


class ClipEmbedder:
    """CLIP embeddings of images and prompts (https://arxiv.org/abs/2103.00020), for CLIP-I and CLIP-T.

    Args:
        model: a transformers `CLIPModel`.
        tokenizer: its tokenizer.
        batch_size: images or prompts in one pass; it does not change the vectors.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int = 32) -> None:
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self._size = int(model.config.vision_config.image_size)

    @classmethod
    def from_pretrained(
        cls, name: str = "openai/clip-vit-large-patch14", *, device: str | torch.device = "cpu", batch_size: int = 32
    ) -> ClipEmbedder:
        """Load a CLIP model by repository or folder.

        Raises:
            EmbedderUnavailableError: it is neither here nor to be fetched.
        """
        from transformers import AutoTokenizer, CLIPModel

        with_model = _loaded(name, lambda: CLIPModel.from_pretrained(name))
        tokenizer = _loaded(name, lambda: AutoTokenizer.from_pretrained(name))
        return cls(with_model.to(device), tokenizer, batch_size=batch_size)

    @torch.no_grad()
    def embed(self, images: Images) -> Embeddings:
        """Vectors (n, d): shorter side to the model's size (bicubic), centre crop, CLIP's mean and deviation.

        Raises:
            MetricInputError: no images, or a tensor of another shape than (n, 3, h, w) in [0, 1].
        """
        device = self.model.device
        parts = [
            _features(self.model.get_image_features(pixel_values=batch.to(device)))
            for batch in _batches(as_pil(images), self.batch_size, self._size, self._size, _CLIP_MEAN, _CLIP_STD)
        ]
        return _all_found(torch.cat(parts))

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Vectors (n, d) float32 of length 1 of prompts, cut at the model's number of tokens.

        Raises:
            MetricInputError: no prompts.
        """
        if not prompts:
            raise MetricInputError("expected at least one prompt, found none")
        limit = int(self.model.config.text_config.max_position_embeddings)
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            tokens = self.tokenizer(
                list(prompts[start : start + self.batch_size]),
                padding="max_length",
                max_length=limit,
                truncation=True,
                return_tensors="pt",
            ).to(self.model.device)
            ids, mask = tokens["input_ids"], tokens["attention_mask"]
            parts.append(_features(self.model.get_text_features(input_ids=ids, attention_mask=mask)))
        return torch.cat(parts)


class DinoEmbedder:
    """Class tokens of DINO ViT-S/16 (https://arxiv.org/abs/2104.14294) or DINOv2 (https://arxiv.org/abs/2304.07193).

    Args:
        model: a transformers `ViTModel` or `Dinov2Model`.
        resize: shorter side before the crop, in pixels.
        crop: side of the centre crop, in pixels.
        batch_size: images in one pass; it does not change the vectors.
    """

    def __init__(self, model: Any, *, resize: int = 256, crop: int = 224, batch_size: int = 32) -> None:
        self.model, self.batch_size = model.eval(), batch_size
        self._resize, self._crop = resize, crop

    @classmethod
    def from_pretrained(
        cls, name: str = "facebook/dino-vits16", *, device: str | torch.device = "cpu", batch_size: int = 32
    ) -> DinoEmbedder:
        """Load "facebook/dino-vits16" (as DreamBooth's metric), "facebook/dinov2-base", or a folder.

        Raises:
            EmbedderUnavailableError: it is neither here nor to be fetched.
        """
        from transformers import AutoModel

        return cls(_loaded(name, lambda: AutoModel.from_pretrained(name)).to(device), batch_size=batch_size)

    @torch.no_grad()
    def embed(self, images: Images) -> Embeddings:
        """Vectors (n, d): shorter side to `resize` (bicubic), centre crop, ImageNet's mean and deviation.

        Raises:
            MetricInputError: no images, or a tensor of another shape than (n, 3, h, w) in [0, 1].
        """
        device = self.model.device
        parts = [
            _features(self.model(pixel_values=batch.to(device)).last_hidden_state[:, 0])
            for batch in _batches(
                as_pil(images), self.batch_size, self._resize, self._crop, _IMAGENET_MEAN, _IMAGENET_STD
            )
        ]
        return _all_found(torch.cat(parts))


def as_pil(images: Images) -> list[Image.Image]:
    """The images as RGB; a tensor is checked at the door and rounded to 8 bits, as a saved file would be."""
    if len(images) == 0:
        raise MetricInputError("expected at least one image, found none")
    if not isinstance(images, Tensor):
        return [image.convert("RGB") for image in images]
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise MetricInputError(
            f"expected a float tensor (n, 3, h, w) in [0, 1], found {images.dtype} {tuple(images.shape)}"
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise MetricInputError(f"expected pixels in [0, 1], found {low:.3g} to {high:.3g}: scale and clamp them")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def _batches(
    images: list[Image.Image],
    batch_size: int,
    resize: int,
    crop: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Iterator[Tensor]:
    """Normalised batches (b, 3, crop, crop) of images whose shorter side was brought to `resize`."""
    shift, scale = (torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1) for values in (mean, std))
    for start in range(0, len(images), batch_size):
        cut = [_centre(image, resize, crop) for image in images[start : start + batch_size]]
        yield torch.stack([(pixels - shift) / scale for pixels in cut])


def _centre(image: Image.Image, resize: int, crop: int) -> Tensor:
    """(3, crop, crop) in [0, 1]."""
    factor = resize / min(image.size)
    width, height = (max(resize, int(side * factor)) for side in image.size)
    left, top = (width - crop) // 2, (height - crop) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + crop, top + crop))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255


def _features(output: Any) -> Tensor:
    """Unit vectors on the CPU, out of a tensor or (transformers 5) an output that holds them as `pooler_output`."""
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu()


def _all_found(vectors: Tensor) -> Embeddings:
    return Embeddings(vectors, torch.ones(len(vectors), dtype=torch.bool, device="cpu"))


def _loaded(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        raise EmbedderUnavailableError(
            f"expected the weights of {name!r}, found none ({error}): give a repository or a folder that can be read"
        ) from error
