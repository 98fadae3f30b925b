# SPDX-License-Identifier: Apache-2.0
"""Stage 2 from the person that an encoder reads: where it starts, when it stops, what is refused."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from peft_metalora import hub
from peft_metalora.encoder import load_reader
from peft_metalora.errors import ArtefactNotFoundError, ConfigError, NoFaceError
from peft_metalora.training.personalize import personalize, personalize_many
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.tuner import subject_state
from training_tiny import personal_config, teach_to_read, tiny_base, tiny_examples, write_people


def config_of(place, down, output, **changes):
    settings = {
        "pretrained_model_name_or_path": str(place / "base"),
        "instance_data_dir": str(place / "people" / "person-0" / "0.png"),
        "down": str(down),
        "output_dir": str(output),
    }
    return personal_config(**{**settings, **changes})


def as_read(down, base, photo, **sight):
    """A person's tensors, from an image file."""
    source = hub.load_down(down)
    reader = load_reader(down, source, base.encode_images)
    seen = reader.encoder.sight(**sight)(Image.open(photo).convert("RGB"))
    return reader.read([seen], source)


def distance(tensors, others):
    return math.sqrt(sum(float((tensors[name] - others[name]).square().sum()) for name in tensors))


def moved(tensors, read):
    """The share of the way from the mean subject to the read one."""
    means = read.space.split(read.space.mean.detach()[None])
    return distance(tensors, read.tensors) / distance(read.tensors, means)


@pytest.mark.parametrize(
    ("given", "reads", "expected"),
    [
        ({}, False, ("stored", 1e-3, 0, 375, None)),
        ({}, True, ("encoder", 3e-4, 10, 100, 0.03)),
        ({"start": "mean"}, True, ("mean", 1e-3, 0, 375, None)),
        ({"method": "lora"}, True, ("stored", 1e-3, 0, 375, None)),
        ({"learning_rate": 0.1, "lr_warmup_steps": 0, "max_train_steps": 7, "max_drift": 0.0}, True,
         ("encoder", 0.1, 0, 7, 0.0)),
        ({"max_train_steps": 0}, True, ("encoder", 3e-4, 10, 0, 0.03)),
    ],
    ids=str,
)  # fmt: skip
def test_defaults_follow_the_start(given, reads, expected):
    plain = {"learning_rate": None, "max_train_steps": None}
    config = personal_config(**{**plain, **given}).settled(reads)
    numbers = config.learning_rate, config.lr_warmup_steps, config.max_train_steps, config.max_drift
    assert (config.start, *numbers) == expected
    assert config.settled(reads) == config


def test_a_down_that_reads_is_started_from_and_the_result_says_so(place, reading, tmp_path):
    barely = {"learning_rate": 1e-9, "max_train_steps": 1}
    folder = personalize(config_of(place, reading, tmp_path / "ann", weighting_scheme="none", **barely), progress=False)
    found = hub.load_subject(folder)
    assert found.config.facts["recipe"]["weighting_scheme"] == "none" and "shift" not in found.config.facts["recipe"]
    read = as_read(reading, tiny_base(), place / "people" / "person-0" / "0.png")
    assert distance(found.tensors, read.tensors) < 1e-4 < distance(read.tensors, hub.load_down(reading).tensors)
    assert found.config.facts["recipe"]["start"] == "encoder" and found.config.facts["steps"] == 1
    other = personalize(config_of(place, reading, tmp_path / "bob", start="stored", **barely), progress=False)
    assert hub.load_subject(other).config.facts["recipe"]["start"] == "stored"
    assert all(tensor.abs().max() < 1e-6 for name, tensor in hub.load_subject(other).tensors.items() if "_up" in name)


def test_several_photos_start_from_their_mean_and_bad_ones_are_left_out(place, reading, tmp_path):
    people = write_people(tmp_path / "people", subjects=1, each=3)
    (people / "person-0" / "1.png").write_bytes(b"no image")
    config = config_of(
        place, reading, tmp_path / "ann", instance_data_dir=str(people / "person-0"), learning_rate=1e-9,
        max_train_steps=1, instance_prompt="a photo",
    )  # fmt: skip
    with pytest.warns(match=r"skipped 1 of 3 images") as warned:
        found = hub.load_subject(personalize(config, progress=False))
    assert len([one for one in warned if "skipped" in str(one.message)]) == 1
    base, photos = tiny_base(), [people / "person-0" / f"{number}.png" for number in (0, 2)]
    codes = torch.stack([as_read(reading, base, photo).code.code for photo in photos])
    source = hub.load_down(reading)
    wanted = load_reader(reading, source, base.encode_images).space.expand(codes.mean(0))
    assert distance(found.tensors, wanted) < 1e-4


