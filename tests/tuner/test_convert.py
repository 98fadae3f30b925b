# SPDX-License-Identifier: Apache-2.0
"""An exported LoRA is the same function, loaded by PEFT and diffusers without knowing us."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from torch import nn
from transformers.pytorch_utils import Conv1D
from tuner_models import adapted, mlp, randomise

from peft_metalora.errors import AdapterNotFoundError, AdapterStateError, ConfigError
from peft_metalora.tuner import to_lora, using_slots
from peft_metalora.tuner.convert import register_lora_conversion

BASES = {
    "linear": (lambda: nn.Linear(12, 16), (3, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (3, 4, 8)),
    "transformers Conv1D": (lambda: Conv1D(16, 12), (3, 12)),
}


def with_lora(base, lora_config, state):
    model = inject_adapter_in_model(lora_config, copy.deepcopy(base))
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    return model.eval()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize(("slot", "r", "meta_r"), [(0, 2, 4), (2, 2, 4), (1, 16, 4), (0, 2, 99)])
def test_to_lora_is_exact(kind, slot, r, meta_r):
    torch.manual_seed(0)
    make, shape = BASES[kind]
    base, x = nn.Sequential(make()).eval(), torch.randn(*shape)
    settings = {"target_modules": ["0"], "num_slots": 3, "lora_alpha": 5, "use_rslora": True}
    model = randomise(adapted(base, r=r, meta_r=meta_r, **settings))
    lora_config, state = to_lora(model, slot=slot)
    assert (lora_config.r, lora_config.lora_alpha) == (r, r)
    with using_slots(model, [slot]):
        torch.testing.assert_close(with_lora(base, lora_config, state)(x), model(x))


def test_ranks_that_differ_by_module():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base, rank_pattern={"lin1": 1}, alpha_pattern={"lin1": 3}))
    lora_config, state = to_lora(model)
    assert lora_config.rank_pattern == lora_config.alpha_pattern
    torch.testing.assert_close(with_lora(base, lora_config, state)(x), model(x))


@pytest.mark.parametrize("rank", [2, 1.0, 5])
def test_pefts_own_conversion_takes_the_exact_road(rank, tmp_path):
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base))
    _, state = convert_to_lora(model, rank)
    if rank != 5:
        assert torch.equal(state["base_model.model.lin0.lora_A.weight"], to_lora(model)[1]["lin0.lora_A.weight"])
    assert state["base_model.model.lin0.lora_A.weight"].shape[0] == (5 if rank == 5 else 2)
    save_as_lora(tmp_path, model, rank)
    torch.testing.assert_close(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))


@pytest.mark.parametrize("rank", [1, 0.5])
def test_a_lower_rank_is_the_best_one(rank):
    model = randomise(adapted())
    _, state = convert_to_lora(model, rank)
    product = state["base_model.model.lin0.lora_B.weight"] @ state["base_model.model.lin0.lora_A.weight"]
    full = model.base_model.model.lin0.get_delta_weight("default")
    left, values, right = torch.linalg.svd(full)
    torch.testing.assert_close(product, values[0] * left[:, :1] @ right[:1], atol=1e-5, rtol=1e-4)


def test_a_subject_of_a_rank_above_the_weights_converts_exactly_and_within_it():
    base, x = mlp(), torch.randn(3, 12)
    model = randomise(adapted(base, r=14, meta_r=20, target_modules=["lin1"]))
    for rank in (1.0, 10):
        lora_config, state = convert_to_lora(model, rank)
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        torch.testing.assert_close(with_lora(base, lora_config, state)(x), model(x), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"rank 14 is larger than the weight shape \(10\).*10 is exact"):
        convert_to_lora(model, 14)


def test_a_rank_above_the_weight_is_refused():
    with pytest.raises(ConfigError, match=r"rank 11 is larger than the weight shape \(10\)"):
        convert_to_lora(adapted(), 11)


def test_registering_the_conversion_again_changes_nothing():
    from peft.tuners.lora import conversion

    before = conversion._convert_module_to_lora
    register_lora_conversion()
    assert conversion._convert_module_to_lora is before


def test_unknown_adapter_or_slot():
    model = adapted()
    with pytest.raises(AdapterNotFoundError, match="no Meta-LoRA adapter 'ann'"):
        to_lora(model, "ann")
    with pytest.raises(AdapterStateError, match="0 to 0; got 1"):
        to_lora(model, slot=1)


class Nested(nn.Module):
    """Layers whose paths end alike: `proj`, `block.proj` and `outer.block.proj`."""

    def __init__(self):
        super().__init__()
        self.proj, self.block = nn.Linear(8, 8), nn.ModuleDict({"proj": nn.Linear(8, 8)})
        self.outer = nn.ModuleDict({"block": nn.ModuleDict({"proj": nn.Linear(8, 8)})})

    def forward(self, x):
        return self.proj(torch.relu(self.block["proj"](torch.relu(self.outer["block"]["proj"](x)))))


@pytest.mark.parametrize("targets", ["proj", r"block\.proj", "outer.block.proj|proj", ["proj"]], ids=str)
def test_a_lora_adapts_the_modules_of_the_subject_and_no_other_of_the_same_ending(targets):
    """Bug: modules were named by suffix, so that `proj` wrapped `block.proj` too, with the rank of the wrong one."""
    torch.manual_seed(0)
    base, x = Nested().eval(), torch.randn(3, 8)
    model = randomise(adapted(base, r=4, target_modules=targets, rank_pattern={"^proj$": 2}))
    lora_config, state = to_lora(model)
    plain = with_lora(base, lora_config, state)
    wrapped = {name for name, module in plain.named_modules() if hasattr(module, "lora_A")}
    assert wrapped == {key.removesuffix(".lora_A.weight") for key in state if key.endswith("lora_A.weight")}
    torch.testing.assert_close(plain(x), model(x))
