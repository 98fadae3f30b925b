# SPDX-License-Identifier: Apache-2.0
"""What one person alone takes on the embedded base: a step of each method of `convergence.json`, and reading a photo.

    python benchmarks/seconds.py

`step` has seconds of a step of stage 2 by method and by what an encoder's code expands to, batch 4, all by the same
code, recorded as a CUDA graph where there is a GPU; `read` has seconds from a photo in memory to the installed person.
Each is the fastest of its repeats: what a busy machine adds says nothing of a method. Seconds do not depend on values:
nothing is learned or scored. On a CPU they are those of one thread at work.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path

import torch
from clock import now
from encoder_world import Recipe, World
from origin import origin, write

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
    parser.add_argument("--steps", type=int, default=50, help="of each method")
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not counted")
    parser.add_argument("--reads", type=int, default=50)
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "seconds.json")
    args = parser.parse_args()
    whole = {"split": "tune", "people": 1, "views": 4, "precision": "fp32", "seconds": 0.0, "world_seed": 0}
    world = World(argparse.Namespace(**vars(args), **whole), pool=None)
    convergence = json.loads((RESULTS / "convergence.json").read_text())
    recipes = {name.rpartition("-")[0]: Recipe(**one["recipe"]) for name, one in convergence["recipes"].items()}
    step, read = {}, {}
    with vmap_ready():
        for family, recipe in recipes.items():
            if family in ("main", "small", "lora", "image_prompt"):
                stack = world.put(world.base, recipe, 1)
                read[family] = of_reading(world, recipe, stack)
                step[family] = of_steps(world, stack)
                print(
                    f"{family}: read in {1000 * read[family]:.2f} ms, a step {1000 * step[family]:.2f} ms", flush=True
                )
                del stack
                world.clear()
        for name in dict.fromkeys(label.partition(", ")[0] for label in convergence["rivals"]):
            stack = put_on(world.base, (RIVALS | FURTHER)[name], world.down, world.config, 1, [0])
            step[name] = of_steps(world, stack)
            print(f"{name}: a step {step[name]:.4f} s", flush=True)
            del stack
            world.clear()
    write(args.output, {**origin(world.device), "batch": BATCH, "step": step, "read": read})


if __name__ == "__main__":
    main()
