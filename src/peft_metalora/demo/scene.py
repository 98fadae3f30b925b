# SPDX-License-Identifier: Apache-2.0
"""What varies between two photos of one person: the scene, its labels and its caption.

A :class:`Scene` holds one value per image of every nuisance variable. Labels are derived from it, captions from
the labels, and :func:`parse_caption` goes back from a caption to the labels. Left and right are those of the IMAGE:
"facing left" means that the nose points to the left edge of the picture, so a horizontal flip of an image
corresponds to swapping the two words in its caption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError

YAWS = ("left", "forward", "right")
EXPRESSIONS = ("neutral", "smiling", "laughing", "sad", "surprised")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown", "grey")
PATTERNS = ("plain", "striped", "checkered", "gradient")
LIGHTS = ("warm", "white", "cool")
"""Light names; "white" is the neutral one (its own word, because "neutral" is already an expression)."""

LABELS: dict[str, tuple[str, ...]] = {
    "yaw": YAWS,
    "expression": EXPRESSIONS,
    "shirt": COLOURS,
    "background": COLOURS,
    "pattern": PATTERNS,
    "light": LIGHTS,
}
"""Every label of a scene with the values it can take; the keys of :func:`parse_caption`'s result."""

VOCABULARY: tuple[str, ...] = tuple(
    dict.fromkeys(["a", "an", "photo", "of", "person", ",", "facing", "in", "on", "shirt", "wall", "light"])
    | dict.fromkeys(YAWS + EXPRESSIONS + COLOURS + PATTERNS + LIGHTS)
)
"""Every word that :func:`captions` can write, the comma included."""

_SUBJECT = "a photo of a person"
_FORWARD, _TURNED = 0.06, (0.27, 0.45)  # |yaw| in radians: at most / between; the gap keeps captions unambiguous
_YAW_BORDER = (_FORWARD + _TURNED[0]) / 2


Columns = TypeVar("Columns", bound="SceneColumns")


