# SPDX-License-Identifier: Apache-2.0
"""Optimisers by name: those of other packages train too, and a run that they make resumes."""

import inspect
import sys

import pytest
import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup

from peft_metalora.errors import ConfigError
from peft_metalora.training.engine.optimizers import optimizer_class
from peft_metalora.training.engine.slot_optimizer import SlotOptimizer
from peft_metalora.training.engine.state import read_state, write_state
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from training_tiny import meta_config, personal_config, tiny_base, tiny_examples

# Prodigy finds its own rate; what is given is a factor.
RATES = {"adamw8bit": 0.01, "prodigy": 1.0, "adafactor": 0.01}


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adamw", torch.optim.AdamW),
        ("AdamW", torch.optim.AdamW),
        ("SGD", torch.optim.SGD),
        ("adafactor", torch.optim.Adafactor),
        ("torch.optim:NAdam", torch.optim.NAdam),
    ],
)
def test_names_in_any_case(name, cls):
    assert optimizer_class(name) is cls


def test_an_unknown_name_is_named():
    with pytest.raises(ConfigError, match="adamv"):
        optimizer_class("adamv")


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Rprop"])
def test_what_cannot_train_here_is_refused_before_anything_is_on_the_model(name):
    """Bug: a TypeError, for LBFGS in the first step with the adapter on."""
    base = tiny_base()
    for make in (
        lambda: MetaTraining(base, tiny_examples(base), meta_config(optimizer=name)),
        lambda: Personalization(base, tiny_examples(base, 1), personal_config(optimizer=name, method="lora")),
    ):
        with pytest.raises(ConfigError, match=f"optimizer must take lr and weight_decay .*found '{name}'"):
            make()
        assert not hasattr(base.denoiser, "peft_config")


def test_a_schedule_that_diffusers_cannot_make_is_refused_with_the_settings():
    """Bugs: of a rate at or below the schedule's last, diffusers' own error, once the base was there; with a warm-up
    of all steps a ZeroDivisionError after the last of them, and nothing was written."""
    end = inspect.signature(get_polynomial_decay_schedule_with_warmup).parameters["lr_end"].default
    for make, own in ((meta_config, {}), (personal_config, {"method": "lora"})):
        short = {"lr_scheduler": "polynomial", "max_train_steps": 60, **own}
        for rate in (end, 1e-9):
            with pytest.raises(ConfigError, match=f"needs a learning_rate above it, found {rate}: raise it, or give"):
                make(learning_rate=rate, **short)
        with pytest.raises(ConfigError, match="found lr_warmup_steps 60 and max_train_steps 60: lower lr_warmup_steps"):
            make(lr_warmup_steps=60, **short)
        for fine in ({"learning_rate": 2 * end}, {"lr_warmup_steps": 59}, {"lr_warmup_steps": 61}):
            make(**short, **fine)
    # From the encoder's start the warm-up is 10 steps, unless somebody says otherwise.
    with pytest.raises(ConfigError, match="found lr_warmup_steps 10"):
        personal_config(
            lr_scheduler="polynomial", max_train_steps=10, learning_rate=None, lr_warmup_steps=None
        ).settled(True)
    base = tiny_base()
    schedule = {"lr_scheduler": "polynomial", "lr_warmup_steps": 2, "max_train_steps": 3, "learning_rate": 2 * end}
    run = Personalization(base, tiny_examples(base, 1), personal_config(method="lora", **schedule))
    assert [step.lr for step in run.steps()] == pytest.approx([0, end, 2 * end])


def test_a_missing_package_is_named_as_pip_knows_it(monkeypatch):
    for name, package in (("adamw8bit", "bitsandbytes"), ("Prodigy", "prodigyopt"), ("nobody.optim:Lion", "nobody")):
        for module in [known for known in sys.modules if known.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Hides(package), *sys.meta_path])
        with pytest.raises(ConfigError, match=f"optimizer '{name}', found none: pip install {package}\n"):
            optimizer_class(name)


class Hides:
    """Makes a package one that is not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {self.package!r}", name=self.package)


@pytest.mark.parametrize("name", RATES)
def test_stage_1_trains_and_resumes(name, tmp_path):
    settings = {"optimizer": name, "learning_rate": RATES[name], "max_train_steps": 24, "warmup_steps": 2}
    settings |= {"subjects_per_batch": 3, "images_per_subject": 2}
    base = tiny_base()
    run = MetaTraining(base, tiny_examples(base), meta_config(**settings))
    first = [factor.clone() for factor in run.state_dict()["factors"]]
    config = meta_config(resume_from_checkpoint=str(tmp_path))
    for step in run.steps():
        if step.number == 10:
            write_state(tmp_path, run.state_dict(), config)
    factors = run.state_dict()["factors"]
    downs = [not torch.equal(one, other) for one, other in zip(first[::4], factors[::4], strict=True)]
    assert all(downs) and sum(run.losses[-8:]) < sum(run.losses[:8])
    base = tiny_base()
    resumed = MetaTraining(base, tiny_examples(base), meta_config(**settings, seed=1))
    resumed.load_state_dict(read_state(config))
    assert [step.number for step in resumed.steps()] == list(range(11, 25))
    assert all(torch.equal(one, other) for one, other in zip(factors, resumed.state_dict()["factors"], strict=True))


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("method", ["meta-lora", "lora"])
def test_stage_2_trains_and_resumes(name, method, down, tmp_path):
    config = personal_config(optimizer=name, learning_rate=RATES[name], max_train_steps=6, method=method)
    states, results = {}, []
    for resumed in (False, True):
        base = tiny_base()
        run = Personalization(base, tiny_examples(base, 1), config, down if method == "meta-lora" else None)
        first = [parameter.detach().clone() for parameter in run.parameters]
        config.resume_from_checkpoint = str(tmp_path)
        if resumed:
            run.load_state_dict(read_state(config))
        for step in run.steps():
            if step.number == 3 and not resumed:
                write_state(tmp_path, run.state_dict(), config)
        results.append([parameter.detach().clone() for parameter in run.parameters])
        states[resumed] = run.steps_done
    assert states == {False: 6, True: 6}
    assert not any(torch.equal(one, other) for one, other in zip(first, results[0], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_eight_bits_are_eight_and_survive(tmp_path):
    """bitsandbytes keeps moments of fewer than 4096 numbers in 32 bits, which all of the tiny models' are."""
    config = meta_config(resume_from_checkpoint=str(tmp_path))
    results = []
    for resumed in (False, True):
        torch.manual_seed(0)
        up = torch.nn.Parameter(torch.randn(2, 128, 64))
        optimizer = SlotOptimizer(optimizer_class("adamw8bit"), [up], lr=0.1)
        start = 0
        if resumed:
            state = read_state(config)
            up.data.copy_(state["up"])
            optimizer.load_state_dict(state["optimizer"])
            start = 3
        for step in range(start, 6):
            optimizer.see([0])
            up.grad = up.detach() - step
            optimizer.step()
            if step == 2:
                write_state(tmp_path, {"up": up.detach(), "optimizer": optimizer.state_dict()}, config)
        results.append(up.detach().clone())
    moments = optimizer.state_dict()["slots"][0]["state"][0]["__bnb_optimizer_quant_state__"]
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    assert torch.equal(*results)
