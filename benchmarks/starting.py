# SPDX-License-Identifier: Apache-2.0
"""How long it takes to start: `import peft_metalora` beside `import peft`, and `metalora --help`.

    python benchmarks/starting.py              any machine, a minute; writes benchmarks/results/starting.json

Each is a process of its own, in turns, so that a busy machine meets all alike; figures are medians of the rounds, of
seconds from start to exit and of ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from origin import origin, write

COMMANDS = {
    "python": ["-c", "pass"],
    "import_peft": ["-c", "import peft"],
    "import_peft_metalora": ["-c", "import peft_metalora"],
    "import_both": ["-c", "import peft_metalora, peft"],
    "help": ["-m", "peft_metalora.cli", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of a process of this interpreter."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "starting.json")
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(arguments.rounds + 1):  # the first fills the caches of files
        for name, command in COMMANDS.items():
            taken = seconds(command)
            times[name] += [taken] if number else []
    figures = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    for name in ("import_peft_metalora", "import_both"):
        ratios = [ours / theirs for ours, theirs in zip(times[name], times["import_peft"], strict=True)]
        figures[f"{name}_over_peft"] = statistics.median(ratios)
    report = {**origin("cpu"), "figures": {name: round(value, 4) for name, value in figures.items()}}
    write(arguments.output, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
