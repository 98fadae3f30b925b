# SPDX-License-Identifier: Apache-2.0
"""What a file of figures says of its origin: machine, date, command and versions; and how it is written."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peft_metalora.files import write_bytes


def machine(device: str | torch.device) -> str:
    """Name of the processor that computes."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def origin(device: str | torch.device, *further: str) -> dict[str, Any]:
    """The first keys of a file of figures.

    Args:
        further: packages whose versions count, beside torch, diffusers and peft.
    """
    return {
        "machine": machine(device),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_anywhere, sys.argv[1:])]),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", *further)},
    }


def _anywhere(argument: str) -> str:
    """A path of this machine as one of any."""
    path = Path(argument)
    return argument if not path.is_absolute() else f"DIR/{path.name}" if path.suffix else "DIR"


def write(path: Path, report: dict[str, Any]) -> None:
    """Write a file of figures, whole or not at all."""
    write_bytes(path, (json.dumps(report, indent=1) + "\n").encode())
