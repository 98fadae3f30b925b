# SPDX-License-Identifier: Apache-2.0
"""Stage 2: Down never moves, slots equal one by one, the baseline is an ordinary LoRA, nothing is left half done."""

from __future__ import annotations

import copy
import errno
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from peft_metalora import enable_meta_lora, errors, hub, load_subject
from peft_metalora.bases import base_for
from peft_metalora.demo.embedded import BASE, DOWN
from peft_metalora.demo.faces import write_dataset
from peft_metalora.errors import (
    ConfigError,
    MetaLoraError,
    NoImagesError,
    RankMismatchError,
    TrainingError,
    UnreadableImageError,
    WriteFailedError,
)
from peft_metalora.hub.cards import model_card
from peft_metalora.training import personalize as personalize_module
from peft_metalora.training.engine.state import read_state
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.personalize import personalize, personalize_many
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.training.stage_settings import PersonalizeConfig
from peft_metalora.tuner import set_slots, subject_state
from peft_metalora.tuner.on_model import meta_lora_layers
from pipelines_tiny import tiny_flux_pipeline
from training_tiny import personal_config, tiny_examples, write_people


def file_config(place, output, **changes):
    settings = {
        "pretrained_model_name_or_path": str(place / "base"),
        "instance_data_dir": str(place / "people" / "person-0" / "0.png"),
        "down": str(place / "down"),
        "output_dir": str(output),
    }
    return personal_config(**{**settings, **changes})


def only(examples, subject):
    chosen = examples.subject == subject
    zero = torch.zeros(int(chosen.sum()), dtype=torch.int64)
    return Examples(examples.latents[chosen], examples.text, examples.caption[chosen], zero)


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"alpha_pattern": {"to_k": 8}}, {"use_dora": True}], ids=str
)
def test_another_rank_keeps_the_downs_scale_and_its_decomposition(base, down, settings):
    """Bug: rsLoRA doubled the scale, alpha_pattern was not adapted to the rank, and use_dora was dropped."""
    config = replace(down.config, lora_alpha=4, **settings)
    Personalization(
        base, tiny_examples(base, subjects=1), personal_config(start="fresh", rank=8), replace(down, config=config)
    )
    layers = [layer for path, layer in meta_lora_layers(base.denoiser) if path.endswith("to_k")]
    assert {"default" in layer.metalora_magnitude for layer in layers} == {"use_dora" in settings}
    expected = 8 / 2 if "alpha_pattern" in settings else 4 / 2**0.5 if "use_rslora" in settings else 4 / 2
    assert [layer.scaling["default"] for layer in layers] == pytest.approx([expected] * len(layers))


@pytest.mark.parametrize("changes", [{}, {"method": "lora", "rank": 2}], ids=str)
def test_removing_gives_the_denoiser_back_as_it_was(base, down, changes):
    """Bug: what was trainable, training mode and gradient checkpointing stayed as the run had set them."""

    def look():
        modes = [module.training for module in base.denoiser.modules()]
        return modes, [p.requires_grad for p in base.denoiser.parameters()], base.denoiser.is_gradient_checkpointing

    base.denoiser.train()
    base.denoiser.proj_out.requires_grad_(False)
    before = look()
    config = personal_config(gradient_checkpointing=True, **changes)
    run = Personalization(base, tiny_examples(base, subjects=1), config, down)
    assert base.denoiser.is_gradient_checkpointing
    run.remove()
    assert look() == before and not hasattr(base.denoiser, "peft_config")


