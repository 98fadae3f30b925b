# SPDX-License-Identifier: Apache-2.0
"""Jobs that write, in processes of their own, killed (kill -9) at a moment drawn from a number; and what they left.

Each job begins where an older result lies and is to put a newer one in its place. Afterwards one of the two must be
there, whole, and the same job, started again, must end as if nothing had happened.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file

from artefacts_tiny import with_down, with_subject
from fake_hub import TOKEN, FakeHub, point_at
from forked import forkserver
from peft_metalora import MetaLoraError, hub, load_down, load_subject, save_down, save_subject
from peft_metalora.demo.faces import write_dataset
from peft_metalora.evaluation.evaluation_settings import EvaluateConfig
from peft_metalora.evaluation.protocol import evaluate
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from pipelines_tiny import save_tiny_flux
from training_tiny import meta_config, personal_config, write_people

CHANGES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
PATIENCE = 300
"""Seconds for a job on a machine however busy."""
STEPS = 4
LAST = 12
"""Changes at the end of a job, among which a result is put in its place."""


@dataclass(frozen=True)
class Kill:
    """A kill.

    Attributes:
        moment: of all changes of the file system that the job makes, or of the time it takes, how many were over.
        killed: whether the moment came before the end.
        left: "older", "newer" or "none", what was there afterwards.
        harm: what was lost or mixed; empty: nothing.
    """

    seed: int
    job: str
    moment: str
    killed: bool
    left: str
    harm: str


# Jobs: in a process of its own, each takes the place that it works in


def _save(place: Path) -> None:
    save_subject(place / "ann", _ann(2), "ann", down=place / "faces", facts={"version": 2})


def _ann(version: int) -> Any:
    return with_subject(with_down(), seed=version + 1)


def _push(place: Path) -> None:
    hub.push_subject(place / "ann-newer", "ann/me", down="ann/faces")


def _pull(place: Path) -> None:
    hub.pull("ann/newer", place / "ann", cache_dir=place / "cache")


def _personalize(place: Path, resume: str | None = None) -> None:
    personalize(
        personal_config(
            pretrained_model_name_or_path=str(place.parent / "base"),
            instance_data_dir=str(place.parent / "people" / "person-0"),
            down=str(place.parent / "down"),
            output_dir=str(place / "out"),
            max_train_steps=STEPS,
            checkpointing_steps=1,
            resume_from_checkpoint=resume,
            overwrite=True,
        ),
        progress=False,
    )


def _meta_train(place: Path, resume: str | None = None, steps: int = STEPS) -> None:
    meta_train(
        meta_config(
            pretrained_model_name_or_path=str(place.parent / "base"),
            train_data_dir=str(place.parent / "people"),
            output_dir=str(place / "out"),
            max_train_steps=steps,
            checkpointing_steps=1,
            resume_from_checkpoint=resume,
        ),
        progress=False,
    )


def _evaluate(place: Path) -> None:
    images = [f"copies={place.parent / 'copies'}"]
    evaluate(
        EvaluateConfig(data=str(place.parent / "faces-data"), output=str(place / "out"), images=images, device="cpu"),
        progress=False,
    )


JOBS: dict[str, Callable[[Path], None]] = {
    "save": _save,
    "push": _push,
    "pull": _pull,
    "personalize": _personalize,
    "meta-train": _meta_train,
    "evaluate": _evaluate,
}
RESUMED: dict[str, Callable[..., None]] = {"personalize": _personalize, "meta-train": _meta_train}


def _child(job: str, place: Path, endpoint: str, stop_before: int | None, resume: bool) -> None:
    """What the process does: the job, and before its n-th change of the file system it kills itself."""
    os.environ["TMPDIR"] = str(place / "tmp")
    torch.set_num_threads(1)
    _point(endpoint, place / "hub-cache")
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        # Opening changes nothing unless it is to write.
        if event not in CHANGES or (event == "open" and not (isinstance(arguments[2], int) and arguments[2] & 3)):
            return
        path = arguments[0] if isinstance(arguments[0], (str, bytes)) else ""
        if not os.fsdecode(path).startswith(str(place)):
            return
        if count == stop_before:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    sys.addaudithook(hook)
    RESUMED[job](place, resume="latest") if resume else JOBS[job](place)
    (place / "changes").write_text(str(count))


def _point(endpoint: str, cache: Path) -> None:
    class Patch:
        def setattr(self, target: Any, name: str, value: Any, raising: bool = True) -> None:
            setattr(target, name, value)

        def setenv(self, name: str, value: str) -> None:
            os.environ[name] = value

    point_at(endpoint, cache, Patch())
    huggingface_hub.utils._auth._get_token_from_environment = lambda: TOKEN


def moment_of(seed: int) -> tuple[str, str, float]:
    """The job of a kill, what it counts (time, all changes of the file system, the last), and the share before it."""
    rng = random.Random(seed)
    return list(JOBS)[seed % len(JOBS)], rng.choice(["time", "changes", "last changes"]), rng.random()


class Killer:
    """Makes what the jobs read, runs each once to its end, and kills.

    Use it as a context: it serves a Hub meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.context = forkserver()
        self._whole: dict[str, tuple[float, int]] = {}
        save_tiny_flux(folder / "base")
        write_people(folder / "people")
        people = write_dataset(folder / "faces-data", "held-out", 1, 2)
        for person in people.iterdir():
            (folder / "copies" / person.name).mkdir(parents=True)
            for number in range(8):
                shutil.copy(person / "0.png", folder / "copies" / person.name / f"{number:03d}-000.png")

    def __enter__(self) -> Killer:
        self.hub = FakeHub().__enter__()
        _point(self.hub.endpoint, self.folder / "hub-cache")
        _meta_train(self._place("first"), steps=2)
        shutil.copytree(self.folder / "first" / "out", self.folder / "down")
        self._place("good")
        hub.push_down(self.folder / "good" / "faces", "ann/faces")
        hub.push_subject(self.folder / "good" / "ann-newer", "ann/newer", down="ann/faces")
        return self

    def __exit__(self, *_: object) -> None:
        self.hub.__exit__()

    def _place(self, name: str, job: str | None = None) -> Path:
        """A place with an older result, as every job begins."""
        place = self.folder / name
        for part in ("tmp", "cache", "hub-cache"):
            (place / part).mkdir(parents=True)
        save_down(place / "faces", with_down(), "faces")
        for version, ending in ((1, ""), (2, "-newer")):
            facts = {"version": version}
            save_subject(place / f"ann{ending}", _ann(version), "ann", down=place / "faces", facts=facts)
        if job == "push":
            self.hub.repos.pop("ann/me", None)
            hub.push_subject(place / "ann", "ann/me", down="ann/faces")
        elif job == "personalize":  # over somebody of an earlier run
            shutil.copytree(self._result("personalize older"), place / "out")
        elif job == "meta-train":
            shutil.copytree(self.folder / "down", place / "out")
            for older in (place / "out").glob("checkpoint-*"):
                shutil.rmtree(older)
        return place

    def _result(self, name: str) -> Path:
        """A subject of the same Down from another run, made once."""
        place = self.folder / name
        if not place.exists():
            place.mkdir()
            personalize(
                personal_config(
                    pretrained_model_name_or_path=str(self.folder / "base"),
                    instance_data_dir=str(self.folder / "people" / "person-1"),
                    down=str(self.folder / "down"),
                    output_dir=str(place / "out"),
                ),
                progress=False,
            )
        return place / "out"

    def _run(
        self, job: str, place: Path, stop_before: int | None = None, after: float | None = None, resume: bool = False
    ) -> bool:
        """Run a job in a process; whether it was killed."""
        arguments = (job, place, self.hub.endpoint, stop_before, resume)
        process = self.context.Process(target=_child, args=arguments)
        process.start()
        timer = threading.Timer(after, process.kill) if after is not None else None
        if timer:
            timer.start()
        process.join(PATIENCE)
        if timer:
            timer.cancel()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{job} ended with {process.exitcode}")
        return process.exitcode == -signal.SIGKILL

    def _measure(self, job: str) -> tuple[float, int]:
        """How long a job takes and how often it changes the file system; and what it comes to, for comparison."""
        if job not in self._whole:
            place = self._place(f"{job}-whole", job)
            start = time.perf_counter()
            self._run(job, place)
            self._whole[job] = time.perf_counter() - start, int((place / "changes").read_text())
        return self._whole[job]

    def kill(self, seed: int) -> Kill:
        """Kill number `seed`, and look at what it left."""
        job, counted, share = moment_of(seed)
        seconds, changes = self._measure(job)
        place = self._place(f"kill-{seed}", job)
        if counted != "time":
            among = min(LAST, changes) if counted == "last changes" else changes
            number = changes - among + int(share * among)
            moment = f"change {number} of {changes}"
            killed = self._run(job, place, stop_before=number)
        else:
            moment = f"{share:.3f} of the time"
            killed = self._run(job, place, after=share * seconds)
        left, harm = "none", ""
        try:
            left = self._look(job, place)
            self._again(job, place)
        except MetaLoraError as error:
            harm = f"cannot be read: {error}"
        except LostError as error:
            harm = str(error)
        shutil.rmtree(place)
        return Kill(seed, job, moment, killed, left, harm[:300])

    # What is there

    def _look(self, job: str, place: Path) -> str:
        """Which result is there; raises LostError for none that was to be, or for a mixture."""
        for path in place.iterdir():  # what a reader would take for an artefact
            if path.name.endswith(".tmp") and not path.name.startswith("."):
                raise LostError(f"left {path.name}")
        if job == "push":
            files = self.hub.repos["ann/me"].files() or {}
            return self._one_of(_written(place / "sent", files), place)
        if job in ("save", "pull"):
            return self._one_of(place / "ann", place)
        if job == "evaluate":
            return "newer" if (place / "out" / "report.html").exists() else "none"
        older = self.folder / "down" if job == "meta-train" else self._result("personalize older")
        newer = self.folder / f"{job}-whole" / "out"
        read = load_down if job == "meta-train" else load_subject
        read(place / "out")
        for checkpoint in (place / "out").glob("checkpoint-*"):
            if job == "personalize" and (checkpoint / "adapter_config.json").exists():
                load_subject(checkpoint)
        files = {path.name: path.read_bytes() for path in (place / "out").iterdir() if path.is_file()}
        for name, folder in (("older", older), ("newer", newer)):
            wanted = {path.name: path for path in folder.iterdir() if path.is_file()}
            if files.keys() == wanted.keys() and all(_same(place / "out" / key, wanted[key]) for key in files):
                return name
        raise LostError(f"neither the older nor the newer: {sorted(files)}")

    def _one_of(self, folder: Path, place: Path) -> str:
        source = hub.load_subject(folder)
        version = (source.config.facts or {}).get("version")
        wanted = load_subject(self.folder / "good" / {1: "ann", 2: "ann-newer"}[version])
        if not all(torch.equal(wanted.tensors[name], tensor) for name, tensor in source.tensors.items()):
            raise LostError(f"the configuration of save {version} and the tensors of another")
        fold = folder / "pytorch_lora_weights.safetensors"
        mine = self.folder / "good" / {1: "ann", 2: "ann-newer"}[version] / fold.name
        if fold.exists() and not _same(fold, mine):
            raise LostError(f"the tensors of save {version} and the fold of another")
        return "older" if version == 1 else "newer"

    def _again(self, job: str, place: Path) -> None:
        """Start the job once more: it must end as if nothing had happened."""
        self._run(job, place, resume=job in RESUMED)
        if job == "evaluate":
            for name in ("report.md", "results.jsonl", "report.html"):
                if (place / "out" / name).read_bytes() != (self.folder / "evaluate-whole" / "out" / name).read_bytes():
                    raise LostError(f"another {name} than without the kill")
        elif self._look(job, place) != "newer":
            raise LostError("the second attempt did not end with the newer")


class LostError(Exception):
    """Something is lost, or one thing is mixed with another."""


def _written(folder: Path, files: dict[str, bytes]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _same(one: Path, other: Path) -> bool:
    if one.suffix == ".json":
        return _without_time(one) == _without_time(other)
    if one.suffix != ".safetensors":
        return one.read_bytes() == other.read_bytes()
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _without_time(path: Path) -> str:
    """A configuration without how long its run took."""
    return re.sub(r'"seconds": [0-9.]+', "", path.read_text())
