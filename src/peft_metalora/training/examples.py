# SPDX-License-Identifier: Apache-2.0
"""Training examples as the denoiser sees them: latents and text embeddings, encoded once and kept in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import Photo, Subject, augment, flip_caption, load_image
from ..errors import ConfigError, NoCaptionError, NoImagesError
from .bases import Base, Text
from .settings import TrainingConfig


@dataclass(frozen=True)
class Examples:
    """Encoded images of some subjects; equal captions are stored once.

    Attributes:
        latents: (n, c, h, w) as `Base.encode_images` gives them.
        text: embeddings of m captions, m rows in each tensor.
        caption: (n,) int64, the row of `text` that belongs to each latent.
        subject: (n,) int64, 0 to the number of subjects - 1.
    """

    latents: Tensor
    text: Text
    caption: Tensor
    subject: Tensor

    @property
    def num_subjects(self) -> int:
        """Number of subjects."""
        return int(self.subject.max()) + 1

    def by_subject(self) -> list[Tensor]:
        """For each subject, the positions (k,) of its latents."""
        return [(self.subject == subject).nonzero().flatten() for subject in range(self.num_subjects)]

    def pick(self, index: Tensor) -> tuple[Tensor, Text]:
        """Latents and text of the examples `index` (b,)."""
        rows = self.caption[index]
        return self.latents[index], {name: tensor[rows] for name, tensor in self.text.items()}

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on a device."""
        text = {name: tensor.to(device) for name, tensor in self.text.items()}
        return replace(
            self,
            latents=self.latents.to(device),
            text=text,
            caption=self.caption.to(device),
            subject=self.subject.to(device),
        )


def encode_subjects(
    base: Base, subjects: Sequence[Subject], config: TrainingConfig, views: int, *, progress: bool = True
) -> Examples:
    """Cut `views` random crops out of every photo, encode them and their captions.

    The views of a subject depend on its photos and the seed alone, not on which subjects are beside it.

    Raises:
        NoImagesError: no subject, or one without photos.
        NoCaptionError: a photo has no caption and there is no `instance_prompt`.
        ConfigError: the resolution does not fit the base.
        UnreadableImageError: a file that is no image.
    """
    if config.resolution % base.pixel_multiple:
        raise ConfigError(
            f"resolution must be a multiple of {base.pixel_multiple} for this base model, found {config.resolution}"
        )
    if not subjects or any(not subject.photos for subject in subjects):
        raise NoImagesError("expected at least one image of each subject, found none: check the folder")
    photos = [(number, photo) for number, subject in enumerate(subjects) for photo in subject.photos]
    captions: dict[str, int] = {}
    latents, rows, owners = [], [], []
    generators = [torch.Generator().manual_seed(config.seed) for _ in subjects]
    for number, photo in tqdm(photos, desc="encoding", unit="image", disable=not progress):
        cuts = list(_views(photo, config, views, generators[number]))
        latents.append(base.encode_images(torch.stack([pixels for pixels, _ in cuts])))
        rows += [captions.setdefault(caption, len(captions)) for _, caption in cuts]
        owners += [number] * len(cuts)
    return Examples(torch.cat(latents), encode_captions(base, list(captions)), torch.tensor(rows), torch.tensor(owners))


def encode_captions(base: Base, captions: Sequence[str], batch_size: int = 64) -> Text:
    """Embeddings of many captions, encoded in batches."""
    parts = [base.encode_text(captions[start : start + batch_size]) for start in range(0, len(captions), batch_size)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _views(
    photo: Photo, config: TrainingConfig, views: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, str]]:
    caption = photo.caption or config.instance_prompt
    if caption is None:
        raise NoCaptionError(
            f"expected a caption for {photo.path}, found none: give instance_prompt, a metadata.jsonl or a .txt file"
        )
    image = load_image(photo.path)
    for _ in range(views):
        flip = config.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        yield augment(image, config.resolution, generator, flip=flip), flip_caption(caption) if flip else caption
