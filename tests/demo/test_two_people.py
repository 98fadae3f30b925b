# SPDX-License-Identifier: Apache-2.0
"""Two people in one picture: how they are drawn and described, and that regions keep them apart."""

from dataclasses import replace

import torch
from safetensors.torch import load_file

from peft_metalora.demo import faces, two_people
from peft_metalora.demo.embedded import MAX_SEQUENCE_LENGTH, RESOLUTION, build_tokenizer, load_base
from peft_metalora.demo.judges import adherence, load_embedder, load_judge
from peft_metalora.demo.make_two_people import train_two_people
from peft_metalora.demo.render import render
from peft_metalora.demo.scene import captions, parse_caption, sample_scenes
from peft_metalora.demo.scoring import generate
from peft_metalora.demo.show_two_people import (
    ADAPTER,
    ASKED,
    PROMPTS,
    TWO_PEOPLE,
    keep_apart,
)


def people(n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return faces.sample_identities(n, generator), faces.sample_identities(n, generator)


def test_each_half_is_a_picture_of_its_own_person_in_the_same_light():
    scenes, pair = two_people.sample_pairs(6, torch.Generator().manual_seed(0)), people(6)
    images = two_people.render_pairs(pair, scenes)
    assert images.shape == (6, 3, 64, 128)
    for half, own, seen in zip(two_people.halves(images), pair, scenes, strict=True):
        assert torch.equal(half, render(own, seen))
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
    whole = [captions(one) for one in scenes]
    for number, text in enumerate(texts):
        start, _, rest = text.partition(", a person")
        own, others = start.split(", ")[1:], rest.split(", ")[1:]
        assert start.startswith("a photo of a person")
        assert set(own) <= set(whole[0][number].split(", ")[:4])
        assert set(others) <= set(whole[1][number].split(", "))
    assert texts == two_people.captions(scenes, torch.Generator().manual_seed(0))


def test_training_writes_a_lora_of_the_committed_form(tmp_path, capsys):
    train_two_people(tmp_path, 1, torch.device("cpu"), pairs=4, batch=2)
    assert "steps of 2 in 1 s on cpu" in capsys.readouterr().out
    made, committed = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path, TWO_PEOPLE))
    forms = [{name: (tensor.shape, tensor.dtype) for name, tensor in lora.items()} for lora in (made, committed)]
    assert forms[0] == forms[1]
    assert any(tensor.any() for name, tensor in made.items() if "lora_B" in name)


def test_the_lora_draws_the_person_that_is_asked_for_in_each_half():
    pipe = load_base()
    pipe.load_lora_weights(str(TWO_PEOPLE), adapter_name=ADAPTER)
    tokens = build_tokenizer()(list(PROMPTS)).input_ids
    assert max(map(len, tokens)) <= MAX_SEQUENCE_LENGTH, "a prompt is read to its end"
    shown = [load_judge().read(half) for half in two_people.halves(generate(pipe, PROMPTS, range(4), 2 * RESOLUTION))]

    def agreement(left, right):
        asked = [[parse_caption(f"a photo of a person, {clauses[side]}") for clauses in ASKED] for side in (0, 1)]
        return adherence(asked[left] + asked[right], shown[0] + shown[1])["all"]

    assert agreement(0, 1) >= 0.6 > agreement(1, 0) + 0.2, "the other person's words are not what a half shows"


def test_scores_tell_whose_face_a_half_shows():
    scenes, pair = two_people.sample_pairs(3, torch.Generator().manual_seed(0)), people(1)
    pair = tuple(who.expand(3, -1) for who in pair)
    embedder = load_embedder()
    others = tuple(embedder.embed(render(who, sample_scenes(3))) for who in pair)
    images = two_people.render_pairs(pair, scenes)
    apart = keep_apart(embedder, images, others)
    assert apart.right.shape == (3, 2) and apart.right.min() > 0.5 > apart.wrong.max() and apart.swapped.sum() == 0
    turned = keep_apart(embedder, images, others[::-1])
    assert torch.equal(turned.right, apart.wrong) and turned.swapped.min() == 1
    torch.testing.assert_close(turned.better, apart.right.mean(1))
    both = keep_apart(embedder, torch.cat([images[..., :RESOLUTION]] * 2, -1), others)
    assert both.swapped.tolist() == [[0, 1]] * 3, "one person twice"
