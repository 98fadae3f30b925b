# SPDX-License-Identifier: Apache-2.0
"""Shows what PEFT's image-generation benchmark says of the experiments of `prepare.py`, as a table in Markdown.

    python rows.py PEFT/method_comparison/image-gen/results

A start's rate is the one with the highest similarity on the *validation* photos, the mean over the looks of a run and
over seeds. The test photos choose nothing. A cell is the mean over seeds with the lowest and the highest of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

Run = dict[str, Any]
COLUMNS = {
    "test dino_similarity": lambda run: run["metrics"][-1]["test dino_similarity"],
    "drift": lambda run: run["metrics"][-1]["drift"],
    "s of training": lambda run: run["train_time"],
    "peak memory, GiB": lambda run: run["accelerator_memory_max"] / 2**30,
    "file, MB": lambda run: run["file_size"] / 1e6,
}


def runs(folder: Path) -> dict[str, dict[float, list[Run]]]:
    """Successful runs by start and rate."""
    found: dict[str, dict[float, list[Run]]] = {}
    for path in sorted(folder.glob("metalora--*.json")):
        data = json.loads(path.read_text())
        name, config = data["run_info"]["experiment_name"], data["run_info"]["train_config"]
        start = name.partition("flux2-klein-")[2].partition("-lr")[0]
        if data["train_info"]["status"] == "success" and "-seed" in name:
            rate = config["optimizer_kwargs"]["lr"]
            found.setdefault(start, {}).setdefault(rate, []).append(data["train_info"])
    return found


def validation(some: list[Run]) -> float:
    """Similarity on the validation photos."""
    key = "valid dino_similarity"
    return mean(mean(look[key] for look in run["metrics"] if key in look) for run in some)


def main() -> None:
    print("| start | rate | seeds | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (3 + len(COLUMNS)) + "|")
    for start, by_rate in runs(Path(sys.argv[1])).items():
        rate = max(by_rate, key=lambda one: validation(by_rate[one]))
        values = {name: [read(run) for run in by_rate[rate]] for name, read in COLUMNS.items()}
        cells = [f"{mean(some):.3g} [{min(some):.3g}, {max(some):.3g}]" for some in values.values()]
        print(f"| {start} | {rate:g} | {len(by_rate[rate])} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
