# SPDX-License-Identifier: Apache-2.0
"""Optimisers by name."""

import pytest
import torch

from peft_metalora.errors import ConfigError
from peft_metalora.training.adapters import optimizer_class


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
