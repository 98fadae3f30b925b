# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: no network, one thread, fixed seeds."""

from __future__ import annotations

import gc
import os
import sys

# Before any import of huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import pytest
import torch

ON_GPU = torch.cuda.is_available()

if not ON_GPU:  # read when Triton is first imported
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what waits for other processes, so that nobody waits for it at the end."""
    waiting = {"test_on_ray.py", "test_processes.py", "test_state.py"}
    items.sort(key=lambda item: item.path.name not in waiting)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """One thread, though a copy of the service in this process asks for all: two wait for a core ten times as long."""
    torch.set_num_threads(1)


_frozen = 0


@pytest.fixture(autouse=True, scope="module")
def imports_are_not_garbage() -> None:
    """What was imported is looked at by no further collection: letting a model go collects, half a second each time."""
    global _frozen
    if len(sys.modules) > _frozen + 50:
        gc.collect()
        gc.freeze()
        _frozen = len(sys.modules)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test draws the same numbers, whichever ran before it."""
    # torch.manual_seed would note the stack for a GPU that is not there, which takes longer than many a test.
    (torch if ON_GPU else torch.default_generator).manual_seed(0)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A small Hub on the loopback, with a token, and an empty cache."""
    import huggingface_hub

    from fake_hub import TOKEN, FakeHub, point_at

    with FakeHub() as fake:
        point_at(fake.endpoint, tmp_path / "cache", monkeypatch)
        # HF_TOKEN would be read once, when huggingface_hub is imported.
        monkeypatch.setattr(huggingface_hub.utils._auth, "_get_token_from_environment", lambda: TOKEN)
        yield fake
