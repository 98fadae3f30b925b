# SPDX-License-Identifier: Apache-2.0
"""All training on two processes (gloo) gives what one process gives, with a whole base and with a divided one."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from PIL import Image
from safetensors.torch import load_file

from forked import on_processes
from peft_metalora import load_subject
from peft_metalora.errors import ConfigError
from peft_metalora.training.engine.processes import Processes
from peft_metalora.training.engine.sharding import shard, wants_shards
from peft_metalora.training.engine.state import read_state
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.training.stage_settings import MetaTrainConfig, TrainEncoderConfig
from peft_metalora.training.train_encoder import check_shares, train_encoder
from pipelines_tiny import save_tiny_flux
from training_tiny import meta_config, personal_config, teach_to_read, tiny_base, tiny_examples, write_people


def launched(prepare, *flags):
    """What `accelerate launch` with these flags puts into the environment of its processes."""
    shared = ["--num_processes", "2", "--num_machines", "1", "--dynamo_backend", "no"]
    arguments = launch_command_parser().parse_args([*flags, *shared, "script.py"])
    arguments.mixed_precision, arguments.deepspeed_fields_from_accelerate_config = "no", ""
    made = prepare(arguments)
    made = made[1] if isinstance(made, tuple) else made
    return {name: value for name, value in made.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


FSDP = launched(prepare_multi_gpu_env, "--use_fsdp", "--fsdp_version", "2")
ZERO = {**launched(prepare_deepspeed_cmd_env, "--use_deepspeed", "--zero_stage", "3"), "DS_ACCELERATOR": "cpu"}
LAUNCHERS = {"plain": {}, "fsdp2": FSDP, "zero3": ZERO}


def held(denoiser):
    """How many numbers of the base's weights this process holds, and how many there are."""
    own = whole = 0
    for name, weight in denoiser.named_parameters():
        if "metalora" not in name:
            local = weight.to_local() if hasattr(weight, "to_local") else getattr(weight, "ds_tensor", weight)
            own, whole = own + local.numel(), whole + getattr(weight, "ds_numel", weight.numel())
    return own, whole