def test_down_and_base_never_move_and_have_no_gradient(base, down):
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    run = Personalization(base, tiny_examples(base, subjects=1), personal_config(), down)
    layers = list(meta_lora_layers(base.denoiser))
    for _ in run.steps():
        for path, layer in layers:
            (key,) = layer.metalora_down
            assert torch.equal(layer.metalora_down[key], down.tensors[f"{path}.metalora_down"])
            assert layer.metalora_down[key].grad is None and not layer.metalora_down[key].requires_grad
            assert layer.base_layer.weight.grad is None
            assert layer.metalora_up["default"].abs().sum() > 0
    run.remove()
    after = base.denoiser.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_bfloat16_without_autocast_is_as_near_to_float32_as_with_it(base, down):
    """The adapter casts its factors itself, so the base runs in bfloat16 alone, and loses nothing by it."""

    def gradient(precision, native=True):
        copied = copy.deepcopy(base.pipeline)
        copied.transformer.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        config = personal_config(mixed_precision=precision)
        run = Personalization(base_for(copied), only(tiny_examples(base), 0), config, down)
        with torch.autocast("cpu", torch.bfloat16, enabled=not native):
            run._loss().backward()  # a whole step would clear the gradient
        assert all(parameter.dtype == torch.float32 for parameter in run.parameters)
        return torch.cat([parameter.grad.flatten() for parameter in run.parameters])

    exact = gradient("no")
    native, autocast = ((gradient("bf16", native) - exact).norm() / exact.norm() for native in (True, False))
    assert 0 < native < 0.1
    assert native < 1.5 * autocast


@pytest.mark.parametrize("settings", [{}, {"method": "lora", "rank": 2}], ids=["meta-lora", "lora"])
def test_a_run_in_float16_is_the_run_in_float32(place, tmp_path, settings):
    factors = {}
    for precision in ("no", "fp16"):
        # Not Adam, whose steps are as large for a gradient that rounding made.
        settings |= {"optimizer": "SGD", "learning_rate": 0.1, "checkpointing_steps": 2}
        config = file_config(place, tmp_path / precision, mixed_precision=precision, **settings).settled(False)
        personalize(config, progress=False)
        stored = read_state(replace(config, resume_from_checkpoint="checkpoint-2"))
        factors[precision] = torch.cat([one.flatten() for one in stored["run"]["parameters"]])
    scale = stored["run"]["scale"]
    assert scale["value"] <= 2.0**16 and scale["good"] == 2
    torch.testing.assert_close(factors["fp16"], factors["no"], rtol=1e-2, atol=1e-3)
    assert not torch.equal(factors["fp16"], factors["no"])
    # One that goes on from there takes up the scale, too.
    start = str(tmp_path / "fp16" / "checkpoint-2")
    personalize(replace(config, output_dir=str(tmp_path / "on"), resume_from_checkpoint=start), progress=False)
    for file in (tmp_path / "fp16").glob("*.safetensors"):
        resumed, whole = load_file(tmp_path / "on" / file.name), load_file(file)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("start", ["stored", "mean"])
def test_many_at_once_equal_one_by_one(base, down, start):
    examples = tiny_examples(base, subjects=3, each=4)
    config = personal_config(start=start, max_train_steps=6)
    run = personalize_many(base, examples, config, down, progress=False)
    together = [subject_state(base.denoiser, "default", slot) for slot in range(3)]
    together = [{name: tensor.clone() for name, tensor in state.items()} for state in together]
    run.remove()
    for subject in range(3):
        alone = personalize_many(base, only(examples, subject), config, down, progress=False)
        for name, tensor in subject_state(base.denoiser, "default").items():
            assert torch.allclose(tensor, together[subject][name], atol=2e-5), name
        alone.remove()


def test_starts(base, down):
    for start in ("stored", "mean", "fresh"):
        run = Personalization(base, tiny_examples(base, 1), personal_config(start=start), down)
        for path, layer in meta_lora_layers(base.denoiser):
            mid, up = layer.metalora_mid["default"][0], layer.metalora_up["default"][0]
            stored = torch.equal(mid, down.tensors[f"{path}.metalora_mid_init"])
            mean = torch.equal(mid, down.tensors[f"{path}.metalora_mid"][0])
            assert (stored, mean) == (start == "stored", start == "mean")
            assert (up.abs().sum() == 0) == (start != "mean")
        run.remove()


