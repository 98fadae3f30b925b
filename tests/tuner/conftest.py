# SPDX-License-Identifier: Apache-2.0
"""Each test starts and ends without the tuner's global loader of Downs being changed."""

from __future__ import annotations

import pytest

from peft_metalora.tuner import down


@pytest.fixture(autouse=True)
def restore_down_loader(monkeypatch):
    monkeypatch.setattr(down, "_loader", None)
