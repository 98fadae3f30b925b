# SPDX-License-Identifier: Apache-2.0
"""Training examples as the denoiser sees them: latents and text embeddings, encoded once, in memory and on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ...bases import Base, Text
from ...bases.generic import written_as
from ...bases.precision import plain_defaults
from ...data import TRIGGER_MARK, Photo, Subject, flip_caption
from ...errors import ConfigError, NoCaptionError, NoFaceError, NoImagesError, UnreadableImageError
from ..prior import class_prompt
from ..stage_settings import TrainingConfig
from .batches import Examples
from .cache import Cache, content_hash, identity
from .fresh import FreshExamples
from .views import ViewCutter, latent_mask, mask_content

_Seen = TypeVar("_Seen")


@plain_defaults()
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
        views: 0: none is encoded before training; every batch cuts and encodes new ones (see `fresh`).
        skip_unreadable: go on without photos that are gone, cannot be decoded or show no face where one is needed, and
            warn with their names and number. The only photo there is is an error.

    Raises:
        NoImagesError: no subject, or one without photos.
        NoCaptionError: a photo has no caption and there is no `instance_prompt`.
        ConfigError: the resolution does not fit the base, or a caption asks for a trigger and there is none.
        UnreadableImageError: a file that is no image. NoFaceError: a photo without a face, with `face_crop`.
    """
    cutter = ViewCutter(base, config)
    if not subjects or any(not subject.photos for subject in subjects):
        raise NoImagesError("expected at least one image of each subject, found none: check the folder")
    owner_of = [number for number, subject in enumerate(subjects) for _ in subject.photos]
    photos = [photo for subject in subjects for photo in subject.photos]
    prior = class_prompt(config)
    for photo in photos:
        caption_of(photo, config)  # before the long work
    progress_bar = tqdm(photos, desc="encoding photos", unit="image", disable=not progress)
    if views:
        encoder = PhotoEncoder(base, config, views, cutter)
        encoded = see(progress_bar, encoder, skip_unreadable)
        of_photo = [number for number, one in encoded for _ in one[1]]
        texts = [text for _, (_, captions, _) in encoded for text in captions]
        latents, mask = _join([one[0] for _, one in encoded], [one[2] for _, one in encoded])
    else:
        opened = see(progress_bar, lambda photo: (photo, cutter.open(photo).plan), skip_unreadable)
        of_photo = [number for number, _ in opened]
        plain = [caption_of(photo, config) for _, (photo, _) in opened]
        texts = [text for one in plain for text in (one, flip_caption(one) if config.random_flip else one)]
        latents, mask = [], None
    cutter.warn_of_narrow_views()
    owners = [owner_of[number] for number in of_photo]
    present = set(owners)
    lost = [subject.name for number, subject in enumerate(subjects) if number not in present]
    if lost:
        raise _nothing_left(lost)
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    examples = Examples(
        latents,
        encode_captions(base, list(rows), cache_dir=config.cache_dir),
        torch.tensor([rows[text] for text in texts]),
        torch.tensor(owners),
        mask,
        None if prior is None else encode_captions(base, [prior], cache_dir=config.cache_dir),
        [subject.tags for subject in subjects],
        torch.tensor(of_photo),
    )
    return examples if views else FreshExamples.of(examples, base, cutter, [one for _, one in opened])


def usable(base: Base, subjects: Sequence[Subject], config: TrainingConfig) -> list[Subject]:
    """The subjects without the photos that `encode_subjects` would leave out, with a warning that names them.

    Raises:
        NoImagesError: a subject has no other. ConfigError: as `encode_subjects`.
    """
    cutter = ViewCutter(base, config)
    photos = [photo for subject in subjects for photo in subject.photos]

    def look(photo: Photo) -> None:
        cutter.open(photo)

    left = {number for number, _ in see(photos, look, skip_unreadable=True)}
    numbers = iter(range(len(photos)))
    found = [replace(one, photos=[photo for photo in one.photos if next(numbers) in left]) for one in subjects]
    if lost := [one.name for one in found if not one.photos]:
        raise _nothing_left(lost)
    return found


def _nothing_left(names: Sequence[str]) -> NoImagesError:
    return NoImagesError(f"expected a readable image of each subject, found none of {', '.join(names[:5])}")


def see(photos: Iterable[Photo], look: Callable[[Photo], _Seen], skip_unreadable: bool) -> list[tuple[int, _Seen]]:
    """What `look` gives of each photo, with its number; see `encode_subjects` for those that cannot be used."""
    seen, unusable, count = [], [], 0
    for number, photo in enumerate(photos):
        count += 1
        try:
            seen.append((number, look(photo)))
        except (NoImagesError, UnreadableImageError, NoFaceError) as error:
            if not skip_unreadable:
                raise
            unusable.append(error)
    if unusable and count == 1:
        raise unusable[0]
    if unusable:
        text = "; ".join(map(str, unusable))
        warnings.warn(f"skipped {len(unusable)} of {count} images: {text}", stacklevel=3)
    return seen


