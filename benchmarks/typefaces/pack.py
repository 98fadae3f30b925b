# SPDX-License-Identifier: Apache-2.0
"""From font files to one small file of glyphs: which fonts are usable, which are one design, who is in which split.

    python benchmarks/typefaces pack --output build/typefaces/glyphs.npz FOLDER...

A folder holds font files as packages unpack them. A font is usable if it has all capital letters and digits, and if
people would read them: most of its glyphs look more like the same letter of other families than like another letter.
Fonts are one family if they share a name but for words such as "bold", or if they are nearly equal in all glyphs;
families, not fonts, are split. Small letters of a font whose small letters are capitals are left out of it.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .glyphs import BASELINE, BOX, CAP_HEIGHT, CHARACTERS

Array = np.ndarray[Any, Any]

SUFFIXES = (".ttf", ".otf", ".pfb", ".t1")
SHARES = {"held-out": 40, "tune": 16}  # families; of the others, a share is the base's
BASE_SHARE = 0.35
OF_A_FAMILY = {"base": 6, "meta": 6, "tune": 1, "held-out": 1}  # fonts at most
_FINE = 4  # glyphs are drawn larger, so that no hinting for small sizes bends them
_LEAST_CAP = 17  # of a font whose glyphs must shrink to fit the box
_LETTERS = slice(0, 52)
# What a font is called beside its family: weights, widths, slants, optical sizes, encodings.
_STYLES = re.compile(
    r"\b(thin|hairline|extra|ultra|semi|demi|light|lite|regular|book|normal|roman|text|medium|med|bold|heavy|black|"
    r"fat|poster|italic|italics|oblique|slanted|upright|cursive|condensed|cond|narrow|wide|extended|expanded|compressed|"
    r"small|caps|smallcaps|sc|osf|lf|tlf|tosf|alt|alternate|display|caption|subhead|subheading|deck|titling|inline|"
    r"outline|shadow|mono|sans|serif|slab|pro|std|nf|otf|ttf|t1|ot1|ly1|ts1|adf|gfs|mt|ps|lt|bt|web|[0-9]+(pt)?|it|bd|rg|"
    r"bi|ob|b|i|r|l|m|x|swash|swashes|initials|math|greek|cyrillic)\b"
)
_SAME = 0.03  # distance of fonts that are one design under two names: see `distances`
_NEAR = 0.06  # fonts of training that are so near to a test font are left out
_TWIN = 0.01  # of one family's fonts only one is kept
_UNICASE = 0.06
_SHAPES = 24
_CHAIN = 24
_LEGIBLE = 0.6  # share of its letters that others read a font by
_OF_A_NAME = 8  # fonts that are compared with all others
_KNOWN = 160  # fonts whose letters others are read by
_DISTINCT = [CHARACTERS.index(letter) for letter in "abdefghijlmnqrt"]  # small letters that are no small capitals


@dataclass(frozen=True)
class Font:
    """A font file as drawn: `glyphs` (62, box, box) bytes of coverage, `has` (62,) which of them are there."""

    path: Path
    family: str
    style: str
    glyphs: Array
    has: Array


def draw_font(path: Path) -> Font | None:
    """Draw a font's letters and digits with capitals of one height; None if it is not usable."""
    try:
        font = ImageFont.truetype(str(path), 200, layout_engine=ImageFont.Layout.BASIC)
        _, top, _, bottom = font.getbbox("H", anchor="ls")
        if top >= -20 or bottom > 60:
            return None
        name, style = (part or "" for part in font.getname())
        scale = _FINE * CAP_HEIGHT / -top
        font = font.font_variant(size=round(200 * scale))
        missing = _mask(font, "\uf0ff"), _mask(font, "\u0e5b")
        if any(_mask(font, letter) in (*missing, b"") for letter in "AEHOaeno"):
            return None
        boxes = [font.getbbox(letter, anchor="ls") for letter in CHARACTERS]
        room = max(
            max(box[2] - box[0] for box in boxes) / (BOX - 4),
            max(-box[1] for box in boxes) / (BASELINE - 2),
            max(box[3] for box in boxes) / (BOX - BASELINE - 2),
        )
        if room > _FINE:
            if CAP_HEIGHT * _FINE / room < _LEAST_CAP:
                return None
            font = font.font_variant(size=int(200 * scale * _FINE / room))
        glyphs = np.stack([_glyph(font, letter) for letter in CHARACTERS])
    except (OSError, ValueError, SyntaxError, ZeroDivisionError):
        return None
    ink = glyphs.reshape(len(glyphs), -1).sum(1, dtype=np.int64)
    has = ink > 255 * 12
    # Letters that are all one picture are no letters.
    if not has[26:].any() or len({glyph.tobytes() for glyph in glyphs[:26]}) < 24 or not has[:26].all():
        return None
    small, capital = glyphs[26:52], glyphs[:26]
    if not has[26:52].all() or _small_capitals(small, capital):
        has[26:52] = False
    if not has[52:].all() or len({glyph.tobytes() for glyph in glyphs[52:]}) < 8:
        has[52:] = False
    return Font(path, name, style, glyphs, has)


