# SPDX-License-Identifier: Apache-2.0
"""Everything from packed fonts to figures, on several GPUs, within a time: networks, Down, encoders, rivals, sheet."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from .domain import SECOND_EMBEDDER

HERE = Path(__file__).resolve().parent
_TO_END = 12  # seconds for files to be written after the last process was stopped
_ENCODER = 330  # seconds: with fewer left, workers make rivals alone
_RIVALS = ("lora_r1", "full", "meta_lora_mean", "lora_r16", "mean_lora")


@dataclass
class Task:
    """A process on a GPU of its own.

    Attributes:
        makes: what is there when it has ended well. needs: what must be there before it starts.
        shares: it may run on a GPU with another. worker: it is asked to stop by itself.
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
    small = args.tiny

    def train(job: str, makes: str, needs: list[Path], *options: str) -> Task:
        command = [*python, "train", job, "--output", str(assets), *options]
        return Task(job, command, assets / makes, needs)

    embedder, judge = assets / "face_embedder.safetensors", assets / "judge.safetensors"
    vae, base = assets / "vae" / "config.json", assets / "base" / "text_encoder" / "model.safetensors"
    down, second = assets / "down" / "adapter_config.json", assets / SECOND_EMBEDDER
    steps = ("--steps", "2") if small else ()
    pool = ("--pool", "64", "--batch", "8") if small else ("--batch", "768")
    seconds = ("--seconds", "4") if small else ("--seconds", str(args.base_seconds))
    down_seconds = ("--seconds", "4") if small else ("--seconds", str(args.down_seconds))
    networks = [
        train("vae", "vae/config.json", [], *steps, *(pool[:2] if small else ())),
        train("embedder", embedder.name, [], *(steps or ("--steps", "2500"))),
        train("judge", judge.name, [], *(("--steps", "4") if small else ("--steps", "4000"))),
        train("second", second.name, [], *(steps or ("--steps", "2500"))),
        train("base", "base/text_encoder/model.safetensors", [vae], *seconds, *pool),
        train("down", "down/adapter_config.json", [base], *down_seconds),
        train("report", "report.json", [base, embedder, judge]),
    ]
    ready = [base, down, embedder, judge, second]
    workers = [
        Task(
            f"worker {number}",
            [sys.executable, str(HERE.parent / "convergence.py")],
            output / f"worker-{number}",
            ready,
        )
        for number in range(args.gpus)
    ]
    main = output / "main-0" / "subject_space.safetensors"
    needs = [main, output / "rivals-lora_r1.json"]
    draw = [*python, "specimen", "--assets", str(assets), "--output", str(output), *(["--fonts", "1"] if small else [])]
    return [*networks, *workers, Task("specimen", draw, output / "specimen.png", needs, shares=True)]


def _start(task: Task, gpu: int, left: float, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = list(task.command)
    if task.name.startswith("worker"):
        command += _worker(args, left)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    log = (args.output / f"{task.name.replace(' ', '-')}.log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def _worker(args: argparse.Namespace, left: float) -> list[str]:
    """What a worker makes: everything, or rivals alone where an encoder would not be done in time."""
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
        tiny = "steps=2,people=4,photos=3,rows=2,targets=1,k=8"
        options += ["--recipe", f"main-0:{tiny}", "--recipe", f"lora-0:kind=lora,r=1,{tiny}"]
        options += ["--recipe", f"image_prompt-0:kind=image_prompt,{tiny}", "--recipe", f"random-0:kind=random,{tiny}"]
        return [*options, "--rival", "lora_r1"]
    options += ["--rival-steps", "25", "50", "100", "200", "300", "500", "--decays", "300", "--precision", "bf16"]
    options += ["--compile", "--save", "main-0", "--seconds", f"{left - 60:.0f}"]
    options += ["--workers", str(max(1, (os.cpu_count() or 4) // args.gpus - 1))]
    if left > _ENCODER:
        return [*options, "--plan"]
    return [*options, *(part for name in _RIVALS for part in ("--rival", name))]


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