def test_writes_a_subject_that_a_stock_pipeline_shows(place, tmp_path):
    folder = personalize(file_config(place, tmp_path / "ann", instance_prompt="sks person"), progress=False)
    names = ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    learned = hub.load_subject(folder).config
    assert learned.facts["steps"] == 3
    card = model_card(learned, "ann/me", folder)
    assert "The words that call it: `sks person`" in card and "| trainable_parameters |" in card
    pipe = enable_meta_lora(tiny_flux_pipeline())

    def draw():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "max_sequence_length": 16, "output_type": "pt", "height": 16, "width": 16}
        return pipe("a photo of a person", generator=generator, **options).images

    before = draw()
    pipe.load_meta_lora(folder)
    assert not torch.equal(draw(), before)
    pipe.unload_meta_lora()
    assert torch.equal(draw(), before)


def test_plain_lora_is_a_file_that_diffusers_loads(place, tmp_path):
    config = file_config(place, tmp_path / "lora", method="lora", down=None, rank=2)
    personalize(config, progress=False)
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert {tensor.shape[0] for name, tensor in weights.items() if "lora_A" in name} == {2}
    pipe = tiny_flux_pipeline()
    pipe.load_lora_weights(tmp_path / "lora")
    loaded = dict(pipe.transformer.named_parameters())
    assert sum("lora_B" in name for name in loaded) == sum("lora_B" in name for name in weights) == 17
    assert all(tensor.abs().sum() > 0 for name, tensor in loaded.items() if "lora_B" in name)


def test_checkpoints_on_the_way_are_subjects(place, tmp_path):
    personalize(file_config(place, tmp_path / "ann", checkpointing_steps=1), progress=False)
    for step in (1, 2):
        assert hub.load_subject(tmp_path / "ann" / f"checkpoint-{step}").config.facts["steps"] == step
    assert hub.load_subject(tmp_path / "ann").config.facts["steps"] == 3


@pytest.mark.parametrize("steps", [0, 2])
def test_interrupt_leaves_a_usable_subject_or_nothing(place, tmp_path, monkeypatch, steps):
    def interrupted(self, original=Personalization._loss):
        if self.steps_done == steps:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Personalization, "_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        personalize(file_config(place, tmp_path / "ann"), progress=False)
    if steps:
        assert hub.load_subject(tmp_path / "ann").config.facts["steps"] == steps
    else:
        assert list(tmp_path.iterdir()) == []


def test_unreadable_images_are_left_out_and_named(place, tmp_path):
    people = write_people(tmp_path / "people", subjects=1, each=3)
    (people / "person-0" / "1.png").write_bytes(b"no image")
    config = file_config(place, tmp_path / "ann", instance_data_dir=str(people / "person-0"), instance_prompt="a photo")
    with pytest.warns(match=r"skipped 1 of 3 images: .*person-0/1\.png which cannot be decoded"):
        personalize(config, progress=False)
    assert hub.load_subject(tmp_path / "ann").config.facts["steps"] == 3


