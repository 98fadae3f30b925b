# SPDX-License-Identifier: Apache-2.0
"""Stage 1 on two processes (gloo) gives the Down that one process gives for the same batches."""

from __future__ import annotations

import multiprocessing
import os
import socket

import pytest
import torch
from safetensors.torch import load_file

from peft_metalora.errors import ConfigError
from peft_metalora.training.meta_train import MetaTraining, meta_train
from peft_metalora.training.processes import Processes
from pipelines_tiny import save_tiny_flux
from training_tiny import meta_config, tiny_base, tiny_examples, write_people


def worker(rank, port, config):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    meta_train(config, progress=False)


def on_two_processes(config):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_metalora.training.meta_train", "peft_metalora.training.personalize"])
    started = [context.Process(target=worker, args=(rank, port, config)) for rank in range(2)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()


def test_same_down_on_one_and_two_processes(tmp_path):
    model, people = save_tiny_flux(tmp_path / "base"), write_people(tmp_path / "people", subjects=4)
    settings = {"pretrained_model_name_or_path": str(model), "train_data_dir": str(people), "max_train_steps": 8}
    settings |= {"shards": 2, "bucket_size": 2, "subjects_per_batch": 2, "optimizer": "SGD"}
    settings |= {"learning_rate": 0.1}
    meta_train(meta_config(**settings, output_dir=str(tmp_path / "one")), progress=False)
    two = meta_config(**settings, output_dir=str(tmp_path / "two"), checkpointing_steps=5)
    on_two_processes(two)
    one, both = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    for name in one:
        # Sums in another order; 1e-5 of the largest number of a factor.
        assert torch.allclose(one[name], both[name], atol=1e-5 * one[name].abs().max().item() + 1e-9), name
    # A run of two processes resumes as well, each with its own subjects.
    folder = tmp_path / "two" / "checkpoint-5"
    names = ["training_state-1.safetensors", "training_state.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    two.output_dir, two.resume_from_checkpoint = str(tmp_path / "again"), str(folder)
    on_two_processes(two)
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], both[name]) for name in both)


def test_shards_must_fit_the_processes():
    base = tiny_base()
    with pytest.raises(ConfigError, match="multiple of the 2 processes, found 3"):
        MetaTraining(base, tiny_examples(base), meta_config(shards=3), Processes(0, 2))


def test_one_process_needs_no_launcher():
    processes = Processes.of_environment(torch.device("cpu"))
    tensor = torch.ones(3)
    processes.sum_([tensor])
    assert (processes.rank, processes.count, processes.is_main) == (0, 1, True)
    assert tensor.tolist() == [1, 1, 1]
    assert processes.common({1, 2}) == {1, 2}
