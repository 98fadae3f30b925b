# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any moment and resumed gives, bit for bit, what it would have given."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from peft_metalora.errors import ArtefactNotFoundError, ConfigError, CorruptFileError
from peft_metalora.training.engine.state import STATE_FILE, read_state, write_state
from peft_metalora.training.meta_train import meta_train, meta_train_on
from peft_metalora.training.personalize import personalize
from peft_metalora.training.stage_1 import MetaTraining
from pipelines_tiny import save_tiny_flux
from training_tiny import meta_config, personal_config, tiny_base, tiny_examples, write_people

KILLS = 10


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    save_tiny_flux(folder / "base")
    write_people(folder / "people")
    base = tiny_base()
    meta_train_on(base, tiny_examples(base), meta_config(), progress=False).save(str(folder / "down"))
    return folder


def make_config(place, stage, output, **changes):
    shared = {"pretrained_model_name_or_path": str(place / "base"), "output_dir": str(output), "max_train_steps": 12}
    shared |= {"lr_scheduler": "cosine", **changes}
    if stage == "meta":
        return meta_config(train_data_dir=str(place / "people"), bucket_size=2, warmup_steps=2, **shared)
    photo = str(place / "people" / "person-0" / "0.png")
    down = str(place / "down") if stage == "meta-lora" else None
    return personal_config(instance_data_dir=photo, down=down, method=stage, **shared)


def run(config):
    (meta_train if hasattr(config, "train_data_dir") else personalize)(config, progress=False)


def result(output):
    return {path.name: load_file(path) for path in sorted(output.glob("*.safetensors"))}


@pytest.mark.parametrize("stage", ["meta", "meta-lora", "lora"])
def test_resumed_in_the_middle_equals_uninterrupted(place, tmp_path, stage):
    run(make_config(place, stage, tmp_path / "whole"))
    run(make_config(place, stage, tmp_path / "parts", checkpointing_steps=1))
    whole, parts = result(tmp_path / "whole"), result(tmp_path / "parts")
    assert all(torch.equal(whole[file][name], parts[file][name]) for file in whole for name in whole[file])
    for step in (1, 5, 6, 7, 11):  # 6 is the last step of the first bucket
        again = tmp_path / f"again-{step}"
        folder = str(tmp_path / "parts" / f"checkpoint-{step}")
        run(make_config(place, stage, again, resume_from_checkpoint=folder))
        found = result(again)
        assert all(torch.equal(whole[file][name], found[file][name]) for file in whole for name in whole[file])


@pytest.mark.parametrize("stage", ["meta", "meta-lora"])
def test_killed_at_random_and_resumed_equals_uninterrupted(place, tmp_path, stage):
    run(make_config(place, stage, tmp_path / "whole"))
    config = make_config(place, stage, tmp_path / "killed", checkpointing_steps=1, resume_from_checkpoint="latest")
    # A server that has imported everything forks a fresh process for each attempt.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_metalora.training.meta_train", "peft_metalora.training.personalize"])
    moments, killed = random.Random(0), 0
    for _ in range(5 * KILLS):
        if killed == KILLS:
            break
        process = context.Process(target=run, args=(config,))
        process.start()
        seen = len(list((tmp_path / "killed").glob("checkpoint-*")))
        while process.is_alive() and len(list((tmp_path / "killed").glob("checkpoint-*"))) == seen:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:  # on a busy machine a run may end before its moment came: there is nothing to kill but a new one
            shutil.rmtree(tmp_path / "killed")
    run(config)
    assert killed == KILLS
    whole, found = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert all(torch.equal(whole[file][name], found[file][name]) for file in whole for name in whole[file])


@pytest.mark.parametrize("optimizer", ["Adafactor", "SGD"])
def test_state_of_other_optimisers_survives(optimizer, tmp_path):
    base = tiny_base()
    training = MetaTraining(base, tiny_examples(base), meta_config(optimizer=optimizer, max_train_steps=6))
    config = meta_config(resume_from_checkpoint=str(tmp_path))
    for step in training.steps():
        if step.number == 3:
            write_state(tmp_path, training.state_dict(), config)
    expected = training._factors()
    base = tiny_base()
    resumed = MetaTraining(base, tiny_examples(base), meta_config(optimizer=optimizer, max_train_steps=6, seed=1))
    resumed.load_state_dict(read_state(config))
    assert [step.number for step in resumed.steps()] == [4, 5, 6]
    assert all(torch.equal(one, other) for one, other in zip(expected, resumed._factors(), strict=True))


def test_latest_is_none_before_the_first_checkpoint(tmp_path):
    assert read_state(meta_config(output_dir=str(tmp_path), resume_from_checkpoint="latest")) is None


def test_states_that_do_not_fit_are_refused(tmp_path):
    config = personal_config(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ArtefactNotFoundError, match=STATE_FILE):
        read_state(config)
    write_state(tmp_path, {"steps": 1}, config)
    assert read_state(config) == {"steps": 1}
    with pytest.raises(ConfigError, match="other values of learning_rate, seed"):
        read_state(personal_config(resume_from_checkpoint=str(tmp_path), seed=5, learning_rate=0.5))
    content = (tmp_path / STATE_FILE).read_bytes()
    for broken in (content[: len(content) // 2], b"", b"x" * 100):
        (tmp_path / STATE_FILE).write_bytes(broken)
        with pytest.raises(CorruptFileError, match="resume from an earlier checkpoint"):
            read_state(config)


def test_a_subject_is_beside_each_state(place, tmp_path):
    run(make_config(place, "meta-lora", tmp_path / "ann", checkpointing_steps=5))
    names = sorted(path.name for path in (tmp_path / "ann" / "checkpoint-5").iterdir())
    assert names[0] == "adapter_config.json" and names[-1] == STATE_FILE
