# SPDX-License-Identifier: Apache-2.0
"""Draw faces: signed distances with soft edges, in pure torch, over a whole batch at once.

A picture is a stack of layers, each a colour and a coverage in [0, 1] obtained from a signed distance (negative
inside) by a smoothstep about a pixel wide. Features of the face live on a curved front that turns with yaw and
pitch, so they shift, narrow and vanish behind the edge as the head turns. Nothing branches on values: the same code
runs on the CPU, on CUDA and under ``torch.compile``. Coordinates: x to the right, y down, the frame is [-1, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from .drawing import blend, cover, ellipse, paint, ramp, row, segment
from .scene import Scene

IDENTITY_FACTORS: tuple[str, ...] = (
    *("skin_lightness", "skin_hue", "face_width", "face_height", "jaw", "ears"),
    *("hair_hue", "hair_lightness", "hair_saturation", "hair_length", "hair_volume", "fringe"),
    *("eye_colour", "eye_size", "eye_spacing", "eye_tilt", "brow_thickness", "brow_tilt"),
    *("nose_length", "nose_width", "mouth_width", "lip_thickness", "lip_colour"),
    *("beard", "moustache", "glasses", "glasses_shape", "glasses_colour", "mole_x", "mole_y"),
)
"""Names of the identity factors, each in [0, 1], in the order of an identity's columns."""

_CHUNK = 16  # images drawn together on a CPU: a plane of 64 x 64 floats each, which stays in cache

# In the order of scene.COLOURS: red, orange, yellow, green, teal, blue, purple, pink, brown, grey.
_NAMED = (
    *((0.80, 0.13, 0.13), (0.95, 0.51, 0.10), (0.95, 0.85, 0.22), (0.22, 0.62, 0.20), (0.08, 0.58, 0.57)),
    *((0.16, 0.33, 0.82), (0.48, 0.20, 0.68), (0.96, 0.56, 0.72), (0.43, 0.27, 0.14), (0.56, 0.56, 0.56)),
)
_LIGHT_GAIN = ((1.08, 0.99, 0.81), (1.0, 1.0, 1.0), (0.86, 0.98, 1.10))  # in the order of scene.LIGHTS
_HAIR = (
    *((0.10, 0.09, 0.10), (0.27, 0.16, 0.09), (0.45, 0.27, 0.13), (0.66, 0.27, 0.08), (0.86, 0.62, 0.25)),
    *((0.93, 0.84, 0.58), (0.72, 0.72, 0.74), (0.90, 0.35, 0.62), (0.52, 0.26, 0.75), (0.18, 0.48, 0.85)),
    *((0.12, 0.65, 0.52),),
)
_EYES = (
    *((0.20, 0.10, 0.05), (0.50, 0.30, 0.08), (0.30, 0.52, 0.14)),
    *((0.10, 0.55, 0.60), (0.18, 0.42, 0.90), (0.55, 0.62, 0.70)),
)
_LIPS = ((0.50, 0.22, 0.15), (0.76, 0.36, 0.34), (0.88, 0.12, 0.18), (0.80, 0.14, 0.52), (0.46, 0.14, 0.52))
_GLASSES = (
    *((0.06, 0.06, 0.07), (0.72, 0.08, 0.10), (0.10, 0.22, 0.72)),
    *((0.05, 0.50, 0.30), (0.88, 0.66, 0.12), (0.95, 0.95, 0.95)),
)
# Dark and light skin, each from pink to golden.
_SKIN = (((0.30, 0.18, 0.13), (0.36, 0.21, 0.10)), ((0.99, 0.80, 0.74), (0.98, 0.84, 0.62)))

# In the order of scene.EXPRESSIONS: neutral, smiling, laughing, sad, surprised.
_EXPRESSION = {
    "curve": (0.0, 0.11, 0.075, -0.12, 0.0),  # by how much the corners of the mouth stand above its middle
    "opening": (0.0, 0.085, 0.24, 0.0, 0.23),  # height of the open mouth in the middle
    "width": (1.0, 1.2, 1.2, 0.95, 0.60),  # factor on the mouth's width
    "teeth": (0.0, 0.2, 0.085, 0.0, 0.0),  # height of the row of teeth
    "eyes": (1.0, 0.85, 0.45, 0.80, 1.30),  # factor on the eyes' height
    "brow_lift": (0.0, 0.01, 0.04, 0.02, 0.10),
    "brow_sad": (0.0, 0.0, 0.0, 0.10, 0.0),  # by how much the inner ends of the brows rise
}

