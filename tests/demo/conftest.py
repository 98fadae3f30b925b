# SPDX-License-Identifier: Apache-2.0
"""What the tests of the demo share."""

import pytest


@pytest.fixture
def coarse_images(monkeypatch):
    """Images in 4 steps for 20: coarser, but of the same people, and drawing is most of the time of these tests."""
    monkeypatch.setattr("peft_metalora.demo.scoring.INFERENCE_STEPS", 4)
