# SPDX-License-Identifier: Apache-2.0
"""What the tests of the service share: a base and a Down on disk, and a loop to run in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from peft_metalora import MetaLoraConfig, load_down, save_down
from peft_metalora.bases import base_for
from peft_metalora.encoder import EncoderConfig, SubjectSpace, make_encoder, save_reader
from pipelines_tiny import save_tiny_flux, tiny_flux_pipeline

CODE_SIZE = 6


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with `base` and `down`, whose space and encoder are random."""
    folder = tmp_path_factory.mktemp("service")
    save_tiny_flux(folder / "base")
    pipe = tiny_flux_pipeline()
    torch.manual_seed(0)
    config = MetaLoraConfig(r=2, meta_r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_weights=False)
    pipe.transformer.add_adapter(config, "faces")
    save_down(folder / "down", pipe.transformer, "faces", base_model=str(folder / "base"))
    space = SubjectSpace.around(load_down(folder / "down"), CODE_SIZE)
    with torch.no_grad():
        space.basis.normal_(std=4.0, generator=torch.Generator().manual_seed(0))
    encoder = make_encoder(
        EncoderConfig(resolution=16, code_size=CODE_SIZE, width=8, hidden=16), base_for(pipe).encode_images
    )
    save_reader(folder / "down", space.rounded(), encoder)
    return folder


@pytest.fixture
def run():
    """Runs a coroutine in a loop of its own; what is left in it goes with it."""

    def in_a_loop(work):
        async def whole():
            return await asyncio.wait_for(work, 60)

        return asyncio.run(whole())

    return in_a_loop
