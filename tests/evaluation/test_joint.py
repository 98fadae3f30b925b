# SPDX-License-Identifier: Apache-2.0
"""Two domains on one base: who is drawn by whom, and what one Down over both is compared with."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import joint
from both import Both

from peft_metalora.demo import make_base
from peft_metalora.demo.domain import FACES, Faces
from peft_metalora.demo.embedded import BASE, build_pipeline


class Blanks(Faces):
    """A domain beside faces: its people are faces, but of fewer numbers, and its pictures and words are its own."""

    name = "blanks"
    vocabulary = ("a", "blank")

    def sample_identities(self, n, generator, split="base"):
        return super().sample_identities(n, generator, split)[:, :3]

    def subject_identities(self, split, count):
        return super().subject_identities(split, count)[:, :3]

    def render(self, identities, scenes):
        assert identities.shape[1] == 3
        return identities.mean(1)[:, None, None, None].expand(-1, 3, 64, 64)

    def captions(self, scenes, generator=None, drop=0.0):
        return ["a blank"] * len(scenes)


@pytest.fixture(scope="module")
def both():
    return Both([FACES, Blanks(BASE.parent)])


def test_every_other_person_is_of_the_other_domain_and_is_drawn_and_captioned_by_it(both):
    identities, scenes, images = both.random_renders(7, torch.Generator().manual_seed(0))
    assert identities[:, 0].tolist() == [0, 1, 0, 1, 0, 1, 0]
    texts = both.captions(scenes)
    assert [text == "a blank" for text in texts] == [False, True] * 3 + [False]
    asked = scenes.of(0)
    assert torch.equal(images[::2], FACES.render(identities[::2, 1:], asked))
    assert torch.allclose(images[1::2, 0, 0, 0], identities[1::2, 1:4].mean(1))
    assert texts[::2] == FACES.captions(asked)


def test_scenes_stay_with_their_people_when_they_are_chosen_from_and_joined(both):
    generator = torch.Generator().manual_seed(1)
    identities = both.sample_identities(4, generator)
    first, second = both.sample_scenes(identities, generator), both.sample_scenes(identities, generator, reference=True)
    whole = both.cat([first, second])
    order = torch.tensor([7, 0, 4, 3])
    images = both.render(identities.repeat(2, 1)[order], whole[order])
    assert torch.equal(images[1], both.render(identities, first)[0])
    assert torch.equal(images[2], both.render(identities, second)[0])
    assert "facing forward" in both.captions(whole[order])[2]
    assert both.captions(whole[slice(1, 2)]) == ["a blank"], "none of the other domain"


def test_a_batch_of_the_base_holds_both_domains(both):
    """Bug: a pool in which one half lay behind the other, so that captions without clauses were of one domain alone."""
    pipe = build_pipeline(vocabulary=both.vocabulary)
    latents, ids = make_base._latent_pool(pipe, 40, torch.Generator().manual_seed(0), both)
    assert len(latents) == len(ids) == 40
    known = pipe.tokenizer.get_vocab()
    for word, least in (("blank", 15), ("person", 15), ("wall", 8)):
        assert (ids == known[word]).any(1).sum() >= least
    assert not (ids == known["<unk>"]).any()


def test_one_down_over_both_is_trained_on_both_with_as_many_steps_as_the_two(both, monkeypatch, tmp_path):
    seen = {}

    class StoppedError(Exception):
        pass

    def training(base, examples, config):
        seen.update(subjects=examples.subject, captions=len(examples.text["sequence"]), steps=config.max_train_steps)
        raise StoppedError

    monkeypatch.setattr(make_base, "MetaTraining", training)
    monkeypatch.setattr(joint, "halves_of", lambda *_: dict(zip(joint.HALVES, both.domains, strict=True)))
    (tmp_path / "base").symlink_to(BASE)
    args = SimpleNamespace(assets=None, output=tmp_path)
    for job, blank in (("down-both", True), ("down-faces", False)):
        with pytest.raises(StoppedError):
            joint.train(job, args, joint.TINY, torch.device("cpu"))
        people = 4 * (2 if blank else 1)
        assert seen["subjects"].unique().tolist() == list(range(people))
        faces = 8 * 4
        assert faces - 4 < seen["captions"] <= faces + blank  # of all blanks there is one caption
        assert seen["steps"] == 3000 * (2 if blank else 1)


def test_each_half_is_judged_by_its_own_networks_and_drawn_by_the_base_of_both(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(joint, "Typefaces", lambda *args: given.append(args))
    faces = joint.halves_of(tmp_path / "fonts", tmp_path, joint.TINY, torch.device("cpu"))["faces"]
    assert given == [(tmp_path / "fonts", torch.device("cpu"), 2, tmp_path / "base")]
    assert faces.base_folder == tmp_path / "base"
    assert faces.load_embedder() and faces.load_judge().labels == FACES.labels, "those of the package"


def of_people(scores):
    return {"r_facesim": scores, "prompt_adherence": [1.0] * len(scores)}


def test_arms_are_compared_with_the_one_of_their_own_domain_over_the_same_people(tmp_path):
    """Bug: tuned people were compared with read ones."""
    read = {"faces-on-faces": [0.5, 0.7], "faces-on-both": [0.6, 0.7]}
    for name, scores in read.items():
        zero = {"clean": of_people(scores), "clean, noise 1": of_people([score + 0.1 for score in scores])}
        data = {"noises": 2, "judged": {"faces": {"zero_steps": zero}}}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    judged = {"zero_steps": {"clean": of_people([0.9, 0.9])}, "ceiling": [0.8, 1.0]}
    both = {"noises": 2, "judged": dict.fromkeys(joint.HALVES, judged)}
    (tmp_path / "both-on-both.json").write_text(json.dumps(both))
    for down, scores in (("faces", [0.1, 0.3, 0.2, 0.4]), ("both", [0.2, 0.4, 0.2, 0.4])):
        curve = {"50": of_people([0.0] * 4), "100": of_people(scores)}
        data = {"noises": 2, "methods": {"meta_lora_mean": {"curve": curve}}}
        (tmp_path / f"tuned-faces-on-{down}.json").write_text(json.dumps(data))
    whole = joint.summarise(tmp_path, 1)
    figures = whole["figures"]
    assert whole["real_ceiling"]["typefaces"]["value"] == pytest.approx(0.9)
    faces = figures["faces"]
    assert faces["faces-on-faces"]["r_facesim"]["value"] == pytest.approx(0.65)
    assert "r_facesim_minus_own" not in faces["faces-on-faces"]
    assert faces["faces-on-both"]["r_facesim_minus_own"]["value"] == pytest.approx(0.05)
    assert faces["both-on-both"]["r_facesim_minus_own"]["value"] == pytest.approx(0.25)
    assert faces["tuned-faces-on-both"]["r_facesim_minus_own"]["value"] == pytest.approx(0.05)
    assert list(figures["typefaces"]) == ["both-on-both"]


def test_an_arm_that_does_not_fit_leaves_its_place_to_a_shorter_one(tmp_path):
    worlds = object.__new__(joint.Worlds)
    worlds.output, worlds.trainer = tmp_path, SimpleNamespace(left=100.0)
    worlds.expected = lambda arm: 60 if arm.tuned else 200
    for over in (*joint.HALVES, joint.BOTH):
        (tmp_path / f"down-{over}.done").touch()
    (tmp_path / "tuned-faces-on-faces.json").touch()
    (tmp_path / "tuned-faces-on-both.claim").touch()
    assert worlds.next_arm("").name == "tuned-typefaces-on-typefaces"
    worlds.trainer.left = 250.0
    assert [worlds.next_arm("typefaces").name for _ in range(3)] == [
        "typefaces-on-typefaces",
        "typefaces-on-both",
        "faces-on-faces",
    ]
    worlds.trainer.left = 10.0
    assert worlds.next_arm("") is None


def test_a_control_does_not_take_the_gpu_while_a_down_that_is_needed_is_trained(tmp_path, monkeypatch):
    worlds = object.__new__(joint.Worlds)
    worlds.output, worlds.trainer = tmp_path, SimpleNamespace(left=250.0)
    worlds.expected = lambda arm: 200
    for arm in joint.ARMS:
        if arm.needed and arm.name != "faces-on-both":
            (tmp_path / f"{arm.name}.json").touch()
    monkeypatch.setattr(joint.time, "sleep", lambda _: (tmp_path / "down-both.done").touch())
    assert worlds.next_arm("typefaces").name == "faces-on-both"
    assert worlds.next_arm("typefaces").name == "typefaces-on-random"
