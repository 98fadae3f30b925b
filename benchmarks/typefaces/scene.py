# SPDX-License-Identifier: Apache-2.0
"""What varies between two photos of one font: which letter is shown, in which ink, on which paper, how it lies.

As `demo/scene.py` for faces: labels are derived from a scene, captions from labels, and `parse_caption` goes back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peft_metalora.demo.scene import SceneColumns, write_captions
from peft_metalora.errors import ConfigError

from .glyphs import CHARACTERS

GLYPHS = tuple(
    f"digit {character}"
    if character.isdigit()
    else f"{'capital' if character.isupper() else 'small'} {character}".lower()
    for character in CHARACTERS
)
INKS = ("black", "red", "blue", "green", "purple", "brown", "orange", "teal")
PAPERS = ("white", "yellow", "pink", "green", "blue", "lilac", "orange", "grey")
PATTERNS = ("plain", "lined", "squared", "dotted")
LIGHTS = ("warm", "white", "cool")
LABELS: dict[str, tuple[str, ...]] = {
    "glyph": GLYPHS,
    "ink": INKS,
    "paper": PAPERS,
    "pattern": PATTERNS,
    "light": LIGHTS,
}
_WORDS = (
    "a",
    "photo",
    "of",
    "glyph",
    "the",
    "capital",
    "small",
    "letter",
    "digit",
    "in",
    "on",
    "ink",
    "paper",
    "light",
)
VOCABULARY = tuple(dict.fromkeys(_WORDS) | dict.fromkeys(INKS + PAPERS + PATTERNS + LIGHTS + tuple(CHARACTERS.lower())))
PROMPTS = (
    "a photo of a glyph, the small letter a, in red ink, on lined blue paper, in warm light",
    "a photo of a glyph, the capital letter r, in black ink, on plain white paper, in white light",
    "a photo of a glyph, the small letter g, in purple ink, on squared orange paper, in cool light",
    "a photo of a glyph, the digit 5, in teal ink, on dotted pink paper, in white light",
    "a photo of a glyph, the capital letter q, in blue ink",
    "a photo of a glyph, the small letter e, in black ink",
    "a photo of a glyph, the digit 2, in green ink",
    "a photo of a glyph, the capital letter m, in brown ink",
)
REFERENCES = "BDFHJKNPSTYbdfhknpsty"
"""Letters that people are learned from: none that the prompts ask for, in either case."""

_SUBJECT = "a photo of a glyph"


@dataclass(frozen=True)
class Scene(SceneColumns):
    """Nuisance variables of n images, each a tensor of shape (n,).

    `glyph`, `ink`, `paper`, `pattern` and `light` are int64 indices into the label tuples. `turn` (positive: clockwise)
    is in radians, `scale` a factor, shifts are in half frame widths; `light_x` and `light_y` in [-1, 1] say where the
    light comes from; the `*_tone` values in [-1, 1] jitter a named colour; the rest lies in [0, 1].
    """

    glyph: Tensor
    ink: Tensor
    paper: Tensor
    pattern: Tensor
    light: Tensor
    turn: Tensor
    scale: Tensor
    shift_x: Tensor
    shift_y: Tensor
    light_x: Tensor
    light_y: Tensor
    strength: Tensor
    ink_tone: Tensor
    paper_tone: Tensor
    pattern_size: Tensor
    pattern_phase: Tensor
    blur: Tensor


def sample_scenes(allowed: Tensor, generator: torch.Generator) -> Scene:
    """Draw a scene for each row of `allowed` (n, 62), whose glyph is one of those that the row allows."""
    n, device = len(allowed), generator.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator, device=device) * (high - low) + low

    def choice(names: tuple[str, ...]) -> Tensor:
        return torch.randint(len(names), (n,), generator=generator, device=device)

    return Scene(
        glyph=torch.multinomial(allowed.float(), 1, generator=generator)[:, 0],
        ink=choice(INKS),
        paper=choice(PAPERS),
        pattern=choice(PATTERNS),
        light=choice(LIGHTS),
        turn=uniform(-0.14, 0.14),
        scale=uniform(0.93, 1.07),
        shift_x=uniform(-0.09, 0.09),
        shift_y=uniform(-0.07, 0.07),
        light_x=uniform(-1, 1),
        light_y=uniform(-1, 1),
        strength=uniform(0, 1),
        ink_tone=uniform(-1, 1),
        paper_tone=uniform(-1, 1),
        pattern_size=uniform(0, 1),
        pattern_phase=uniform(0, 1),
        blur=uniform(0, 1),
    )


def labels(scene: Scene) -> dict[str, Tensor]:
    """The class indices of each label, (n,) each, into the tuples of `LABELS`."""
    return {name: getattr(scene, name) for name in LABELS}


def _clauses(label: dict[str, str]) -> list[str]:
    kind, character = label["glyph"].split()
    return [
        f"the digit {character}" if kind == "digit" else f"the {kind} letter {character}",
        f"in {label['ink']} ink",
        f"on {label['pattern']} {label['paper']} paper",
        f"in {label['light']} light",
    ]


def captions(scene: Scene, generator: torch.Generator | None = None, drop: float = 0.0) -> list[str]:
    """Write one caption per image, such as those of `PROMPTS`; each clause is left out with probability `drop`."""
    return write_captions(_SUBJECT, _clauses, LABELS, labels(scene), generator, drop)


def parse_caption(text: str) -> dict[str, str]:
    """The labels that a caption asks for; those that it does not mention are absent.

    Raises:
        ConfigError: if a clause does not belong to the grammar of `captions`.
    """
    first, *clauses = text.split(", ")
    if first != _SUBJECT:
        raise ConfigError(f"expected a caption that starts with {_SUBJECT!r}, found {text!r}")
    found: dict[str, str] = {}
    for clause in clauses:
        match clause.split():
            case ["the", "capital" | "small" as kind, "letter", character] if f"{kind} {character}" in GLYPHS:
                found["glyph"] = f"{kind} {character}"
            case ["the", "digit", character] if f"digit {character}" in GLYPHS:
                found["glyph"] = f"digit {character}"
            case ["in", colour, "ink"] if colour in INKS:
                found["ink"] = colour
            case ["on", pattern, colour, "paper"] if pattern in PATTERNS and colour in PAPERS:
                found |= {"paper": colour, "pattern": pattern}
            case ["in", light, "light"] if light in LIGHTS:
                found["light"] = light
            case _:
                raise ConfigError(f"expected a clause that captions() writes, found {clause!r} in {text!r}")
    return found
