# SPDX-License-Identifier: Apache-2.0
"""What the tests of the service share: a base and a Down on disk, and a loop to run in."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from peft_metalora.bases import base_for
from sftp_here import sftp  # noqa: F401
from training_tiny import save_tiny_down, teach_to_read

CODE_SIZE = 6


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """A folder with `base` and `down`, whose space and encoder are random."""
    folder = tmp_path_factory.mktemp("service")
    pipe = save_tiny_down(folder)
    teach_to_read(folder / "down", CODE_SIZE, base_for(pipe), spread=4.0)
    return folder


@pytest.fixture
def run():
    """Runs a coroutine in a loop of its own; what is left in it goes with it."""

    def in_a_loop(work):
        async def whole():
            return await asyncio.wait_for(work, 60)

        return asyncio.run(whole())

    return in_a_loop