def _join(
    latents: list[Tensor], masks: list[Tensor | None]
) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor] | None]:
    """Latents (k, c, h, w) and masks (k, 1, h, w) of photos, as `Examples` holds them; no mask is a white one."""
    filled = [
        latent.new_ones(len(latent), 1, *latent.shape[-2:]) if mask is None else mask
        for latent, mask in zip(latents, masks, strict=True)
    ]
    masked = any(mask is not None for mask in masks)
    if len({latent.shape[1:] for latent in latents}) == 1:
        return torch.cat(latents), torch.cat(filled) if masked else None
    return [one for part in latents for one in part], [one for part in filled for one in part] if masked else None


class PhotoEncoder:
    """Encodes the views of one photo after another."""

    def __init__(self, base: Base, config: TrainingConfig, views: int, cutter: ViewCutter | None = None) -> None:
        self.base, self.config, self.views = base, config, views
        self.cutter = ViewCutter(base, config) if cutter is None else cutter
        self._cache = Cache(config.cache_dir)
        cached = config.cache_dir is not None
        self._made_by = [identity(base.pipeline.vae), written_as(type(base))] if cached else []

    def __call__(self, photo: Photo) -> tuple[Tensor, list[str], Tensor | None]:
        """Latents (views, c, h, w), captions, and masks (views, 1, h, w) of a photo that has one.

        Raises:
            NoImagesError, UnreadableImageError: it is not there, or cannot be decoded.
            NoFaceError: it is to be cut around a face, and shows none.
        """
        content, mask = photo.read(), mask_content(photo)
        digest = content_hash(content)
        made_from = {
            "made_by": self._made_by,
            "photo": digest,
            "mask": None if mask is None else content_hash(mask),
            "views": self.views,
            "seed": self.config.seed,
            "format": 4,
            **self.cutter.settings,
        }
        found = self._cache.get(made_from, lambda: self._encode(photo, content, int(digest[:12], 16)))
        caption = caption_of(photo, self.config)
        captions = [flip_caption(caption) if flip else caption for flip in found["flip"].tolist()]
        return found["latents"], captions, found.get("mask")

    def _encode(self, photo: Photo, content: bytes, number: int) -> dict[str, Tensor]:
        opened = self.cutter.open(photo, content)
        generator = torch.Generator().manual_seed(self.config.seed + number)
        views = [self.cutter.cut(opened, generator) for _ in range(self.views)]
        latents = self.base.encode_images(torch.stack([view.pixels for view in views]))
        found = {"latents": latents, "flip": torch.tensor([view.flip for view in views])}
        if opened.mask is not None:
            found["mask"] = latent_mask(views, latents)
        return found


def encode_captions(base: Base, captions: Sequence[str], *, cache_dir: str | None = None, batch_size: int = 64) -> Text:
    """Embeddings of many captions, encoded in batches; with `cache_dir`, kept on disk one by one."""
    if cache_dir is None:
        starts = range(0, len(captions), batch_size)
        parts = [base.encode_text(captions[start : start + batch_size]) for start in starts]
    else:
        cache = Cache(cache_dir)
        encoders = identity(*(getattr(base.pipeline, name, None) for name in base.encoder_names if name != "vae"))
        length = base.max_sequence_length
        made_from = {"encoders": encoders, "base": written_as(type(base)), "length": length, "format": 2}
        parts = [cache.get({**made_from, "caption": one}, partial(base.encode_text, [one])) for one in captions]
    return {name: _join_text([part[name] for part in parts]) for name in parts[0]}


def _join_text(parts: list[Tensor]) -> Tensor:
    """Rows of several parts one below the other, sequences of families without a fixed length filled up with zeros."""
    if parts[0].dim() > 1:
        longest = max(part.shape[1] for part in parts)
        ends = [0, 0] * (parts[0].dim() - 2)
        parts = [F.pad(part, [*ends, 0, longest - part.shape[1]]) for part in parts]
    return torch.cat(parts)


def caption_of(photo: Photo, config: TrainingConfig) -> str:
    """The caption that a photo is trained with.

    Raises:
        NoCaptionError: it has none and there is no `instance_prompt`.
        ConfigError: it asks for a trigger and there is none.
    """
    caption = photo.caption or config.instance_prompt
    if caption is None:
        raise NoCaptionError(
            f"expected a caption for {photo.path}, found none: give instance_prompt, a metadata.jsonl or a .txt file"
        )
    if config.trigger is not None:
        return caption.replace(TRIGGER_MARK, config.trigger)
    if TRIGGER_MARK in caption:
        raise ConfigError(f"expected a trigger for the caption {caption!r} of {photo.path}, found none: give `trigger`")
    return caption
