# SPDX-License-Identifier: Apache-2.0
"""How much of the reference is copied, how many images match, and who it still is after one to four edits.

    python benchmarks/copying.py                 32 held-out people; writes benchmarks/results/copying.json
    python benchmarks/copying.py --small         2 people and few steps, to check the script

Everything goes the way of a user's `metalora evaluate`, on the embedded base and its own Down, which reads photos:
people as they are read in zero steps, a LoRA after 100 steps, the base, and the reference in the place of every image.
The images of every prompt are edited image to image by the next prompt, the results by the one after it, and so on,
with the person on the base; those of read people also by the base alone, which says what the adapter keeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from origin import origin, write

from peft_metalora.data import load_image, read_subjects
from peft_metalora.demo.faces import write_dataset
from peft_metalora.demo.scoring import PROMPTS
from peft_metalora.evaluation.bench import Bench, Stop
from peft_metalora.evaluation.cells import Cell, read_cells
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.evaluation.figures import edited_rows, real_photos, summary
from peft_metalora.evaluation.prompts import image_name, prompts_of
from peft_metalora.evaluation.protocol import evaluate

PHOTOS, STRENGTH = 7, 0.6
READ, BASE, COPIES, ALONE = "meta-lora:start=encoder", "base", "reference", "read, then edited by the base alone"
LORA = "lora:r=1,lr=1e-2"  # the rate of docs/results.md


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a check of this script")
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100, help="of the LoRA")
    parser.add_argument("--edits", type=int, default=4)
    parser.add_argument("--inference-steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", type=Path, help="folder of the images, where a rerun goes on")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the figures")
    given = parser.parse_args()
    if given.small:
        given.people, given.steps, given.edits, given.inference_steps = 2, 2, 1, 4
    facts = {"people": given.people, "prompts": len(PROMPTS), "steps": given.steps, "edit_strength": STRENGTH}
    with tempfile.TemporaryDirectory() as folder:
        home = given.keep or Path(folder)
        people = home / "people"
        if not people.exists():
            write_dataset(people, "held-out", given.people, PHOTOS)
        copies = home / COPIES
        for subject in read_subjects(people):
            (copies / subject.name).mkdir(parents=True, exist_ok=True)
            for number in range(len(PROMPTS)):
                shutil.copy(subject.split()[0].path, copies / subject.name / image_name(number, 0))
        whole = EvaluateConfig(
            data=str(people), output=str(home / "out"), method=[BASE, READ], images=[f"{COPIES}={copies}"], steps=[0],
            edits=given.edits, edit_strength=STRENGTH, device=given.device, num_inference_steps=given.inference_steps,
        )  # fmt: skip
        learned = dataclasses.replace(whole, method=[LORA], images=[], steps=[given.steps])
        for config, methods in ((whole, [READ, BASE, COPIES]), (learned, [READ, LORA, BASE, COPIES])):
            evaluate(config)
            cells = read_cells(home / "out", methods)
            write(given.output / "copying.json", {**origin(given.device), **facts, **figures_of(cells)})
        alone = edited_alone(whole, [cell for cell in cells if cell["method"] == READ])
        write(given.output / "copying.json", {**origin(given.device), **facts, **figures_of(cells, alone)})


def edited_alone(config: EvaluateConfig, cells: Sequence[Cell]) -> list[Cell]:
    """The same images of read people, edited by the base without them."""
    bench, output = Bench(config, prompts_of(config)), Path(config.output)
    people = {subject.name: subject for subject in read_subjects(config.data)}
    found = []
    for cell in cells:
        drawn = [load_image(output / row["file"]) for row in cell["rows"]]
        folder = output / ALONE / cell["subject"]
        rows = bench.edit(folder, drawn, people[cell["subject"]], Stop(0, 0.0, 0, config.subject_name))
        found.append({**cell, "method": ALONE, "edited": rows})
    return found


def figures_of(cells: Sequence[Cell], alone: Sequence[Cell] = ()) -> dict[str, Any]:
    """Means with intervals over people: by method and score, by method and number of edits, and of real photos."""
    ceiling = real_photos(cells)
    assert ceiling is not None
    return {
        "real_photos": vars(ceiling),
        "figures": {method: {name: vars(one) for name, one in row.items()} for method, row in summary(cells).items()},
        "edited": {method: [vars(one) for one in row] for method, row in edited_rows([*cells, *alone]).items()},
    }


if __name__ == "__main__":
    main()
