# SPDX-License-Identifier: Apache-2.0
"""Is one Down over faces and typefaces as good as one over each? Everything on one base that draws both.

    python benchmarks/joint.py run --assets build/typefaces --output build/joint --seconds 575 --gpus 4
    python benchmarks/joint.py down-both --assets build/typefaces --output build/joint      one of the jobs of `run`

`--assets` is the folder of typefaces (`benchmarks/typefaces`): glyphs, embedder and judge; those of faces are in the
package. `run` goes on where an earlier one stopped: an autoencoder and a base from random weights, half of what they
see of each domain; a Down over each domain, and one over both, which has as many steps as the two together. Then arms,
`PEOPLE-on-DOWN`: an encoder that reads people of a domain, or of both, on one of the Downs (or on one that was never
trained), and `tuned-PEOPLE-on-DOWN`: people learned from the mean subject of a Down, without an encoder. All are judged
on held-out people of the domain, and their noise levels are the same. DIR/joint.json has the figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import convergence
import jobs
import torch
from both import Both
from convergence_figures import clean, paired, people_of
from diffusers import AutoencoderKL
from encoder_world import Recipe, World, helpers
from origin import origin
from typefaces.domain import Typefaces

from peft_metalora.demo import make_base
from peft_metalora.demo.domain import Domain, Drawn, Faces
from peft_metalora.demo.embedded import ASSETS
from peft_metalora.errors import TrainingError
from peft_metalora.evaluation.rivals import vmap_ready
from peft_metalora.evaluation.summary import interval
from peft_metalora.files import write_bytes
from peft_metalora.hub import load_down

FACES, TYPEFACES, BOTH, RANDOM = "faces", "typefaces", "both", "random"
HALVES = FACES, TYPEFACES
SHIFT = 2.5  # of noise levels: on tune fonts 0.163, where 4 had 0.169 and 1 had 0.097 (2,000 steps); faces use 1
DOWN_STEPS = 3000
TUNED = "100"  # steps after which tuned people are compared, as on faces

# Seconds on an H100 or H200 that a job needs, and, of those that train by the clock, what else they do.
_TO_START = 15
_VAE, _REPORT, _DOWN = 150, 45, {FACES: 90, TYPEFACES: 90, BOTH: 150}
_LEAST_BASE, _BESIDE_BASE = 330, 45
_TUNING, _JUDGING = 75, 18


@dataclass(frozen=True)
class Sizes:
    """How much of everything. `recipe` is of encoders, `options` of `convergence.py`; `most` fonts of a split."""

    vae: Mapping[str, int]
    pool: int
    batch: int
    people: int
    down_seconds: float
    encoder_steps: int
    recipe: str
    options: Sequence[str]
    most: int | None = None


FULL = Sizes(
    vae={"steps": 1200},
    pool=393_216,
    batch=768,
    people=1024,
    down_seconds=300,
    encoder_steps=4000,  # of a domain; faces had 0.69 after them and 0.75 after 12,000
    recipe=f"worse=-sunglasses,brief=2,shift={SHIFT}",
    options=("--precision", "bf16", "--compile", "--rival-steps", "25", "50", "100", "200"),
)
TINY = Sizes(
    vae={"steps": 2, "pool": 16},
    pool=16,
    batch=4,
    people=4,
    down_seconds=4,
    encoder_steps=2,
    recipe=f"worse=-sunglasses,brief=2,shift={SHIFT},people=4,photos=3,rows=2,targets=1,k=8",
    options=(
        *("--people", "2", "--tune-people", "1", "--views", "1", "--inference-steps", "1", "--seeds", "1"),
        *("--rival-steps", "1", "--workers", "1"),
    ),
    most=2,
)


@dataclass(frozen=True)
class Arm:
    """What is compared. needed: whether the question cannot be answered without it."""

    name: str
    needed: bool = True

    @property
    def tuned(self) -> bool:
        return self.name.startswith("tuned-")

    @property
    def people(self) -> str:
        return self.name.removeprefix("tuned-").partition("-on-")[0]

    @property
    def down(self) -> str:
        return self.name.partition("-on-")[2]

    @property
    def judged(self) -> tuple[str, ...]:
        return HALVES if self.people == BOTH else (self.people,)


ARMS = (
    Arm("faces-on-faces"),
    Arm("typefaces-on-typefaces"),
    Arm("both-on-both"),
    Arm("faces-on-both"),
    Arm("typefaces-on-both"),
    *(Arm(f"tuned-{half}-on-{down}") for half in HALVES for down in (half, BOTH)),
    *(Arm(f"{half}-on-{RANDOM}", needed=False) for half in HALVES),
    Arm("faces-on-typefaces", needed=False),
    Arm("typefaces-on-faces", needed=False),
)


def halves_of(assets: Path, output: Path, sizes: Sizes, device: torch.device) -> dict[str, Domain]:
    """The domains, drawn by the base of both."""
    base = output / "base"
    return {FACES: Faces(ASSETS, base), TYPEFACES: Typefaces(assets, device, sizes.most, base)}


def train(job: str, args: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    """One of the networks: `vae`, `first` and `base`, `report`, or `down-` and what it is over."""
    clock = time.perf_counter()
    make_base.set_backends()
    output, halves = args.output, halves_of(args.assets, args.output, sizes, device)
    drawn = {**halves, BOTH: Both(list(halves.values()))}
    if job == "vae":
        make_base.train_vae(device=device, domain=drawn[BOTH], **sizes.vae).half().save_pretrained(output / "vae")
    elif job in ("first", "base"):
        vae = AutoencoderKL.from_pretrained(output / "vae", dtype=torch.float32).to(device)
        start = output / "first" if job == "base" and (output / "first.done").exists() else None
        pipe = make_base.train_base(vae, args.seconds, device, sizes.pool, sizes.batch, drawn[BOTH], start, clock)
        make_base.save_base(pipe, output / job)
    elif job == "report":
        for name, half in halves.items():
            figures = make_base.report(output, device, domain=half)
            (output / "samples.png").replace(output / f"samples-{name}.png")
            write_bytes(output / f"base-{name}.json", (json.dumps(figures, indent=1) + "\n").encode())
    else:
        over = job.removeprefix("down-")
        share = len(HALVES) if over == BOTH else 1
        make_base.train_down(
            output / "base",
            output / job,
            sizes.down_seconds,
            device,
            share * sizes.people,
            domain=drawn[over],
            steps=share * DOWN_STEPS,
            shift=SHIFT,
        )


class Worlds:
    """A world of each domain on one base; encoders are trained in the first, whoever they read."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes, pool: Pool, device: torch.device) -> None:
        self.output, self.sizes, self.device = args.output, sizes, device
        self.halves = halves_of(args.assets, args.output, sizes, device)
        given = ["--output", str(args.output), "--split", "held-out", "--seconds", str(args.seconds)]
        given += ["--looks", "--decays", "--rival-shifts", str(SHIFT), "--device", str(device), *sizes.options]
        self.args = convergence.parse(given)
        down = self.down(FACES)
        self.of_domain = {name: World(self.args, pool, half, down) for name, half in self.halves.items()}
        for world in self.of_domain.values():
            world.speed = convergence.SPEED
        self.trainer = self.of_domain[FACES]
        self.both = Both(list(self.halves.values()))

    def down(self, over: str) -> Any:
        return load_down(str(self.output / f"down-{over}"))

    def ready(self, arm: Arm) -> bool:
        """Whether its Down is there."""
        return arm.down == RANDOM or (self.output / f"down-{arm.down}.done").exists()

    def taught(self, arm: Arm) -> Drawn:
        """Whom its encoder learns to read."""
        return self.both if arm.people == BOTH else self.halves[arm.people]

    def recipe(self, arm: Arm) -> Recipe:
        share = len(arm.judged)
        kind = "random" if arm.down == RANDOM else "meta"
        steps = share * self.sizes.encoder_steps
        recipe = Recipe.parse(f"{arm.name}:kind={kind},steps={steps},{self.sizes.recipe}")
        return dataclasses.replace(recipe, people=share * recipe.people)

    def expected(self, arm: Arm) -> float:
        """Seconds that an arm takes."""
        if arm.tuned:
            return _TUNING
        self.trainer.taught = self.taught(arm)
        more = (convergence.PREPARING + _JUDGING) * (len(arm.judged) - 1)  # both domains are drawn and judged
        return convergence.expected(self.trainer, self.recipe(arm)) + more

    def next_arm(self, last: str) -> Arm | None:
        """The first that nobody has taken and that can be done in time; those who were read last go first.

        Waits where a Down is still being trained; controls wait for all that is needed.
        """
        while True:
            taken = {path.stem for suffix in ("json", "claim") for path in self.output.glob(f"*-on-*.{suffix}")}
            open_ = [arm for arm in ARMS if arm.name not in taken]
            fit = [arm for arm in open_ if self.expected(arm) < self.trainer.left]
            if any(arm.needed for arm in fit):
                fit = [arm for arm in fit if arm.needed]
            for arm in sorted(fit, key=lambda arm: (arm.tuned, arm.people != last)):
                if self.ready(arm) and convergence.claimed(self.output / f"{arm.name}.json"):
                    return arm
            if all(self.ready(arm) for arm in fit):
                return None
            time.sleep(1)

    def of(self, arm: Arm) -> dict[str, Any]:
        """Train and judge an arm."""
        for world in self.of_domain.values():
            world.down = self.down(FACES if arm.down == RANDOM else arm.down)
        if arm.tuned:
            world = self.of_domain[arm.people]
            return {"methods": convergence.rival(world, "meta_lora_mean")}
        self.trainer.taught = self.taught(arm)
        trained = convergence.train(self.trainer, self.recipe(arm))
        judged = {}
        for name in arm.judged:
            world = self.of_domain[name]
            zero = convergence.judge(world, trained)
            ceiling, denoised = world.ceiling(world.known()), convergence.denoised(world, trained)
            judged[name] = {"zero_steps": zero, "denoised": denoised, "ceiling": ceiling}
            print(arm.name, "read", name, convergence.line(zero["clean"]), flush=True)
        return {"recipe": dataclasses.asdict(trained.recipe), **trained.facts, "judged": judged}


