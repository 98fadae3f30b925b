# SPDX-License-Identifier: Apache-2.0
"""Typefaces' jobs on several GPUs: in order, resumed by files, and over in time."""

import argparse
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import jobs
from typefaces import schedule


def job(name, folder, code, needs=(), shares=False, seconds=0.0):
    makes = folder / f"{name}.done"
    needed = [folder / f"{n}.done" for n in needs]
    return jobs.Task(name, [sys.executable, "-c", code], makes, needed, shares, seconds)


def test_a_job_waits_until_another_has_ended_well_and_all_end_in_time(tmp_path, monkeypatch, capfd):
    """Bug: the Down was trained on a base whose files were there, but were still being written."""
    half, whole = str(tmp_path / "half"), str(tmp_path / "whole")
    slow = f"import time; open({half!r}, 'w').close(); time.sleep(0.7); open({whole!r}, 'w')"
    then = f"import os; assert os.path.exists({whole!r})"
    all_jobs = [
        job("too long", tmp_path, "", seconds=100),
        job("first", tmp_path, slow),
        job("second", tmp_path, then, ["first"]),
        job("broken", tmp_path, "raise SystemExit(1)"),
        job("never", tmp_path, "", ["broken"]),
        job("endless", tmp_path, "import time; time.sleep(60)"),
    ]
    monkeypatch.setattr(schedule, "tasks", lambda args: all_jobs)
    monkeypatch.setattr(jobs, "_TO_END", 0)
    start = time.monotonic()
    args = argparse.Namespace(seconds=5.0, output=tmp_path / "results", assets=tmp_path, gpus=2, tiny=False)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "main-0.claim").touch()
    schedule.run(args)
    assert time.monotonic() - start < 15
    assert {path.stem for path in tmp_path.glob("*.done")} == {"first", "second"}, "a job that does not fit is left out"
    assert not list((tmp_path / "results").glob("*.claim"))  # what was stopped can be made again
    assert "endless ended with -15" in capfd.readouterr().out
