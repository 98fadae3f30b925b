# SPDX-License-Identifier: Apache-2.0
"""4-bit weights on a CPU: bitsandbytes computes with them there, and diffusers alone asks for a GPU."""

from __future__ import annotations

from bitsandbytes.nn import modules
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

from peft_metalora.bases import memory


def allow_on_a_cpu(monkeypatch) -> None:
    """Let this test quantise to nf4 on the CPU, and stream there."""
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "update_device_map", lambda _, given: given or {"": "cpu"})
    # The layout that CPUs infer with asks for widths that tiny models do not have.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr(memory, "_TABLE", tuple(row for row in memory._TABLE if row.where != memory.CPU))
