# SPDX-License-Identifier: Apache-2.0
"""`metalora demo` and `metalora demo-data`, and their settings."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import setting
from . import Done


@dataclass(kw_only=True)
class DemoConfig:
    """The whole method on the embedded base: one held-out person, from one photo, trained on and read."""

    output_dir: str = setting("Folder for demo.png, demo-two.png and demo.json.", ".")


@dataclass(kw_only=True)
class DemoDataConfig:
    """Draw the demo's faces as an ordinary data set."""

    output_dir: str = setting("Folder to write: <subject>/<n>.png and metadata.jsonl.", positional="DIR")
    split: str = setting(
        "Which people: those of meta-training, those that learning rates are chosen on, held-out ones that "
        "no network of the demo has seen, or any others.",
        "meta",
        choices=("meta", "tune", "held-out", "base"),
    )
    subjects: int = setting("Number of people.", 16)
    images_per_subject: int = setting("Images of each person.", 8)
    size: int = setting("Height and width in pixels.", 64)
    seed: int = setting("Seed of the scenes.", 0)
    conditions: bool = setting("Also write photos of strongly turned heads, for evaluate --degrade yaw.", False)


def run_demo(config: DemoConfig) -> Done:
    """Run the demo, and name its files."""
    from ..demo import run

    run.run_demo(config.output_dir)
    files = [f"{config.output_dir}/{name}" for name in ("demo.png", "demo-two.png", "demo.json")]
    return Done(f"wrote {', '.join(files)}", {"files": files})


def run_demo_data(config: DemoDataConfig) -> Done:
    """Draw a data set, and say where it lies."""
    from ..demo.faces import write_dataset

    write_dataset(
        config.output_dir,
        config.split,
        config.subjects,
        config.images_per_subject,
        size=config.size,
        seed=config.seed,
        conditions=config.conditions,
    )
    values = {"folder": config.output_dir, "subjects": config.subjects}
    return Done(f"wrote {config.subjects} people to {config.output_dir}", values)
