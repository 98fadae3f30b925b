# SPDX-License-Identifier: Apache-2.0
"""A file in the place of an adapter, by `load_adapter`: what does not fit is refused, and all is as before."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tuner_models import adapted, config, down_source, layer_of, mlp, randomise

from peft_metalora.errors import AdapterStateError, FingerprintMismatchError
from peft_metalora.tuner import set_down_loader
from peft_metalora.tuner.on_model import meta_lora_layers


def other_down(base):
    model = randomise(adapted(base), 5)
    for _, layer in meta_lora_layers(model):
        layer.metalora_down["default"].data.neg_()
    return down_source(model)


@pytest.fixture
def downs():
    """The Down of most, and another one of the same shapes."""
    sources = down_source(adapted()), other_down(mlp())
    by_mark = {source.fingerprint: source for source in sources}
    set_down_loader(lambda config: by_mark[config.down_fingerprint or sources[0].fingerprint])
    return sources


def person(seed, **settings):
    return randomise(adapted(mlp(), **{"stage": "subject", "down": "a/b", **settings}), seed)


def on_another_down(downs):
    return person(4, down_fingerprint=downs[1].fingerprint)


REFUSED = {
    "another Down": (on_another_down, FingerprintMismatchError, "was trained with the Down"),
    "another scale": (lambda _: person(4, lora_alpha=32), AdapterStateError, "has the scale 16 at 'lin0'"),
    "rsLoRA": (lambda _: person(4, use_rslora=True), AdapterStateError, "has the scale"),
    "fewer modules": (lambda _: person(4, target_modules=["lin0"]), AdapterStateError, "has no tensor for lin1"),
    "another rank": (lambda _: person(4, r=1, start="fresh"), AdapterStateError, r"\(1, 1, 4\) for lin0.metalora_mid"),
    "more slots": (lambda _: person(4, num_slots=3), AdapterStateError, r"\(3, 2, 4\) for lin0.metalora_mid"),
    "DoRA": (lambda _: person(4, use_dora=True), AdapterStateError, "for lin0.metalora_magnitude"),
    "a Down": (lambda _: randomise(adapted(), 4), AdapterStateError, "for lin0.metalora_down"),
    "a LoRA": (
        lambda _: get_peft_model(mlp(), LoraConfig(target_modules=["lin0", "lin1"])),
        AdapterStateError,
        "of PeftType.LORA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_all_is_as_before(case, downs, tmp_path):
    """Bug: the tensors were taken as they were: somebody else showed, or half of the one before."""
    make, error, says = REFUSED[case]
    make(downs).save_pretrained(tmp_path)
    model, x = person(3), torch.randn(3, 12)
    before, state = model(x).detach(), {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        with pytest.raises(error, match=f"(?s){says}.*Load it under another name"):
            model.load_adapter(tmp_path, "default")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), before)


def test_who_comes_is_who_is_named(downs, tmp_path):
    """Bug: a save of the one who had come bore the name of the one before, and replaced their files unasked."""
    person(3, subject_name="ann").save_pretrained(tmp_path / "ann")
    bob = person(4, subject_name="bob", facts={"photos": 1})
    bob.save_pretrained(tmp_path / "bob")
    model, x = PeftModel.from_pretrained(mlp(), tmp_path / "ann"), torch.randn(3, 12)
    model.load_adapter(tmp_path / "bob", "default")
    known = model.peft_config["default"]
    assert (known.subject_name, known.facts) == ("bob", {"photos": 1})
    assert torch.equal(model(x), bob(x))


def test_a_down_that_subjects_use_is_not_replaced_under_them(tmp_path):
    """Bug: they stood on another Down then, and showed somebody else."""
    randomise(adapted(), 5).save_pretrained(tmp_path)
    model, x = randomise(adapted()), torch.randn(3, 12)
    model.load_adapter(tmp_path, "default")
    model.add_adapter("ann", config(stage="subject", down="default"))
    randomise(model)
    model.set_adapter("ann")
    before = model(x).detach()
    with pytest.raises(AdapterStateError, match="'ann' use\\(s\\) the Down of 'default'"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(x), before)


def test_a_configuration_of_ones_own_may_scale_what_is_read(downs, tmp_path):
    ann = person(3)
    ann.save_pretrained(tmp_path)
    louder = copy.deepcopy(type(ann.peft_config["default"]).from_pretrained(tmp_path))
    louder.lora_alpha = 8
    model, base, x = PeftModel.from_pretrained(mlp(), tmp_path, config=louder), mlp(), torch.randn(3, 12)
    assert layer_of(model).scaling["default"] == 2 * layer_of(ann).scaling["default"]
    assert torch.isfinite(model(x) - base(x)).all()


def test_a_file_without_a_tensor_is_refused(downs, tmp_path):
    person(4).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "lin1" not in key}, file)
    model = person(3)
    with pytest.raises(AdapterStateError, match="no tensor for lin1"):
        model.load_adapter(tmp_path, "default")
