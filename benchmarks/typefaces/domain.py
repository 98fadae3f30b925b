# SPDX-License-Identifier: Apache-2.0
"""The domain of typefaces: an identity is a font, perhaps made bolder, slanted, wider or hollow; a photo is a glyph.

Fonts of `held-out` and `tune` are shown as they are, one of each family. Those of `base` and `meta` are multiplied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from peft_metalora.demo.domain import Domain
from peft_metalora.demo.drawing import cover, paint, row
from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.files import staged_folder

from .glyphs import BASELINE, BOX, CAP_HEIGHT, CHARACTERS, REACH, Glyphs
from .scene import (
    LABELS,
    LIGHTS,
    PATTERNS,
    PROMPTS,
    REFERENCES,
    VOCABULARY,
    Scene,
    captions,
    labels,
    parse_caption,
    sample_scenes,
)

FACTORS = ("font", "weight", "slant", "width", "hollow")
"""Columns of an identity: the number of a font, strokes thicker by this share, shear, factor on widths, 1: outlines."""

GLYPHS_FILE = "glyphs.npz"
SECOND_EMBEDDER = "second_embedder.safetensors"
_WAYS = 6  # of a font that a judge must tell apart
_AS_DRAWN = 0.3  # share of multiplied identities that are a font as it is
_HOLLOW = 0.06
ZOOM = 1.28  # a pixel of a glyph's box in pixels of the picture
_LINE = 1.1  # half of the thickness of an outline
_SHARP = 9  # how fast lines and dots of a paper fade, in a period of its pattern
# Smaller dots, where two lines cross, were lost in the autoencoder: of 140 dotted photos the judge saw 31 as dotted
# behind it, of these 140, and no picture of the base had any.
_DOT = 0.2
_TOGETHER, _EMBEDDED = 2048, 512
_SPLITS = ("base", "meta", "tune", "held-out")

_INK = (
    *((0.07, 0.07, 0.08), (0.76, 0.08, 0.10), (0.10, 0.20, 0.76), (0.04, 0.42, 0.12), (0.44, 0.08, 0.56)),
    *((0.36, 0.20, 0.07), (0.86, 0.36, 0.02), (0.00, 0.42, 0.44)),
)
_PAPER = (
    *((0.96, 0.96, 0.96), (0.97, 0.91, 0.48), (0.97, 0.70, 0.79), (0.66, 0.89, 0.62), (0.60, 0.78, 0.98)),
    *((0.80, 0.69, 0.95), (0.98, 0.76, 0.50), (0.72, 0.72, 0.72)),
)
_GAIN = ((1.06, 0.99, 0.82), (1.0, 1.0, 1.0), (0.87, 0.98, 1.09))
assert len(_GAIN) == len(LIGHTS)


class Typefaces(Domain):
    """Fonts that `pack.py` packed.

    Args:
        assets: folder of `glyphs.npz` and of the networks. device: where glyphs are kept; others are drawn there, too.
        most: fonts of each split; None: all. base_folder: another base than that of `assets`.
    """

    name = "typefaces"
    labels = LABELS
    vocabulary = VOCABULARY
    prompts = PROMPTS
    backdrop = "paper"
    content = "glyph"

    def __init__(
        self,
        assets: Path,
        device: torch.device | str = "cpu",
        most: int | None = None,
        base_folder: Path | None = None,
    ) -> None:
        super().__init__(assets, base_folder)
        self.glyphs = Glyphs.load(assets / GLYPHS_FILE, device, most)

    def sample_identities(self, n: int, generator: torch.Generator, split: str = "base") -> Tensor:
        own = torch.tensor(self.glyphs.splits[split], device=generator.device)
        font = own[torch.randint(len(own), (n,), generator=generator, device=generator.device)]
        return self._multiplied(font, generator)

    def distinct_identities(self, n: int, generator: torch.Generator) -> Tensor:
        """Every font of `base` as it is, and some ways of each: more would be too much alike."""
        most = _WAYS * len(self.glyphs.splits["base"])
        return self.subject_identities("base", min(n, most)).to(generator.device)

    def subject_identities(self, split: str, count: int) -> Tensor:
        """Every font as it is first; then, of `base` and `meta`, multiplied ones."""
        own = torch.tensor(self.glyphs.splits[split])
        plain = torch.stack([_as_drawn(font) for font in own[:count]])
        if split in ("tune", "held-out") or count <= len(own):
            return plain
        generator = torch.Generator().manual_seed(50_000 + _SPLITS.index(split))
        font = own[torch.arange(count - len(own)) % len(own)]
        return torch.cat([plain, self._multiplied(font, generator, as_drawn=0.0)])

    def _multiplied(self, font: Tensor, generator: torch.Generator, as_drawn: float = _AS_DRAWN) -> Tensor:
        def uniform() -> Tensor:
            return torch.rand(len(font), generator=generator, device=generator.device)

        plain = uniform() < as_drawn
        weight = torch.where(uniform() < 0.5, -0.3 * uniform(), 0.55 * uniform())
        slant = torch.where(uniform() < 0.5, torch.zeros_like(weight), 0.42 * uniform() - 0.12)
        width = 0.78 + 0.5 * uniform()
        hollow = (uniform() < _HOLLOW).float()
        changed = torch.stack([font.float(), weight, slant, width, hollow], dim=1)
        return torch.where(plain[:, None], _as_drawn(font), changed)

    def sample_scenes(self, identities: Tensor, generator: torch.Generator, reference: bool = False) -> Scene:
        allowed = self.glyphs.has[identities[:, 0].long().to(self.glyphs.has.device)].to(generator.device)
        if reference:
            chosen = torch.tensor([character in REFERENCES for character in CHARACTERS], device=generator.device)
            allowed = allowed & chosen
        return sample_scenes(allowed, generator)

    def cat(self, scenes: Sequence[Scene]) -> Scene:
        return Scene.cat(scenes)

    @torch.no_grad()
    def render(self, identities: Tensor, scenes: Scene) -> Tensor:
        parts = [
            self._render(identities[start : start + _TOGETHER], scenes[start : start + _TOGETHER])
            for start in range(0, len(identities), _TOGETHER)
        ]
        return torch.cat(parts)

    def _render(self, identities: Tensor, scenes: Scene) -> Tensor:
        place = identities.device
        device = self.glyphs.distance.device
        identities, scenes = identities.to(device), scenes.to(device)
        line = (torch.arange(RESOLUTION, device=device) + 0.5) * (2 / RESOLUTION) - 1
        y, x = torch.meshgrid(line, line, indexing="ij")
        paper = self._paper(scenes, x, y)
        ink = (row(_INK, scenes.ink) + 0.04 * _wide(scenes.ink_tone)[:, None]).clamp(0, 1)
        image = paint(paper, ink, self._coverage(identities, scenes, x, y))
        # Light falls off from one side, and has a colour.
        slope = _wide(scenes.light_x) * x + _wide(scenes.light_y) * y
        image = image * (1 - 0.16 * _wide(scenes.strength) * (slope + 0.6)).unsqueeze(1) * row(_GAIN, scenes.light)
        smooth = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return torch.lerp(image, smooth, 0.8 * _wide(scenes.blur)[:, None]).clamp(0, 1).to(place)

    def _coverage(self, identities: Tensor, scenes: Scene, x: Tensor, y: Tensor) -> Tensor:
        """How far ink covers each pixel, (n, h, w)."""
        font = identities[:, 0].long()
        weight, slant, width, hollow = (_wide(column) for column in identities[:, 1:].unbind(1))
        zoom = ZOOM * _wide(scenes.scale) * RESOLUTION / BOX
        across, down = x - _wide(scenes.shift_x), y - _wide(scenes.shift_y)
        sine, cosine = _wide(scenes.turn.sin()), _wide(scenes.turn.cos())
        u, v = (cosine * across + sine * down) / zoom, (cosine * down - sine * across) / zoom
        # Capitals stand in the middle of the picture; a slant leaves their middle where it is.
        middle = (BASELINE - CAP_HEIGHT / 2) * 2 / BOX - 1
        u, v = (u + slant * v) / width, v + middle
        glyph = self.glyphs.distance[font, scenes.glyph].float()[:, None] - 127
        grid = torch.stack([u, v], dim=-1)
        distance = (F.grid_sample(glyph, grid, align_corners=False, padding_mode="zeros")[:, 0] + 127) * (REACH / 127)
        thicker = weight * _wide(self.glyphs.stroke[font]).clamp(0.8, 4)
        distance = distance - thicker
        distance = torch.where(hollow > 0.5, (distance + _LINE / 2).abs() - _LINE, distance)
        return cover(distance * zoom, distance.new_tensor(1.0))

    def _paper(self, scenes: Scene, x: Tensor, y: Tensor) -> Tensor:
        colour = (row(_PAPER, scenes.paper) + 0.03 * _wide(scenes.paper_tone)[:, None]).clamp(0, 1)
        period = 0.24 + 0.14 * _wide(scenes.pattern_size)
        across, down = (side / period + _wide(scenes.pattern_phase) for side in (x, y))
        lines, columns = _stripe(down), _stripe(across)
        radius = torch.hypot(across - across.round(), down - down.round())
        dots = ((_DOT - radius) * _SHARP).clamp(0, 1)
        drawn = torch.stack([torch.zeros_like(lines), lines, torch.maximum(lines, columns), dots])
        assert len(drawn) == len(PATTERNS)
        shown = drawn[scenes.pattern, torch.arange(len(scenes), device=x.device)]
        return paint(colour.expand(-1, -1, *x.shape), 0.66 * colour, 0.6 * shown)

    def scene_labels(self, scenes: Scene) -> dict[str, Tensor]:
        return labels(scenes)

    def captions(self, scenes: Scene, generator: torch.Generator | None = None, drop: float = 0.0) -> list[str]:
        return captions(scenes, generator, drop)

    def parse_caption(self, text: str) -> dict[str, str]:
        return parse_caption(text)

    def photos(self, split: str, number: int, count: int) -> tuple[Tensor, Scene]:
        """One subject's photos (count, 3, 64, 64), each of another glyph, and their scenes; the reference first."""
        identity = self.subject_identities(split, number + 1)[number]
        generator = torch.Generator().manual_seed(60_000 + 1_000 * _SPLITS.index(split) + number)
        each = identity.expand(count, -1)
        free = torch.randperm(len(CHARACTERS), generator=generator)
        scenes = self.cat([self.sample_scenes(each[:1], generator, True), self.sample_scenes(each[1:], generator)])
        has = self.glyphs.has[int(identity[0])].cpu()
        others = free[has[free] & (free != scenes.glyph[0])][: count - 1]
        scenes.glyph[1:] = others
        return self.render(each, scenes), scenes

    def write_dataset(self, folder: Path, split: str, count: int, photos: int) -> Path:
        for number in range(len(self.subject_identities(split, count))):
            images, scenes = self.photos(split, number, photos)
            pixels = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            with staged_folder(folder / f"{split}-{number:04d}") as home:
                lines = []
                for photo, (image, text) in enumerate(zip(pixels, captions(scenes), strict=True)):
                    Image.fromarray(image).save(home / f"{photo}.png")
                    lines.append(
                        json.dumps({"file_name": f"{photo}.png", "text": text, "reference": photo == 0}) + "\n"
                    )
                (home / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        return folder


class SecondEmbedder(nn.Module):
    """The second judge: a small vision transformer, (n, 3, 64, 64) in [0, 1] to unit vectors (n, 128)."""

    _WIDTH = 192

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            self._WIDTH, 6, 3 * self._WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.patches = nn.Conv2d(3, self._WIDTH, 8, stride=8)
        self.places = nn.Parameter(0.02 * torch.randn((RESOLUTION // 8) ** 2, self._WIDTH))
        self.trunk = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(self._WIDTH), nn.Linear(self._WIDTH, 128))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images * 2 - 1).flatten(2).transpose(1, 2) + self.places
        return F.normalize(self.head(self.trunk(tokens).mean(1)), dim=-1)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Unit vectors (n, 128) on the CPU."""
        device = self.places.device
        return torch.cat([self(batch.to(device)).float().cpu() for batch in images.split(_EMBEDDED)])


def _as_drawn(font: Tensor) -> Tensor:
    """Identities (..., 5) of fonts as they are."""
    font = font.float()
    return torch.stack([font, 0 * font, 0 * font, 0 * font + 1, 0 * font], dim=-1)


def _wide(column: Tensor) -> Tensor:
    return column[:, None, None]


def _stripe(position: Tensor) -> Tensor:
    """A thin line at every whole number."""
    return (1 - (position - position.round()).abs() * _SHARP).clamp(0, 1)
