# SPDX-License-Identifier: Apache-2.0
"""What the tests of the page share: a tiny base and a Down on disk, and a page on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from app_tiny import Tried
from peft_metalora.bases import base_for, load_base
from training_tiny import save_tiny_down, teach_to_read


@pytest.fixture(scope="session")
def app_home(tmp_path_factory) -> Path:
    """A folder with `base` and `down`, whose space and encoder are random."""
    folder = tmp_path_factory.mktemp("app-home")
    pipe = save_tiny_down(folder)
    teach_to_read(folder / "down", 6, base_for(pipe), spread=4.0)
    return folder


@pytest.fixture(scope="session")
def base(app_home):
    return load_base(app_home / "base", max_sequence_length=8)


@pytest.fixture
def tried(app_home, base, tmp_path):
    made: list[Tried] = []

    def make(**changes) -> Tried:
        made.append(Tried(app_home, base, tmp_path, **changes))
        return made[-1]

    yield make
    base.pipeline.unload_meta_lora()