def test_a_run_stops_when_the_person_has_moved_far_enough(place, reading, tmp_path):
    states = {}
    for steps in (50, 1):
        config = config_of(
            place, reading, tmp_path / f"ann-{steps}", learning_rate=0.003, max_train_steps=50, checkpointing_steps=1,
            lr_warmup_steps=0, max_drift=0.03 if steps == 50 else 0.0,
        )  # fmt: skip
        if steps == 1:
            config = replace(config, max_train_steps=1)
        states[steps] = hub.load_subject(personalize(config, progress=False))
    read = as_read(reading, tiny_base(), place / "people" / "person-0" / "0.png")
    ended = states[50].config.facts["steps"]
    before = hub.load_subject(tmp_path / "ann-50" / f"checkpoint-{ended - 1}")
    assert 1 < ended < 50
    assert moved(before.tensors, read) < 0.03 <= moved(states[50].tensors, read)
    assert states[1].config.facts["steps"] == 1 and moved(states[1].tensors, read) > 0


def test_each_of_many_stops_by_itself_as_it_would_alone(place, reading):
    base = tiny_base()
    people = [as_read(reading, base, place / "people" / f"person-{number}" / "0.png") for number in range(3)]
    # Codes of an encoder have one length; of means of several photos they have not.
    people[1] = replace_code(people[1], 0.3 * people[1].code.code)
    examples, source = tiny_examples(base, subjects=3, each=4), hub.load_down(reading)
    config = personal_config(learning_rate=0.003, lr_warmup_steps=2, max_train_steps=40, start="encoder")
    run = personalize_many(base, examples, config, source, read=people, progress=False)
    together = [subject_state(base.denoiser, "default", slot) for slot in range(3)]
    together = [{name: tensor.clone() for name, tensor in state.items()} for state in together]
    steps = [run.facts(slot)["steps"] for slot in range(3)]
    assert steps[1] < min(steps[0], steps[2]) <= run.steps_done < 40
    run.remove()
    for number, person in enumerate(people):
        chosen = examples.subject == number
        alone = replace(
            examples, latents=examples.latents[chosen], caption=examples.caption[chosen],
            subject=torch.zeros(int(chosen.sum()), dtype=torch.int64),
        )  # fmt: skip
        run = personalize_many(base, alone, config, source, read=[person], progress=False)
        assert run.steps_done == steps[number]
        for name, tensor in subject_state(base.denoiser, "default").items():
            assert torch.allclose(tensor, together[number][name], atol=2e-5), name
        assert moved(together[number], person) >= 0.03
        run.remove()


def replace_code(person, code):
    return type(person)(person.config, replace(person.code, code=code), person.space, person.down)


def test_a_run_does_not_go_on_with_what_reads_otherwise(place, reading, tmp_path):
    """Bug: where the Down had been taught to read anew, the run stopped where nobody had asked it to."""
    settings = {"max_train_steps": 4, "max_drift": 0.5, "checkpointing_steps": 2}
    personalize(config_of(place, reading, tmp_path / "out", **settings), progress=False)
    anew = teach_to_read(shutil.copytree(place / "down", tmp_path / "anew"), spread=0.5)
    going_on = config_of(place, anew, tmp_path / "out", **settings, resume_from_checkpoint="checkpoint-2")
    with pytest.raises(ConfigError, match=r"expected the reader of the Down of the run .*found others \(.*anew\)"):
        personalize(going_on, progress=False)


def test_a_resumed_run_is_the_uninterrupted_one(place, reading, tmp_path):
    settings = {"learning_rate": 0.002, "max_train_steps": 50, "checkpointing_steps": 2}
    whole = hub.load_subject(personalize(config_of(place, reading, tmp_path / "whole", **settings), progress=False))
    steps = whole.config.facts["steps"]
    assert 2 < steps < 50
    part = {**settings, "max_train_steps": 2}
    personalize(config_of(place, reading, tmp_path / "part", **part), progress=False)
    resumed = config_of(place, reading, tmp_path / "part", **settings, resume_from_checkpoint="latest")
    found = hub.load_subject(personalize(resumed, progress=False))
    assert found.config.facts["steps"] == steps
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in whole.tensors.items())
    last = f"checkpoint-{steps - steps % 2}"
    again = replace(resumed, resume_from_checkpoint=last)
    assert hub.load_subject(personalize(again, progress=False)).config.facts["steps"] == steps


def test_no_steps_go_on_from_no_checkpoint(place, reading, tmp_path):
    """Bug: the person was written as read, and the checkpoints that the run was to go on from were removed."""
    config = config_of(place, reading, tmp_path / "ann", max_drift=0.0, checkpointing_steps=1)
    personalize(config, progress=False)
    with pytest.raises(ConfigError, match="goes on from no checkpoint, found resume_from_checkpoint 'latest'"):
        personalize(replace(config, max_train_steps=0, resume_from_checkpoint="latest"), progress=False)
    assert len(list((tmp_path / "ann").glob("checkpoint-*"))) == 3


