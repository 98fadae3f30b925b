# SPDX-License-Identifier: Apache-2.0
"""A Down learns to read photos, from folder to folder, and a person is read with it."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from peft_metalora import MetaLoraConfig, enable_meta_lora, load_down, save_down
from peft_metalora.bases import load_base
from peft_metalora.cli import main
from peft_metalora.data import read_subjects
from peft_metalora.data.degrade import DEGRADATIONS, make_worse
from peft_metalora.encoder import EncoderConfig, make_encoder
from peft_metalora.errors import ConfigError, TooFewImagesError, TrainingError
from peft_metalora.metrics import Embeddings, r_facesim
from peft_metalora.training import train_encoder as module
from peft_metalora.training.engine.processes import Processes
from peft_metalora.training.engine.slot_gradients import SlotGradients
from peft_metalora.training.engine.stacked import RowGradients
from peft_metalora.training.engine.state import read_state
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.reading import read_photos
from peft_metalora.training.stage_settings import TrainEncoderConfig
from peft_metalora.training.train_encoder import train_encoder
from peft_metalora.training.watching.best_step import BestStep
from peft_metalora.training.watching.held_out import Watch
from pipelines_tiny import tiny_flux_pipeline
from training_tiny import Brightness, save_tiny_down, tiny_base, write_people


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and a Down on disk."""
    home = tmp_path_factory.mktemp("encoder")
    save_tiny_down(home)
    write_people(home / "people", subjects=3, each=2)
    return home


def config_of(home, output, **changes):
    settings = {
        "down": str(home / "down"),
        "train_data_dir": str(home / "people"),
        "output_dir": str(output),
        "resolution": 16,
        "code_size": 6,
        "encoder_width": 8,
        "encoder_hidden": 16,
        "max_train_steps": 3,
        "subjects_per_batch": 2,
        "images_per_subject": 1,
        "lr_warmup_steps": 1,
        "device": "cpu",
    }
    return TrainEncoderConfig(**{**settings, **changes})


def test_a_person_is_read_with_a_down_that_learned_to(folders, tmp_path, capsys):
    output = tmp_path / "reading"
    with pytest.warns(UserWarning, match="3 people"):
        assert train_encoder(config_of(folders, output, shift=2.0), progress=False) == output
    down = load_down(output)
    assert down.config.facts["encoder_recipe"]["shift"] == 2.0
    assert down.fingerprint == load_down(folders / "down").fingerprint
    assert down.config.facts["encoder_subjects"] == 3 and down.config.facts["encoder_steps"] == 3
    photo = next((folders / "people" / "person-0").glob("*.png"))
    arguments = ["read", "--down", str(output), "--photos", str(photo), "--output_dir", str(tmp_path / "ann")]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "1 photo(s)" in capsys.readouterr().out


