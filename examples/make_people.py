# SPDX-License-Identifier: Apache-2.0
"""People who do not exist, for stage 1: a Down without one real person's photo.

    python examples/make_people.py --output people --people 500 --scenes 8           # FLUX.2 klein, insightface
    python examples/make_people.py --demo --output people --people 16 --scenes 3     # embedded base, a CPU, minutes
    metalora meta-train --train_data_dir people --domain "made-up faces" ...         # docs/make_a_down.md

Each person is drawn once, as a portrait; a pipeline that takes a reference image then draws them in other scenes. A
face embedder keeps a portrait only if it is nobody who is there already, and a scene only if it shows that person.
Result: a folder for each person with pictures and captions, and people.json; a second call goes on where one stopped.
What a model draws may resemble people whom it was trained on: the check is among the drawn ones alone.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from peft_metalora.bases.memory import Whole, ready_to_draw
from peft_metalora.bases.precision import choose_device
from peft_metalora.data.images import load_image, png
from peft_metalora.files import staged_folder, write_bytes
from peft_metalora.metrics import Embedder, InsightFaceEmbedder
from peft_metalora.metrics.by_name import made_by

Draw = Callable[[str, int, Image.Image | None], Image.Image]
AGES, KINDS = ("a young", "a middle-aged", "an old"), {"female": "woman", "male": "man"}
FROM = "African", "East Asian", "European", "Indian", "Latin American", "Middle Eastern", "Pacific", "Southeast Asian"
HAIR = "short hair", "long hair", "curly hair", "straight hair", "a shaved head", "hair tied back", "wavy hair"
FACES = (
    "a round face",
    "a narrow face",
    "freckles",
    "glasses",
    "strong eyebrows",
    "dimples",
    "a broad nose",
    "high cheeks",
)
LOOKS = "smiling", "laughing", "serious", "surprised", "thinking", "talking"
POSES = "facing the camera", "in profile", "looking up", "looking over the shoulder", "from a distance", "in a close-up"
CLOTHES = "a red coat", "a white shirt", "a blue dress", "a black suit", "a green pullover", "sportswear"
PLACES = (
    "on a beach",
    "in a kitchen",
    "in a city street at night",
    "in a forest",
    "in an office",
    "in a train",
    "in snow",
)


@dataclass(frozen=True)
class Person:
    """Somebody to draw: prompt and training caption of the portrait, what is said of them, and scenes without end."""

    prompt: str
    caption: str
    tags: dict[str, str]
    scenes: Iterator[str]


def made_up(number: int, seed: int) -> Person:
    """The person of a number; half of all are female."""
    pick, sex = random.Random(f"{seed} {number}"), list(KINDS)[number % 2]
    looks = f"{pick.choice(AGES)} {pick.choice(FROM)} {KINDS[sex]} with {pick.choice(HAIR)} and {pick.choice(FACES)}"
    pose = "neutral, facing the camera, in front of a plain wall"

    def scenes() -> Iterator[str]:
        while True:
            words = pick.choice(LOOKS), pick.choice(POSES), f"in {pick.choice(CLOTHES)}", pick.choice(PLACES)
            yield f"a photo of a person, {', '.join(words)}"

    return Person(f"a portrait photo of {looks}, {pose}", f"a photo of a person, {pose}", {"sex": sex}, scenes())


def drawer(portraits: Any, editor: Any, **options: Any) -> Draw:
    """Draws a prompt, with or without a reference.

    Args:
        portraits: a pipeline that draws from a prompt. editor: one that also takes `image`, or the same one.
    """
    known = inspect.signature(editor.__call__).parameters
    if "image" not in known:
        raise SystemExit(f"--editor needs a pipeline that takes a reference image, found {type(editor).__name__}")

    def draw(prompt: str, seed: int, reference: Image.Image | None) -> Image.Image:
        pipe, given = (portraits, {}) if reference is None else (editor, {"image": reference})
        names = inspect.signature(pipe.__call__).parameters
        given |= {name: value for name, value in options.items() if value is not None and name in names}
        if "true_cfg_scale" in names and names["true_cfg_scale"].default > 1:  # Qwen-Image's guidance asks for one
            given.setdefault("negative_prompt", " ")
        return pipe(prompt=prompt, generator=torch.Generator().manual_seed(seed), **given).images[0].convert("RGB")

    return draw


def make_person(
    person: Person, seeds: Iterator[int], draw: Draw, embedder: Embedder, known: list[Tensor], args: argparse.Namespace
) -> tuple[list[tuple[str, Image.Image]], Tensor] | None:
    """Captioned pictures of somebody new, the portrait first, and its vector; None if there are not enough of them."""
    for _ in range(args.tries):
        portrait = draw(person.prompt, next(seeds), None)
        seen = embedder.embed([portrait])
        vector = seen.vectors[0]
        if seen.found[0] and all(float(vector @ other) < args.different for other in known):
            break
    else:
        return None
    pictures = [(person.caption, portrait)]
    for caption in itertools.islice(person.scenes, args.scenes * args.tries):
        picture = draw(caption, next(seeds), portrait)
        seen = embedder.embed([picture])
        if seen.found[0] and float(seen.vectors[0] @ vector) >= args.same:
            pictures.append((caption, picture))
        if len(pictures) > args.scenes:
            return pictures, vector
    return None


def make_people(
    cast: Callable[[int, int], Person], draw: Draw, embedder: Embedder, args: argparse.Namespace
) -> tuple[int, int]:
    """Write the folders of all people who are not there yet; how many there are, and how many were given up."""
    output, known, tags = Path(args.output), [], {}
    for number in tqdm(range(args.people), desc="making people", unit="person"):
        person, folder = cast(number, args.seed), output / f"person-{number:04d}"
        if folder.is_dir():
            known.append(embedder.embed([load_image(folder / "0.png")]).vectors[0])
            tags[folder.name] = person.tags
            continue
        seeds = itertools.count(args.seed + 10_000 * number)
        made = make_person(person, seeds, draw, embedder, known, args)
        if made is None:
            continue
        pictures, vector = made
        known.append(vector)
        tags[folder.name] = person.tags
        with staged_folder(folder) as stage:
            lines = []
            for place, (caption, picture) in enumerate(pictures):
                (stage / f"{place}.png").write_bytes(png(picture))
                lines.append(json.dumps({"file_name": f"{place}.png", "text": caption, "reference": place == 0}))
            (stage / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        write_bytes(output / "people.json", json.dumps(tags, indent=1).encode())
    return len(known), args.people - len(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editor", default="black-forest-labs/FLUX.2-klein-4B", help="pipeline that takes a reference")
    parser.add_argument("--portraits", help="pipeline that draws the portraits; default: the editor")
    parser.add_argument("--demo", action="store_true", help="the embedded base, drawing over a reference")
    parser.add_argument("--output", required=True)
    parser.add_argument("--people", type=int, default=500)
    parser.add_argument("--scenes", type=int, default=8, help="pictures of each beside the portrait")
    parser.add_argument("--embedder", default="insightface", help="or module:function")
    parser.add_argument("--same", type=float, default=0.45, help="least similarity of a scene and its portrait")
    parser.add_argument("--different", type=float, default=0.35, help="similarity that two people stay below")
    parser.add_argument("--tries", type=int, default=4, help="for each picture")
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="of the sampler; default: the pipeline's own")
    parser.add_argument("--offload", default="none", choices=("none", "model", "group"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    options: dict[str, Any] = {"num_inference_steps": args.steps, "height": args.resolution, "width": args.resolution}
    if args.demo:
        portraits, editor, embedder, cast = demo()
        options |= {"height": 64, "width": 64, "strength": 0.7, "max_sequence_length": 24}
    else:
        from diffusers import DiffusionPipeline

        cast = made_up
        editor = DiffusionPipeline.from_pretrained(args.editor, dtype=torch.bfloat16)
        portraits = (
            DiffusionPipeline.from_pretrained(args.portraits, dtype=torch.bfloat16) if args.portraits else editor
        )
        embedder = InsightFaceEmbedder() if args.embedder == "insightface" else made_by(args.embedder, "--embedder")
        for pipe in {id(one): one for one in (editor, portraits)}.values():
            pipe.set_progress_bar_config(disable=True)
            ready_to_draw(pipe, Whole(offload=args.offload), choose_device(None))
    there, given_up = make_people(cast, drawer(portraits, editor, **options), embedder, args)
    print(
        f"{args.output} has {there} people; {given_up} were given up: nobody new, or too few scenes like the portrait"
    )


def demo() -> tuple[Any, Any, Embedder, Callable[[int, int], Person]]:
    """The embedded base, which knows no references, drawing over them; its own captions and face embedder."""
    from diffusers import FluxImg2ImgPipeline

    from peft_metalora.demo.embedded import load_base
    from peft_metalora.demo.judges import load_embedder
    from peft_metalora.demo.scene import captions, sample_scenes

    def drawn(number: int, seed: int) -> Person:
        generator = torch.Generator().manual_seed(1000 * seed + number)
        portrait = "a photo of a person, facing forward, neutral, in a grey shirt, on a plain grey wall, in white light"
        scenes = (captions(sample_scenes(1, generator))[0] for _ in itertools.count())
        return Person(portrait, portrait, {"sex": list(KINDS)[number % 2]}, scenes)

    portraits = load_base()
    editor = FluxImg2ImgPipeline(**portraits.components)
    editor.set_progress_bar_config(disable=True)
    return portraits, editor, load_embedder(), drawn


if __name__ == "__main__":
    main()
