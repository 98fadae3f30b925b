# SPDX-License-Identifier: Apache-2.0
"""Bad photos: blurred, dark, covered or small ones, that a method is tried on or learns to see through.

Each function takes a PIL image and a strength in (0, 1] and returns an image of the same size. Sizes are shares of
the image, so that a strength means the same at 64 and at 1024 px. Strong yaw is no filter: it takes another photo.
"""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Callable

import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from ..errors import ConfigError

FACE = (0.2, 0.25, 0.8, 0.8)
"""Where the face is when nobody says: left, top, right, bottom as shares of the image."""


def blur(image: Image.Image, strength: float) -> Image.Image:
    """Gaussian blur, its radius up to 6 % of the width."""
    return image.filter(ImageFilter.GaussianBlur(0.06 * strength * image.width))


def noise(image: Image.Image, strength: float) -> Image.Image:
    """Gaussian noise, its deviation up to 0.4 of full scale; the same for the same image and strength."""
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(image.tobytes()))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
    drawn = torch.randn(pixels.shape, generator=generator, dtype=torch.float32, device="cpu")
    noisy = pixels + 255 * 0.4 * strength * drawn
    return Image.frombytes("RGB", image.size, bytes(noisy.round().clamp(0, 255).byte().tolist()))


def jpeg(image: Image.Image, strength: float) -> Image.Image:
    """JPEG of quality 75 down to 5."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(75 - 70 * strength))
    return Image.open(buffer).convert("RGB")


def low_light(image: Image.Image, strength: float) -> Image.Image:
    """Brightness down to a tenth."""
    return ImageEnhance.Brightness(image).enhance(1 - 0.9 * strength)


def occlusion(image: Image.Image, strength: float) -> Image.Image:
    """A grey box over the lower part of the face, up to half of it."""
    left, top, right, bottom = _pixels(image)
    covered = image.copy()
    ImageDraw.Draw(covered).rectangle((left, bottom - strength * (bottom - top) / 2, right, bottom), (128, 128, 128))
    return covered


def low_resolution(image: Image.Image, strength: float) -> Image.Image:
    """Down to an eighth of the size and back."""
    factor = 1 + 7 * strength
    small = image.resize(
        (max(1, round(image.width / factor)), max(1, round(image.height / factor))), Image.Resampling.BOX
    )
    return small.resize(image.size, Image.Resampling.BICUBIC)


def sunglasses(image: Image.Image, strength: float) -> Image.Image:
    """Two lenses over the eyes; the strength is how little light they let through."""
    left, top, right, bottom = _pixels(image)
    width, height = right - left, bottom - top
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    for start in (0.08, 0.54):
        box = (left + start * width, top + 0.12 * height, left + (start + 0.38) * width, top + 0.46 * height)
        draw.ellipse(box, round(255 * strength))
    return Image.composite(Image.new("RGB", image.size), image, mask)


def grey(image: Image.Image, strength: float) -> Image.Image:
    """Colour taken away; at 1 none is left."""
    return ImageEnhance.Color(image).enhance(1 - strength)


DEGRADATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "blur": blur,
    "noise": noise,
    "jpeg": jpeg,
    "low_light": low_light,
    "occlusion": occlusion,
    "low_resolution": low_resolution,
    "sunglasses": sunglasses,
    "grey": grey,
}


def erase(image: Image.Image, strength: float, source: random.Random) -> Image.Image:
    """One to three boxes of one colour anywhere, up to 40 % of a side each (random erasing, arXiv 1708.04896)."""
    erased = image.copy()
    draw = ImageDraw.Draw(erased)
    for _ in range(source.randint(1, 3)):
        width, height = (
            max(2, round(side * 0.4 * strength * source.uniform(0.4, 1))) for side in (image.width, image.height)
        )
        left, top = source.uniform(0, image.width - width), source.uniform(0, image.height - height)
        colour = (source.randrange(256), source.randrange(256), source.randrange(256))
        draw.rectangle((left, top, left + width, top + height), colour)
    return erased


def make_worse(
    image: Image.Image, source: random.Random, names: tuple[str, ...] | None = None, erasing: bool = True
) -> Image.Image:
    """A bad version of an RGB photo, as training an encoder shows it: one corruption, at random, of random strength.

    Args:
        source: of all that is drawn. names: corruptions to choose from; None: all of `DEGRADATIONS`.
        erasing: whether boxes may be erased instead, twice as often as any other corruption happens.
    """
    known = tuple(DEGRADATIONS) if names is None else names
    name = source.choice((*known, "erase", "erase") if erasing else known)
    strength = source.uniform(0.2, 1.0)
    return erase(image, strength, source) if name == "erase" else degrade(image, name, strength)


def degrade(image: Image.Image, name: str, strength: float) -> Image.Image:
    """Apply one degradation to an RGB image.

    Raises:
        ConfigError: no such degradation, or a strength that is not in (0, 1].
    """
    if name not in DEGRADATIONS:
        raise ConfigError(f"expected one of {', '.join(DEGRADATIONS)}, found {name!r}")
    if not 0 < strength <= 1:
        raise ConfigError(f"expected a strength above 0 and up to 1, found {strength}")
    return DEGRADATIONS[name](image.convert("RGB"), strength)


def _pixels(image: Image.Image) -> tuple[float, float, float, float]:
    left, top, right, bottom = FACE
    return left * image.width, top * image.height, right * image.width, bottom * image.height
