# SPDX-License-Identifier: Apache-2.0
"""One photo: decoding, and the random crops and mirror images of training, of the photo and its mask alike."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import re
import struct
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin
from torch import Tensor

from ..errors import NoImagesError, UnreadableImageError
from ..files import open_regular

# What photos come in. Pillow's other formats stay closed: of EPS, say, it would start Ghostscript.
FORMATS = "AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"
HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
IMAGE_SUFFIXES = HEIC_SUFFIXES | {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png"}
IMAGE_SUFFIXES |= {".ppm", ".tga", ".tif", ".tiff", ".webp"}
HEIC_EXTRA = "HEIC needs pip install 'peft-metalora[heic]'"
MAX_MEGAPIXELS = 64
"""An image of more is refused; a JPEG is decoded at half or a quarter of its sides."""
MAX_FILE_BYTES = 2**29

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

_SIDES = {"left": "right", "right": "left"}
_SIDE = re.compile(r"\b(left|right)(?=\b|wards?\b|most\b)", re.IGNORECASE)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image to RGB, upright as its EXIF data says, transparency on white.

    Raises:
        NoImagesError: there is no such file.
        UnreadableImageError: it is damaged, too large, or no image.
    """
    return decode_image(read_file(path), path)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of an image file.

    Raises:
        NoImagesError: there is no such file.
        UnreadableImageError: it cannot be read, is no file, or has more than `MAX_FILE_BYTES`.
    """
    try:
        with open_regular(path) as file:
            # What is too large is not read first; what grows meanwhile is not read to its end.
            is_larger = os.fstat(file.fileno()).st_size > MAX_FILE_BYTES
            content = b"" if is_larger else file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, ValueError) as error:  # ValueError: a name that no file can have
        raise NoImagesError(f"expected an image, found no file {os.fspath(path)}: check the path") from error
    except OSError as error:
        raise UnreadableImageError(
            f"expected an image, found {os.fspath(path)} which cannot be read: {error}"
        ) from error
    if is_larger or len(content) > MAX_FILE_BYTES:
        raise UnreadableImageError(
            f"expected an image of at most {MAX_FILE_BYTES >> 20} MiB, found {os.fspath(path)}, which is larger: save "
            "it smaller"
        )
    return content


def decode_image(content: bytes, name: str | os.PathLike[str], behind: str = "white") -> Image.Image:
    """As `load_image`, of bytes; `name` is for the message.

    Args:
        behind: the colour that transparency is laid on.

    Raises:
        UnreadableImageError: they are damaged, too large, or no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            try:
                return _decoded(content, behind)
            except ValueError as error:
                if "MAX_TEXT_" not in str(error):
                    raise
                return _decoded(_without_text(content), behind)
    except (_TooLargeError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(
            f"expected an image of at most {MAX_MEGAPIXELS} megapixels, found {os.fspath(name)} of more ({error}): "
            "save it smaller"
        ) from error
    except Exception as error:  # a decoder raises nearly anything of a broken file
        reason = re.sub(
            r"<_io\.BytesIO object at 0x[0-9a-f]+>", lambda _: repr(os.fspath(name)), str(error) or type(error).__name__
        )
        hint = "replace or remove it"
        if content[4:8] == b"ftyp" and not reads_heic():
            hint = HEIC_EXTRA
        raise UnreadableImageError(
            f"expected an image, found {os.fspath(name)} which cannot be decoded ({reason}): {hint}"
        ) from error


def size_of(content: bytes, name: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height in pixels that an image's header tells; nothing of it is decoded.

    Raises:
        UnreadableImageError: it is no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=_formats()) as image:
                return image.size
    except Exception as error:  # as of decoders
        raise UnreadableImageError(f"expected an image, found {os.fspath(name)} which is none: replace it") from error


class _TooLargeError(Exception):
    pass


def _decoded(content: bytes, behind: str) -> Image.Image:
    image: Image.Image
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        _limit(image)
        ImageOps.exif_transpose(image, in_place=True)
        image.load()
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError("expected 8 or 16 bits a channel, found 32, whose black and white nothing tells")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _limit(opened: Image.Image) -> None:
    """Have a large JPEG decoded at a part of its size, and refuse what is large still."""
    (width, height), limit = opened.size, MAX_MEGAPIXELS * 10**6
    # libjpeg holds all of a progressive one in memory, whatever is made of it.
    if isinstance(opened, JpegImagePlugin.JpegImageFile) and "progressive" not in opened.info:
        part = 1
        while width * height > limit * part * part:
            part *= 2
        opened.draft(None, (width // part, height // part))
    if opened.width * opened.height > limit:
        raise _TooLargeError(f"{width} x {height}")


def _without_text(content: bytes) -> bytes:
    """A PNG without its chunks of text, of which Pillow reads no more than a megabyte: a workflow, for example."""
    kept, position = [content[:8]], 8
    while position + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        if kind not in (b"iTXt", b"tEXt", b"zTXt"):
            kept.append(content[position : position + length + 12])
        position += length + 12
    return b"".join(kept)


@functools.cache
def reads_heic() -> bool:
    """Whether the extra that reads HEIC is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


@functools.cache
def _formats() -> list[str]:
    if reads_heic():
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def decode_mask(content: bytes, name: str | os.PathLike[str], size: tuple[int, int]) -> Image.Image:
    """Decode a mask to grey, white where the subject is, and bring it to the size of its photo.

    What is transparent in it is black: tools that cut somebody out leave the rest so.

    Args:
        size: width and height of the photo, upright.

    Raises:
        UnreadableImageError: it cannot be decoded, is light nowhere, or has not the shape of the photo.
    """
    mask = decode_image(content, name, behind="black").convert("L")
    if abs(mask.width * size[1] - mask.height * size[0]) > 0.02 * mask.width * size[1]:
        raise UnreadableImageError(
            f"expected a mask of the shape of its photo, {size[0]} x {size[1]}, found {os.fspath(name)} of "
            f"{mask.width} x {mask.height}: draw it on the upright photo"
        )
    if (lightest := int(mask.getextrema()[1])) < 128:  # type: ignore[arg-type]
        raise UnreadableImageError(
            f"expected a mask that is white where the subject is, found {os.fspath(name)}, whose lightest place is "
            f"{lightest} of 255: draw the subject in white, or remove it and the whole photo counts"
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BOX)


def random_box(image_size: tuple[int, int], size: tuple[int, int], generator: torch.Generator | None = None) -> Box:
    """A random crop of the target's aspect ratio, whose sides are 0.8 to 1 of those of the largest that fits.

    Meta-LoRA trains on several crops and mirror images of its one photo, against overfitting to pose, background and
    light (https://arxiv.org/abs/2503.22352). The sizes of the crops are our choice.

    Args:
        image_size: width and height of the image, in pixels.
        size: height and width of the target.
        generator: source of the crop's size and place; the same state gives the same crop.
    """
    (image_width, image_height), (height, width) = image_size, size
    scale, x, y = torch.rand(3, generator=generator, dtype=torch.float32, device="cpu").tolist()
    unit = min(image_width / width, image_height / height) * (0.8 + (1 - 0.8) * scale)
    left, top = x * (image_width - width * unit), y * (image_height - height * unit)
    # The sum may exceed the image by a rounding error, which Pillow refuses.
    return left, top, min(left + width * unit, image_width), min(top + height * unit, image_height)


def cut(image: Image.Image, box: Box, size: tuple[int, int], *, flip: bool = False) -> Tensor:
    """Cut a box out of an RGB image and scale it to height and width `size`: (3, height, width) in [-1, 1]."""
    part = image.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box)
    pixels = torch.from_numpy(np.array(part)).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.flip(-1) if flip else pixels.contiguous()


def cut_mask(mask: Image.Image, box: Box, size: tuple[int, int], *, flip: bool = False) -> Tensor:
    """As `cut`, of a grey image: (1, height, width) in [0, 1]."""
    part = mask.resize((size[1], size[0]), Image.Resampling.BOX, box=box)
    weights = torch.from_numpy(np.array(part))[None].float() / 255
    return weights.flip(-1) if flip else weights


def flip_caption(caption: str) -> str:
    """The caption of the mirrored image: the words "left" and "right" change places.

    >>> flip_caption("facing left, a bright lamp on the right")
    'facing right, a bright lamp on the left'
    """

    def other(match: re.Match[str]) -> str:
        word = match.group(1)
        swapped = _SIDES[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDE.sub(other, caption)


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