def test_the_photo_is_read_as_it_is_cut_for_training(place, reading, tmp_path):
    detector, photos = "training_tiny:Bright", tmp_path / "photos"
    photos.mkdir()
    for number, dot in enumerate(((255,) * 3, (200,) * 3)):
        image = Image.open(place / "people" / "person-0" / "0.png").convert("RGB").point(lambda value: value // 2)
        image.putpixel((12, 12), dot)
        image.save(photos / f"{number}.png")
    settings = {"instance_data_dir": str(photos), "instance_prompt": "a photo", "face_crop": detector}
    settings |= {"learning_rate": 1e-9, "max_train_steps": 1}
    with pytest.warns(match=r"expected a face in .*1\.png"):
        found = personalize(config_of(place, reading, tmp_path / "ann", face_margin=0.25, **settings), progress=False)
    wanted = as_read(reading, tiny_base(), photos / "0.png", face_crop=detector, face_margin=0.25)
    assert distance(hub.load_subject(found).tensors, wanted.tensors) < 1e-4
    settings["instance_data_dir"] = str(photos / "1.png")
    with pytest.raises(NoFaceError, match=r"expected a face in .*1\.png"):
        personalize(config_of(place, reading, tmp_path / "bob", **settings), progress=False)
    assert not (tmp_path / "bob").exists()


def test_what_cannot_be_is_one_sentence_and_writes_nothing(place, reading, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_metalora.training.personalize.prepare", lambda *_, **__: pytest.fail("work"))
    for down, changes, error, message in (
        (place / "down", {"start": "encoder"}, ArtefactNotFoundError, "with an encoder .* --start stored"),
        (place / "down", {"max_train_steps": 0}, ConfigError, "max_train_steps 0 writes the person as read"),
        (place / "down", {"max_drift": 0.1}, ConfigError, "belongs to start 'encoder', found 'stored'"),
        (reading, {"start": "mean", "max_drift": 0.1}, ConfigError, "belongs to start 'encoder', found 'mean'"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            personalize(config_of(place, down, tmp_path / "ann", **changes), progress=False)
    for changes, message in (
        ({"method": "lora", "start": "encoder"}, "belongs to method 'meta-lora'"),
        ({"max_train_steps": -1}, "at least 0, found -1"),
        ({"max_train_steps": 2.5}, "whole number"),
        ({"max_drift": -0.1}, "max_drift must be 0 or more"),
        ({"start": "nowhere"}, "start must be one of 'encoder', 'stored', 'mean', 'fresh'"),
    ):
        with pytest.raises(ConfigError, match=message):
            personal_config(**changes)
    assert list(tmp_path.iterdir()) == []


def test_a_start_for_each_or_none(place, reading):
    base, source = tiny_base(), hub.load_down(reading)
    ann = as_read(reading, base, place / "people" / "person-0" / "0.png")
    for people in ([], [ann]):
        with pytest.raises(ConfigError, match=rf"each of 2 subjects .* found {len(people)}"):
            Personalization(base, tiny_examples(base, 2), personal_config(start="encoder"), source, read=people)
        assert not hasattr(base.denoiser, "peft_config")


def test_somebody_who_was_read_as_the_mean_has_no_way_to_measure(place, reading):
    """Bug: ZeroDivisionError in the first step, with the adapter left on the model."""
    base, source = tiny_base(), hub.load_down(reading)
    ann = as_read(reading, base, place / "people" / "person-0" / "0.png")
    mean = replace_code(ann, torch.zeros_like(ann.code.code))
    config = personal_config(start="encoder")
    with pytest.raises(ConfigError, match="subject 1 read as the mean"):
        Personalization(base, tiny_examples(base, 2), config, source, read=[ann, mean])
    assert not hasattr(base.denoiser, "peft_config")
    run = Personalization(base, tiny_examples(base, 1), replace(config, max_drift=0.0), source, read=[mean])
    assert len(list(run.steps())) == config.max_train_steps
    run.remove()


def test_code_of_an_encoder_runs_only_when_it_is_named(place, tmp_path):
    """Bug: see `load_encoder`; the same road through personalize."""
    down = teach_to_read(shutil.copytree(place / "down", tmp_path / "down"), source=f"face:{__name__}:faces")
    settings = {"learning_rate": 1e-9, "max_train_steps": 1}
    with pytest.raises(ConfigError, match="face_model="):
        personalize(config_of(place, down, tmp_path / "ann", **settings), progress=False)
    personalize(config_of(place, down, tmp_path / "ann", face_model=f"{__name__}:faces", **settings), progress=False)
    assert hub.load_subject(tmp_path / "ann").config.facts["recipe"]["start"] == "encoder"


def faces():
    from training_tiny import Brightness

    return Brightness()