_VIEW = (
    *("yaw", "pitch", "roll", "scale", "shift_x", "shift_y", "light_x", "light_y", "strength", "collar"),
    *("background_tone", "shirt_tone", "pattern_angle", "pattern_phase", "pattern_size"),
)


def render(identity: Tensor, scene: Scene, size: int = 64) -> Tensor:
    """Draw one image for each row of ``identity`` and each entry of ``scene``.

    Args:
        identity: (n, len(IDENTITY_FACTORS)) in [0, 1], on the scene's device.
        scene: nuisance variables of n images.
        size: height and width in pixels.

    Returns:
        (n, 3, size, size) float32 RGB in [0, 1]. An image depends on its own row only.

    Raises:
        ConfigError: if the shapes do not fit each other.
    """
    if identity.ndim != 2 or identity.shape != (len(scene), len(IDENTITY_FACTORS)):
        raise ConfigError(
            f"expected identities of shape ({len(scene)}, {len(IDENTITY_FACTORS)}), one row for each entry of the "
            f"scene, found {tuple(identity.shape)}; expand one identity to (n, -1) to draw it in n scenes"
        )
    if identity.is_cuda or len(identity) <= _CHUNK:
        return _draw(identity, scene, size)
    starts = range(0, len(identity), _CHUNK)
    return torch.cat([_draw(identity[i : i + _CHUNK], scene[i : i + _CHUNK], size) for i in starts])


@dataclass(frozen=True)
class Front:
    """The front of each face, (n, size, size) each: 1 where it is seen and 0 elsewhere, and coordinates on it.

    They turn with the head: x from -1 to 1 over the width of the face, y from the middle between the ears downward.
    """

    inside: Tensor
    x: Tensor
    y: Tensor


def front(identity: Tensor, scene: Scene, size: int = 64) -> Front:
    """Where the faces lie that `render` draws of the same arguments."""
    at = _place(_person(identity), _view(scene), size)
    return Front(at.head, at.fx / at.width, at.fy)


def _draw(identity: Tensor, scene: Scene, size: int) -> Tensor:
    person, view = _person(identity), _view(scene)
    at = _place(person, view, size)
    image = _background(at, view)
    image = _body(image, at, person, view)
    image = _head(image, at, person)
    image = _eyes(image, at, person, view)
    image = _mouth(image, at, person, view)
    image = _nose(image, at, person)
    image = _accessories(image, at, person)
    image = _hair(image, at, person)
    strength = (0.10 + 0.14 * view["strength"]).float() * (0.35 + 0.65 * at.head)
    shade = 1 + strength * (view["light_x"].float() * at.ball_x + view["light_y"].float() * at.ball_y)
    gain = row(_LIGHT_GAIN, scene.light)
    return (image * (shade.unsqueeze(1) * gain)).clamp(0, 1)


# One value per image is computed in float64 first, so that rounding does not depend on the batch.
def _person(identity: Tensor) -> dict[str, Tensor]:
    return dict(zip(IDENTITY_FACTORS, identity.double()[:, :, None, None].unbind(1), strict=True))


def _view(scene: Scene) -> dict[str, Tensor]:
    view = {name: getattr(scene, name).double()[:, None, None] for name in _VIEW}
    for name, values in _EXPRESSION.items():
        view[name] = scene.yaw.new_tensor(values, dtype=torch.float64)[scene.expression][:, None, None]
    view["background"] = row(_NAMED, scene.background) * (1 + 0.10 * view["background_tone"].unsqueeze(1)).float()
    view["shirt"] = row(_NAMED, scene.shirt) * (1 + 0.10 * view["shirt_tone"].unsqueeze(1)).float()
    view["pattern"] = scene.pattern[:, None, None]
    return view


@dataclass(frozen=True)
class _Place:
    """Where each pixel lies, (n, size, size) each, and the head's outline there."""

    x: Tensor  # frame
    y: Tensor
    u: Tensor  # head: upright, unit scale, origin between the ears
    v: Tensor
    ball_x: Tensor  # head, in units of its size, for shading
    ball_y: Tensor
    fx: Tensor  # front of the face, turned with it
    fy: Tensor
    edge: Tensor  # signed distance to the face's outline
    head: Tensor  # coverage of the face
    pixel: Tensor  # (n, 1, 1) size of a pixel in head units
    fpixel: Tensor  # size of a pixel on the front of the face
    turn: Tensor  # (n, 1, 1) sine of yaw
    width: Tensor  # (n, 1, 1) half width of the face
    chin: Tensor  # (n, 1, 1) y of the chin


