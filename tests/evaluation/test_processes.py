# SPDX-License-Identifier: Apache-2.0
"""Two processes (gloo) divide the people among them and give the report that one process gives."""

from __future__ import annotations

import shutil
from pathlib import Path

from forked import on_processes
from peft_metalora.demo.faces import write_dataset
from peft_metalora.evaluation.bench import Bench
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.evaluation.protocol import evaluate


def worker(rank: int, config: EvaluateConfig) -> None:
    done, finish = [], Bench._finish  # what each process is done with; the report holds what both did
    Bench._finish = lambda self, *cell: done.append(cell[3].name) or finish(self, *cell)
    evaluate(config, progress=False)
    Path(f"{config.output}-{rank}.txt").write_text(" ".join(done))


def test_people_are_divided_and_the_report_is_the_same(tmp_path: Path) -> None:
    people = write_dataset(tmp_path / "people", "held-out", 3, 2)
    for person in people.iterdir():
        (tmp_path / "copies" / person.name).mkdir(parents=True)
        for number in range(8):
            shutil.copy(person / "0.png", tmp_path / "copies" / person.name / f"{number:03d}-000.png")

    def settings(name: str) -> EvaluateConfig:
        images = [f"copies={tmp_path / 'copies'}"]
        return EvaluateConfig(data=str(people), output=str(tmp_path / name), images=images, device="cpu")

    on_processes(2, worker, settings("two"))
    assert [(tmp_path / f"two-{rank}.txt").read_text() for rank in range(2)] == [
        "held-out-0000 held-out-0002",
        "held-out-0001",
    ]
    evaluate(settings("one"), progress=False)
    for name in ("report.md", "results.jsonl", "report.html"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
