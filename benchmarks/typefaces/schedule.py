# SPDX-License-Identifier: Apache-2.0
"""Everything from packed fonts to figures, on several GPUs, within a time: networks, Down, encoders, rivals, sheet."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jobs
from jobs import Task

HERE = Path(__file__).resolve().parent
_TO_START = 15  # until a worker's clock runs
_SHORTEST = 130  # seconds that a worker needs for anything
_SHEET = 40  # seconds that the specimen takes
_DOWN_STEPS = 3000
_SHIFT = 4  # of the noise levels of training, as `domains.py` says why; rivals choose between it and none


def run(args: argparse.Namespace) -> None:
    """Run what is missing, as far as the time goes; then write the figures of what is there."""
    args.output.mkdir(parents=True, exist_ok=True)
    jobs.free_claims(args.output)
    jobs.run(tasks(args), args.seconds, args.gpus, args.output)
    _summarise(args)


def tasks(args: argparse.Namespace) -> list[Task]:
    """The jobs in the order in which they are wanted."""
    assets, output = args.assets, args.output
    python = [sys.executable, str(HERE)]

    def done(*jobs: str) -> list[Path]:
        return [assets / f"{job}.done" for job in jobs]

    def train(job: str, needs: Sequence[str], full: str, tiny: str, seconds: float) -> Task:
        options = (tiny if args.tiny else full).split()
        command = [*python, "train", job, "--output", str(assets), *options]
        return Task(job, command, *done(job), done(*needs), seconds=0 if args.tiny else seconds)

    base = f"--seconds {args.base_seconds} --batch 768"
    down = f"--seconds {args.down_seconds} --down-steps {_DOWN_STEPS} --shift {_SHIFT}"
    networks = [
        train("vae", [], "--steps 1200", "--steps 2 --pool 16", 130),
        train("embedder", [], "--steps 5000", "--steps 2", 350),
        train("judge", [], "--steps 6000", "--steps 4", 260),
        train("second", [], "--steps 5000", "--steps 2", 400),
        train("base", ["vae"], base, "--seconds 4 --pool 16 --batch 4", args.base_seconds + 90),
        train("down", ["base"], down, "--seconds 4 --people 4", args.down_seconds + 30),
    ]
    if not args.tiny:
        networks.append(train("report", ["base", "embedder", "judge"], "", "", 30))
    convergence = [sys.executable, str(HERE.parent / "convergence.py")]
    ready = done("down", "embedder", "judge", "second")
    least, options = 0 if args.tiny else _SHORTEST, partial(_worker, args)
    workers = [
        Task(f"worker {number}", convergence, output / f"worker-{number}", ready, seconds=least, options=options)
        for number in range(args.gpus)
    ]
    draw = [*python, "specimen", "--assets", str(assets), "--output", str(output), "--fonts", "1" if args.tiny else "3"]
    needs = [output / "main-0.json", output / "main-0", output / "rivals-lora_r1.json"]
    sheet = Task("specimen", draw, output / "specimen.png", needs, shares=True, seconds=0 if args.tiny else _SHEET)
    return [*networks, *workers, sheet]


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


def _summarise(args: argparse.Namespace) -> None:
    """The figures of what is there, also after workers were stopped."""
    from convergence_figures import summarise

    if any(args.output.glob("*-*.json")):
        summarise(args.output, "typefaces")
