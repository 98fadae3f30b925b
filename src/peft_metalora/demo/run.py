# SPDX-License-Identifier: Apache-2.0
"""The whole method on the embedded base, on a CPU, with no download: what `make demo` runs.

A held-out person is brought in from one photo: by a plain LoRA of rank 1, which is trained on it; by the Down's
encoder, which reads it and trains nothing; and by a few steps of tuning from there. Each result is written to disk,
loaded into a stock pipeline as a user would, shown in the same prompts from the same noise, and scored. Nothing is
chosen for the picture: rates come from other people (`benchmarks/sweep.py`, `benchmarks/stopping.py`). A second person
is read, too, and both are drawn in one picture, by regions and as a plain sum.
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

import torch
from PIL import Image
from safetensors.torch import load_file

from ..checkpoint.config_file import read_config
from ..checkpoint.folded import FOLD_FILE
from ..data import load_image
from ..data.images import png
from ..files import write_bytes
from ..metrics import real_ceiling
from ..pipelines.loader import enable_meta_lora
from ..training.personalize import personalize
from ..training.stage_settings import PersonalizeConfig
from .embedded import BASE, DOWN, RESOLUTION, load_base
from .faces import write_dataset
from .judges import FaceEmbedder, load_embedder, load_judge
from .scoring import PROMPTS, Scorer, Scores, generate, to_pil
from .sheet import Row, sheet
from .show_two_people import ADAPTER, ASKED, TWO_PEOPLE, Apart, draw_two, keep_apart, side_by_side
from .show_two_people import PROMPTS as PAIR_PROMPTS

STEPS = 100
"""Steps of the LoRA; the tuned person's are fewer."""
_PHOTOS = 7
_COLUMNS, _PAIR_COLUMNS, _PAIRS = 4, 2, 3  # of the pictures; all prompts are scored, of two people some
_ARTICLE = re.compile(r"^(in|on) (an? )?")


@dataclass(frozen=True)
class Method:
    """A way to bring the person in, and its settings of stage 2 (None: the base model without anybody)."""

    name: str
    label: str
    settings: dict[str, Any] | None


METHODS = (
    Method("base", "Base model", None),
    Method("lora_r1", "LoRA, rank 1", {"method": "lora", "rank": 1, "learning_rate": 1e-2, "max_train_steps": STEPS}),
    Method("encoder", "Meta-LoRA, read", {"start": "encoder", "max_train_steps": 0}),
    Method("encoder_tuned", "Then tuned", {"start": "encoder"}),
)
"""The LoRA's rate: of highest R-FaceSim after `STEPS` on the `tune` people (`benchmarks/sweep.py`, docs/demo.md)."""


