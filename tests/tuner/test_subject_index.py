# SPDX-License-Identifier: Apache-2.0
"""Each sample keeps its subject: through checkpointing, through backward, beside a merge."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from tuner_models import adapted, layer_of, randomise

from peft_metalora.errors import SubjectIndexError
from peft_metalora.tuner import set_slots, using_slots


def gradients(slots, before, *, how, backward_inside=False):
    """Gradient of Up of the second layer after a loss inside of `using_slots`, and that loss's value."""
    model, x = randomise(adapted(num_slots=3)), torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    set_slots(model, before)

    def run(x):
        if how == "plain":
            return model(x)
        return checkpoint(model.base_model.model, x.requires_grad_(), use_reentrant=how == "reentrant")

    total = torch.zeros(())
    for index, weight in slots:
        with using_slots(model, index):
            loss = weight * run(x.clone()).square().sum()
            if backward_inside:
                loss.backward()
        total = total + loss
    if not backward_inside:
        total.backward()
    return layer_of(model, "lin1").metalora_up["default"].grad


@pytest.mark.parametrize("how", ["checkpointed", "reentrant", "plain"])
@pytest.mark.parametrize("before", [None, [0, 0], [0], [-1, 2]])
@pytest.mark.parametrize("index", [[1, 2], [-1, 1], None])
def test_backward_outside_of_the_block_reaches_the_slots_of_the_block(index, before, how):
    """Bug: the pass that checkpointing repeats read the index of after the block, so another person's slot trained."""
    pairs = [(index, 1.0)]
    wanted = gradients(pairs, before, how="plain", backward_inside=True)
    torch.testing.assert_close(gradients(pairs, before, how=how), wanted)


def test_two_losses_of_different_people_keep_their_slots():
    """Bug: with one backward for two checkpointed losses, both landed in the slots that were set last."""
    pairs = [([1, 2], 1.0), ([0, -1], 3.0), (None, 0.5)]
    wanted = gradients(pairs, None, how="plain", backward_inside=True)
    torch.testing.assert_close(gradients(pairs, None, how="checkpointed"), wanted)


def test_another_index_between_forward_and_backward_is_no_error():
    """Bug: the index was overwritten in place, and autograd refused the backward of what was chosen before."""
    model, x = randomise(adapted(num_slots=2)), torch.randn(2, 12)
    set_slots(model, [1, 1])
    loss = model(x).sum()
    set_slots(model, [0, 0])
    loss.backward()
    touched = layer_of(model).metalora_up["default"].grad.abs().sum((1, 2)) > 0
    assert touched.tolist() == [False, True]


def test_slot_0_for_everybody_is_refused_while_another_slot_is_merged():
    """Bug: `set_slots(model, None)` was accepted beside a merged slot 1, which every sample went on to show."""
    model, x = randomise(adapted(num_slots=2)), torch.randn(2, 12)
    zero = model(x)
    set_slots(model, [1])
    model.base_model.merge_adapter()
    with pytest.raises(SubjectIndexError, match="Unmerge it"):
        set_slots(model, None)
    model.base_model.unmerge_adapter()
    set_slots(model, None)
    assert torch.equal(model(x), zero)


def test_a_merge_inside_the_block_leaves_the_block_in_peace():
    """Bug: leaving `using_slots` raised after a merge inside, and the block's index stayed."""
    model, x = randomise(adapted(num_slots=2)), torch.randn(2, 12)
    set_slots(model, [0, 0])
    with using_slots(model, [1, 1]):
        one = model(x)
        model.base_model.merge_adapter()
    torch.testing.assert_close(model(x), one)
    assert layer_of(model).subject_index.values == (0, 0)


def test_samples_repeat_each_where_frames_are_flattened():
    """Bug: a batch of k times the index could only repeat it as a whole, so frames of one film mixed people."""
    model, x = randomise(adapted(num_slots=2)), torch.randn(6, 12)
    with using_slots(model, [0, 0, 0, 1, 1, 1]):
        wanted = model(x)
    set_slots(model, [0, 1], each=True)
    torch.testing.assert_close(model(x), wanted)
    set_slots(model, [0, 1])
    assert not torch.allclose(model(x), wanted)