@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_full_disk_leaves_nothing(place, tmp_path, monkeypatch, method):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peft_metalora.files.os.replace", full)
    with pytest.raises(WriteFailedError, match="No space left"):
        personalize(file_config(place, tmp_path / "ann", method=method), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_can_be_looked_at_between_steps_without_changing_the_run(base, down):
    states = []
    for look in (False, True):
        run = Personalization(base, tiny_examples(base, 2), personal_config(), down)
        for _ in run.steps():
            if look:
                set_slots(base.denoiser, [1])
                torch.manual_seed(5)
                base.pipeline(
                    "a red shirt", height=16, width=16, num_inference_steps=1, max_sequence_length=16, output_type="pt"
                )
        states.append({name: tensor.clone() for name, tensor in subject_state(base.denoiser, "default", 1).items()})
        run.remove()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_learning_rate_that_destroys_ends_the_run(tmp_path):
    """Bug: `learning_rate 1e3` trained to rubbish, wrote it and said nothing."""
    write_dataset(tmp_path / "people", "held-out", 1, 1)
    config = PersonalizeConfig(
        pretrained_model_name_or_path=str(BASE),
        down=str(DOWN),
        start="stored",
        instance_data_dir=str(next((tmp_path / "people").glob("*/*.png"))),
        output_dir=str(tmp_path / "ann"),
        resolution=64,
        views_per_image=4,
        learning_rate=1e3,
        max_train_steps=8,
        checkpointing_steps=3,
    )
    with pytest.raises(TrainingError, match=r"destroyed what it learns.* No result was written to .*no checkpoint"):
        personalize(config, progress=False)
    assert not (tmp_path / "ann" / "adapter_config.json").exists()


@pytest.mark.parametrize("start", [1, 3, 5])
def test_an_error_says_which_checkpoint_is_good(place, tmp_path, monkeypatch, start):
    """Bug: a NaN gradient spoiled the weights in silence, and no word said what was left of the run."""
    calls, real = [], Personalization._loss

    def loss(self):
        calls.append(None)
        found = real(self)
        if len(calls) > start:
            found.register_hook(lambda gradient: gradient * float("nan"))
        return found

    monkeypatch.setattr(Personalization, "_loss", loss)
    config = file_config(place, tmp_path / "ann", max_train_steps=9, checkpointing_steps=2)
    left = f"the last good checkpoint is {tmp_path / 'ann' / f'checkpoint-{start - 1}'}"
    with pytest.raises(TrainingError, match="no checkpoint is from before" if start == 1 else re.escape(left)):
        personalize(config, progress=False)
    assert not (tmp_path / "ann" / "adapter_config.json").exists()
    assert start == 1 or hub.load_subject(tmp_path / "ann" / f"checkpoint-{start - 1}")


def test_an_output_that_would_fall_on_an_input_is_refused_before_any_work(place, tmp_path, monkeypatch):
    """Bug: `personalize --down D --output_dir D` left a subject where the Down was, with exit code 0."""
    monkeypatch.setattr(personalize_module, "prepare", lambda *_, **__: pytest.fail("work before the check"))
    shutil.copytree(place / "down", tmp_path / "down")
    shutil.copytree(place / "people" / "person-0", tmp_path / "photos")
    write_people(tmp_path / "out" / "validation", subjects=1)
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    settings = {"down": str(tmp_path / "down"), "instance_data_dir": str(tmp_path / "photos")}
    places = ["down", "down/../down", "photos", "photos/new"]
    cases = [{"output_dir": str(tmp_path / name)} for name in places]
    cases += [{"cache_dir": str(tmp_path / name)} for name in ("down", "photos", "photos/cache", "ann")]
    cases += [{"logging_dir": str(tmp_path / "photos"), "report_to": "tensorboard"}]
    held_out = {"validation_data_dir": str(tmp_path / "out" / "validation"), "validation_steps": 1}
    cases += [{"output_dir": str(tmp_path / "out"), **held_out}]
    cases += [{"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": str(tmp_path / "out")}]
    for changes in cases:
        config = file_config(place, tmp_path / "ann", **{**settings, **changes})
        with pytest.raises(ConfigError, match="apart from"):
            personalize(config, progress=False)
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_nobody_elses_output_is_replaced_unasked_and_that_before_any_work(place, tmp_path, monkeypatch):
    """Bug: a run for one person replaced the subject of another, or a Down, that lay in its output folder."""
    people = place / "people"
    config = file_config(place, tmp_path / "out", instance_data_dir=str(people / "person-0"))
    assert load_subject(personalize(config, progress=False)).config.subject_name == "person-0"
    personalize(config, progress=False)
    other = file_config(place, tmp_path / "out", instance_data_dir=str(people / "person-1"))
    monkeypatch.setattr("peft_metalora.training.personalize.prepare", lambda *_, **__: pytest.fail("work"))
    for wrong in (other, file_config(place, tmp_path / "out", method="lora", down=None)):
        with pytest.raises(errors.OutputExistsError, match="overwrite"):
            personalize(wrong, progress=False)
    monkeypatch.undo()
    personalize(file_config(place, tmp_path / "out", instance_data_dir=other.instance_data_dir, overwrite=True))
    assert load_subject(tmp_path / "out").config.subject_name == "person-1"


def test_replacing_somebody_leaves_nothing_of_them(place, tmp_path):
    """Bug: checkpoints, validation pictures, logs and the card of the older person stayed beside the newer."""
    pytest.importorskip("tensorboard")
    people, out = place / "people", tmp_path / "out"
    held = {"validation_data_dir": str(people / "person-1"), "validation_steps": 1, "validation_prompt": "a photo"}
    config = file_config(place, out, instance_data_dir=str(people / "person-0"), **held, report_to="tensorboard")
    personalize(replace(config, checkpointing_steps=1), progress=False)
    (out / "README.md").write_text("All about person-0, by hand.")
    assert {"checkpoint-1", "validation", "logs"} <= {path.name for path in out.iterdir()}
    (out / "notes.txt").write_text("mine")
    personalize(
        file_config(place, out, instance_data_dir=str(people / "person-1"), overwrite=True, max_train_steps=1),
        progress=False,
    )
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
    assert left == {*adapter, "notes.txt"}


def test_a_run_that_goes_on_elsewhere_leaves_nothing_of_who_was_there(place, tmp_path):
    """Bug: a run that went on from a checkpoint in another folder took its output's checkpoints and pictures for its
    own: those of the older person stayed beside the newer."""
    people, ann, out = place / "people", tmp_path / "ann", tmp_path / "out"
    looks = {"checkpointing_steps": 1, "validation_steps": 1, "validation_prompt": ["a photo"]}
    config = file_config(place, ann, instance_data_dir=str(people / "person-1"), **looks, max_train_steps=3)
    personalize(config, progress=False)
    older = replace(config, instance_data_dir=str(people / "person-0"), output_dir=str(out), max_train_steps=2)
    personalize(older, progress=False)
    went_on = replace(config, output_dir=str(out), resume_from_checkpoint=str(ann / "checkpoint-2"), overwrite=True)
    personalize(went_on, progress=False)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert load_subject(out / "checkpoint-3").config.subject_name == "person-1"
    assert [path.name for path in out.glob("validation/*")] == ["00003-00.png"]
    whole, found = load_subject(ann).tensors, load_subject(out).tensors
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    # In the folder of its checkpoint it keeps what it had.
    personalize(replace(config, resume_from_checkpoint="checkpoint-2"), progress=False)
    assert len(list(ann.glob("checkpoint-*"))) == len(list(ann.glob("validation/*"))) == 3


def test_a_photo_alone_replaces_nobody_unasked(place, tmp_path):
    """Bug: who was learned from one photo had no name, and took the place of anybody without `overwrite`."""
    people, out = place / "people", tmp_path / "out"
    personalize(file_config(place, out, instance_data_dir=str(people / "person-0"), checkpointing_steps=1))
    before = (out / "adapter_model.safetensors").read_bytes()
    photo = file_config(place, out, instance_data_dir=str(people / "person-1" / "0.png"))
    with pytest.raises(errors.OutputExistsError, match="the subject 'person-0', not 'out'"):
        personalize(photo, progress=False)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    for path in out.glob("*.*"):
        path.unlink()
    with pytest.raises(errors.OutputExistsError, match="checkpoint-"):  # of a run that was killed
        personalize(photo, progress=False)
    personalize(replace(photo, overwrite=True), progress=False)
    assert load_subject(out).config.subject_name == "out"


def test_a_new_run_leaves_nothing_of_an_older_one(place, tmp_path):
    """Bug: pictures and checkpoints of the photo before stayed in a folder that says it is somebody else."""
    out = tmp_path / "out"
    config = file_config(place, out, instance_data_dir=str(place / "people" / "person-0" / "0.png"))
    personalize(
        replace(config, max_train_steps=4, checkpointing_steps=1, validation_steps=1, validation_prompt="a"),
        progress=False,
    )
    assert len(list(out.glob("checkpoint-*"))) == 4 and len(list(out.glob("validation/*"))) == 4
    mine = [out / "validation" / "ann.png", out / "logs" / "mine.log", out / "checkpoint-7" / "optimizer.bin"]
    mine.append(out / "logs" / "another run" / "events.out.tfevents.1")
    older = out / "logs" / "metalora" / "events.out.tfevents.1"
    for path in (*mine, older):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    other = replace(config, instance_data_dir=str(place / "people" / "person-1" / "0.png"), checkpointing_steps=2)
    personalize(other, progress=False)
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
        "validation", "logs", "checkpoint-7", "checkpoint-2",
    }  # fmt: skip
    assert not older.exists()
    assert all(path.read_text() == "mine" for path in mine) and len(list(out.glob("validation/*"))) == 1


