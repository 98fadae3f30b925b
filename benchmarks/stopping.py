# SPDX-License-Identifier: Apache-2.0
"""When stage 2 from a read start should stop, on the embedded domain: what is gained, and what a run can see of it.

    python benchmarks/stopping.py --compile --precision bf16 --output benchmarks/results

An encoder is trained as `convergence.py` trains one. People of `tune` are read from one photo, good or bad, and tuned
from there on that photo. After each number of steps the judges score each person; beside that stands what a run could
go by: the loss on crops of the photo that it does not train on, at fixed noises and levels (`held_loss`), and how far
the person's numbers have moved, as a share of the way from the mean subject to the read one (`moved`). `other_loss`, on
the person's other photos, no run can know. `stopping.json` has every person's values, and as `figures` the gain in
R-FaceSim, with its 95 % interval over people, where each of several limits to `moved` stops (between two looks by a
straight line), after fixed numbers of steps, and at the lowest held loss.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convergence import train
from encoder_world import Recipe, World, helpers
from origin import origin, write
from torch import Tensor

from evaluation import BATCH, People
from peft_metalora.data import Photo, Subject
from peft_metalora.data.degrade import degrade
from peft_metalora.demo.scoring import INFERENCE_STEPS
from peft_metalora.evaluation.rivals import take_off, vmap_ready
from peft_metalora.evaluation.summary import interval
from peft_metalora.training.engine.stacked import RowGradients, denoising_inputs, train_stack
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_subjects

DRAWS = 8  # of noise and level for each view that a loss is of
LIMITS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1)
FIXED = (10, 25, 50, 100)  # steps


def references(world: World, condition: str) -> list[Photo]:
    """The photo that each of the test people is read from and tuned on: their reference, clean or made worse."""
    photos = [subject.split()[0] for subject in world.read(world.args.split, world.args.people)]
    if condition == "clean":
        return photos
    name, strength = condition.split(":")
    folder = world.home / condition.replace(":", "-")
    folder.mkdir()
    worse = []
    for number, photo in enumerate(photos):
        worse.append(Photo(folder / f"{number}.png", photo.caption))
        degrade(photo.load(), name, float(strength)).save(worse[-1].path)
    return worse


class FixedLoss:
    """The loss of each row on its person's examples, at noises and levels drawn once."""

    def __init__(self, world: World, examples: Examples, numbers: list[int]) -> None:
        each = min(len(own) for own in examples.by_subject()) // BATCH * BATCH
        positions = torch.stack([own[:each] for own in examples.by_subject()])[numbers].to(world.device)
        generator, examples = torch.Generator(world.device), examples.to(world.device)
        self._parts = [
            denoising_inputs(world.base, examples, part.flatten(), generator.manual_seed(1000 * BATCH * number + draw))
            for number, part in enumerate(positions.split(BATCH, dim=1))
            for draw in range(DRAWS)
        ]

    def __call__(self, gradients: RowGradients) -> list[float]:
        losses: list[float] = torch.stack([gradients(part)[0] for part in self._parts]).mean(0).tolist()
        return losses