def _mask(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    return bytes(font.getmask(letter))


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> Array:
    left, _, right, _ = font.getbbox(letter, anchor="ls")
    image = Image.new("L", (BOX * _FINE, BOX * _FINE))
    x = round(BOX * _FINE / 2 - (left + right) / 2)
    ImageDraw.Draw(image).text((x, BASELINE * _FINE), letter, 255, font, anchor="ls")
    return np.asarray(image.reduce(_FINE))


def _small_capitals(small: Array, capital: Array) -> bool:
    """Whether small letters are drawn as the capitals, of their size or smaller."""
    distances = [_difference(_filled(small[i - 26]), _filled(capital[i - 26])) for i in _DISTINCT]
    return bool(np.median(distances) < _UNICASE * 3)


def _filled(glyph: Array) -> Array:
    """A glyph that fills a small square."""
    box = Image.fromarray(glyph).getbbox()
    whole = Image.fromarray(glyph).crop(box).resize((_SHAPES, _SHAPES), Image.Resampling.BOX)
    return np.asarray(whole, np.float32) / 255


def _difference(a: Array, b: Array) -> float:
    return float(((a - b) ** 2).sum() / ((a**2).sum() + (b**2).sum() + 1e-6))


def family_of(font: Font) -> str:
    """The name of a font without its style: what files of one family share."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|[-_.,()]+", " ", font.family or font.path.stem).lower()
    kept = " ".join(_STYLES.sub(" ", name).split())
    return kept or name.strip()


def small_views(fonts: Sequence[Font]) -> Array:
    """(n, 62, 24 * 24) of glyphs where they stand, a little blurred by being made smaller; missing ones are 0."""
    views = np.zeros((len(fonts), len(CHARACTERS), _SHAPES * _SHAPES), np.float32)
    for number, font in enumerate(fonts):
        for place in np.flatnonzero(font.has):
            small = Image.fromarray(font.glyphs[place]).resize((_SHAPES, _SHAPES), Image.Resampling.BOX)
            views[number, place] = np.asarray(small, np.float32).ravel() / 255
    return views


def legible(views: Array, families: Sequence[str], seed: int = 0, neighbours: int = 5) -> Array:
    """(n,): share of each font's glyphs whose nearest glyphs in other families are mostly of that letter.

    Letters of two cases count as one, and so do 0 and O, 1, l and I.
    """
    n, places, _ = views.shape
    same = np.array([{"0": "o", "1": "l", "i": "l"}.get(letter.lower(), letter.lower()) for letter in CHARACTERS])
    chosen = np.random.default_rng(seed).permutation(n)[:_KNOWN]
    known = views[chosen].reshape(-1, views.shape[2])
    present = known.any(1)
    letters = np.tile(same, len(chosen))[present]
    owners = np.repeat(np.array(families)[chosen], places)[present]
    known = known[present]
    sizes = (known**2).sum(1)
    found = np.zeros(n)
    for number in range(n):
        own = views[number]
        there = own.any(1)
        distance = sizes - 2 * own[there] @ known.T
        distance[:, owners == families[number]] = np.inf
        nearest = letters[np.argpartition(distance, neighbours, axis=1)[:, :neighbours]]
        found[number] = ((nearest == same[there][:, None]).sum(1) > neighbours / 2).mean()
    return found


def distances(views: Array) -> Array:
    """(n, n): how different fonts are: mean square difference over shared glyphs, as a share of their ink."""
    n = len(views)
    present = views.any(2).astype(np.float32)
    shared, crossed = np.zeros((n, n), np.float32), np.zeros((n, n), np.float32)
    for place in range(views.shape[1]):
        one = views[:, place]
        ink = (one**2).sum(1)
        both = present[:, place][:, None] * present[:, place][None]
        shared += (ink[:, None] + ink[None]) * both
        crossed += 2 * one @ one.T
    return 1 - crossed / np.maximum(shared, 1e-6)


def groups(families: Sequence[str], apart: Array, same: float = _SAME) -> Array:
    """(n,): number of the independent family of each font: those of one name and those of one design are joined."""
    parent = list(range(len(families)))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    first: dict[str, int] = {}
    for number, family in enumerate(families):
        parent[root(number)] = root(first.setdefault(family, number))
    for one, other in zip(*np.nonzero(np.triu(apart < same, 1)), strict=True):
        parent[root(int(one))] = root(int(other))
    roots = [root(number) for number in range(len(families))]
    return np.unique(roots, return_inverse=True)[1]


def thinned(fonts: Sequence[Font], most: int = _OF_A_NAME) -> list[Font]:
    """The plainest fonts of each name: some families have a hundred."""
    of: dict[str, list[Font]] = {}
    for font in fonts:
        of.setdefault(family_of(font), []).append(font)
    return [font for own in of.values() for font in sorted(own, key=_how_plain)[:most]]


def split(fonts: Sequence[Font], group: Array, apart: Array) -> dict[str, list[int]]:
    """Fonts of each split: whole families, a few fonts of each that are not nearly equal.

    Held-out and tune families have all glyphs. No font of another split is near to one of theirs: those that were are
    left out. The draw depends on the names of families alone.
    """
    members = [np.flatnonzero(group == number) for number in range(group.max() + 1)]
    whole = {number: [i for i in own if fonts[i].has.all()] for number, own in enumerate(members)}

    def lot(number: int) -> bytes:
        return hashlib.sha256(min(family_of(fonts[i]) for i in members[number]).encode()).digest()

    order = sorted(range(len(members)), key=lot)
    result: dict[str, list[int]] = {name: [] for name in OF_A_FAMILY}
    # A family of dozens of fonts is a chain of neighbours, and most fonts are near to one of them.
    candidates = [number for number in order if whole[number] and len(members[number]) <= _CHAIN]
    taken: set[int] = set()
    for name, count in SHARES.items():
        for number in candidates:
            plainest = min(whole[number], key=lambda i: _how_plain(fonts[i]))
            tested = [i for split in SHARES for i in result[split]]
            if len(result[name]) < count and number not in taken and (apart[plainest, tested] > _NEAR).all():
                result[name].append(plainest)
                taken.add(number)
    tested = [i for split in SHARES for i in result[split]]
    others = [number for number in order if number not in taken]
    for name, some in (
        ("base", others[: round(BASE_SHARE * len(others))]),
        ("meta", others[round(BASE_SHARE * len(others)) :]),
    ):
        for number in some:
            kept: list[int] = []
            for i in sorted(members[number], key=lambda i: _how_plain(fonts[i])):
                alone = (apart[i, kept] > _TWIN).all() and (apart[i, tested] > _NEAR).all()
                if len(kept) < OF_A_FAMILY[name] and alone:
                    kept.append(i)
            result[name] += kept
    return result


def _how_plain(font: Font) -> tuple[int, int, str]:
    text = f"{font.family} {font.style} {font.path.stem}".lower()
    return len(_STYLES.findall(text.replace("regular", ""))), len(text), text


def find(folders: Sequence[Path]) -> list[Path]:
    """Font files below some folders, in a fixed order."""
    found = (path for folder in folders for path in folder.rglob("*"))
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES and path.is_file())


def usable(paths: Sequence[Path], workers: int) -> Iterator[Font]:
    """The fonts that can be drawn; of files that draw the same, the first."""
    seen: set[bytes] = set()
    with Pool(workers) as pool:
        for font in pool.imap(draw_font, paths, chunksize=16):
            if font is None:
                continue
            digest = hashlib.sha256(font.glyphs.tobytes()).digest()
            if digest not in seen:
                seen.add(digest)
                yield font


def package_of(path: Path) -> str:
    """Name of the Debian package or, within TeX's, of the bundle that a file is from."""
    parts = path.parts
    for mark, offset in (("opentype", 2), ("truetype", 2), ("type1", 2)):
        if mark in parts and "texmf-dist" in parts and len(parts) > parts.index(mark) + offset + 1:
            return f"texlive: {parts[parts.index(mark) + offset]}"
    named = [part for part in parts if part.startswith("fonts-")]
    return named[0] if named else parts[-2]


def pack(folders: Sequence[Path], output: Path, workers: int) -> dict[str, Any]:
    """Write `output` (see `glyphs.Glyphs`) and say what was found."""
    paths = find(folders)
    return pack_fonts(len(paths), list(usable(paths, workers)), output)


def pack_fonts(files: int, fonts: list[Font], output: Path) -> dict[str, Any]:
    """As `pack`, of fonts that are drawn."""
    drawn = len(fonts)
    fonts = thinned(fonts)
    views = small_views(fonts)
    read = np.flatnonzero(legible(views, [family_of(font) for font in fonts]) >= _LEGIBLE)
    return write([fonts[i] for i in read], distances(views[read]), files, drawn, output)


def write(fonts: Sequence[Font], apart: Array, files: int, drawn: int, output: Path) -> dict[str, Any]:
    """Split legible fonts, of which `apart` says how different they are, and write those of a split."""
    families = [family_of(font) for font in fonts]
    group = groups(families, apart)
    chosen = split(fonts, group, apart)
    order = [i for own in chosen.values() for i in own]
    tests = chosen["tune"] + chosen["held-out"]
    training = chosen["base"] + chosen["meta"]
    listed = [
        {
            "name": f"{fonts[i].family} {fonts[i].style}".strip(),
            "family": int(group[i]),
            "split": name,
            "package": package_of(fonts[i].path),
        }
        for name, own in chosen.items()
        for i in own
    ]
    write_glyphs(output, np.stack([fonts[i].glyphs for i in order]), np.stack([fonts[i].has for i in order]), listed)
    return {
        "files": files,
        "drawn": drawn,
        "legible": len(fonts),
        "names": len(set(families)),
        "independent_families": int(group.max()) + 1,
        "families": {name: len({int(group[i]) for i in own}) for name, own in chosen.items()},
        "fonts": {name: len(own) for name, own in chosen.items()},
        "nearest_to_a_test_font": round(float(apart[np.ix_(tests, training)].min(initial=1)), 4),
        "packages": sorted({package_of(fonts[i].path) for i in order}),
        "bytes": output.stat().st_size,
    }


def write_glyphs(output: Path, glyphs: Array, has: Array, listed: Sequence[dict[str, Any]]) -> None:
    """Write coverage (n, 62, box, box) in 16 levels, which glyphs are there, and what is said of each font."""
    levels = (glyphs.astype(np.uint16) + 8) // 17
    levels[~has] = 0
    packed = (levels[..., ::2] * 16 + levels[..., 1::2]).astype(np.uint8)
    output.parent.mkdir(parents=True, exist_ok=True)
    data = np.frombuffer(lzma.compress(packed.tobytes(), preset=6), np.uint8)
    np.savez(output, glyphs=data, has=has, fonts=np.array(json.dumps(list(listed))))
