# SPDX-License-Identifier: Apache-2.0
"""A subject for each token of a layer's input, against a dense reference for each token."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from tuner_models import adapted, layer_of, mlp, randomise

from peft_metalora.errors import SubjectIndexError
from peft_metalora.tuner import TokenSlots, fold, set_slots, set_token_slots, using_slots

SLOTS = torch.tensor([-1, 0, 2, 2, -1, 0, 1])


def table(maps):
    made = TokenSlots()
    made.write(maps, torch.device("cpu"))
    return made


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize("grad", [True, False])
def test_each_token_is_what_its_subject_makes_of_it(settings, grad):
    base, x = mlp(), torch.randn(2, 7, 12)
    model = randomise(adapted(base, num_slots=3, **settings))
    with torch.set_grad_enabled(grad):
        alone = []
        for slot in (-1, 0, 1, 2):
            with using_slots(model, [slot, slot]):
                alone.append(model(x))
        expected = torch.stack(alone)[SLOTS + 1, :, torch.arange(7)].transpose(0, 1)
        set_token_slots(model, dict.fromkeys(("lin0", "lin1"), table({(7,): SLOTS})))
        mixed = model(x)
        plain = base(x)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed[:, SLOTS < 0], plain[:, SLOTS < 0]), "bit for bit the base where nobody is"


def test_subjects_of_tokens_train():
    model = randomise(adapted(num_slots=2))
    set_token_slots(model, {"lin0": table({(3,): torch.tensor([1, -1, 1])})})
    model(torch.randn(1, 3, 12)).sum().backward()
    up = layer_of(model).metalora_up["default"].grad
    assert not up[0].any() and up[1].any()
    assert layer_of(model).metalora_down["default"].grad.any()


@pytest.mark.parametrize("kernel,stride", [(1, 1), (3, 2)])
def test_maps_of_a_convolution(kernel, stride):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 5, kernel, stride, kernel // 2)).eval()
    model = randomise(adapted(base, target_modules=["0"], num_slots=2))
    x = torch.randn(2, 4, 6, 8)
    slots = torch.randint(-1, 2, base(x).shape[2:])
    expected = base(x)
    for slot in (0, 1):
        with using_slots(model, [slot, slot]):
            expected = torch.where(slots == slot, model(x), expected)
    set_token_slots(model, {"0": table({tuple(slots.shape): slots})})
    mixed = model(x)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed[:, :, slots < 0], base(x)[:, :, slots < 0])


def test_tables_take_the_place_of_the_samples_index_and_leave_it_alone():
    base, x = mlp(), torch.randn(2, 3, 12)
    model = randomise(adapted(base, num_slots=2))
    set_slots(model, [1, 0])
    before = model(x)
    set_token_slots(model, {})
    assert torch.equal(model(x), base(x)), "layers without a table show nobody"
    set_token_slots(model, {"lin0": table({(3,): torch.zeros(3, dtype=torch.int64)})})
    assert torch.equal(model(x[:, 0]), base(x[:, 0])), "nor do inputs without tokens"
    fold(model)
    set_token_slots(model, None)
    torch.testing.assert_close(model(x), before)


def test_tokens_that_no_map_describes_are_refused():
    model = adapted(num_slots=2)
    set_token_slots(model, {"lin0": table({(3,): torch.tensor([0, 1, -1])})})
    with pytest.raises(SubjectIndexError, match=r"sees \(4,\) tokens, the image has \[\(3,\)\]"):
        model(torch.randn(1, 4, 12))


def test_a_merged_subject_is_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(SubjectIndexError, match="merged"):
        set_token_slots(model, {})
    assert layer_of(model).token_slots is None
