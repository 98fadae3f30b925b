# SPDX-License-Identifier: Apache-2.0
"""Subjects of one Down hold one copy of it, measured in bytes, whatever is done to the model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tuner_models import config, down_source, randomise

from peft_metalora.tuner import set_down_loader
from peft_metalora.tuner.on_model import meta_lora_layers

D, META_R, R, LAYERS = 64, 16, 2, 2
DOWN_BYTES = LAYERS * META_R * D * 4
START_BYTES = LAYERS * (2 * R * META_R + D * R) * 4  # stored Mid, mean Mid and mean Up
SUBJECT_BYTES = LAYERS * (R * META_R + D * R) * 4


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).eval()


def settings(**more):
    return config(r=R, meta_r=META_R, target_modules=["0", "1"], **more)


def adapter_bytes(model):
    """Bytes of distinct storages below the layers, the base weights left out."""
    storages = {}
    for _, layer in meta_lora_layers(model):
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if "base_layer" not in name:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr(), tensor.device.type] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture
def subject_folder(tmp_path):
    source = down_source(randomise(get_peft_model(base(), settings())))
    set_down_loader(lambda _: source)
    ann = randomise(get_peft_model(base(), settings(stage="subject", down="a/b")))
    ann.save_pretrained(tmp_path)
    return tmp_path


def loaded(folder, count, low_cpu_mem_usage=False):
    model = PeftModel.from_pretrained(base(), folder, "s0", low_cpu_mem_usage=low_cpu_mem_usage)
    for number in range(1, count):
        model.load_adapter(folder, f"s{number}", low_cpu_mem_usage=low_cpu_mem_usage)
    return model


def expected(count, half=False):
    return (DOWN_BYTES + START_BYTES + count * SUBJECT_BYTES) // (2 if half else 1)


COUNTS = pytest.mark.parametrize("count", [1, 10, 100])


@COUNTS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_bytes_are_one_down_and_so_many_subjects(subject_folder, count, low_cpu_mem_usage):
    assert adapter_bytes(loaded(subject_folder, count, low_cpu_mem_usage)) == expected(count)


@COUNTS
def test_bytes_of_new_subjects(subject_folder, count):
    model = get_peft_model(base(), settings(stage="subject", down="a/b"))
    for number in range(1, count):
        model.add_adapter(f"s{number}", settings(stage="subject", down="a/b"))
    assert adapter_bytes(model) == expected(count)


def test_slots_cost_the_same_as_adapters(subject_folder):
    model = get_peft_model(base(), settings(stage="subject", down="a/b", num_slots=100))
    assert adapter_bytes(model) == expected(100)


@COUNTS
def test_bytes_after_casts_moves_copies_and_pickles(subject_folder, count):
    model = loaded(subject_folder, count)
    assert adapter_bytes(model.bfloat16()) == expected(count, half=True)
    assert adapter_bytes(model.float()) == expected(count)
    assert adapter_bytes(copy.deepcopy(model)) == expected(count)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert adapter_bytes(torch.load(file, weights_only=False)) == expected(count)
    state = model.state_dict()
    empty = copy.deepcopy(model).to("meta")
    assert all(parameter.is_meta for parameter in empty.parameters())
    back = empty.to_empty(device="cpu")
    back.load_state_dict(state)
    assert adapter_bytes(back) == expected(count)


@COUNTS
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_bytes_after_deletes_and_loads(subject_folder, count, low_cpu_mem_usage):
    model = loaded(subject_folder, count, low_cpu_mem_usage)
    for number in range(1, count):
        model.delete_adapter(f"s{number}")
    assert adapter_bytes(model) == expected(1)
    model.load_adapter(subject_folder, "again", low_cpu_mem_usage=low_cpu_mem_usage)
    assert adapter_bytes(model) == expected(2)


def test_subjects_of_a_meta_adapter_add_no_down(subject_folder):
    model = randomise(get_peft_model(base(), settings()))
    before = adapter_bytes(model)
    for number in range(10):
        model.add_adapter(f"s{number}", settings(stage="subject", down="default"))
    assert adapter_bytes(model) == before + 10 * SUBJECT_BYTES


def test_a_saved_subject_is_small(subject_folder):
    size = (subject_folder / "adapter_model.safetensors").stat().st_size
    assert SUBJECT_BYTES <= size < SUBJECT_BYTES + 1024
