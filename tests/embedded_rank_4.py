# SPDX-License-Identifier: Apache-2.0
"""The Down of the embedded base at rank 4, as the benchmarks have it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from peft_metalora.tuner import DownSource

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def embedded_down(r: int = 4) -> DownSource:
    """As `benchmarks/embedded_down.py` gives it."""
    spec = importlib.util.spec_from_file_location("embedded_down", BENCHMARKS / "embedded_down.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    down: DownSource = module.embedded_down(r)
    return down
