# SPDX-License-Identifier: Apache-2.0
"""`metalora evaluate`; its settings are those of evaluation."""

from __future__ import annotations

from ..evaluation.evaluation_settings import EvaluateConfig
from ..evaluation.protocol import evaluate
from . import Done


def run_evaluate(config: EvaluateConfig) -> Done:
    """Evaluate, and say where the report lies."""
    report = evaluate(config)
    return Done(f"wrote {report}", {"report": report})
