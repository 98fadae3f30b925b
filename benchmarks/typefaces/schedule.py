# SPDX-License-Identifier: Apache-2.0
"""Everything from packed fonts to figures, on several GPUs, within a time: networks, Down, encoders, rivals, sheet."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
_TO_END = 12  # seconds for files to be written after the last process was stopped
_TO_START = 15  # until a worker's clock runs
_DOWN_STEPS = 3000
_SHIFT = 4  # of the noise levels of training, as `domains.py` says why; rivals choose between it and none


@dataclass
class Task:
    """A process on a GPU of its own.

    Attributes:
        makes: what is there when it has ended well, a mark where its own files may be half written.
        needs: what must be there before it starts. shares: it may run on a GPU with another.
    """

    name: str
    command: list[str]
    makes: Path
    needs: list[Path] = field(default_factory=list)
    shares: bool = False


def run(args: argparse.Namespace) -> None:
    """Run what is missing, as far as the time goes; then write the figures of what is there."""
    end = time.monotonic() + args.seconds - _TO_END
    args.output.mkdir(parents=True, exist_ok=True)
    for claim in args.output.glob("*.claim"):
        if not claim.with_suffix(".json").exists():
            claim.unlink()
    free, running = list(range(args.gpus)), {}
    waiting = [task for task in tasks(args) if not task.makes.exists()]
    spare = args.gpus - 1
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
            if (free or task.shares) and all(path.exists() for path in task.needs):
                waiting.remove(task)
                gpu = spare if task.shares else free.pop(0)
                process = _start(task, gpu, left, args)
                running[process] = (task, gpu)
                print(f"{task.name} on GPU {gpu}, {left:.0f} s left", flush=True)
        if not running:
            print(f"nothing can go on: {[task.name for task in waiting]}", flush=True)
            break
        time.sleep(0.5)
    _summarise(args)


def tasks(args: argparse.Namespace) -> list[Task]:
    """The jobs in the order in which they are wanted."""
    assets, output = args.assets, args.output
    python = [sys.executable, str(HERE)]

    def done(*jobs: str) -> list[Path]:
        return [assets / f"{job}.done" for job in jobs]

    def train(job: str, needs: Sequence[str], full: str, tiny: str) -> Task:
        options = (tiny if args.tiny else full).split()
        return Task(job, [*python, "train", job, "--output", str(assets), *options], *done(job), done(*needs))

    base = f"--seconds {args.base_seconds} --batch 768"
    down = f"--seconds {args.down_seconds} --down-steps {_DOWN_STEPS} --shift {_SHIFT}"
    networks = [
        train("vae", [], "--steps 1200", "--steps 2 --pool 16"),
        train("embedder", [], "--steps 5000", "--steps 2"),
        train("judge", [], "--steps 6000", "--steps 4"),
        train("second", [], "--steps 5000", "--steps 2"),
        train("base", ["vae"], base, "--seconds 4 --pool 16 --batch 4"),
        train("down", ["base"], down, "--seconds 4 --people 4"),
    ]
    if not args.tiny:
        networks.append(train("report", ["base", "embedder", "judge"], "", ""))
    convergence = [sys.executable, str(HERE.parent / "convergence.py")]
    ready = done("down", "embedder", "judge", "second")
    workers = [Task(f"worker {number}", convergence, output / f"worker-{number}", ready) for number in range(args.gpus)]
    draw = [*python, "specimen", "--assets", str(assets), "--output", str(output), "--fonts", "1" if args.tiny else "3"]
    needs = [output / "main-0.json", output / "rivals-lora_r1.json"]
    return [*networks, *workers, Task("specimen", draw, output / "specimen.png", needs, shares=True)]


def _start(task: Task, gpu: int, left: float, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = list(task.command)
    if task.name.startswith("worker"):
        command += _worker(args, left)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    log = (args.output / f"{task.name.replace(' ', '-')}.log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _worker(args: argparse.Namespace, left: float) -> list[str]:
    """The options of a worker: what the plan still lacks, as far as it would be done in time."""
    options = [
        "--domain",
        "typefaces",
        "--assets",
        str(args.assets),
        "--output",
        str(args.output),
        "--split",
        "held-out",
    ]
    if args.tiny:
        options += ["--people", "2", "--tune-people", "1", "--meta-people", "2", "--mean-steps", "1", "--views", "1"]
        options += ["--inference-steps", "1", "--rival-steps", "1", "--decays", "--at", "1", "25", "--seeds", "1"]
        options += ["--looks", "--conditions", "blur", "--fitting-steps", "1", "--workers", "1", "--save", "main-0"]
        options += ["--changes", args.changes, "--rival-shifts", "1", str(_SHIFT)]
        tiny = "steps=2,people=4,photos=3,rows=2,targets=1,k=8"
        options += ["--recipe", f"main-0:{tiny}", "--recipe", f"lora-0:kind=lora,r=1,{tiny}"]
        options += ["--recipe", f"image_prompt-0:kind=image_prompt,{tiny}", "--recipe", f"random-0:kind=random,{tiny}"]
        return [*options, "--rival", "lora_r1"]
    options += ["--rival-steps", "25", "50", "100", "200", "300", "500", "--decays", "300", "--precision", "bf16"]
    options += ["--compile", "--save", "main-0", "--seconds", f"{left - _TO_START:.0f}"]
    options += ["--changes", args.changes, "--rival-shifts", "1", str(_SHIFT)]
    options += ["--workers", str(max(1, (os.cpu_count() or 4) // args.gpus - 1))]
    return [*options, "--plan"]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours, and those that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(4)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _summarise(args: argparse.Namespace) -> None:
    """The figures of what is there, also after workers were stopped."""
    from convergence_figures import summarise

    if any(args.output.glob("*-*.json")):
        summarise(args.output, "typefaces")
