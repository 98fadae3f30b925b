# SPDX-License-Identifier: Apache-2.0
"""What tests of training start from."""

from __future__ import annotations

import shutil

import pytest

from peft_metalora import hub
from peft_metalora.training.meta_train import meta_train_on
from pipelines_tiny import save_tiny_flux
from training_tiny import meta_config, teach_to_read, tiny_base, tiny_examples, write_people


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny base, its Down and three people; nobody writes into it."""
    folder = tmp_path_factory.mktemp("training")
    save_tiny_flux(folder / "base")
    write_people(folder / "people")
    base = tiny_base()
    meta_train_on(base, tiny_examples(base), meta_config(), progress=False).save(str(folder / "down"))
    return folder


@pytest.fixture(scope="session")
def reading(place, tmp_path_factory):
    """A copy of the Down of `place` that reads photos; nobody writes into it."""
    return teach_to_read(shutil.copytree(place / "down", tmp_path_factory.mktemp("reading") / "down"))


@pytest.fixture
def down(place):
    return hub.load_down(place / "down")


@pytest.fixture
def base():
    return tiny_base()
