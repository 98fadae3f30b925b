# SPDX-License-Identifier: Apache-2.0
"""What is seen of a photo: all of it or the part around the face, with its mask cut alike; and what an encoder sees."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..data import Photo, decode_image, decode_mask, read_file
from ..errors import ConfigError, NoFaceError
from ..metrics.face_crop import FaceCrop, Region

_GREY = 127


@dataclass(frozen=True)
class SeenPhoto:
    """RGB, and its mask in grey if it has one, both cut to the part that is used (None: all of it)."""

    image: Image.Image
    mask: Image.Image | None
    region: Region | None


def open_photo(
    photo: Photo, region_of: Callable[[Image.Image], Region | None], content: bytes | None = None
) -> SeenPhoto:
    """Decode a photo and its mask, and cut both.

    Args:
        region_of: the part to use.
        content: the photo's bytes, if they have been read.

    Raises:
        NoImagesError, UnreadableImageError: it, or its mask, is not there or cannot be decoded.
        What `region_of` raises.
    """
    image = decode_image(photo.read() if content is None else content, photo.path)
    mask = None if photo.mask is None else decode_mask(read_file(photo.mask), photo.mask, image.size)
    region = region_of(image)
    if region is not None:
        image, mask = region.cut(image), None if mask is None else region.cut(mask)
    return SeenPhoto(image, mask, region)


def face_region(faces: FaceCrop, image: Image.Image, name: str | os.PathLike[str]) -> Region:
    """The part of a photo around its face; `name` is for the message.

    Raises:
        NoFaceError: it shows none.
    """
    region = faces.region(image)
    if region is None:
        raise NoFaceError(f"expected a face in {os.fspath(name)}, found none: remove the photo, or leave face_crop out")
    return region


class Sight:
    """Photos as an encoder sees them: what a mask hides is grey.

    Args:
        face_crop, face_margin, face_align: as `FaceCrop`; None: all of a photo, a margin of 0.5, and not aligned.

    Raises:
        ConfigError: a margin or an alignment of nothing. ConfigError, EmbedderUnavailableError: as `FaceCrop`.
    """

    def __init__(
        self, face_crop: str | None = None, face_margin: float | None = None, face_align: bool | None = None
    ) -> None:
        self._faces = None
        if face_crop is not None:
            self._faces = FaceCrop(face_crop, 0.5 if face_margin is None else face_margin, bool(face_align))
        elif (face_margin, face_align) != (None, None):
            name = "face_align" if face_margin is None else "face_margin"
            raise ConfigError(f"{name} needs face_crop, found none: give face_crop 'insightface', or leave it out")

    def __call__(
        self, photo: Photo | Image.Image, name: str = "the image", content: bytes | None = None
    ) -> Image.Image:
        """A photo, or an image that is in memory and called `name`, in RGB; raises as `open_photo`, and NoFaceError.

        Args:
            content: of the photo's file, where it has been read already.
        """
        if isinstance(photo, Photo):
            seen = open_photo(photo, lambda image: self.region(image, photo.path), content)
            if seen.mask is None:
                return seen.image
            return Image.composite(seen.image, Image.new("RGB", seen.image.size, (_GREY,) * 3), seen.mask)
        image = photo.convert("RGB")
        region = self.region(image, name)
        return image if region is None else region.cut(image)

    def region(self, image: Image.Image, name: str | os.PathLike[str]) -> Region | None:
        """The part of an image that is used; None: all of it. Raises NoFaceError."""
        return None if self._faces is None else face_region(self._faces, image, name)
