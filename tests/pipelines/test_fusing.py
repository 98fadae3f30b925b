# SPDX-License-Identifier: Apache-2.0
"""A thousand people fused into one base and taken out again: not a bit of it changes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from artefacts_tiny import write_subjects
from peft_metalora import enable_meta_lora
from peft_metalora.tuner import subject_state, write_subject
from pipelines_tiny import tiny_flux_pipeline

SUBJECTS = 1000
TARGETS = ["to_q", "add_q_proj", "proj_mlp", "norm1.linear"]


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """A hash over names, dtypes and bytes of all tensors."""
    mark = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        mark.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        mark.update(tensor.view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()


def weights(pipe):
    """The denoiser's own weights, wherever the adapter has put them."""
    state = pipe.transformer.state_dict()
    return {name.replace("base_layer.", ""): t for name, t in state.items() if "metalora" not in name}


def image(pipe):
    noise = torch.Generator().manual_seed(0)
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipe("a photo of a person", generator=noise, **settings).images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_subjects_leave_no_trace(tmp_path, dtype):
    model = tiny_flux_pipeline().transformer
    write_subjects(tmp_path, model, "ann", target_modules=TARGETS)

    pipe = enable_meta_lora(tiny_flux_pipeline()).to(dtype)
    before, base = digest(weights(pipe)), image(pipe)
    pipe.load_meta_lora(tmp_path / "ann", "someone")
    start = subject_state(pipe.transformer, "someone")
    seen = set()
    for number in range(SUBJECTS):
        generator = torch.Generator().manual_seed(number)
        person = {name: torch.randn(factor.shape, generator=generator) for name, factor in start.items()}
        write_subject(pipe.transformer, "someone", person)
        pipe.fuse_meta_lora("someone")
        seen.add(digest(weights(pipe)))
        pipe.unfuse_meta_lora()
        if number % 100 == 0:
            assert digest(weights(pipe)) == before
    assert len(seen) == SUBJECTS and before not in seen
    assert digest(weights(pipe)) == before
    pipe.unload_meta_lora()
    assert digest(pipe.transformer.state_dict()) == before
    assert np.array_equal(image(pipe), base)
