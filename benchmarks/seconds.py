# SPDX-License-Identifier: Apache-2.0
"""What one person alone takes on the embedded base: a step of each method of `convergence.json`, and reading a photo.

    python benchmarks/seconds.py

`step` has seconds of a step of stage 2 by method and by what an encoder's code expands to, batch 4, all by the same
code, recorded as a CUDA graph where there is a GPU; `read` has seconds from a photo in memory to the installed person.
Each is the fastest of its repeats, and of earlier runs on the same machine that are in the file: what a busy machine
adds says nothing of a method. Seconds do not depend on values: nothing is learned or scored. On a CPU they are those of
one thread at work.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
from clock import now
from encoder_world import Recipe, World
from origin import origin, write
from result_plots import READ

from evaluation import BATCH
from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.encoder import EncoderConfig, SubjectSpace, make_encoder
from peft_metalora.evaluation.rivals import FURTHER, RIVALS, put_on, vmap_ready
from peft_metalora.training.engine.stacked import AdapterStack, train_stack

RESULTS = Path(__file__).parent / "results"


def seconds(world: World) -> float:
    """A clock of the device's work."""
    return time.process_time() if world.device.type == "cpu" else now(world.device)


def of_steps(world: World, stack: AdapterStack) -> float:
    """Seconds of a training step on one photo."""
    examples, marks = world.examples(stack, world.people("tune", 1)), []
    steps = world.args.steps + world.args.warmup
    for _ in train_stack(
        world.base, stack, examples, steps=steps, batch_size=BATCH, lr=1e-6, seed=0, graph=world.args.graph
    ):
        marks.append(seconds(world))
    marks = marks[world.args.warmup - 1 :]
    return min(after - before for before, after in pairwise(marks))


def of_reading(world: World, recipe: Recipe, stack: AdapterStack) -> float:
    """Seconds from a photo's pixels to its person in the adapter."""
    photo = world.known("tune").photos[:1, 0]
    layout = [(name, tuple(tensor.shape[1:])) for name, tensor in stack.parameters.items()]
    basis = torch.zeros(recipe.k, stack.values.shape[1], device=world.device)
    space = SubjectSpace(layout, stack.values[0], basis, world.down.fingerprint)
    shape = {"resolution": RESOLUTION, "code_size": recipe.k, "width": recipe.width, "hidden": recipe.hidden}
    encoder = make_encoder(EncoderConfig(**shape), world.base.encode_images, 0).to(world.device).eval()

    spent = []
    with torch.no_grad():
        for _ in range(world.args.reads):
            begin = seconds(world)
            stack.values.copy_(space(encoder(world.seen(photo, recipe))))
            spent.append(seconds(world) - begin)
    return min(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each method in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not counted")
    parser.add_argument("--reads", type=int, default=20)
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "seconds.json")
    args = parser.parse_args()
    whole = {"split": "tune", "people": 1, "views": 4, "precision": "fp32", "seconds": 0.0, "world_seed": 0}
    world = World(argparse.Namespace(**vars(args), **whole), pool=None)
    convergence = json.loads((RESULTS / "convergence.json").read_text())
    recipes = {name.rpartition("-")[0]: Recipe(**one["recipe"]) for name, one in convergence["recipes"].items()}
    rivals = dict.fromkeys(label.partition(", ")[0] for label in convergence["rivals"])
    known = RIVALS | FURTHER
    names = [*(family for family in recipes if family in READ), *(name for name in rivals if name in known)]
    facts = {**origin(world.device), "batch": BATCH}
    before = json.loads(args.output.read_text()) if args.output.exists() else {}
    same = all(before.get(key) == facts[key] for key in ("machine", "versions", "batch"))
    step, read = (dict(before[key]) if same else {} for key in ("step", "read"))
    with vmap_ready():
        for name in names * args.rounds:  # in turns: a machine is not equally busy throughout
            recipe = recipes.get(name)
            if recipe:
                stack = world.put(world.base, recipe, 1)
                read[name] = min(read.get(name, math.inf), of_reading(world, recipe, stack))
            else:
                stack = put_on(world.base, known[name], world.down, world.config, 1, [0])
            step[name] = min(step.get(name, math.inf), of_steps(world, stack))
            print(f"{name}: a step {step[name]:.4f} s", f"read in {read[name]:.4f} s" if recipe else "", flush=True)
            del stack
            world.clear()
    write(args.output, {**facts, "step": step, "read": read})


if __name__ == "__main__":
    main()
