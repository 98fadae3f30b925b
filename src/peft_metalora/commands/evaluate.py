# SPDX-License-Identifier: Apache-2.0
"""`metalora evaluate`; its settings are those of evaluation."""

from __future__ import annotations

from ..evaluation.protocol import evaluate
from ..evaluation.settings import EvaluateConfig


def run_evaluate(config: EvaluateConfig) -> str:
    """Evaluate, and say where the report lies."""
    return f"wrote {evaluate(config)}"