class SceneColumns:
    """Base of a frozen dataclass whose fields are tensors of shape (n,), a value for each of n images."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def __getitem__(self: Columns, index: slice | Tensor) -> Columns:
        """Select images by slice, mask or index tensor."""
        return type(self)(**{name: column[index] for name, column in vars(self).items()})

    def to(self: Columns, device: torch.device | str) -> Columns:
        """Copy to a device."""
        return type(self)(**{name: column.to(device) for name, column in vars(self).items()})

    @classmethod
    def cat(cls: type[Columns], scenes: Sequence[Columns]) -> Columns:
        """Concatenate scenes along the batch."""
        return cls(**{name: torch.cat([getattr(scene, name) for scene in scenes]) for name in vars(scenes[0])})


@dataclass(frozen=True)
class Scene(SceneColumns):
    """Nuisance variables of n images, each a tensor of shape (n,).

    ``yaw`` (positive: facing right), ``pitch`` (positive: looking down) and ``roll`` (positive: clockwise) are in
    radians; ``scale`` is a factor; shifts are in half frame widths; ``light_x`` and ``light_y`` in [-1, 1] say where
    the light comes from (positive: right, below); the ``*_tone`` values in [-1, 1] jitter a named colour;
    ``expression``, ``background``, ``pattern``, ``shirt`` and ``light`` are int64 indices into the label tuples;
    the remaining values lie in [0, 1].
    """

    yaw: Tensor
    pitch: Tensor
    roll: Tensor
    scale: Tensor
    shift_x: Tensor
    shift_y: Tensor
    light_x: Tensor
    light_y: Tensor
    strength: Tensor
    background_tone: Tensor
    shirt_tone: Tensor
    pattern_angle: Tensor
    pattern_phase: Tensor
    pattern_size: Tensor
    collar: Tensor
    expression: Tensor
    background: Tensor
    pattern: Tensor
    shirt: Tensor
    light: Tensor


def sample_scenes(n: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Scene:
    """Draw n scenes; every label is uniform and independent of the others.

    The draw happens on the generator's device (``device`` without one), the result lies on ``device``.
    """
    source = generator.device if generator is not None else torch.device(device)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=generator, device=source) * (high - low) + low

    def choice(names: tuple[str, ...]) -> Tensor:
        return torch.randint(len(names), (n,), generator=generator, device=source)

    side = choice(YAWS) - 1
    yaw = torch.where(side == 0, uniform(-_FORWARD, _FORWARD), side * uniform(*_TURNED))
    return Scene(
        yaw=yaw,
        pitch=uniform(-0.14, 0.14),
        roll=uniform(-0.16, 0.16),
        scale=uniform(0.92, 1.08),
        shift_x=uniform(-0.13, 0.13),
        shift_y=uniform(-0.06, 0.06),
        light_x=uniform(-1, 1),
        light_y=uniform(-1, 0.3),
        strength=uniform(0, 1),
        background_tone=uniform(-1, 1),
        shirt_tone=uniform(-1, 1),
        pattern_angle=uniform(-math.pi / 2, math.pi / 2),
        pattern_phase=uniform(0, 1),
        pattern_size=uniform(0, 1),
        collar=uniform(0, 1),
        expression=choice(EXPRESSIONS),
        background=choice(COLOURS),
        pattern=choice(PATTERNS),
        shirt=choice(COLOURS),
        light=choice(LIGHTS),
    ).to(device)


def scene_from_labels(
    n: int = 1,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    **labels: str | None,
) -> Scene:
    """Draw n scenes that show the given labels, everything else at random.

    ``scene_from_labels(8, yaw="left", expression="smiling", shirt="red", background="blue")`` has length 8. The
    number of random draws does not depend on the labels, so equal generators give scenes that differ in them only.

    Raises:
        ConfigError: if a label or its value is not one of ``LABELS``.
    """
    scene = sample_scenes(n, generator, device)
    for name, value in labels.items():
        if value is None:
            continue
        if name not in LABELS or value not in LABELS[name]:
            allowed = LABELS.get(name, tuple(LABELS))
            raise ConfigError(f"expected one of {', '.join(allowed)}, found {name}={value!r}; use a name from LABELS")
        if name == "yaw":
            scene = replace(scene, yaw=_turn(scene.yaw, value))
        else:
            index = torch.full_like(getattr(scene, name), LABELS[name].index(value))
            scene = replace(scene, **{name: index})
    return scene


def _turn(yaw: Tensor, value: str) -> Tensor:
    """Map yaw of any class to the class `value`, keeping its position within the range of its class."""
    size = yaw.abs()
    low, high = _TURNED
    position = torch.where(size < _YAW_BORDER, size / _FORWARD, (size - low) / (high - low)).clamp(0, 1)
    if value == "forward":
        return yaw.sign() * position * _FORWARD
    return (low + position * (high - low)) * (1 if value == "right" else -1)


def labels(scene: Scene) -> dict[str, Tensor]:
    """Return the class indices of each label, (n,) int64 each, into the tuples of ``LABELS``."""
    yaw = torch.bucketize(scene.yaw, scene.yaw.new_tensor([-_YAW_BORDER, _YAW_BORDER]))
    return {"yaw": yaw} | {name: getattr(scene, name) for name in LABELS if name != "yaw"}


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _clauses(label: dict[str, str]) -> list[str]:
    colour, pattern = label["background"], label["pattern"]
    # English wants "a plain blue wall" but "a blue striped wall".
    wall = f"plain {colour}" if pattern == "plain" else f"{colour} {pattern}"
    return [
        f"facing {label['yaw']}",
        label["expression"],
        f"in {_article(label['shirt'])} shirt",
        f"on {_article(wall)} wall",
        f"in {label['light']} light",
    ]


def captions(scene: Scene, generator: torch.Generator | None = None, drop: float = 0.0) -> list[str]:
    """Write one caption per image, such as "a photo of a person, facing left, smiling, in a red shirt, on a blue
    checkered wall, in warm light".

    Each clause after the first is left out independently with probability ``drop`` (drawn on the CPU); the order of
    clauses is fixed.
    """
    return write_captions(_SUBJECT, _clauses, LABELS, labels(scene), generator, drop)


def write_captions(
    subject: str,
    clauses: Callable[[dict[str, str]], list[str]],
    values: Mapping[str, Sequence[str]],
    indices: Mapping[str, Tensor],
    generator: torch.Generator | None,
    drop: float,
) -> list[str]:
    """One caption per image: `subject`, and of what `clauses` says of its labels each with probability 1 - `drop`."""
    rows = zip(*(index.tolist() for index in indices.values()), strict=True)
    said = [clauses({name: values[name][i] for name, i in zip(indices, row, strict=True)}) for row in rows]
    shape = (len(said), len(said[0]) if said else 0)
    keep = torch.rand(shape, generator=generator) >= drop if drop > 0 else torch.ones(shape, dtype=torch.bool)
    kept = [
        [one for one, keeps in zip(row, mask, strict=True) if keeps]
        for row, mask in zip(said, keep.tolist(), strict=True)
    ]
    return [", ".join([subject, *row]) for row in kept]


def parse_caption(text: str) -> dict[str, str]:
    """Return the labels that a caption asks for; labels it does not mention are absent.

    >>> parse_caption("a photo of a person, facing left, on an orange striped wall")
    {'yaw': 'left', 'background': 'orange', 'pattern': 'striped'}

    Raises:
        ConfigError: if a clause does not belong to the grammar of :func:`captions`.
    """
    first, *clauses = text.split(", ")
    if first != _SUBJECT:
        raise ConfigError(f"expected a caption that starts with {_SUBJECT!r}, found {text!r}")
    found: dict[str, str] = {}
    for clause in clauses:
        match clause.split():
            case ["facing", yaw] if yaw in YAWS:
                found["yaw"] = yaw
            case [expression] if expression in EXPRESSIONS:
                found["expression"] = expression
            case ["in", "a" | "an", colour, "shirt"] if colour in COLOURS:
                found["shirt"] = colour
            case ["on", "a" | "an", "plain", colour, "wall"] if colour in COLOURS:
                found |= {"background": colour, "pattern": "plain"}
            case ["on", "a" | "an", colour, pattern, "wall"] if colour in COLOURS and pattern in PATTERNS:
                found |= {"background": colour, "pattern": pattern}
            case ["in", light, "light"] if light in LIGHTS:
                found["light"] = light
            case _:
                raise ConfigError(f"expected a clause that captions() writes, found {clause!r} in {text!r}")
    return found
