# SPDX-License-Identifier: Apache-2.0
"""Two learned people in one picture of the embedded domain: regions beside plain sums of their adapters.

    python benchmarks/regions.py                 16 pairs of held-out people; writes benchmarks/results/regions.json
    python benchmarks/regions.py --small         2 pairs, few steps, to check the script

Everybody is learned from one image (rank 4, mean start, 100 steps) and is in one pair. All ways
draw the same prompts from the same noise. Compared are the faces in the two halves of a picture with the other photos
of the person who belongs there (right) and of the other one (wrong). `better` is the cosine to the right person if the
score may choose for each picture who stands where: a sum cannot know. People alone, in pictures of their own, are what
there is to reach.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from embedded_down import embedded_down, write_down
from origin import origin, write
from PIL import Image

from peft_metalora import enable_meta_lora
from peft_metalora.bases import base_for
from peft_metalora.data import Subject, load_image, read_subjects
from peft_metalora.data.images import png
from peft_metalora.demo.embedded import BASE, RESOLUTION, load_base
from peft_metalora.demo.faces import write_dataset
from peft_metalora.demo.judges import load_embedder
from peft_metalora.demo.scoring import generate, to_pil
from peft_metalora.demo.sheet import Row, sheet
from peft_metalora.demo.show_two_people import (
    ADAPTER,
    ASKED,
    PROMPTS,
    TWO_PEOPLE,
    Apart,
    draw_two,
    keep_apart,
    side_by_side,
)
from peft_metalora.evaluation.summary import interval
from peft_metalora.files import write_bytes
from peft_metalora.training.examples.encoding import encode_subjects
from peft_metalora.training.personalize import personalize_many
from peft_metalora.training.stage_settings import PersonalizeConfig

PHOTOS, STEPS = 7, 100
SETTINGS = {"start": "mean", "learning_rate": 3e-3}  # the rate: of `sweep.py` on the tune people
WAYS = {
    "alone": "each alone, a picture each",
    "regions": "regions",
    "sum_half": "sum, weight 0.5 each",
    "sum": "sum, weight 1 each",
    "nobody": "no subject",
}
IN_PICTURE = 4  # pairs

Figures = dict[str, dict[str, list[float]]]


def learn(base, people: list[Subject], steps: int, home: Path) -> None:
    """Write a subject for each person, learned from the reference alone, to `home`/NAME, beside their Down."""
    config = PersonalizeConfig(
        pretrained_model_name_or_path=str(BASE),
        output_dir=str(home),
        resolution=RESOLUTION,
        max_train_steps=steps,
        mixed_precision="no",
        down=str(home.parent / "down"),
        **SETTINGS,
    )
    references = [Subject(person.name, [person.split()[0]]) for person in people]
    examples = encode_subjects(base, references, config, config.views_per_image)
    run = personalize_many(base, examples, config, embedded_down())
    for slot, person in enumerate(people):
        run.save(home / person.name, slot)
    run.remove()


def draw(pipe, way: str, left: str, right: str, seeds: list[int]) -> torch.Tensor:
    """(prompts, 3, 64, 128) in [0, 1]."""
    prompts = PROMPTS[: len(seeds)]
    if way == "alone":
        images = []
        for number, name in enumerate((left, right)):
            pipe.set_adapters(name)
            own = [f"a photo of a person, {asked[number]}, {asked[2]}" for asked in ASKED[: len(seeds)]]
            images.append(generate(pipe, own, seeds))
        return torch.cat(images, -1)
    if way == "nobody":
        pipe.set_adapters(ADAPTER)
        return generate(pipe, prompts, seeds, 2 * RESOLUTION)
    return draw_two(pipe, left, right, prompts, seeds, {"regions": None, "sum_half": 0.5, "sum": 1.0}[way])


def note(figures: Figures, way: str, found: Apart) -> None:
    """Means of one pair."""
    for name in ("right", "wrong", "swapped", "better"):
        figures[way].setdefault(name, []).append(float(getattr(found, name).mean()))


def measure(pairs: int, prompts: int, steps: int, device: str) -> tuple[Figures, Image.Image]:
    """Values of each pair by way and name, and a picture of the first pairs under the first prompt."""
    base = base_for(load_base())
    base.place(torch.device(device), encoders=True)
    embedder = load_embedder()
    figures: Figures = {way: {} for way in WAYS}
    shown: dict[str, list[Image.Image]] = {"photos": [], **{way: [] for way in WAYS}}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_dataset(home / "people", "held-out", 2 * pairs, PHOTOS)
        people = read_subjects(home / "people")
        write_down(home / "down")
        learn(base, people, steps, home / "subjects")
        pipe = enable_meta_lora(base.pipeline)
        pipe.load_lora_weights(str(TWO_PEOPLE), adapter_name=ADAPTER)
        pipe.load_meta_lora(home / "down", "down")
        for pair in range(pairs):
            left, right = people[2 * pair : 2 * pair + 2]
            photos = [[load_image(photo.path) for photo in person.photos] for person in (left, right)]
            others = embedder.embed(photos[0][1:]), embedder.embed(photos[1][1:])
            for person in (left, right):
                pipe.load_meta_lora(home / "subjects" / person.name, person.name)
            for way in WAYS:
                images = draw(pipe, way, left.name, right.name, [100 * pair + n for n in range(prompts)])
                note(figures, way, keep_apart(embedder, images, others))
                shown[way].append(to_pil(images[0]))
            shown["photos"].append(side_by_side(photos[0][0], photos[1][0]))
            pipe.delete_adapters([left.name, right.name])
            print(f"pair {pair}: " + ", ".join(f"{way} {figures[way]['right'][-1]:.3f}" for way in WAYS), flush=True)
    labels = {
        "photos": "learned from\none image each",
        "regions": "a region each",
        "sum_half": "sum of both\nweight 0.5 each",
        "sum": "sum of both\nweight 1 each",
        "nobody": "no subject",
    }
    return figures, sheet([Row(label, shown[way][:IN_PICTURE]) for way, label in labels.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="2 pairs, 1 prompt, 5 steps")
    parser.add_argument("--pairs", type=int, default=16, help="of the 64 held-out people")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"at most {len(PROMPTS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--picture", type=Path, help="also write a PNG of the first pairs")
    default = Path(__file__).parent / "results" / "regions.json"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    pairs, prompts, steps = (2, 1, 5) if args.small else (args.pairs, args.prompts, STEPS)
    start = time.perf_counter()
    figures, picture = measure(pairs, prompts, steps, args.device)
    result = {
        **origin(args.device),
        "pairs": pairs,
        "prompts": prompts,
        "steps": steps,
        "figures": {way: {name: interval(values) for name, values in own.items()} for way, own in figures.items()},
    }
    write(args.output, result)
    if args.picture:
        write_bytes(args.picture, png(picture))
    for way, own in result["figures"].items():
        print(f"{WAYS[way]:<28}" + "  ".join(f"{name} {found['value']:.3f}" for name, found in own.items()))
    print(f"{time.perf_counter() - start:.0f} s on {result['machine']}")


if __name__ == "__main__":
    main()
