# SPDX-License-Identifier: Apache-2.0
"""The domain of typefaces: what is packed, who is in which split, what is drawn, and what is scored."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from typefaces import glyphs, pack, scene
from typefaces.domain import ZOOM, Typefaces

from peft_metalora.data import read_subjects


def a_font(name: str, squeeze: float = 1.0, lower: bool = True) -> pack.Font:
    """Pillow's own font, perhaps narrower."""
    found = ImageFont.load_default(200)
    font = found.font_variant(size=round(200 * pack._FINE * glyphs.CAP_HEIGHT / -found.getbbox("H", anchor="ls")[1]))
    drawn = []
    for letter in glyphs.CHARACTERS:
        image = Image.fromarray(pack._glyph(font, letter))
        narrow = image.resize((round(glyphs.BOX * squeeze), glyphs.BOX))
        page = Image.new("L", image.size)
        page.paste(narrow, ((glyphs.BOX - narrow.width) // 2, 0))
        drawn.append(np.asarray(page))
    has = np.ones(62, bool)
    has[26:52] = lower
    return pack.Font(Path(f"{name}.ttf"), name, "Regular", np.stack(drawn), has)


@pytest.fixture(scope="module")
def plain():
    return a_font("Plain")


@pytest.fixture(scope="module")
def domain(tmp_path_factory, plain):
    folder = tmp_path_factory.mktemp("assets")
    fonts = [plain, a_font("Narrow", 0.6, lower=False), a_font("Test", 0.8)]
    listed = [
        {"name": font.family, "family": number, "split": split, "package": "none"}
        for number, (font, split) in enumerate(zip(fonts, ("meta", "base", "held-out"), strict=True))
    ]
    pack.write_glyphs(
        folder / "glyphs.npz", np.stack([font.glyphs for font in fonts]), np.stack([font.has for font in fonts]), listed
    )
    return Typefaces(folder)


def test_fonts_of_one_name_or_one_design_are_one_family(plain):
    """Bug: a clone under another name is held out while the encoder was trained on its twin."""
    clone, other = a_font("Clone", 0.98), a_font("Other", 0.6)
    bold = pack.Font(Path("b.ttf"), "Other Bold", "Bold", np.roll(other.glyphs, 5, 2), other.has)
    fonts = [plain, clone, other, bold]
    apart = pack.distances(pack.small_views(fonts))
    assert apart[0, 1] < pack._SAME < apart[0, 2]
    families = [pack.family_of(font) for font in fonts]
    assert families[2] == families[3]
    group = pack.groups(families, apart)
    assert group[0] == group[1] != group[2] == group[3]
    chosen = pack.split(fonts, group, apart)
    assert sorted(len(own) for own in chosen.values()) == [0, 0, 0, 2]  # one font of each of the two families


def test_a_dingbat_is_not_legible(plain):
    rng = np.random.default_rng(0)
    wide = a_font("Odd", 0.7)
    odd = pack.Font(wide.path, "Odd", "", wide.glyphs[rng.permutation(62)], wide.has)
    fonts = [plain, a_font("A", 0.9), a_font("B", 0.8), odd]
    found = pack.legible(pack.small_views(fonts), [font.family for font in fonts], neighbours=1)
    assert found[0] > 0.8 and found[3] < 0.3


def test_distances_are_those_to_the_edge():
    """Bug: an edge through half-covered pixels was taken to be half a pixel off."""
    coverage = torch.zeros(1, 16, 16)
    coverage[:, :, :8] = 1
    coverage[:, :, 8] = 0.25  # the edge stands at 8.25
    distance = glyphs.signed_distance(coverage)[0, 8].float() * glyphs.REACH / 127
    middle = torch.arange(16) + 0.5
    assert torch.allclose(distance[4:13], (middle - 8.25)[4:13], atol=0.06)
    assert distance[15] == glyphs.REACH


def test_a_photo_shows_the_glyph_as_packed(domain, plain):
    identity = torch.tensor([[0.0, 0, 0, 1, 0]])
    scenes = domain.sample_scenes(identity, torch.Generator().manual_seed(0))
    for name in ("turn", "shift_x", "shift_y", "blur", "strength", "pattern"):
        getattr(scenes, name).zero_()
    scenes.scale.fill_(1)
    ink = 1 - domain.render(identity, scenes)[0].mean(0)
    size = round(64 * ZOOM)
    zoomed = Image.fromarray(plain.glyphs[int(scenes.glyph)]).resize((size, size), Image.Resampling.BILINEAR)
    # Capitals stand in the middle of the picture.
    top, left = round((glyphs.BASELINE - glyphs.CAP_HEIGHT / 2) * ZOOM) - 31, (size - 64) // 2
    expected = torch.from_numpy(np.asarray(zoomed).copy()).float()[top : top + 64, left : left + 64]
    assert torch.corrcoef(torch.stack([ink.flatten(), expected.flatten()]))[0, 1] > 0.9  # to half a pixel
    bold = domain.render(torch.tensor([[0.0, 0.5, 0, 1, 0]]), scenes)
    assert (1 - bold[0].mean(0)).sum() > 1.1 * ink.sum()


def test_only_glyphs_that_a_font_has_are_shown(domain):
    identities = torch.tensor([[1.0, 0, 0, 1, 0]]).expand(200, -1)
    shown = domain.sample_scenes(identities, torch.Generator().manual_seed(0)).glyph
    assert not ((shown >= 26) & (shown < 52)).any()


def test_captions_say_what_is_shown_and_can_be_read_back(domain):
    identities = domain.sample_identities(50, torch.Generator().manual_seed(0), "held-out")
    scenes = domain.sample_scenes(identities, torch.Generator().manual_seed(1))
    labels = scene.labels(scenes)
    for row, text in enumerate(scene.captions(scenes)):
        wanted = {name: scene.LABELS[name][int(index[row])] for name, index in labels.items()}
        assert domain.parse_caption(text) == wanted
        assert len(text.split()) + 2 <= 24
        assert set(text.replace(",", "").split()) <= set(scene.VOCABULARY)


def test_prompts_ask_for_no_letter_that_references_show():
    asked = {domain_prompt["glyph"][-1] for domain_prompt in map(scene.parse_caption, scene.PROMPTS)}
    assert not asked & set(scene.REFERENCES.lower())


def test_photos_of_a_subject_are_of_different_letters(domain, tmp_path):
    """Bug: nearness to the font's other photos was nearness to the same letter."""
    (subject,) = read_subjects(domain.write_dataset(tmp_path, "held-out", 1, 7))
    shown = [domain.parse_caption(photo.caption)["glyph"] for photo in subject.photos]
    assert len(set(shown)) == 7
    reference, _ = subject.split()
    assert domain.parse_caption(reference.caption)["glyph"][-1] in scene.REFERENCES.lower()


def test_a_judge_learns_no_identity_under_two_labels(domain):
    """Bug: fonts that were drawn several times as they are were several classes of the margin loss."""
    people = domain.distinct_identities(100, torch.Generator().manual_seed(0)).tolist()
    assert len({tuple(one) for one in people}) == len(people) == 6


def test_held_out_fonts_are_shown_as_they_are_and_meta_fonts_are_multiplied(domain):
    assert domain.subject_identities("held-out", 5).tolist() == [[2, 0, 0, 1, 0]]
    many = domain.subject_identities("meta", 9)
    assert len(many) == 9 and len({tuple(one) for one in many.tolist()}) == 9 and (many[:, 0] == 0).all()


def test_dots_of_a_paper_are_wider_than_its_lines(domain):
    """Bug: dots as small as where two lines cross were gone behind the autoencoder, and with them a clause."""
    identity = torch.tensor([[0.0, 0, 0, 1, 0]]).expand(40, -1)
    scenes = domain.sample_scenes(identity, torch.Generator().manual_seed(0))
    line = (torch.arange(64) + 0.5) / 32 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    share = []
    for pattern in ("plain", "lined", "dotted"):
        scenes.pattern.fill_(scene.PATTERNS.index(pattern))
        share.append(domain._paper(scenes, x, y).mean())
    plain, lined, dotted = share
    assert (plain - dotted) > 0.5 * (plain - lined)
