# SPDX-License-Identifier: Apache-2.0
"""Processes on several GPUs that wait for each other's files, within a time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TO_END = 12  # seconds for files to be written after the last process was stopped


@dataclass
class Task:
    """A process on a GPU of its own.

    Attributes:
        makes: what is there when it has ended well, a mark where its own files may be half written.
        needs: what must be there before it starts. shares: it may run on a GPU with another.
        seconds: with less time left it is not started, and a shorter one may be.
        options: further arguments, given the seconds that are left.
    """

    name: str
    command: list[str]
    makes: Path
    needs: list[Path] = field(default_factory=list)
    shares: bool = False
    seconds: float = 0.0
    options: Callable[[float], list[str]] = lambda left: []


def run(tasks: Sequence[Task], seconds: float, gpus: int, logs: Path) -> None:
    """Run what is missing, the first that can go on first; all have ended, or were stopped, when the time is over.

    Args:
        gpus: how many there are, of those in CUDA_VISIBLE_DEVICES where that is set. logs: folder of outputs.
    """
    end = time.monotonic() + seconds - _TO_END
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    free: list[str] = visible.split(",")[:gpus]
    spare, running = free[-1], {}
    waiting = [task for task in tasks if not task.makes.exists()]
    while waiting or running:
        left = end - time.monotonic()
        for process, (task, gpu) in list(running.items()):
            if process.poll() is not None or left < 0:
                _stop(process)
                del running[process]
                if not task.shares:
                    free.append(gpu)
                if process.returncode == 0 and task.makes.suffix == ".done":
                    task.makes.touch()
                print(f"{task.name} ended with {process.returncode}, {left:.0f} s left", flush=True)
        if left < 0:
            break
        for task in list(waiting):
            ready = left > task.seconds and all(path.exists() for path in task.needs)
            if ready and (free or task.shares):
                waiting.remove(task)
                gpu = spare if task.shares else free.pop(0)
                running[_start(task, gpu, left, logs)] = task, gpu
                print(f"{task.name} on GPU {gpu}, {left:.0f} s left", flush=True)
        if not running:
            print(f"nothing can go on: {[task.name for task in waiting]}", flush=True)
            break
        time.sleep(0.5)


def free_claims(folder: Path) -> None:
    """What was begun by processes that were stopped can be made again."""
    for claim in folder.glob("*.claim"):
        if not claim.with_suffix(".json").exists():
            claim.unlink()


def _start(task: Task, gpu: str, left: float, logs: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    with (logs / f"{task.name.replace(' ', '-')}.log").open("ab") as log:
        return subprocess.Popen(
            [*task.command, *task.options(left)], env=environment, stdout=log, stderr=log, start_new_session=True
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours, and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(4)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