def work(args: argparse.Namespace, sizes: Sizes, device: torch.device) -> None:
    """Arms that are still missing, one after another, as far as the time goes."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    workers = 1 if args.tiny else max(1, (os.cpu_count() or 4) // args.gpus - 1)
    with helpers(workers) as pool, vmap_ready():
        worlds, last = Worlds(args, sizes, pool, device), ""
        facts = {
            **origin(device),
            "split": worlds.args.split,
            "people": worlds.args.people,
            "noises": worlds.args.seeds,
        }
        while arm := worlds.next_arm(last):
            path = args.output / f"{arm.name}.json"
            print(f"{arm.name}, {worlds.trainer.left:.0f} s left", flush=True)
            try:
                write_bytes(path, (json.dumps({**facts, **worlds.of(arm)}, indent=1) + "\n").encode())
            except TrainingError as error:
                print(error, flush=True)
            last = arm.people
            for world in worlds.of_domain.values():
                world.clear()


def summarise(output: Path, gpus: int) -> dict[str, Any]:
    """Write `joint.json`: of each domain every arm, and how far it is from the arm of the domain alone."""
    files = {arm: json.loads(path.read_text()) for arm in ARMS if (path := output / f"{arm.name}.json").exists()}
    figures: dict[str, Any] = {}
    ceilings: dict[str, Any] = {}
    for half in HALVES:
        judged = [data["judged"][half] for arm, data in files.items() if half in arm.judged and not arm.tuned]
        if of_photos := [one["ceiling"] for one in judged if "ceiling" in one]:
            ceilings[half] = interval(of_photos[0])
        scores = {arm.name: _scores(arm, data, half) for arm, data in files.items() if half in arm.judged}
        rows = figures[half] = {}
        for name, own in scores.items():
            rows[name] = {metric: interval(values) for metric, values in own.items()}
            standard = f"{'tuned-' if name.startswith('tuned-') else ''}{half}-on-{half}"
            if name != standard and standard in scores:
                rows[name] |= {f"{metric}_minus_own": paired(own[metric], scores[standard][metric]) for metric in own}
    bases = {half: output / f"base-{half}.json" for half in HALVES}
    facts = ("machine", "date", "command", "split", "people", "noises", "versions")
    whole = {
        "figures": figures,
        "real_ceiling": ceilings,
        "base": {half: json.loads(path.read_text()) for half, path in bases.items() if path.exists()},
        "command": f"python benchmarks/joint.py run --assets build/typefaces --output build/joint --gpus {gpus}",
        "shift": SHIFT,
        "tuned_steps": int(TUNED),
        "origins": {arm.name: {key: data[key] for key in facts if key in data} for arm, data in files.items()},
    }
    write_bytes(output / "joint.json", (json.dumps(whole, indent=1) + "\n").encode())
    return whole


def _scores(arm: Arm, data: Mapping[str, Any], half: str) -> dict[str, list[float]]:
    """R-FaceSim and adherence by person, the means over noises."""
    metrics = "r_facesim", "prompt_adherence"
    if not arm.tuned:
        return {metric: clean(data["judged"][half], metric) for metric in metrics}
    curve = data["methods"]["meta_lora_mean"]["curve"]
    scores = curve.get(TUNED) or curve[max(curve, key=int)]
    return {metric: people_of(scores[metric], data["noises"]) for metric in metrics}


def tasks(args: argparse.Namespace) -> list[jobs.Task]:
    """The jobs in the order in which they are wanted."""
    python, output = [sys.executable, str(Path(__file__).resolve())], args.output
    given = ["--assets", str(args.assets), "--output", str(output), "--gpus", str(args.gpus)]
    given += ["--tiny"] if args.tiny else []

    def task(name: str, needs: Sequence[str], seconds: float, beside: float = 0.0) -> jobs.Task:
        """beside: seconds of those that are left which the job's own clock does not count."""

        def options(left: float) -> list[str]:
            most = args.base_seconds if name in ("first", "base") else left
            return ["--seconds", f"{4 if args.tiny and name in ('first', 'base') else min(most, left - beside):.0f}"]

        done = [output / f"{need}.done" for need in needs]
        least = 0 if args.tiny else seconds
        return jobs.Task(name, [*python, name.split()[0], *given], output / f"{name}.done", done, False, least, options)

    first = [] if args.once else [task("first", ["vae"], _LEAST_BASE, _BESIDE_BASE)]
    base = task("base", ["vae"] if args.once else ["first"], _LEAST_BASE, _BESIDE_BASE)
    downs = [task(f"down-{over}", ["base"], 0 if args.tiny else seconds) for over, seconds in _DOWN.items()]
    report = [] if args.tiny else [task("report", ["base"], _REPORT)]
    ready = [f"down-{half}" for half in HALVES]
    workers = [task(f"worker {number}", ready, 120, _TO_START) for number in range(args.gpus)]
    for worker in workers:
        worker.makes = output / "never"  # what it makes are arms
    return [task("vae", [], _VAE), *first, base, *downs, *report, *workers]


def run(args: argparse.Namespace) -> None:
    """Run what is missing, as far as the time goes; then write the figures of what is there."""
    args.output.mkdir(parents=True, exist_ok=True)
    jobs.free_claims(args.output)
    jobs.run(tasks(args), args.seconds, args.gpus, args.output)
    summarise(args.output, args.gpus)


def main() -> None:
    names = ["run", "vae", "first", "base", "report", "worker", *(f"down-{over}" for over in _DOWN)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=names)
    parser.add_argument("--assets", type=Path, required=True, help="folder of typefaces")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1200, help="of `run`: everything has ended by then")
    parser.add_argument(
        "--base-seconds", type=float, default=430, help="at most, each time the base is trained, from rendering on"
    )
    parser.add_argument("--once", action="store_true", help="train the base once; it does not go on in a later run")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="everything once, as small as it gets, on a CPU")
    args = parser.parse_args()
    sizes, device = TINY if args.tiny else FULL, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.job == "run":
        run(args)
    elif args.job == "worker":
        work(args, sizes, device)
    else:
        train(args.job, args, sizes, device)


if __name__ == "__main__":
    main()
