# SPDX-License-Identifier: Apache-2.0
"""Two people in one picture: how they are drawn and described."""

from dataclasses import replace

import torch

from peft_metalora.demo import faces, two_people
from peft_metalora.demo.base import MAX_SEQUENCE_LENGTH, build_tokenizer


def people(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return faces.sample_identities(n, generator), faces.sample_identities(n, generator)


def test_each_half_is_a_picture_of_its_own_person_in_the_same_light():
    scenes, pair = two_people.sample_pairs(6, torch.Generator().manual_seed(0)), people(6)
    images = two_people.render_pairs(pair, scenes)
    assert images.shape == (6, 3, 64, 128)
    for half, own, seen in zip(two_people.halves(images), pair, scenes, strict=True):
        assert torch.equal(half, faces.render(own, seen))
    left, right = scenes
    assert torch.equal(left.background, right.background) and torch.equal(left.light, right.light)
    assert not torch.equal(left.shirt, right.shirt)


def test_stripes_go_on_from_one_half_into_the_other():
    left, right = two_people.sample_pairs(64, torch.Generator().manual_seed(3))
    # Light falls on each person from the front, so that nothing but the wall tells the halves apart.
    level = dict.fromkeys(("light_x", "light_y"), torch.zeros(64))
    left, right = replace(left, pattern=torch.ones_like(left.pattern), **level), replace(right, **level)
    right = replace(right, pattern=left.pattern)

    def steps(scenes):
        row = two_people.render_pairs(people(64), scenes)[:, :, 0].diff(dim=-1).abs().mean((0, 1))
        return row[63], torch.cat([row[58:63], row[64:69]]).mean()

    seam, beside = steps((left, right))
    assert seam < 1.5 * beside
    seam, beside = steps((left, replace(right, pattern_phase=left.pattern_phase)))
    assert seam > 3 * beside, "the same phase in both halves breaks the stripes"


def test_captions_name_both_people_in_words_that_the_base_knows():
    scenes = two_people.sample_pairs(200, torch.Generator().manual_seed(0))
    texts = two_people.captions(scenes, torch.Generator().manual_seed(0))
    tokenizer = build_tokenizer()
    ids = tokenizer(texts).input_ids
    assert max(map(len, ids)) == MAX_SEQUENCE_LENGTH and all(tokenizer.unk_token_id not in row for row in ids)
    whole = [faces.captions(one) for one in scenes]
    for number, text in enumerate(texts):
        start, _, rest = text.partition(", a person")
        own, others = start.split(", ")[1:], rest.split(", ")[1:]
        assert start.startswith("a photo of a person")
        assert set(own) <= set(whole[0][number].split(", ")[:4])
        assert set(others) <= set(whole[1][number].split(", "))
    assert texts == two_people.captions(scenes, torch.Generator().manual_seed(0))
