# SPDX-License-Identifier: Apache-2.0
"""Two processes (gloo) divide the people among them and give the report that one process gives."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
from pathlib import Path

from peft_metalora.demo.faces import write_dataset
from peft_metalora.evaluation.bench import Bench
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.evaluation.protocol import evaluate


def worker(rank: int, port: int, config: EvaluateConfig) -> None:
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
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

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_metalora.training.meta_train", "peft_metalora.training.personalize"])
    started = [context.Process(target=worker, args=(rank, port, settings("two"))) for rank in range(2)]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(120)
        assert [process.exitcode for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    assert [(tmp_path / f"two-{rank}.txt").read_text() for rank in range(2)] == [
        "held-out-0000 held-out-0002",
        "held-out-0001",
    ]
    evaluate(settings("one"), progress=False)
    for name in ("report.md", "results.jsonl", "report.html"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