def run_demo(output_dir: str | Path, *, person: int = 0, steps: int | None = None) -> list[dict[str, Any]]:
    """Bring a held-out person in by each method and write `demo.png`, `demo-two.png` and `demo.json`.

    Args:
        person: which of the 64 held-out people; `demo-two.png` has their neighbour, 1 with 0, 3 with 2.
        steps: of every method that trains; by default its own.

    Returns:
        What is in `demo.json`: one object a method, with its scores (`demo.scoring.Scores`), `steps`,
        `trainable_parameters` and `seconds` from a photo on disk to an adapter on disk, loading the base included.

    Raises:
        WriteFailedError: the folder cannot be written; nothing is there then.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small: on a busy machine threads would wait for each other for minutes
    try:
        return _run(Path(output_dir), person, steps)
    finally:
        torch.set_num_threads(threads)


def _run(output: Path, person: int, steps: int | None) -> list[dict[str, Any]]:
    scorer = Scorer(load_embedder(), load_judge())
    pipe = enable_meta_lora(load_base())
    drawn: dict[str, list[Image.Image]] = {}
    results = []
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
                print(f"{method.label}: one photo")
                _bring_in(method, files[0], adapter, steps)
            seconds = time.perf_counter() - start
            with _loaded(pipe, method, adapter):
                images = generate(pipe, PROMPTS, range(len(PROMPTS)))
            drawn[method.name] = [to_pil(image) for image in images]
            scores = scorer.score(images, PROMPTS, reference, others)
            results.append(_result(method, scores, adapter, seconds, person, steps))
        photos = ([reference, *others], [load_image(path) for path in second])
        both, ways = _two_people(pipe, scorer.embedder, (files[0], second[0]), photos)
    alike = real_ceiling(scorer.embedder.embed(others))
    write_bytes(output / "demo.png", png(_picture(reference, others, alike, results, drawn)))
    write_bytes(output / "demo-two.png", png(both))
    write_bytes(output / "demo.json", (json.dumps(results, indent=2) + "\n").encode())
    print(_table(results))
    print(_table_of_two(ways))
    return results


def _bring_in(method: Method, photo: Path, adapter: Path, steps: int | None) -> None:
    """One photo to an adapter on disk, as `metalora personalize` does it."""
    settings = dict(method.settings or {})
    if steps is not None and settings.get("max_train_steps") != 0:
        settings["max_train_steps"] = steps
    personalize(
        PersonalizeConfig(
            pretrained_model_name_or_path=str(BASE),
            output_dir=str(adapter),
            instance_data_dir=str(photo),
            resolution=RESOLUTION,
            local_files_only=True,
            down=None if method.name.startswith("lora") else str(DOWN),
            **settings,
        )
    )


def _two_people(
    pipe: Any,
    embedder: FaceEmbedder,
    files: tuple[Path, Path],
    photos: tuple[list[Image.Image], list[Image.Image]],
) -> tuple[Image.Image, dict[str, Apart]]:
    """Read two people and draw both in one picture, by regions and as a sum.

    Args:
        files: the photo that is read, of the left and of the right person. photos: all of theirs, that one first.

    Returns:
        `demo-two.png`, and whose face each half shows, by what each way is called.
    """
    pipe.load_lora_weights(str(TWO_PEOPLE), adapter_name=ADAPTER)
    for name, file in zip(("left", "right"), files, strict=True):
        pipe.read_subject(file, name, down=DOWN)
    pairs = [side_by_side(left, right) for left, right in zip(*photos, strict=True)]
    heads = ["these two photos were read", "other photos of both"]
    rows = [Row("Two people", pairs[:_PAIR_COLUMNS], heads)]
    asked = [f"left: {left}\nright: {right}\n{wall}" for left, right, wall in ASKED[:_PAIR_COLUMNS]]
    others = embedder.embed(photos[0][1:]), embedder.embed(photos[1][1:])
    found = {}
    for label, weight in (("a region each", None), ("sum, weight 0.5 each", 0.5)):
        images = draw_two(pipe, "left", "right", PAIR_PROMPTS[:_PAIRS], range(_PAIRS), weight)
        shown = [to_pil(image) for image in images[:_PAIR_COLUMNS]]
        rows.append(Row(label.capitalize().replace(", ", "\n"), shown, asked))
        found[label] = keep_apart(embedder, images, others)
        asked = []
    return sheet(rows), found


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
        pipe.load_meta_lora(adapter)
        yield
        pipe.unload_meta_lora()


def _result(
    method: Method, scores: Scores, adapter: Path, seconds: float, person: int, steps: int | None
) -> dict[str, Any]:
    """One object of `demo.json`."""
    result: dict[str, Any] = {"method": method.name, "person": person, **asdict(scores)}
    if method.settings is None:
        return result
    if method.name.startswith("lora"):
        weights = load_file(adapter / FOLD_FILE)
        learned = {
            "steps": method.settings["max_train_steps"] if steps is None else steps,
            "learning_rate": method.settings["learning_rate"],
            "trainable_parameters": sum(tensor.numel() for tensor in weights.values()),
        }
    else:
        facts = read_config(adapter).facts or {}
        kept = {"learning_rate", "trainable_parameters"}
        learned = {"steps": facts["steps"]} | {name: of for name, of in facts["recipe"].items() if name in kept}
    return {**result, **learned, "seconds": round(seconds, 1)}


def _table(results: list[dict[str, Any]]) -> str:
    """What the terminal shows."""
    columns = {
        "r_facesim": "R-FaceSim",
        "face_sim": "FaceSim",
        "prompt_adherence": "adherence",
        "copied_background": "copied wall",
        "steps": "steps",
        "trainable_parameters": "trained",
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
    reference: Image.Image,
    others: Sequence[Image.Image],
    alike: float,
    results: Sequence[dict[str, Any]],
    drawn: dict[str, list[Image.Image]],
) -> Image.Image:
    """The photo and others of the person on top, then a row for each method under the prompts it was given."""
    rows = [
        Row(
            f"The person\nreal photos, R-FaceSim {alike:.2f}",
            [reference, *others[: _COLUMNS - 1]],
            ["the photo used", "others, which no method has seen"],
        )
    ]
    asked = [_heading(prompt) for prompt in PROMPTS[:_COLUMNS]]
    labels = {method.name: method.label for method in METHODS}
    for result in results:
        if "steps" not in result:
            continue  # nobody in particular
        name = result["method"]
        notes = f"{result['steps']} steps, {result['seconds']:.1f} s\nR-FaceSim {result['r_facesim']:.2f}"
        rows.append(Row(f"{labels[name]}\n{notes}", drawn[name][:_COLUMNS], asked))
        asked = []
    return sheet(rows)


def _heading(prompt: str) -> str:
    """What a prompt asks for, in a few short lines."""
    _, yaw, expression, *rest = prompt.split(", ")
    return "\n".join([yaw, expression, *(_ARTICLE.sub("", clause) for clause in rest)])
