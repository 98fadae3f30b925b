# SPDX-License-Identifier: Apache-2.0
"""The whole method on the embedded base, on a CPU, with no download: what `make demo` runs.

A held-out person is learned from one image, with the same number of steps, by a plain LoRA of rank 1 and by Meta-LoRA
from the stored Mid and from the mean. Each result is written to disk, loaded into a stock pipeline as a user would,
shown in the same prompts from the same noise, and scored. Nothing is chosen for the picture: learning rates come from
a sweep over other people (`benchmarks/sweep.py`). A second person is learned in half the steps, and both are drawn in
one picture, by regions and as a plain sum.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file

from ..data import load_image
from ..data.images import png
from ..files import write_bytes
from ..pipelines.loader import enable_meta_lora
from ..training.personalize import personalize
from ..training.stage_settings import PersonalizeConfig
from .embedded import ASSETS, BASE, RESOLUTION, load_base
from .faces import write_dataset
from .judges import FaceEmbedder, load_embedder, load_judge
from .scoring import PROMPTS, Scorer, Scores, generate, to_pil
from .show_two_people import ADAPTER, ASKED, TWO_PEOPLE, Apart, draw_two, keep_apart, sheet_of_two, side_by_side
from .show_two_people import PROMPTS as PAIR_PROMPTS

DOWN = ASSETS / "down"
STEPS = 100
"""Steps of stage 2, for every method."""
_PHOTOS = 7
_SCALE = 2  # of a 64 px image in demo.png
_PAIR_PICTURES = 3
_ARTICLE = re.compile(r"^(in|on) (an? )?")


@dataclass(frozen=True)
class Method:
    """A row of the demo: its name, and how it is trained (None: the base model without any adapter)."""

    name: str
    label: str
    settings: dict[str, Any] | None


METHODS = (
    Method("base", "base model", None),
    Method("lora_r1", "LoRA, rank 1", {"method": "lora", "rank": 1, "learning_rate": 1e-2}),
    Method("meta_lora_stored", "Meta-LoRA, stored Mid", {"start": "stored", "learning_rate": 3e-3}),
    Method("meta_lora_mean", "Meta-LoRA, mean", {"start": "mean", "learning_rate": 3e-3}),
)
"""Learning rates: of highest R-FaceSim after `STEPS` on the `tune` people (`benchmarks/sweep.py`, docs/demo.md)."""


def run_demo(output_dir: str | Path, *, person: int = 0, steps: int = STEPS) -> list[dict[str, Any]]:
    """Personalise a held-out person in each way and write `demo.png`, `demo-two.png` and `demo.json`.

    Args:
        person: which of the 64 held-out people; `demo-two.png` has their neighbour, 1 with 0, 3 with 2.
        steps: of stage 2, for every method; half as many for the second person.

    Returns:
        What is in `demo.json`: one object a method, with its scores (`demo.scoring.Scores`), `trainable_parameters`
        and `seconds` of training, encoding and saving included.

    Raises:
        WriteFailedError: the folder cannot be written; nothing is there then.
    """
    output = Path(output_dir)
    scorer = Scorer(load_embedder(), load_judge())
    pipe = enable_meta_lora(load_base())
    rows, results = [], []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        pair = person, person ^ 1  # even and odd, as benchmarks/regions.py pairs them
        write_dataset(home / "people", "held-out", pair, _PHOTOS)
        files, second = (
            [home / "people" / f"held-out-{one:04d}" / f"{photo}.png" for photo in range(_PHOTOS)] for one in pair
        )
        reference, *others = [load_image(path) for path in files]
        for method in METHODS:
            start = time.perf_counter()
            adapter = home / method.name
            if method.settings is not None:
                print(f"{method.label}: {steps} steps on one image")
                _learn(method, files[0], adapter, steps)
            seconds = time.perf_counter() - start
            with _loaded(pipe, method, adapter):
                images = generate(pipe, PROMPTS, range(len(PROMPTS)))
            scores = scorer.score(images, PROMPTS, reference, others)
            rows.append((method.label, [to_pil(image) for image in images]))
            results.append(_result(method, scores, adapter, seconds, person, steps))
        print(f"a second person: {METHODS[-1].label}, {max(1, steps // 2)} steps on one image")
        _learn(METHODS[-1], second[0], home / "second", max(1, steps // 2))
        photos = ([reference, *others], [load_image(path) for path in second])
        both, ways = _two_people(pipe, scorer.embedder, (adapter, home / "second"), photos)
    write_bytes(output / "demo.png", png(_picture(reference, others, rows)))
    write_bytes(output / "demo-two.png", png(both))
    write_bytes(output / "demo.json", (json.dumps(results, indent=2) + "\n").encode())
    print(_table(results))
    print(_table_of_two(ways))
    return results


def _learn(method: Method, photo: Path, adapter: Path, steps: int) -> None:
    """Stage 2 on one photo, as `metalora personalize` runs it."""
    personalize(
        PersonalizeConfig(
            pretrained_model_name_or_path=str(BASE),
            output_dir=str(adapter),
            instance_data_dir=str(photo),
            resolution=RESOLUTION,
            max_train_steps=steps,
            local_files_only=True,
            down=None if method.name == "lora_r1" else str(DOWN),
            **(method.settings or {}),
        )
    )


def _two_people(
    pipe: Any,
    embedder: FaceEmbedder,
    adapters: tuple[Path, Path],
    photos: tuple[list[Image.Image], list[Image.Image]],
) -> tuple[Image.Image, dict[str, Apart]]:
    """Draw both people in one picture, by regions and as a sum.

    Args:
        photos: of the left and of the right person, the reference first.

    Returns:
        `demo-two.png`, and whose face each half shows, by what each way is called.
    """
    pipe.load_lora_weights(str(TWO_PEOPLE), adapter_name=ADAPTER)
    pipe.load_meta_lora(DOWN, "down")
    for name, adapter in zip(("left", "right"), adapters, strict=True):
        pipe.load_meta_lora(adapter, name)
    pairs = [side_by_side(left, right) for left, right in zip(*photos, strict=True)]
    rows = [("learned from the\nfirst image each", pairs[:_PAIR_PICTURES])]
    others = embedder.embed(photos[0][1:]), embedder.embed(photos[1][1:])
    found = {}
    for label, weight in (("a region each", None), ("sum, weight 0.5 each", 0.5)):
        images = draw_two(pipe, "left", "right", PAIR_PROMPTS[:_PAIR_PICTURES], range(_PAIR_PICTURES), weight)
        rows.append((label.replace(", ", ",\n"), [to_pil(image) for image in images]))
        found[label] = keep_apart(embedder, images, others)
    return sheet_of_two(rows, ["\n".join(asked) for asked in ASKED[:_PAIR_PICTURES]]), found


@contextmanager
def _loaded(pipe: Any, method: Method, adapter: Path) -> Iterator[None]:
    """The pipeline with the adapter of a method, as any user loads it; afterwards without."""
    if method.settings is None:
        yield
    elif method.name.startswith("lora"):
        pipe.load_lora_weights(str(adapter))
        yield
        pipe.unload_lora_weights()
    else:
        pipe.load_meta_lora(DOWN, "down")
        pipe.load_meta_lora(adapter)
        yield
        pipe.unload_meta_lora()


def _result(method: Method, scores: Scores, adapter: Path, seconds: float, person: int, steps: int) -> dict[str, Any]:
    """One object of `demo.json`."""
    result: dict[str, Any] = {"method": method.name, "person": person, **asdict(scores)}
    if method.settings is not None:
        name = "pytorch_lora_weights.safetensors" if method.name.startswith("lora") else "adapter_model.safetensors"
        numbers = sum(tensor.numel() for tensor in load_file(adapter / name).values())
        result |= {
            "steps": steps,
            "learning_rate": method.settings["learning_rate"],
            "trainable_parameters": numbers,
            "seconds": round(seconds, 1),
        }
    return result


def _table(results: list[dict[str, Any]]) -> str:
    """What the terminal shows."""
    columns = {
        "r_facesim": "R-FaceSim",
        "face_sim": "FaceSim",
        "prompt_adherence": "adherence",
        "copied_background": "copied wall",
        "trainable_parameters": "parameters",
        "seconds": "seconds",
    }
    labels = {method.name: method.label for method in METHODS}
    lines = [f"{'':24}" + "".join(f"{title:>13}" for title in columns.values())]
    for result in results:
        cells = [result.get(name, "-") for name in columns]
        shown = [f"{cell:.3f}" if isinstance(cell, float) and cell < 2 else str(cell) for cell in cells]
        lines.append(f"{labels[result['method']]:24}" + "".join(f"{cell:>13}" for cell in shown))
    return "\n".join(lines)


def _table_of_two(ways: dict[str, Apart]) -> str:
    """What the terminal shows of the second picture."""
    titles = ("to the right person", "to the other one", "halves nearer to the other one")
    lines = [f"{'two people, cosine':24}" + "".join(f"{title:>32}" for title in titles)]
    for label, found in ways.items():
        cells = (float(values.mean()) for values in (found.right, found.wrong, found.swapped))
        lines.append(f"{label:24}" + "".join(f"{cell:>32.3f}" for cell in cells))
    return "\n".join(lines)


def _picture(
    reference: Image.Image, others: Sequence[Image.Image], rows: Sequence[tuple[str, Sequence[Image.Image]]]
) -> Image.Image:
    """Reference and other photos on top, then a row for each method under the prompts it was given."""
    tile, left, line = RESOLUTION * _SCALE, 150, 15
    captions = [[_ARTICLE.sub("", clause) for clause in prompt.split(", ")[1:]] for prompt in PROMPTS]
    heading = line * (max(map(len, captions)) + 1)
    width = left + tile * len(PROMPTS) + 8
    sheet = Image.new("RGB", (width, 2 * tile + heading + tile * (len(rows) - 1) + 34), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)

    def text(x: int, y: int, words: str) -> None:
        draw.text((x, y), words, fill="black", font=font)

    def show(image: Image.Image, x: int, y: int) -> None:
        sheet.paste(image.resize((tile - 4, tile - 4), Image.Resampling.NEAREST), (x, y))

    text(8, 8, "learned from")
    text(8, 8 + line, "this one image:")
    show(reference, left, 4)
    text(left + tile + 8, 8, "not shown to")
    text(left + tile + 8, 8 + line, "any method:")
    for number, photo in enumerate(others[: len(PROMPTS) - 2]):
        show(photo, left + tile * (number + 2), 4)
    y = tile + 16
    text(8, y, "asked for:")
    for number, caption in enumerate(captions):
        for row, words in enumerate(caption):
            text(left + tile * number, y + line * row, words)
    y += heading
    for label, images in rows:
        for row, words in enumerate(label.split(", ")):
            text(8, y + 8 + line * row, words)
        for number, image in enumerate(images):
            show(image, left + tile * number, y)
        y += tile
    return sheet.crop((0, 0, width, y + 4))
