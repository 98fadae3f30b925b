# SPDX-License-Identifier: Apache-2.0
"""Training of the embedded base."""

import torch

from peft_metalora.demo.embedded import BASE, load_base
from peft_metalora.demo.make_base import train_base


def test_a_base_goes_on_from_another():
    """Bug: a base that was to be trained further began from random weights."""
    before = load_base()
    pipe = train_base(before.vae, 1e-3, torch.device("cpu"), pool=4, batch=2, start_base=BASE)  # one step
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        old, new = (getattr(one, part).state_dict() for one in (before, pipe))
        assert all(torch.allclose(old[name], new[name], atol=1e-3) for name in old), part
    assert any(not torch.equal(old[name], new[name]) for name in old)
