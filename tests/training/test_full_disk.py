# SPDX-License-Identifier: Apache-2.0
"""What a disk refuses on the way of a run is missing, and said to be; the run goes on to its result."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
import torch
from accelerate import tracking as trackers_of_accelerate
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file

from peft_metalora import files
from peft_metalora.errors import NonFiniteError, WriteFailedError
from peft_metalora.training.engine.processes import Processes
from peft_metalora.training.engine.state import STATE_FILE, read_state, write_checkpoint, write_state
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from training_tiny import meta_config, personal_config

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def fills(monkeypatch):
    """Makes a disk that is full for every path with one of these parts in it, until it is called anew."""
    real, refused = files._flush, []

    def flush(path):
        if any(part in path.as_posix() for part in refused):
            raise FULL
        real(path)

    def fill(*parts):
        refused[:] = parts

    monkeypatch.setattr(files, "_flush", flush)
    return fill


def config_for(place, stage, output, **changes):
    settings = {"pretrained_model_name_or_path": str(place / "base"), "output_dir": str(output), "max_train_steps": 8}
    settings |= {"checkpointing_steps": 2, **changes}
    if stage == "meta":
        return meta_config(train_data_dir=str(place / "people"), **settings)
    photo = str(place / "people" / "person-0" / "0.png")
    return personal_config(instance_data_dir=photo, down=str(place / "down"), **settings)


def run(config):
    (meta_train if hasattr(config, "train_data_dir") else personalize)(config, progress=False)


def factors(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def checkpoints(folder):
    return {path.name for path in folder.glob("*checkpoint-*")}


@pytest.mark.parametrize(
    ("stage", "part"),
    [("meta", "/checkpoint-6/"), ("personal", "/checkpoint-6/"), ("personal", "/.checkpoint-6.")],
    ids=["a Down", "a state", "a subject beside a state that is whole"],
)
def test_a_checkpoint_that_does_not_fit_ends_no_run(place, tmp_path, fills, stage, part):
    """Bug: the run ended, though its result is smaller and might have fitted, and an empty or half-written checkpoint
    stayed."""
    run(config_for(place, stage, tmp_path / "whole"))
    fills(part)
    config = config_for(place, stage, tmp_path / "out", checkpoints_total_limit=1)
    with pytest.warns(UserWarning, match=r"checkpoint-6.*No space left .* The run goes on without it\.$"):
        run(replace(config, checkpointing_steps=3))
    # The limit counts what is whole.
    assert checkpoints(tmp_path / "out") == {"checkpoint-3"}
    assert same(factors(tmp_path / "out"), factors(tmp_path / "whole"))
    fills()
    run(replace(config, checkpointing_steps=3, resume_from_checkpoint="latest"))
    assert checkpoints(tmp_path / "out") == {"checkpoint-6"}
    assert same(factors(tmp_path / "out"), factors(tmp_path / "whole"))


@pytest.mark.parametrize("stage", ["meta", "personal"])
def test_a_result_that_does_not_fit_is_had_from_the_last_checkpoint(place, tmp_path, fills, stage):
    config = config_for(place, stage, tmp_path / "out")
    fills("/.out.")
    with pytest.raises(WriteFailedError, match=r"free some space .* Then go on with resume_from_checkpoint 'latest'"):
        run(config)
    with pytest.raises(WriteFailedError) as error:
        run(replace(config, output_dir=str(tmp_path / "none" / "out"), checkpointing_steps=None))
    assert str(error.value).endswith("choose another folder.")
    fills()
    run(replace(config, resume_from_checkpoint="latest"))
    run(replace(config, output_dir=str(tmp_path / "whole")))
    assert same(factors(tmp_path / "out"), factors(tmp_path / "whole"))


def test_a_state_that_does_not_fit_leaves_an_older_one_of_that_step(tmp_path, fills):
    config = meta_config(output_dir=str(tmp_path), resume_from_checkpoint="checkpoint-2")
    write_checkpoint(config, 2, {"run": "older"})
    fills(STATE_FILE)
    with pytest.warns(UserWarning, match="goes on without"):
        write_checkpoint(config, 2, {"run": "newer"})
    assert read_state(config) == {"run": "older"}


def test_what_is_refused_for_another_reason_leaves_no_half_of_a_checkpoint(tmp_path):
    def refuse(folder):
        raise NonFiniteError("infinite")

    with pytest.raises(NonFiniteError):
        write_checkpoint(personal_config(output_dir=str(tmp_path)), 2, {}, beside=refuse)
    assert not list(tmp_path.iterdir())


class Two(Processes):
    """One of two processes, of which the other one's disk is full."""

    def common(self, numbers):
        return set()


def test_all_processes_leave_out_what_one_of_them_cannot_write(tmp_path):
    """A checkpoint of stage 1 is whole with the states of all."""
    config = meta_config(output_dir=str(tmp_path), checkpoints_total_limit=1)
    for rank in range(2):
        write_state(tmp_path / "checkpoint-2", {"rank": rank}, config, Processes(rank, 2))
    write_checkpoint(config, 4, {"rank": 0}, Two(0, 2))
    assert checkpoints(tmp_path) == {"checkpoint-2"}


def test_an_old_checkpoint_that_stays_ends_no_run(place, tmp_path, monkeypatch):
    """Bug: it ended the run."""

    def refuse(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr("peft_metalora.training.engine.state.remove_checkpoint", refuse)
    with pytest.warns(UserWarning, match=r"expected to remove the old checkpoint .*checkpoint-2, found: .*denied"):
        run(config_for(place, "personal", tmp_path / "out", checkpoints_total_limit=1))
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize("stage", ["meta", "personal"])
def test_pictures_and_scores_that_do_not_fit_end_no_run(place, tmp_path, fills, stage):
    """Bug: they did."""
    looking = {"validation_steps": 4, "validation_prompt": ["a photo"]}
    looking |= {"validation_subjects": 1, "validation_train_steps": 1} if stage == "meta" else {}
    fills("/validation/")
    with pytest.warns(UserWarning, match=r"00008.*No space left .* The run goes on without it"):
        run(config_for(place, stage, tmp_path / "out", checkpointing_steps=None, **looking))
    assert (tmp_path / "out" / "adapter_config.json").exists()


class Unwell(GeneralTracker):
    """A tracker whose disk is full once it has logged one step."""

    name = "unwell"
    requires_logging_directory = False
    tracker = None
    logged: list[int] = []  # noqa: RUF012

    def __init__(self, project):
        super().__init__()

    def start(self):
        self.logged.clear()

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        self.logged.append(step)
        if step > 1:
            raise FULL

    def finish(self):
        raise FULL


def test_a_tracker_whose_disk_is_full_ends_no_run(place, tmp_path, monkeypatch):
    """Bug: TensorBoard's thread raised in a step, or as the run closed it, and the result was not written."""
    monkeypatch.setitem(trackers_of_accelerate.LOGGER_TYPE_TO_CLASS, "unwell", Unwell)
    for steps in (1, 3):
        config = config_for(place, "personal", tmp_path / str(steps), report_to="unwell", max_train_steps=steps)
        with pytest.warns(UserWarning, match="the tracker 'unwell' failed: .*No space left.* goes on without it"):
            run(config)
        assert Unwell.logged == [1, 2][:steps]
        assert (tmp_path / str(steps) / "adapter_config.json").exists()