def curves(
    world: World, recipe: Recipe, people: People, held: Examples, others: Examples, start: Tensor, mean: Tensor
) -> dict[str, Any]:
    """Scores and losses of each person, by rate and number of steps."""
    args, rates = world.args, world.args.rates
    rows = len(start) * len(rates)
    numbers = [row // len(rates) for row in range(rows)]
    stack = world.put(world.base, recipe, rows)
    begin = start.repeat_interleave(len(rates), 0)
    stack.values.copy_(begin)
    gradients = RowGradients(world.base, stack)
    held_loss, other_loss = FixedLoss(world, held, numbers), FixedLoss(world, others, numbers)
    result: dict[str, Any] = {str(rate): {} for rate in rates}

    def look(done: int) -> None:
        scores = world.score(stack, people, rows, [0] * len(rates))
        values = {name: scores[name] for name in ("r_facesim", "prompt_adherence")}
        values |= {"held_loss": held_loss(gradients), "other_loss": other_loss(gradients)}
        values["moved"] = ((stack.values - begin).norm(dim=1) / (begin - mean).norm(dim=1)).tolist()
        for number, rate in enumerate(rates):
            result[str(rate)][str(done)] = {
                name: [round(value, 4) for value in own[number :: len(rates)]] for name, own in values.items()
            }

    look(0)
    for done in train_stack(
        world.base,
        stack,
        people.examples,
        steps=max(args.at),
        batch_size=BATCH,
        lr=torch.tensor(rates).repeat(len(start)),
        seed=0,
        numbers=numbers,
        schedule=lambda number: min(1.0, (number + 1) / args.warmup),
        graph=args.graph,
    ):
        if done in args.at:
            look(done)
    take_off(world.base)
    return result


def figures(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """What rules of stopping give, by photo, rate and rule: `gain` in R-FaceSim, `adherence` gained, mean `steps`."""
    return {
        f"{condition}, rate {rate}": _rules(curve)
        for condition, rates in conditions.items()
        for rate, curve in rates.items()
    }


def _rules(curve: Mapping[str, Any]) -> dict[str, Any]:
    steps = np.array([int(step) for step in curve])
    scores, adherence, moved, losses = (
        np.array([one[name] for one in curve.values()])
        for name in ("r_facesim", "prompt_adherence", "moved", "held_loss")
    )
    people = range(scores.shape[1])

    def rule(at: Sequence[float]) -> dict[str, Any]:
        """Stopping after a number of steps of each person's own."""
        gained = [np.interp(at[one], steps, scores[:, one]) - scores[0, one] for one in people]
        kept = [np.interp(at[one], steps, adherence[:, one]) - adherence[0, one] for one in people]
        return {"gain": interval(gained), "adherence": interval(kept)["value"], "steps": round(float(np.mean(at)), 1)}

    rules = {f"moved {limit}": rule([np.interp(limit, moved[:, one], steps) for one in people]) for limit in LIMITS}
    rules |= {f"{count} steps": rule([count] * len(people)) for count in FIXED if count <= max(steps)}
    return {**rules, "lowest held loss": rule([float(step) for step in steps[losses.argmin(0)]])}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="read:steps=3000,people=1024", help="see encoder_world.Recipe")
    parser.add_argument("--conditions", nargs="+", default=["clean", "sunglasses:0.5", "blur:1.0"])
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3])
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--at", type=int, nargs="+", default=[5, 10, 15, 20, 25, 35, 50, 75, 100, 150, 200])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", default="tune", choices=("tune", "held-out"))
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--world-seed", type=int, default=0)
    parser.add_argument("--inference-steps", type=int, default=INFERENCE_STEPS)
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--compile", action="store_true", help="compile the pass of the encoder's training")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the base in that training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(seconds=3600.0, looks=[], variants=16)
    return parser.parse_args()


def main() -> None:
    args, conditions = parse(), {}
    args.output.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.parse(args.recipe)
    with helpers(args.workers) as pool:
        world = World(args, pool)
        with vmap_ready():
            trained = train(world, recipe)
            subjects = world.read(args.split, args.people)
            plain = replace(world.config, random_flip=False)
            unseen = [Subject(str(number), subject.split()[1]) for number, subject in enumerate(subjects)]
            others = encode_subjects(world.base, unseen, plain, 1, progress=False)
            for condition in args.conditions:
                photos = references(world, condition)
                alone = [Subject(str(number), [photo]) for number, photo in enumerate(photos)]
                other_crops = replace(world.config, seed=world.config.seed + 1)
                held = encode_subjects(world.base, alone, other_crops, 8, progress=False)
                people = world.with_references(subjects, photos)
                start = trained.subjects(world.seen(np.stack([np.array(photo.load()) for photo in photos]), recipe))
                mean = trained.space.mean.detach()
                conditions[condition] = curves(world, recipe, people, held, others, start, mean)
                report = {**origin(world.device), "recipe": args.recipe, "conditions": conditions}
                write(args.output / "stopping.json", {"figures": figures(conditions), **report})
                for name, rules in figures({condition: conditions[condition]}).items():
                    for rule, found in rules.items():
                        print(f"{name}, {rule}:", found, flush=True)


if __name__ == "__main__":
    main()
