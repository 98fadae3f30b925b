# SPDX-License-Identifier: Apache-2.0
"""What the scripts here share: they read prompts.jsonl of `metalora evaluate`, and write what its --images reads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

Draw = Callable[[dict[str, Any], Image.Image], Image.Image | None]


def parser(description: str | None) -> argparse.ArgumentParser:
    """With `prompts`, the file, and `output`, the folder of the images."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("prompts", type=Path, help="file of metalora evaluate --export_prompts")
    made.add_argument("output", type=Path, help="folder for the images, for --images NAME=FOLDER")
    return made


def draw_each(prompts: Path, output: Path, draw: Draw) -> None:
    """Draw what is missing; an image that cannot be drawn is left out, which counts as a miss.

    Args:
        draw: takes a line (prompt, template with {subject}, seed, resolution, subject) and the reference photo.
    """
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines()]
    for number, line in enumerate(lines):
        path = output / line["file_name"]
        if path.exists():
            continue
        image = draw(line, Image.open(line["reference"]).convert("RGB"))
        if image is None:
            print(f"no image for {line['file_name']}: no face in {line['reference']}", flush=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        image.save(part, "PNG")
        part.rename(path)
        print(f"{number + 1}/{len(lines)} {line['file_name']}", flush=True)