def _place(person: dict[str, Tensor], view: dict[str, Tensor], size: int) -> _Place:
    line = (torch.arange(size, device=view["yaw"].device) + 0.5) * (2 / size) - 1
    x, y = line[None, None, :], line[None, :, None]
    scale = 1.14 * view["scale"]
    cos, sin = (view["roll"].cos() / scale).float(), (view["roll"].sin() / scale).float()
    dx, dy = x - view["shift_x"].float(), y - (view["shift_y"] - 0.08).float()
    u, v = cos * dx + sin * dy, cos * dy - sin * dx

    width = (0.45 + 0.13 * person["face_width"]).float()
    chin = (0.47 + 0.13 * person["face_height"]).float()
    turn = view["yaw"].sin().float()
    down = (v / chin).clamp(-0.5, 1)
    jut = u - 0.17 * turn * down  # the chin lies in front of the axis, so it moves with yaw
    taper = (0.34 - 0.90 * person["jaw"]).float()
    below = down.clamp(0, 1)
    edge = ellipse(jut / (1 - taper * below * below), v, width, torch.where(v > 0, chin, chin.new_tensor(0.56)))

    px, py = jut / (1.18 * width), v / 0.8
    pz = (1 - px * px - 0.6 * py * py).clamp(min=0.14).sqrt()
    cy, sy = view["yaw"].cos().float(), view["yaw"].sin().float()
    cp, sp = view["pitch"].cos().float(), view["pitch"].sin().float()
    pixel = (2 / size / scale).float()
    return _Place(
        x=x,
        y=y,
        u=u,
        v=v,
        ball_x=(px * 0.9).clamp(-1, 1),
        ball_y=py.clamp(-1, 1),
        fx=1.18 * width * (px * cy - pz * sy),
        fy=0.8 * (py * cp - (px * sy + pz * cy) * sp),
        edge=edge,
        head=cover(edge, pixel),
        pixel=pixel,
        fpixel=pixel * (cy + px / pz * sy).clamp(0.8, 2.2),
        turn=turn,
        width=width,
        chin=chin,
    )


def _background(at: _Place, view: dict[str, Tensor]) -> Tensor:
    angle = view["pattern_angle"]
    cos, sin = angle.cos().float(), angle.sin().float()
    period = (0.42 + 0.22 * view["pattern_size"]).float()
    phase = (view["pattern_phase"] * 2).float()
    # Across is odd and along is even under a mirror; the waves below are even, which keeps a flip exact.
    across, along = cos * at.x + sin * at.y, cos * at.y - sin * at.x
    pixel = 2 / at.x.shape[-1] / period

    def wave(t: Tensor, offset: Tensor | float) -> Tensor:
        """Smooth square wave in [0, 1] of period 2 and its half."""
        t = (t / period + offset) * 0.5
        t = (t - t.round()).abs()  # 0 ... 0.5
        return ((t - 0.25) * 2 / (1.5 * pixel) + 0.5).clamp(0, 1)

    column, band = wave(across, 0.0), wave(along, phase)
    check = column + band - 2 * column * band
    slope = ((along * 0.5).clamp(-0.6, 0.6) * 1.25 + 0.5).clamp(0, 1)
    pattern = view["pattern"]
    dark = torch.where(pattern == 1, band, torch.where(pattern == 2, check, torch.where(pattern == 3, slope, 0.0)))
    light = torch.where(pattern == 0, 1.0, 1.08)
    return view["background"] * (light - 0.46 * dark).unsqueeze(1)


def _skin(person: dict[str, Tensor]) -> Tensor:
    hue, lightness = person["skin_hue"].unsqueeze(1), person["skin_lightness"].unsqueeze(1)
    table = [[lightness.new_tensor(colour)[None, :, None, None] for colour in row] for row in _SKIN]
    dark, light = (torch.lerp(pink, golden, hue) for pink, golden in table)
    return torch.lerp(dark, light, lightness).float()