def worker(rank, environment, configs):
    os.environ |= environment
    warnings.simplefilter("ignore")
    if "ACCELERATE_USE_DEEPSPEED" in environment:
        import deepspeed

        # An exchange through shared memory, which it would compile first.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for config in configs:
        if isinstance(config, TrainEncoderConfig):
            train_encoder(config, progress=False)
        elif isinstance(config, MetaTrainConfig):
            result = meta_train(config, progress=False)
            seen = {"held": held(result.denoiser), "losses": result.losses}
            Path(config.output_dir, f"seen-{rank}.json").write_text(json.dumps(seen))
        else:
            personalize(config, progress=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, four people, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("processes")
    save_tiny_flux(folder / "base")
    write_people(folder / "people", subjects=4)
    result = meta_train(stage_1(folder, folder / "one"), progress=False)
    (folder / "one" / "losses.json").write_text(json.dumps(result.losses))
    for method in ("meta-lora", "lora"):
        personalize(stage_2(folder, folder / f"one-{method}", method), progress=False)
    teach_to_read(shutil.copytree(folder / "one", folder / "reads"))
    personalize(from_read(folder, folder / "one-read"), progress=False)
    return folder


def stage_1(place, output, **changes):
    settings = {"pretrained_model_name_or_path": str(place / "base"), "train_data_dir": str(place / "people")}
    settings |= {"shards": 2, "bucket_size": 2, "subjects_per_batch": 2, "max_train_steps": 6}
    settings |= {"optimizer": "SGD", "learning_rate": 0.1, "warmup_steps": 2}
    return meta_config(**{**settings, **changes}, output_dir=str(output))


def stage_2(place, output, method="meta-lora", **changes):
    settings = {"pretrained_model_name_or_path": str(place / "base"), "down": str(place / "one"), "method": method}
    settings |= {"instance_data_dir": str(place / "people" / "person-0" / "0.png"), "train_batch_size": 3}
    settings |= {"optimizer": "SGD", "learning_rate": 0.1, "max_train_steps": 4}
    return personal_config(**{**settings, **changes}, output_dir=str(output))


def from_read(place, output):
    """Stage 2 from the person that the Down reads, until it stops by itself."""
    return stage_2(place, output, down=str(place / "reads"), max_train_steps=30, learning_rate=1.0, max_drift=2e-3)


def reading(place, output, **changes):
    settings = {"pretrained_model_name_or_path": str(place / "base"), "down": str(place / "one")}
    settings |= {"train_data_dir": str(place / "people"), "resolution": 16, "code_size": 6, "encoder_width": 8}
    settings |= {"encoder_hidden": 16, "max_train_steps": 4, "images_per_subject": 2, "lr_warmup_steps": 1}
    settings |= {"learning_rate": 1e-4, "space_learning_rate": 1e-4, "subjects_per_batch": 4, "device": "cpu"}
    return TrainEncoderConfig(**{**settings, **changes}, output_dir=str(output))


def files(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def assert_equal_files(found, expected, tolerance):
    """Whole tensors of the same names and shapes, equal within `tolerance` of the largest number of each."""
    assert {name: list(file) for name, file in found.items()} == {name: list(file) for name, file in expected.items()}
    for name, file in expected.items():
        for key, tensor in file.items():
            limit = tolerance * tensor.abs().max().item() + 1e-9 * bool(tolerance)
            assert torch.allclose(found[name][key], tensor, rtol=0, atol=limit), (name, key)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_what_one_gives(place, tmp_path, launcher):
    held_out = {"validation_data_dir": str(place / "people"), "validation_subjects": 1, "validation_train_steps": 1}
    looking = {
        "plain": ({}, {}),
        "fsdp2": ({"validation_steps": 4, **held_out, "gradient_checkpointing": True}, {"dynamo_backend": "eager"}),
        # The pipeline draws with a divided base.
        "zero3": ({"gradient_checkpointing": True}, {"validation_steps": 4, "validation_prompt": ["a photo"]}),
    }[launcher]
    configs = stage_1(place, tmp_path / "one", **looking[0]), stage_2(place, tmp_path / "one-meta-lora", **looking[1])
    if launcher == "plain":
        configs += stage_2(place, tmp_path / "one-lora", "lora"), from_read(place, tmp_path / "one-read")
    on_processes(2, worker, LAUNCHERS[launcher], configs)
    for name in ("one", "one-meta-lora", *(("one-lora", "one-read") if launcher == "plain" else ())):
        # Sums in another order.
        assert_equal_files(files(tmp_path / name), files(place / name), 1e-5)
    if launcher == "plain":
        steps = [load_subject(folder / "one-read").config.facts["steps"] for folder in (place, tmp_path)]
        assert steps[0] == steps[1] and 1 < steps[0] < 30
    if launcher == "fsdp2":
        (scores,) = (tmp_path / "one" / "validation" / "scores.jsonl").read_text().splitlines()
        assert list(json.loads(scores)["subjects"]) == ["person-0"]
    if launcher == "zero3":
        Image.open(tmp_path / "one-meta-lora" / "validation" / "00004-00.png").verify()
    losses = json.loads((place / "one" / "losses.json").read_text())
    for rank in range(2):
        seen = json.loads((tmp_path / "one" / f"seen-{rank}.json").read_text())
        assert seen["losses"] == pytest.approx(losses, rel=1e-5)  # the whole batch's, on each
        own, whole = seen["held"]
        assert own == whole if launcher == "plain" else 0.45 * whole < own < 0.55 * whole


def assert_same_state(found, expected):
    """States of an encoder's training, but for what Adam makes of sums in another order: far less than a step."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for part in ("space", "encoder"):
        for name, tensor in expected[part].items():
            torch.testing.assert_close(found[part][name], tensor, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("launcher", ["plain", "fsdp2"])
@pytest.mark.filterwarnings("ignore:4 people")
def test_two_processes_teach_what_one_teaches(place, tmp_path, launcher):
    """Dropout, too, is drawn for the batch and not for a process. A divided base takes slots, a whole one a stack."""
    looking = {"validation_steps": 2, "validation_data_dir": str(place / "people"), "validation_subjects": 2}
    settings = {"checkpointing_steps": 2, "gradient_accumulation_steps": 2, **looking}
    train_encoder(reading(place, tmp_path / "one", **settings), progress=False)
    on_processes(2, worker, LAUNCHERS[launcher], [reading(place, tmp_path / "two", **settings)])

    def state(name, step):
        folder = tmp_path / name / f"checkpoint-{step}"
        assert [path.name for path in folder.iterdir()] == ["training_state.safetensors"]
        return read_state(reading(place, "unused", **{**settings, "resume_from_checkpoint": str(folder)}))

    for step in (2, 4):
        assert_same_state(state("two", step), state("one", step))
    scores = [(tmp_path / name / "validation" / "scores.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, other in zip(*scores, strict=True):
        assert json.loads(one)["score"] == pytest.approx(json.loads(other)["score"], rel=1e-5)
    if launcher == "plain":
        # All share one state, so that another number of processes may go on with it.
        settings["resume_from_checkpoint"] = str(tmp_path / "two" / "checkpoint-2")
        train_encoder(reading(place, tmp_path / "again", **settings), progress=False)
        assert_same_state(state("again", 4), state("two", 4))


@pytest.mark.filterwarnings("ignore:4 people")
def test_four_processes_make_one_down_and_one_space(place, tmp_path):
    settings = {"shards": 4, "bucket_size": 4, "subjects_per_batch": 4, "max_train_steps": 3, "warmup_steps": 1}
    meta_train(stage_1(place, tmp_path / "one", **settings), progress=False)
    train_encoder(reading(place, tmp_path / "one reading", checkpointing_steps=4), progress=False)
    configs = [
        stage_1(place, tmp_path / "four", **settings, checkpointing_steps=2),
        reading(place, tmp_path / "four reading", checkpointing_steps=4),
        stage_1(place, tmp_path / "again", **settings, resume_from_checkpoint=str(tmp_path / "four" / "checkpoint-2")),
    ]
    on_processes(4, worker, {}, configs)
    assert_equal_files(files(tmp_path / "four"), files(tmp_path / "one"), 1e-5)
    assert_equal_files(files(tmp_path / "again"), files(tmp_path / "four"), 0)
    one, four = (tmp_path / f"{name} reading" / "checkpoint-4" for name in ("one", "four"))
    states = [read_state(reading(place, "unused", resume_from_checkpoint=str(folder))) for folder in (four, one)]
    assert_same_state(*states)


def test_same_down_from_photos_of_several_shapes_and_balanced_groups(place, tmp_path):
    people = write_people(tmp_path / "people", subjects=5, each=3, sizes=[(24, 24), (40, 24)])
    tags = {f"person-{number}": {"sex": "male" if number < 2 else "female"} for number in range(5)}
    (people / "people.json").write_text(json.dumps(tags))
    settings = {
        "pretrained_model_name_or_path": str(place / "base"),
        "train_data_dir": str(people),
        "max_train_steps": 6,
    }
    settings |= {"shards": 2, "subjects_per_batch": 4, "optimizer": "SGD", "learning_rate": 0.1, "resolution": 32}
    settings |= {"aspect_ratio_buckets": "auto", "balance_by": "sex"}
    meta_train(meta_config(**settings, output_dir=str(tmp_path / "one")), progress=False)
    on_processes(2, worker, {}, [meta_config(**settings, output_dir=str(tmp_path / "two"))])
    one, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:
        assert torch.allclose(one[name], both[name], atol=1e-5 * one[name].abs().max().item() + 1e-9), name


def test_a_run_of_two_processes_resumes(place, tmp_path):
    adam = {"optimizer": "AdamW", "learning_rate": 0.01}
    looking = {"validation_steps": 2, "patience": 9}
    whole = (
        stage_1(place, tmp_path / "two", **adam, checkpointing_steps=4),
        stage_2(place, tmp_path / "ann", **adam, **looking, checkpointing_steps=3),
        reading(place, tmp_path / "reading", checkpointing_steps=3),
    )
    on_processes(2, worker, {}, whole)
    folder = tmp_path / "two" / "checkpoint-4"  # in the warm-up of the second bucket
    names = ["training_state-1.safetensors", "training_state.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    # Bug: one process went on alone with its own subjects, and the others' were lost.
    with pytest.raises(ConfigError, match=r"the 2 process\(es\) .*found 1"):
        meta_train(stage_1(place, tmp_path / "two", **adam, resume_from_checkpoint="latest"), progress=False)
    half = str(tmp_path / "ann" / "checkpoint-3")
    resumed = (
        stage_1(place, tmp_path / "two again", **adam, resume_from_checkpoint=str(folder)),
        stage_2(place, tmp_path / "ann again", **adam, **looking, resume_from_checkpoint=half),
        reading(place, tmp_path / "reading again", resume_from_checkpoint=str(tmp_path / "reading" / "checkpoint-3")),
    )
    on_processes(2, worker, {}, resumed)
    for name in ("two", "ann", "reading"):
        assert_equal_files(files(tmp_path / f"{name} again"), files(tmp_path / name), 0)


def test_what_cannot_be_divided_is_refused(monkeypatch):
    base = tiny_base()
    with pytest.raises(ConfigError, match="multiple of the 2 processes, found 3"):
        MetaTraining(base, tiny_examples(base), meta_config(shards=3), Processes(0, 2))
    with pytest.raises(ConfigError, match="each of the 4 processes in a batch, found 2: raise train_batch_size"):
        Personalization(base, tiny_examples(base, 1), personal_config(method="lora"), processes=Processes(0, 4))
    with pytest.raises(ConfigError, match=r"multiple of the 3 processes.*found 8: give 6"):
        check_shares(8, Processes(0, 3))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not wants_shards(Processes(), meta_config())
    cases = (({}, "fsdp_version 2"), ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "without offloading"))
    for environment, message in cases:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=message):
            shard(base, torch.device("cpu"), Processes(0, 2), meta_config())
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "NoSuchBlock")
    with pytest.raises(ConfigError, match="NoSuchBlock"):
        shard(base, torch.device("cpu"), Processes(0, 2), meta_config())
    assert not any(hasattr(weight, "to_local") for weight in base.denoiser.parameters())


def test_lower_stages_of_zero_leave_the_base_whole(monkeypatch):
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    assert wants_shards(Processes(0, 2), meta_config())
    with pytest.raises(ConfigError, match="no dynamo_backend beside DeepSpeed"):
        shard(tiny_base(), torch.device("cpu"), Processes(0, 2), meta_config(dynamo_backend="eager"))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert not wants_shards(Processes(0, 2), meta_config())


def test_deepspeed_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("peft_metalora.training.engine.sharding.is_deepspeed_available", lambda: False)
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        wants_shards(Processes(0, 2), meta_config())


def test_one_process_needs_no_launcher():
    processes = Processes.of_environment(torch.device("cpu"))
    tensor = torch.ones(3)
    processes.sum_([tensor])
    assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
    assert tensor.tolist() == [1, 1, 1]
    assert processes.common({1, 2}) == {1, 2}
