# SPDX-License-Identifier: Apache-2.0
"""`metalora evaluate`; its settings are those of evaluation."""

from __future__ import annotations

from ..evaluation.evaluation_settings import EvaluateConfig
from ..evaluation.protocol import evaluate


def run_evaluate(config: EvaluateConfig) -> str:
    """Evaluate, and say where the report lies."""
    return f"wrote {evaluate(config)}"
