# SPDX-License-Identifier: Apache-2.0
"""The whole method on the embedded base, on a CPU, with no download: what `make demo` runs.

A held-out person is learned from one image, with the same number of steps, by a plain LoRA of rank 1 and by Meta-LoRA
from the stored Mid and from the mean. Each result is written to disk, loaded into a stock pipeline as a user would,
shown in the same prompts from the same noise, and scored. Nothing is chosen for the picture: learning rates come from
a sweep over other people (`benchmarks/sweep.py`).
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
from torch import Tensor

from ..data import load_image
from ..files import write_bytes
from ..pipelines import enable_meta_lora
from ..training.personalize import personalize
from ..training.settings import PersonalizeConfig
from ..training.validation import png
from .base import ASSETS, BASE, RESOLUTION, load_base
from .faces import write_dataset
from .judges import load_embedder, load_judge
from .scoring import PROMPTS, Scorer, Scores, generate

DOWN = ASSETS / "down"
STEPS = 100
"""Steps of stage 2, for every method."""
_PHOTOS = 7
_SCALE = 2  # of a 64 px image in demo.png
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
    """Personalise a held-out person in each way and write `demo.png` and `demo.json`.

    Args:
        person: which of the 64 held-out people.
        steps: of stage 2, for every method.

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
        write_dataset(home / "people", "held-out", [person], _PHOTOS)
        photos = sorted((home / "people").glob("*/*.png"), key=lambda path: int(path.stem))
        reference, *others = [load_image(path) for path in photos]
        for method in METHODS:
            start = time.perf_counter()
            adapter = home / method.name
            if method.settings is not None:
                print(f"{method.label}: {steps} steps on one image")
                personalize(
                    PersonalizeConfig(
                        pretrained_model_name_or_path=str(BASE),
                        output_dir=str(adapter),
                        instance_data_dir=str(photos[0]),
                        resolution=RESOLUTION,
                        max_train_steps=steps,
                        local_files_only=True,
                        down=None if method.name == "lora_r1" else str(DOWN),
                        **method.settings,
                    )
                )
            seconds = time.perf_counter() - start
            with _loaded(pipe, method, adapter):
                images = generate(pipe, PROMPTS, range(len(PROMPTS)))
            scores = scorer.score(images, PROMPTS, reference, others)
            rows.append((method.label, [_to_pil(image) for image in images]))
            results.append(_result(method, scores, adapter, seconds, person, steps))
    write_bytes(output / "demo.png", png(_picture(reference, others, rows)))
    write_bytes(output / "demo.json", (json.dumps(results, indent=2) + "\n").encode())
    print(_table(results))
    return results


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


def _to_pil(image: Tensor) -> Image.Image:
    """(3, h, w) in [0, 1] -> an RGB image."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), bytes(pixels.flatten().tolist()))