def test_a_place_that_cannot_be_written_is_refused_before_any_work(place, tmp_path, monkeypatch):
    """Bug: a whole training was lost to a folder that could not be made, or ended at the first validation."""
    monkeypatch.setattr(personalize_module, "prepare", lambda *_, **__: pytest.fail("work before the check"))
    (tmp_path / "file").write_text("a file")
    (tmp_path / "out").mkdir()
    for name in ("logs", "validation"):
        (tmp_path / "out" / name).write_text("a file")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for changes in (
        {"output_dir": str(tmp_path / "file" / "ann")},
        {"output_dir": str(tmp_path / "gone")},
        {"cache_dir": str(tmp_path / "file" / "cache")},
        {"output_dir": str(tmp_path / "out"), "report_to": "tensorboard"},
        {"output_dir": str(tmp_path / "out"), "validation_steps": 1},
    ):
        with pytest.raises(WriteFailedError, match="is no folder"):
            personalize(file_config(place, **{"output": tmp_path / "ann", **changes}), progress=False)
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(WriteFailedError, match="closed to you"):
        personalize(file_config(place, tmp_path / "new" / "ann"), progress=False)


def test_bad_input_is_one_clear_sentence_and_changes_nothing(place, tmp_path, base, down):
    names = [name for name, _ in base.denoiser.named_modules()]
    cases = [
        (file_config(place, tmp_path / "x", instance_data_dir=str(tmp_path / "none")), NoImagesError, "check the path"),
        (
            file_config(place, tmp_path / "x", instance_data_dir=__file__, instance_prompt="a"),
            UnreadableImageError,
            "cannot be decoded",
        ),
        (file_config(place, tmp_path / "x", down=None), ConfigError, "needs a Down"),
        (file_config(place, tmp_path / "x", rank=3), (ConfigError, RankMismatchError), "rank must be the Down's, 2"),
        (file_config(place, tmp_path / "x", down=str(place / "base")), MetaLoraError, "base"),
    ]
    for config, error, message in cases:
        with pytest.raises(error, match=message):
            personalize(config, progress=False)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="one subject a run, found 2"):
        Personalization(base, tiny_examples(base, 2), personal_config(method="lora"))
    foreign = {name.replace("transformer_blocks.0", "transformer_blocks.7"): t for name, t in down.tensors.items()}
    with pytest.raises(MetaLoraError):
        Personalization(base, tiny_examples(base, 1), personal_config(), replace(down, tensors=foreign))
    assert [name for name, _ in base.denoiser.named_modules()] == names


def test_a_down_of_another_base_is_refused(base, down):
    wide = {name: tensor.repeat(1, 2) if "down" in name else tensor for name, tensor in down.tensors.items()}
    with pytest.raises(MetaLoraError, match="base model"):
        Personalization(
            base, tiny_examples(base, 1), personal_config(), type(down)(down.config, wide, down.fingerprint)
        )