def test_equal_seeds_are_equal_readers(folders, tmp_path):
    for name in ("one", "two"):
        with pytest.warns(UserWarning, match="people"):
            train_encoder(config_of(folders, tmp_path / name), progress=False)
    for file in ("subject_space.safetensors", "subject_encoder.safetensors", "encoder_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def reads_of(folders, **changes):
    """The subjects, and what a small encoder sees of their photos."""
    subjects = read_subjects(folders / "people")
    encoder = make_encoder(
        EncoderConfig(resolution=16, code_size=6, width=8), lambda pixels: torch.nn.functional.avg_pool2d(pixels, 4)
    )
    examples = Examples(torch.zeros(6, 4, 4, 4), {}, torch.zeros(6), torch.arange(6) // 2, photo=torch.arange(6))
    return read_photos(subjects, examples, encoder, config_of(folders, "unused", **changes), progress=False)


def test_a_quarter_of_what_is_read_is_bad(folders):
    reads = reads_of(folders)
    assert reads.person.bincount().tolist() == [24, 24, 24] and reads.photo.bincount().tolist() == [12] * 6
    assert len(reads.features) == 4 * 6  # each version is kept once
    first = reads.of(torch.arange(12), torch.device("cpu"))
    assert all(torch.equal(row, first[0]) for row in first[:9])
    assert not any(torch.equal(row, first[0]) for row in first[9:])
    assert reads_of(folders, bad_versions=0).photo.tolist() == list(range(6))


def test_what_was_seen_is_found_again_on_disk(folders, tmp_path, monkeypatch):
    cached = {"cache_dir": str(tmp_path / "cache")}
    first = reads_of(folders, **cached)
    monkeypatch.setattr("peft_metalora.training.examples.reading.make_worse", None)
    again = reads_of(folders, **cached)
    assert torch.equal(again.features, first.features) and torch.equal(again.row, first.row)
    with pytest.raises(TypeError):
        reads_of(folders, **cached, seed=1)


def test_bad_versions_without_the_face_are_left_out_and_so_are_photos(folders, monkeypatch):
    subjects = read_subjects(folders / "people")
    corners = [float(np.asarray(photo.load())[0, 0].mean()) for one in subjects for photo in one.photos]
    limit = sorted(corners)[1] + 0.1  # two photos are darker there

    class Bright:
        """Finds a face where a picture's corner is bright."""

        def embed(self, images):
            values = torch.tensor([[float(np.asarray(image)[0, 0].mean()), 1.0] for image in images])
            return Embeddings(values, values[:, 0] > limit)

    monkeypatch.setattr("peft_metalora.metrics.by_name.InsightFaceEmbedder", Bright)
    examples = Examples(torch.zeros(6, 4, 4, 4), {}, torch.zeros(6), torch.arange(6) // 2, photo=torch.arange(6))
    encoder = make_encoder(EncoderConfig(source="face", code_size=6))
    monkeypatch.setattr(
        "peft_metalora.training.examples.reading.make_worse", lambda image, source: Image.new("RGB", image.size)
    )
    with pytest.warns(UserWarning, match=r"skipped 2 of 6 images: expected a face in .*png, found none"):
        reads = read_photos(subjects, examples, encoder, config_of(folders, "unused", encoder="face"), progress=False)
    # What is left is the good version of each photo that shows a face.
    assert reads.photo.tolist() == [number for number, corner in enumerate(corners) if corner > limit]


def test_worse_photos_are_of_the_same_size_and_differ():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    photo, source = Image.fromarray(pixels), random.Random(0)
    made = [make_worse(photo, source) for _ in range(40)]
    assert all(image.size == photo.size and image.mode == "RGB" for image in made)
    assert len({image.tobytes() for image in made}) > len(DEGRADATIONS)
    dark = make_worse(photo, source, ("low_light",), erasing=False)
    assert np.asarray(dark).mean() < 0.9 * pixels.mean()


FILES = "subject_space.safetensors", "subject_encoder.safetensors", "encoder_config.json"
BY_SLOTS = {"gradient_checkpointing": True}  # which the stacked step cannot do


def content(folder):
    return [(folder / name).read_bytes() for name in FILES]


def teach(config):
    with pytest.warns(UserWarning, match="people"):
        train_encoder(config, progress=False)


@pytest.mark.parametrize(
    "way", [{}, BY_SLOTS, {"mixed_precision": "fp16"}], ids=["stacked", "slots", "slots in float16"]
)
def test_resumed_in_the_middle_equals_uninterrupted(folders, tmp_path, way):
    settings = {"max_train_steps": 6, "gradient_accumulation_steps": 2, **way}
    teach(config_of(folders, tmp_path / "whole", **settings, checkpointing_steps=2))
    for step in (2, 4, 6):
        folder = str(tmp_path / "whole" / f"checkpoint-{step}")
        teach(config_of(folders, tmp_path / f"{step}", **settings, resume_from_checkpoint=folder))
        assert content(tmp_path / f"{step}") == content(tmp_path / "whole")
    # Killed in step 5: 'latest' goes on after step 4, and only the newest are kept.
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    settings |= {"checkpointing_steps": 1, "checkpoints_total_limit": 2, "resume_from_checkpoint": "latest"}
    teach(config_of(folders, tmp_path / "whole", **settings))
    assert content(tmp_path / "whole") == content(tmp_path / "2")
    left = sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*"))
    assert left == ["checkpoint-5", "checkpoint-6"]


def test_a_run_goes_on_only_as_what_it_was(folders, tmp_path):
    teach(config_of(folders, tmp_path / "one", checkpointing_steps=2))
    folder = str(tmp_path / "one" / "checkpoint-2")
    other = write_people(tmp_path / "other", subjects=4)
    torch.manual_seed(1)
    pipe = tiny_flux_pipeline()
    pipe.transformer.add_adapter(MetaLoraConfig(r=2, meta_r=4, lora_alpha=2, target_modules=["to_q"]), "faces")
    save_down(tmp_path / "down", pipe.transformer, "faces", base_model=str(folders / "base"))
    for changes, message in (
        ({"learning_rate": 0.1}, "other values of learning_rate"),
        ({"max_train_steps": 9}, "other values of max_train_steps"),
        ({"encoder_dropout": 0.0}, "other values of encoder_dropout"),
        ({"train_data_dir": str(other)}, "expected the photos of the run"),
        ({"down": str(tmp_path / "down")}, "expected the Down of the run"),
    ):
        config = config_of(folders, tmp_path / "again", resume_from_checkpoint=folder, **changes)
        with pytest.warns(UserWarning, match="people"), pytest.raises(ConfigError, match=message):
            train_encoder(config, progress=False)
    assert not (tmp_path / "again").exists()


def test_training_does_not_notice_that_it_is_looked_at(folders, tmp_path, monkeypatch):
    offer = BestStep.offer
    monkeypatch.setattr(BestStep, "offer", lambda self, step, score: offer(self, step, step))  # the last is the best
    write_people(tmp_path / "others", subjects=2, each=3)
    looking = {"validation_steps": 2, "validation_data_dir": str(tmp_path / "others"), "max_train_steps": 4}
    drawing = {"validation_prompt": ["a photo"], "report_to": "tensorboard"}
    for name, way in (("stacked", {}), ("slots", {**BY_SLOTS, **drawing})):
        blind, seeing = tmp_path / f"blind-{name}", tmp_path / f"seeing-{name}"
        teach(config_of(folders, blind, max_train_steps=4, **(BY_SLOTS if way else {})))
        teach(config_of(folders, seeing, **looking, **way))
        assert content(seeing) == content(blind)
    seen = {}
    for name in ("stacked", "slots"):
        place = tmp_path / f"seeing-{name}" / "validation"
        seen[name] = [json.loads(line) for line in (place / "scores.jsonl").read_text().splitlines()]
        assert [record["step"] for record in seen[name]] == [2, 4]
        assert list(seen[name][0]["subjects"]) == ["person-0", "person-1"]
        assert seen[name][0]["score"] != seen[name][1]["score"]
    assert sorted(path.name for path in place.iterdir()) == ["00002.png", "00004.png", "scores.jsonl"]
    assert Image.open(place / "00004.png").size == (2 * 16, 2 * 16)
    for one, other in zip(seen["stacked"], seen["slots"], strict=True):
        assert one["score"] == pytest.approx(other["score"], rel=1e-4)
    (events,) = (tmp_path / "seeing-slots" / "logs" / "metalora").glob("events*")
    found = EventAccumulator(str(events.parent)).Reload()
    assert {"loss", "lr", "validation_score"} <= set(found.Tags()["scalars"])
    assert [one.step for one in found.Scalars("loss")] == [1, 2, 3, 4]
    # Only names of folders leave the machine.
    for path in (tmp_path / "seeing-slots" / "logs").rglob("*"):
        assert path.is_dir() or (str(tmp_path).encode() not in path.read_bytes())
        assert path.is_dir() or (str(folders).encode() not in path.read_bytes())


def test_the_step_that_reads_others_best_is_written(folders, tmp_path, monkeypatch):
    """Bug: a run over few people wrote its last step, which had learned them by heart and read others worse."""
    write_people(tmp_path / "others", subjects=1, each=2)
    settings = {"validation_steps": 2, "validation_data_dir": str(tmp_path / "others"), "checkpointing_steps": 2}
    settings |= {"max_train_steps": 6, "learning_rate": 0.1}
    monkeypatch.setattr(Watch, "finish", lambda self, step: -float(step))
    teach(config_of(folders, tmp_path / "out", **settings))
    assert load_down(tmp_path / "out").config.facts["encoder_steps"] == 2

    def going_on(step):
        folder = str(tmp_path / "out" / f"checkpoint-{step}")
        return config_of(folders, tmp_path / "again", **settings, resume_from_checkpoint=folder)

    second = read_state(going_on(2))["encoder"]
    written = load_file(tmp_path / "out" / "subject_encoder.safetensors")
    assert written and all(torch.equal(tensor, second[name].to(tensor.dtype)) for name, tensor in written.items())
    # Also by a run that was killed after it.
    teach(going_on(4))
    assert content(tmp_path / "again") == content(tmp_path / "out")


def test_a_resumed_run_may_be_looked_at_in_another_way(folders, tmp_path, monkeypatch):
    """Bug: with validation from then on the checkpoint was called broken; with another score the best step so far by
    the older one was written, whatever came after."""
    write_people(tmp_path / "others", subjects=1, each=2)
    looking = {"validation_steps": 2, "validation_data_dir": str(tmp_path / "others")}
    by_face = {**looking, "validation_embedder": "training_tiny:Brightness", "validation_prompt": ["a photo"]}
    monkeypatch.setattr(Watch, "finish", lambda self, step: 10.0 - step if self._faces else step - 10.0)
    settings = {"max_train_steps": 6, "checkpointing_steps": 2}
    for name, before, now, best in (
        ("new", {}, looking, 6),
        ("other", by_face, looking, 6),
        ("same", by_face, by_face, 2),
        ("none", by_face, {}, 6),
    ):
        teach(config_of(folders, tmp_path / name, **settings, **before))
        checkpoint = str(tmp_path / name / "checkpoint-4")
        teach(config_of(folders, tmp_path / name, **settings, **now, resume_from_checkpoint=checkpoint))
        assert load_down(tmp_path / name).config.facts["encoder_steps"] == best, name


def test_a_copy_of_a_photo_is_no_other_photo(folders, tmp_path):
    """Bug: an encoder was judged by a copy of the very photo that it read."""
    people = shutil.copytree(folders / "people", tmp_path / "people")
    shutil.copy(people / "person-0" / "0.png", people / "person-0" / "1.png")
    with pytest.warns(UserWarning, match="left out 1 of 3 people, who have one photo: person-0"):
        train_encoder(config_of(folders, tmp_path / "out", train_data_dir=str(people)), progress=False)


def test_held_out_people_who_are_trained_on_are_named(folders, tmp_path):
    """Bug: the best step was chosen on people who were trained on, without a word."""
    looking = {"validation_steps": 2, "validation_data_dir": str(folders / "people"), "validation_subjects": 1}
    with pytest.warns(UserWarning, match=r"2 photos that validation looks at are trained on, too \(person-0\)"):
        train_encoder(config_of(folders, tmp_path / "out", **looking), progress=False)


def test_the_score_is_that_of_a_person_who_is_read(folders, tmp_path):
    write_people(tmp_path / "others", subjects=1, each=2)
    looking = {"validation_steps": 3, "validation_data_dir": str(tmp_path / "others"), "validation_prompt": ["a photo"]}
    looking["validation_embedder"] = "training_tiny:Brightness"
    teach(config_of(folders, tmp_path / "out", **looking, space_learning_rate=0.1))
    (line,) = (tmp_path / "out" / "validation" / "scores.jsonl").read_text().splitlines()
    # The same person, read from the files.
    pipe = enable_meta_lora(load_base(str(folders / "base"), dtype=torch.float32).pipeline)
    reference, other = sorted((tmp_path / "others" / "person-0").glob("*.png"))
    pipe.read_subject(reference, "ann", down=str(tmp_path / "out"))
    drawn = pipe("a photo", generator=torch.Generator().manual_seed(0), height=16, width=16, num_inference_steps=20)
    embedder = Brightness()
    score = r_facesim(embedder.embed(drawn.images), embedder.embed([Image.open(other)])).mean
    assert json.loads(line)["score"] == pytest.approx(score, abs=1e-3)  # the basis at rest is bfloat16


def test_held_out_people_of_the_folder_are_not_trained_on(folders, tmp_path):
    teach(config_of(folders, tmp_path / "out", validation_steps=2, validation_subjects=1))
    assert load_down(tmp_path / "out").config.facts["encoder_subjects"] == 2
    (line,) = (tmp_path / "out" / "validation" / "scores.jsonl").read_text().splitlines()
    assert list(json.loads(line)["subjects"]) == ["person-2"]


@pytest.mark.parametrize("way", [{}, BY_SLOTS], ids=["stacked", "slots"])
def test_a_gradient_that_is_no_number_stops_the_run(folders, tmp_path, monkeypatch, way):
    gradients = SlotGradients if way else RowGradients
    original, calls = gradients.__call__, []

    def bad(self, inputs):
        losses, gradient = original(self, inputs)
        calls.append(len(calls))
        return losses, gradient * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(gradients, "__call__", bad)
    config = config_of(folders, tmp_path / "out", max_train_steps=5, checkpointing_steps=1, **way)
    with (
        pytest.warns(UserWarning, match="people"),
        pytest.raises(TrainingError, match=r"finite gradients.* in step 3.*No result.*good checkpoint is .*point-2\."),
    ):
        train_encoder(config, progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_a_loss_that_is_no_number_stops_the_run(folders, tmp_path, monkeypatch):
    original = RowGradients.__call__
    monkeypatch.setattr(
        RowGradients, "__call__", lambda self, inputs: tuple(part * torch.nan for part in original(self, inputs))
    )
    with pytest.warns(UserWarning, match="people"), pytest.raises(TrainingError, match="no checkpoint is from before"):
        train_encoder(config_of(folders, tmp_path / "out"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("way", "half"), [({}, "bf16"), (BY_SLOTS, "bf16"), (BY_SLOTS, "fp16")], ids=["stacked", "slots", "float16"]
)
def test_a_base_in_half_precision_teaches_the_same(folders, tmp_path, way, half):
    losses = []
    for precision in ("no", half):
        config = config_of(folders, tmp_path / precision, mixed_precision=precision, checkpointing_steps=3, **way)
        teach(config)
        config.resume_from_checkpoint = "checkpoint-3"
        losses.append(read_state(config)["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


def test_want_of_memory_is_a_sentence_and_writes_nothing(folders, tmp_path, monkeypatch, capsys):
    def full(self, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")

    monkeypatch.setattr(RowGradients, "__call__", full)
    settings = {name: value for name, value in vars(config_of(folders, tmp_path / "out")).items() if value}
    flags = [
        part for name, value in settings.items() if not isinstance(value, bool) for part in (f"--{name}", str(value))
    ]
    assert main(["train-encoder", *flags]) == 2
    assert "expected enough memory, found: CUDA out of memory" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_it_writes_what_there_is(folders, tmp_path, monkeypatch):
    original, calls = RowGradients.__call__, []

    def interrupted(self, inputs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, inputs)

    monkeypatch.setattr(RowGradients, "__call__", interrupted)
    with pytest.warns(UserWarning, match="people"), pytest.raises(KeyboardInterrupt):
        train_encoder(config_of(folders, tmp_path / "out"), progress=False)
    assert load_down(tmp_path / "out").config.facts["encoder_steps"] == 2
    assert all((tmp_path / "out" / name).exists() for name in FILES)


def test_few_people_and_people_with_one_photo_are_told(folders, tmp_path):
    people = write_people(tmp_path / "people", subjects=3, each=2)
    lines = (people / "person-1" / "metadata.jsonl").read_text().splitlines()
    (people / "person-1" / "1.png").unlink()
    (people / "person-1" / "metadata.jsonl").write_text(lines[0])
    with pytest.warns(UserWarning) as warnings:
        train_encoder(config_of(folders, tmp_path / "out", train_data_dir=str(people)), progress=False)
    told = [str(one.message) for one in warnings]
    assert any(text.startswith("2 people: ") and "0.69 after 1024" in text for text in told)
    assert "left out 1 of 3 people, who have one photo: person-1" in told
    assert load_down(tmp_path / "out").config.facts["encoder_subjects"] == 2


def test_which_gradients_are_taken_is_a_rule_and_is_said(folders, tmp_path, capsys, monkeypatch):
    with pytest.warns(UserWarning, match="people"):
        train_encoder(config_of(folders, tmp_path / "out", max_train_steps=1), progress=True)
    assert "gradients of 2 people a batch: stacked (a base of 0 M numbers, at most 100 M)" in capsys.readouterr().err
    base = tiny_base()
    for changes, why in ((BY_SLOTS, "gradient_checkpointing"), ({"dynamo_backend": "eager"}, "dynamo_backend")):
        assert module.stacks(base, config_of(folders, "unused", **changes), Processes()) == (False, why)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    found = module.stacks(base, config_of(folders, "unused"), Processes(0, 2))
    assert found == (False, "the base is divided over processes")
    base.denoiser.numbers_of_a_large_one = torch.nn.Parameter(torch.empty(101_000_000, device="meta"))
    taken, why = module.stacks(base, config_of(folders, "unused"), Processes())
    assert not taken and why == "a base of 101 M numbers, more than 100 M"


def test_what_cannot_be_trained_is_named_and_writes_nothing(folders, tmp_path):
    alone = write_people(tmp_path / "alone", subjects=2, each=1)
    with pytest.warns(UserWarning, match="people"), pytest.raises(TooFewImagesError, match="give more photos"):
        train_encoder(config_of(folders, tmp_path / "out", train_data_dir=str(alone)), progress=False)
    with pytest.warns(UserWarning, match="people"), pytest.raises(ConfigError, match="encoder must be one of"):
        train_encoder(config_of(folders, tmp_path / "out", encoder="eyes"), progress=False)
    with pytest.raises(ConfigError, match="bad_versions"):
        config_of(folders, tmp_path / "out", bad_versions=-1)
    with pytest.raises(ConfigError):
        train_encoder(config_of(folders, folders / "down"), progress=False)
    assert not (tmp_path / "out").exists()