def _hair_colour(person: dict[str, Tensor]) -> Tensor:
    colour = blend(_HAIR, person["hair_hue"])
    grey = colour.mean(1, keepdim=True)
    colour = grey + (colour - grey) * (0.55 + 0.65 * person["hair_saturation"]).float().unsqueeze(1)
    return (colour * (0.75 + 0.5 * person["hair_lightness"]).float().unsqueeze(1)).clamp(0.03, 1)


def _hair_outline(at: _Place, person: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Distance to the mass of hair seen from the front, and y where it ends."""
    volume = (0.035 + 0.15 * person["hair_volume"]).float()
    length = (-0.10 + 0.80 * person["hair_length"]).float()
    back = at.u + 0.10 * at.turn  # the mass lies behind the axis
    cap = ellipse(back, at.v + 0.02, at.width + volume, 0.57 + volume)
    side = back.abs() - (at.width + volume) * (1 - 0.10 * at.v)
    fall = torch.maximum(torch.maximum(side, at.v - length), -at.v)
    return torch.minimum(torch.maximum(cap, at.v - length.clamp(min=0.1)), fall), length


def _body(image: Tensor, at: _Place, person: dict[str, Tensor], view: dict[str, Tensor]) -> Tensor:
    skin, hair, shirt = _skin(person), _hair_colour(person), view["shirt"]
    pixel = at.pixel
    mass, _ = _hair_outline(at, person)
    centre = at.x - 0.7 * view["shift_x"].float()
    shoulder = 0.60 + 0.30 * centre * centre - at.y
    image = paint(image, shirt * 0.35, cover(shoulder - 0.03, pixel))
    image = paint(image, shirt, cover(shoulder + 0.01, pixel))
    neckline = (0.11 + 0.10 * view["collar"]).float()
    cut = ellipse(centre, at.y - 0.55, 0.30, neckline)
    image = paint(image, shirt * 0.45, cover(cut - 0.035, pixel))
    image = paint(image, skin * 0.72, cover(cut, pixel))
    image = paint(image, hair * 0.45, cover(mass - 0.02, pixel))
    image = paint(image, hair * 0.72, cover(mass + 0.015, pixel))
    neck = torch.maximum((at.u * 0.6 + centre * 0.4).abs() - 0.20, at.y - 0.58)
    neck = torch.maximum(neck, -at.v)
    image = paint(image, skin * 0.40, cover(neck - 0.02, pixel) * cover(at.y - 0.58, pixel))
    return paint(image, skin * 0.72, cover(neck, pixel))


def _head(image: Tensor, at: _Place, person: dict[str, Tensor]) -> Tensor:
    skin = _skin(person)
    pixel = at.pixel
    size = (0.075 + 0.085 * person["ears"]).float()
    # Both ears at once: the near one comes forward over the cheek, the far one hides behind the head.
    side = at.u.sign()
    ear = ellipse(at.u.abs() - at.width * 0.98 - side * 0.09 * at.turn, at.v - 0.02, size, size * 1.35)
    image = paint(image, skin * 0.42, cover(ear - 0.025, pixel))
    image = paint(image, skin * 0.92, cover(ear + 0.005, pixel))
    image = paint(image, skin * 0.62, cover(ear + size * 0.55, pixel))
    image = paint(image, skin * 0.42, cover(at.edge - 0.022, pixel))
    return paint(image, skin, cover(at.edge + 0.01, pixel))


def _eyes(image: Tensor, at: _Place, person: dict[str, Tensor], view: dict[str, Tensor]) -> Tensor:
    spacing = (0.185 + 0.075 * person["eye_spacing"]).float()
    size = (0.095 + 0.055 * person["eye_size"]).float()
    height = (size.double() * 0.70 * view["eyes"]).float()
    side = at.fx.sign()
    ax, ay = at.fx.abs() - spacing, at.fy + 0.07
    tilt = (0.45 * (person["eye_tilt"] - 0.5)).float()  # positive: outer corners up
    ay = ay + tilt * ax
    lid = ellipse(ax, ay, size, height)
    pixel = at.fpixel
    image = paint(image, image.new_tensor(0.06), cover(lid - 0.028, pixel) * at.head)
    white = cover(lid, pixel) * at.head
    image = paint(image, image.new_tensor(0.97), white)
    gaze = side * at.turn * 0.06
    iris = torch.sqrt((ax - gaze) ** 2 + ay * ay + 1e-8)
    radius = 0.045 + 0.2 * size
    image = paint(image, blend(_EYES, person["eye_colour"]), cover(iris - radius, pixel) * white)
    image = paint(image, image.new_tensor(0.02), cover(iris - 0.45 * radius, pixel) * white)

    lift = (0.17 + 0.4 * size.double() + view["brow_lift"]).float()
    reach = size * 1.15
    slant = reach * (0.45 * (person["brow_tilt"] - 0.5)).float()  # positive: outer ends up, a stern look
    sad = view["brow_sad"].float()
    by = at.fy + 0.07 + lift
    brow = segment(at.fx.abs() - spacing, by, -reach, slant - sad, reach, 0.4 * sad - slant)
    thick = (0.014 + 0.056 * person["brow_thickness"]).float()
    return paint(image, _hair_colour(person) * 0.5, cover(brow - thick, pixel) * at.head)


def _mouth_shape(at: _Place, person: dict[str, Tensor], view: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Half width, y of the middle of the lips, and y offset from it of the line of the closed mouth."""
    half = ((0.165 + 0.095 * person["mouth_width"]) * view["width"]).float()
    middle = at.chin * 0.62 - 0.03
    t = (at.fx / half).clamp(-1, 1)
    return half, middle, view["curve"].float() * (0.5 - t * t)


def _mouth(image: Tensor, at: _Place, person: dict[str, Tensor], view: dict[str, Tensor]) -> Tensor:
    half, middle, line = _mouth_shape(at, person, view)
    pixel = at.fpixel
    hair = _hair_colour(person)
    y = at.fy - middle
    t = (at.fx / half).abs().clamp(max=3)
    arch = (1 - t * t).clamp(min=0)
    opening = view["opening"].float()

    beard = person["beard"]
    full = ramp(beard, 0.5, 0.95).float()
    cheek = at.fx / at.width
    border = middle + 0.02 - 0.12 * full - (0.35 + 0.2 * full) * cheek * cheek
    bare = ellipse(at.fx, y - 0.3 * opening, half * 1.05, 0.10 + 0.45 * opening)
    growth = torch.maximum(torch.maximum(border - at.fy, -bare), at.edge - 0.005)
    alpha = (0.90 * ramp(beard, 0.50, 0.75)).float()
    image = paint(image, hair * 0.78, cover(growth, pixel) * alpha)

    stache = ramp(person["moustache"], 0.55, 0.7).float()
    bush = (0.04 + 0.06 * ramp(person["moustache"], 0.6, 1.0)).float()
    droop = 0.12 * (at.fx / half) ** 2
    tash = (y + 0.115 + 0.2 * opening - droop - line * 0.5).abs() - bush * (1.15 - 0.75 * t)
    tash = torch.maximum(tash, at.fx.abs() - half * 1.05)

    top = line - 0.30 * opening * arch
    bottom = line + 0.70 * opening * arch
    slope = (1 + (2 * line / half) ** 2).sqrt()
    gap = torch.maximum(torch.maximum(top - y, y - bottom) / slope, (t - 1) * half)
    lip = (0.020 + 0.045 * person["lip_thickness"]).float()
    lips = blend(_LIPS, person["lip_colour"])
    tone = 0.45 + 0.55 * person["skin_lightness"].float().unsqueeze(1)
    lips = lips * tone
    swell = lip * (0.35 + 0.65 * arch)
    image = paint(image, lips * 0.45, cover(gap - swell - 0.022, pixel) * at.head)
    image = paint(image, lips, cover(gap - swell, pixel) * at.head)
    inside = cover(gap - 0.013, pixel) * at.head
    image = paint(image, image.new_tensor((0.16, 0.02, 0.03))[:, None, None], inside)
    tongue = cover(0.62 * opening - (y - line), pixel) * inside * ramp(opening, 0.12, 0.2)
    image = paint(image, image.new_tensor((0.85, 0.30, 0.32))[:, None, None], tongue)
    teeth = cover(torch.maximum(y - top - view["teeth"].float(), gap + 0.008), pixel)
    image = paint(image, image.new_tensor(0.98), teeth * at.head * ramp(view["teeth"], 0.0, 0.05).float())
    return paint(image, hair * 0.62, cover(tash, pixel) * stache * at.head)


def _nose(image: Tensor, at: _Place, person: dict[str, Tensor]) -> Tensor:
    skin = _skin(person)
    half = (0.065 + 0.075 * person["nose_width"]).float()
    tip = (0.07 + 0.11 * person["nose_length"]).float() - 0.02
    top = -0.07
    along = ((at.fy - top) / (tip - top)).clamp(0, 1)
    x = at.fx - 0.42 * at.turn * half.clamp(min=0.09) * 3 * along  # the tip stands out, so it leads the turn
    pixel = at.fpixel
    ball = ellipse(x, at.fy - tip, half * 1.25, 0.055 + 0.25 * half)
    ridge = torch.maximum(x.abs() - (0.03 + 0.5 * half * along), (at.fy - tip).abs() - (tip - top))
    ridge = torch.maximum(ridge, at.fy - tip)
    nose = torch.minimum(ball, ridge)
    dark = skin * 0.32
    # The outline is strong below and on the far side only: a closed one looks like a beak.
    below = ramp(at.fy - tip, -0.03, 0.02)
    far = ramp(x * at.turn, 0.002, 0.012)
    rim = cover(nose - 0.034, pixel) * torch.maximum(below, far).clamp(min=0.22)
    image = paint(image, dark, rim * at.head)
    return paint(image, torch.lerp(skin, skin.new_tensor((1.0, 0.62, 0.5))[:, None, None], 0.22), cover(nose, pixel))


def _hair(image: Tensor, at: _Place, person: dict[str, Tensor]) -> Tensor:
    hair = _hair_colour(person)
    mass, length = _hair_outline(at, person)
    fringe = person["fringe"].float()
    side = (at.fx / at.width).abs()
    line = -0.46 + 0.24 * fringe + (0.25 - 0.5 * fringe).clamp(min=0) * (side * side)
    drop = ((length + 0.12).clamp(0.0, 0.3) + 3 * ramp(length, 0.1, 0.3)) / 0.28
    steep = (1 + (drop / at.width * (side > 0.8)) ** 2).sqrt()  # makes a distance of a height
    front = (at.fy - line - drop * (side - 0.80).clamp(0, 0.8)) / steep
    front = torch.maximum(front, mass)
    image = paint(image, hair * 0.42, cover(front - 0.022, at.pixel) * cover(mass, at.pixel))
    image = paint(image, hair, cover(torch.maximum(front, mass + 0.02), at.pixel))
    shine = ellipse(at.u + 0.10 * at.turn, at.v + 0.52, 0.28, 0.035)
    return paint(image, hair * 0.6 + 0.4, cover(shine, at.pixel) * cover(front + 0.03, at.pixel) * 0.6)


def _accessories(image: Tensor, at: _Place, person: dict[str, Tensor]) -> Tensor:
    pixel = at.fpixel
    mole_x = ((person["mole_x"] - 0.5) * 1.3).float() * at.width
    mole_y = (-0.25 + 0.75 * person["mole_y"]).float()
    mole = torch.sqrt((at.fx - mole_x) ** 2 + (at.fy - mole_y) ** 2 + 1e-8) - 0.038
    image = paint(image, _skin(person) * 0.22, cover(mole, pixel) * at.head)

    spacing = (0.185 + 0.075 * person["eye_spacing"]).float()
    radius = spacing - 0.035
    square = person["glasses_shape"].float()
    ax, ay = at.fx.abs() - spacing, at.fy + 0.06
    circle = torch.sqrt(ax * ax + ay * ay + 1e-8) - radius
    box = torch.maximum(ax.abs() - radius, ay.abs() - 0.72 * radius)
    lens = torch.lerp(circle, box, square)
    bridge = torch.maximum((ay + 0.03).abs() - 0.01, at.fx.abs() - spacing + radius)
    temple = torch.maximum((ay + 0.03).abs() - 0.01, torch.maximum(-ax + radius, at.edge))
    frame = torch.minimum(torch.minimum(lens.abs(), bridge), temple) - 0.022
    worn = ramp(person["glasses"], 0.54, 0.62).float()
    image = paint(image, image.new_tensor(0.9), cover(lens, pixel) * worn * 0.12)
    worn = worn * cover(at.edge - 0.03, at.pixel)
    return paint(image, blend(_GLASSES, person["glasses_colour"]), cover(frame, pixel) * worn)
