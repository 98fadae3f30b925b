# SPDX-License-Identifier: Apache-2.0
"""Training examples as the denoiser sees them: latents and text embeddings, encoded once, in memory and on disk."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data import TRIGGER_MARK, Photo, Subject, augment, flip_caption, load_image
from ..errors import ConfigError, NoCaptionError, NoImagesError, UnreadableImageError
from .bases import Base, Text
from .cache import Cache, file_hash, identity
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
    base: Base,
    subjects: Sequence[Subject],
    config: TrainingConfig,
    views: int,
    *,
    progress: bool = True,
    skip_unreadable: bool = False,
) -> Examples:
    """Cut `views` random crops out of every photo, encode them and their captions.

    The views of a photo depend on its bytes and the seed, not on other photos or subjects. With `cache_dir` what is
    encoded is kept on disk, and looked up there.

    Args:
        skip_unreadable: go on without images that cannot be decoded, and warn with their names and number.

    Raises:
        NoImagesError: no subject, or one without photos.
        NoCaptionError: a photo has no caption and there is no `instance_prompt`.
        ConfigError: the resolution does not fit the base, or a caption asks for a trigger and there is none.
        UnreadableImageError: a file that is no image.
    """
    if config.resolution % base.pixel_multiple:
        raise ConfigError(
            f"resolution must be a multiple of {base.pixel_multiple} for this base model, found {config.resolution}"
        )
    if not subjects or any(not subject.photos for subject in subjects):
        raise NoImagesError("expected at least one image of each subject, found none: check the folder")
    photos = [(number, photo) for number, subject in enumerate(subjects) for photo in subject.photos]
    for _, photo in photos:
        _caption(photo, config)  # before the long work
    encoder = PhotoEncoder(base, config, views)
    captions: dict[str, int] = {}
    latents, rows, owners, unreadable = [], [], [], []
    for number, photo in tqdm(photos, desc="encoding", unit="image", disable=not progress):
        try:
            encoded, texts = encoder(photo)
        except UnreadableImageError as error:
            if not skip_unreadable:
                raise
            unreadable.append(str(error))
            continue
        latents.append(encoded)
        rows += [captions.setdefault(text, len(captions)) for text in texts]
        owners += [number] * len(texts)
    if unreadable:
        warnings.warn(f"skipped {len(unreadable)} of {len(photos)} images: {'; '.join(unreadable)}", stacklevel=2)
    lost = [subject.name for number, subject in enumerate(subjects) if number not in set(owners)]
    if lost:
        raise NoImagesError(f"expected a readable image of each subject, found none of {', '.join(lost[:5])}")
    text = encode_captions(base, list(captions), cache_dir=config.cache_dir)
    return Examples(torch.cat(latents), text, torch.tensor(rows), torch.tensor(owners))


class PhotoEncoder:
    """Encodes the views of one photo after another."""

    def __init__(self, base: Base, config: TrainingConfig, views: int) -> None:
        self.base, self.config, self.views = base, config, views
        self._cache = Cache(config.cache_dir)
        self._vae = identity(base.pipeline.vae) if config.cache_dir is not None else ""

    def __call__(self, photo: Photo) -> tuple[Tensor, list[str]]:
        """Latents (views, c, h, w) and captions of a photo.

        Raises:
            NoImagesError, UnreadableImageError: it is not there, or cannot be decoded.
        """
        config, image = self.config, load_image(photo.path)
        content = file_hash(photo.path)
        made_from = {
            "vae": self._vae,
            "photo": content,
            "views": self.views,
            "resolution": config.resolution,
            "random_flip": config.random_flip,
            "seed": config.seed,
            "format": 1,
        }
        found = self._cache.get(made_from, lambda: self._encode(image, content))
        caption = _caption(photo, config)
        return found["latents"], [flip_caption(caption) if flip else caption for flip in found["flip"].tolist()]

    def _encode(self, image: Image.Image, content: str) -> dict[str, Tensor]:
        pixels, flips = [], []
        generator = torch.Generator().manual_seed(self.config.seed + int(content[:12], 16))
        for _ in range(self.views):
            flip = self.config.random_flip and bool(torch.rand((), generator=generator) < 0.5)
            pixels.append(augment(image, self.config.resolution, generator, flip=flip))
            flips.append(flip)
        return {"latents": self.base.encode_images(torch.stack(pixels)), "flip": torch.tensor(flips)}


def encode_captions(base: Base, captions: Sequence[str], *, cache_dir: str | None = None, batch_size: int = 64) -> Text:
    """Embeddings of many captions, encoded in batches; with `cache_dir`, kept on disk one by one."""
    if cache_dir is None:
        starts = range(0, len(captions), batch_size)
        parts = [base.encode_text(captions[start : start + batch_size]) for start in starts]
    else:
        cache = Cache(cache_dir)
        encoders = identity(*(getattr(base.pipeline, name, None) for name in base.encoder_names if name != "vae"))
        made_from = {"encoders": encoders, "length": base.max_sequence_length, "format": 1}
        parts = [cache.get({**made_from, "caption": one}, partial(base.encode_text, [one])) for one in captions]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _caption(photo: Photo, config: TrainingConfig) -> str:
    caption = photo.caption or config.instance_prompt
    if caption is None:
        raise NoCaptionError(
            f"expected a caption for {photo.path}, found none: give instance_prompt, a metadata.jsonl or a .txt file"
        )
    if config.trigger is not None:
        return caption.replace(TRIGGER_MARK, config.trigger)
    if TRIGGER_MARK in caption:
        raise ConfigError(f"expected a trigger for the caption {caption!r} of {photo.path}, found none: give trigger")
    return caption
