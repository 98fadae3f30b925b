# SPDX-License-Identifier: Apache-2.0
"""Cases, each made from a number: something is damaged, goes down one of the roads by which files are read, and is
judged.

`run_case(seed, lab)` copies what the road reads, damages a part of it, goes down the road, and says what came of it: a
refusal by an error of ours, a success (some damage is none: a flipped bit in a number of a subject makes another
subject), or another exception; and what was harmed: a model that a refusal leaves other than it was, a file that
nobody should have changed, an output half written, one save mixed with another.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import torch
from damage import CACHE, PHOTOS, SETTINGS, STATES
from diffusers import DiffusionPipeline
from mutations import CONFIG, FOLD, MUTATIONS, WEIGHTS, Mutation
from peft import PeftModel
from torch import nn

from artefacts_tiny import TinyModel, with_down, with_subject
from fake_hub import TOKEN, FakeHub, point_at
from peft_metalora import (
    MetaLoraError,
    enable_meta_lora,
    export_subject,
    hub,
    load_down,
    load_subject,
    project,
    save_down,
    save_subject,
)
from peft_metalora.cli import COMMANDS, make_config
from peft_metalora.data import read_photos, read_subjects
from peft_metalora.lora.export import FORMATS
from peft_metalora.training import preparing
from peft_metalora.training.engine.state import read_state, understanding
from peft_metalora.training.examples.encoding import encode_subjects
from peft_metalora.training.meta_train import meta_train_on
from peft_metalora.training.personalize import personalize
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.tuner.placing import restore
from training_tiny import meta_config, personal_config, tiny_base, tiny_examples, write_people

HANGS = 60
"""Seconds after which a case is taken for one that would never end, on a machine however busy."""


class TinyPipeline(DiffusionPipeline):
    """A pipeline of one small model, for the loader to load into."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    @property
    def components(self) -> dict[str, object]:
        """What diffusers looks through for offloading."""
        return {"transformer": self.transformer}


class Hung(BaseException):
    """A case that does not end; no `except Exception` on the way takes it for its own."""


class HarmError(Exception):
    """What a road finds that must not be: it is no refusal and no error of the road."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        result: "refused", "done", "refused by PEFT" (before it knows whose file it reads), or the name of an exception
            that is none of ours.
        harm: what was harmed; empty: nothing.
        seconds: of this process' time, so that other work of the machine does not count.
    """

    seed: int
    road: str
    damage: str
    result: str
    error: str
    harm: str
    seconds: float


@dataclass
class Case:
    """A copy of what a road reads.

    Attributes:
        place: the folder that holds it all.
        target: what is damaged. damage: how.
        output: where a road may write; everything else must stay as it is.
        before: the state of every model that a refusal must leave alone.
    """

    place: Path
    target: Path
    damage: str
    rng: random.Random
    number: int
    before: list[tuple[nn.Module, tuple]] = field(default_factory=list)

    @property
    def output(self) -> Path:
        return self.place / "output"

    def watch(self, model: nn.Module) -> nn.Module:
        self.before.append((model, state_of(model)))
        return model


def state_of(model: nn.Module) -> tuple:
    """Module tree, flags, attributes, adapters, weights and output of a model."""
    with torch.no_grad():
        output = model(torch.linspace(-1, 1, 16).view(2, 8))
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return modules, flags, sorted(vars(model)), sorted(getattr(model, "peft_config", {})), weights, output


def same_state(one: tuple, other: tuple) -> bool:
    """Whether two states are the same, to the bit."""
    same = one[4].keys() == other[4].keys() and all(torch.equal(one[4][name], other[4][name]) for name in one[4])
    return same and one[:4] == other[:4] and torch.equal(one[5], other[5])


# Roads


def _load_down(lab: Lab, case: Case) -> None:
    load_down(case.target)


def _load_subject(lab: Lab, case: Case) -> None:
    source = load_subject(case.rng.choice((case.target, case.place / "ann")))
    _require_one_save(source.config, source.tensors)


def _hub_load(lab: Lab, case: Case) -> None:
    model = case.rng.choice((None, lab.pipe.transformer))
    subfolder = case.rng.random() < 0.3
    path = case.place if subfolder else case.target
    source = hub.load(path, model=model, subfolder=case.target.name if subfolder else None)
    _require_one_save(source.config, source.tensors)


def _require_one_save(config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Each save says in its facts which it is, and its tensors say it too."""
    facts = config.facts if isinstance(config.facts, dict) else {}
    name = next(iter(tensors))
    for version, known in VERSIONS.get(config.stage, {}).items():
        if torch.equal(known.get(name, torch.empty(0)), tensors[name]) and facts.get("version", version) != version:
            raise HarmError(f"the tensors of save {version} with the configuration of another")


VERSIONS: dict[str, dict[int, dict[str, torch.Tensor]]] = {"meta": {}, "subject": {}}


def _pipeline(lab: Lab, case: Case) -> None:
    case.watch(lab.pipe.transformer)
    # A spoilt Down is met on its own, or through the subject that stands on it.
    lab.pipe.load_meta_lora(case.target if case.rng.random() < 0.7 else case.place / "ann", "case")
    lab.pipe.unload_meta_lora()


def _add_subject(lab: Lab, case: Case) -> None:
    case.watch(lab.pipe.transformer)
    lab.pipe.add_subject(case.place / "ann" if case.target.name == "faces" else case.target, "case")
    lab.pipe.unload_meta_lora()


def _from_pretrained(lab: Lab, case: Case) -> None:
    model = case.watch(TinyModel())
    PeftModel.from_pretrained(model, str(case.target), adapter_name="case")


def _load_adapter(lab: Lab, case: Case) -> None:
    model = PeftModel.from_pretrained(TinyModel(), str(lab.good / "faces"), adapter_name="faces")
    case.watch(model.base_model.model)
    model.load_adapter(str(case.target), adapter_name="case")


def _push(lab: Lab, case: Case) -> None:
    name, private = f"ann/case-{case.number}", case.rng.random() < 0.5
    if case.target.name == "faces":
        hub.push_down(case.target, name, private=private)
        made = {CONFIG, WEIGHTS, "README.md"}
    else:
        hub.push_subject(case.target, name, private=private, down="ann/faces")
        made = {CONFIG, WEIGHTS, FOLD, "README.md"}
    files = lab.hub.repos.pop(name).files() or {}
    if set(files) != made:
        raise HarmError(f"sent {sorted(files)}")
    stale = [(case.place / "bob" / FOLD).read_bytes(), b"by hand"]
    if any(content in stale for content in files.values()):
        raise HarmError("sent a file that an older save or another hand left")


def _pull(lab: Lab, case: Case) -> None:
    name = f"ann/case-{case.number}"
    files = {}
    for folder in (case.target, case.place / ("ann" if case.target.name == "faces" else "faces")):
        for path in folder.iterdir() if folder.is_dir() else []:
            if path.is_file() and os.path.realpath(path).startswith(str(case.place)):
                with open(path, "rb") as file:
                    files[f"{folder.name}/{path.name}"] = file.read(2**22)
    lab.hub.add(name, files)
    output = _output(case)
    try:
        hub.pull(name, output, subfolder=case.target.name, cache_dir=case.place / "cache", overwrite=_forces(case))
    finally:
        del lab.hub.repos[name]
    _require_whole(output)


def _export(lab: Lab, case: Case) -> None:
    source = load_subject(case.place / "ann" if case.target.name == "faces" else case.target)
    export_subject(source, _output(case), case.rng.choice(FORMATS), overwrite=_forces(case))


def _project(lab: Lab, case: Case) -> None:
    down = lab.down
    project(case.target, down, _output(case), down_reference=str(case.place / "faces"), overwrite=_forces(case))
    _require_whole(case.output)


def _project_file(lab: Lab, case: Case) -> None:
    case.target = case.target / case.rng.choice((WEIGHTS, ""))
    _project(lab, case)


def _output(case: Case) -> Path:
    """An output folder: new, or with something in it that was there before."""
    there = case.rng.choice(("nothing", "nothing", "older", "another kind", "another person", "card", "file", "link"))
    if there in ("older", "another kind", "another person"):
        name = {"older": "ann", "another kind": "faces", "another person": "bob"}[there]
        shutil.copytree(case.place.parent / "good" / name, case.output)
    elif there == "card":
        case.output.mkdir()
        (case.output / "README.md").write_text("by hand")
    elif there == "file":
        case.output.write_text("x")
    elif there == "link":
        case.output.symlink_to("nowhere" if case.rng.random() < 0.5 else "elsewhere")
    return case.output


def _forces(case: Case) -> bool:
    return case.rng.random() < 0.5


def _require_whole(folder: Path) -> None:
    """What was written loads, and its fold is its own."""
    stage = "meta" if "stage" in (text := (folder / CONFIG).read_text()) and '"stage": "meta"' in text else "subject"
    try:
        (load_down if stage == "meta" else hub.load_subject)(
            folder, **({} if stage == "meta" else {"known_down": _any})
        )
    except MetaLoraError as error:
        raise HarmError(f"wrote what cannot be read: {error}") from error
    if stage == "meta" and (folder / FOLD).exists():
        raise HarmError("a fold of somebody beside a Down")


def _any(fingerprint: str) -> Any:
    return KNOWN.get(fingerprint)


KNOWN: dict[str, Any] = {}


def _photos(lab: Lab, case: Case) -> None:
    for photo in read_photos(case.place / "people" / "person-0", template="a {trigger}", trigger="x"):
        photo.load()


def _subjects(lab: Lab, case: Case) -> None:
    for subject in read_subjects(case.place / "people", trigger="x"):
        for photo in subject.photos[:2]:
            photo.load()


def _state(lab: Lab, case: Case) -> None:
    config = lab.personal(
        case.place, resume_from_checkpoint=case.rng.choice((str(case.target / "checkpoint-1"), "latest"))
    )
    state = read_state(config, extendable=True)
    if state is not None:
        with understanding("a state"):
            lab.run.load_state_dict(state["run"])


def _resume(lab: Lab, case: Case) -> None:
    """The whole of `personalize`, its base already read."""
    config = lab.personal(case.place, resume_from_checkpoint="checkpoint-1", checkpointing_steps=1)
    lab.personalize(config)
    found, wanted = load_subject(case.target).tensors, load_subject(lab.good / "run").tensors
    # Somebody who knows the format may write another state, which is another run.
    if case.damage != "content of the state" and not all(torch.equal(found[name], wanted[name]) for name in wanted):
        raise HarmError("resumed to another person than without the damage")


def _cache(lab: Lab, case: Case) -> None:
    config = lab.personal(case.place, cache_dir=str(case.target))
    subject = read_subjects(lab.good / "people")[0]
    found = encode_subjects(lab.base, [subject], config, 1, progress=False)
    if not all(torch.equal(found.text[name], lab.encoded.text[name]) for name in found.text):
        raise HarmError("other embeddings than without a cache")
    if not torch.equal(found.latents, lab.encoded.latents):
        raise HarmError("other latents than without a cache")


def _settings(lab: Lab, case: Case) -> None:
    command = COMMANDS[case.rng.choice(list(COMMANDS))]
    make_config(command.config_class(), str(case.target / "settings.yaml"), {})


def _many_at_once(lab: Lab, case: Case) -> None:
    """Two write a folder, over and over, while two read it."""
    stop, found = threading.Event(), []
    (case.place / "elsewhere").mkdir(exist_ok=True)

    def write(version: int) -> None:
        try:
            for _ in range(3):
                lab.save(case.place / "ann", version)
        except Exception as error:
            found.append(error)

    def read() -> None:
        try:
            while not stop.is_set():
                source = load_subject(case.place / "ann")
                _require_one_save(source.config, source.tensors)
        except Exception as error:
            found.append(error)

    writers = [threading.Thread(target=write, args=(version,)) for version in (1, 2)]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    if found:
        raise found[0]
    source = load_subject(case.place / "ann")
    _require_one_save(source.config, source.tensors)


def _none(folder: Path, rng: random.Random) -> None:
    pass


@dataclass(frozen=True)
class Road:
    """A way by which files are read.

    Attributes:
        go: down it; MetaLoraError refuses.
        needs: what of the good things it reads. damaged: of these, what may be damaged.
        damage: to that. share: of all cases, relative to other roads.
        writes: what it may change in its place, beside `output`, whatever comes of it.
    """

    go: Callable[[Lab, Case], None]
    needs: tuple[str, ...]
    damaged: tuple[str, ...]
    damage: Mapping[str, Mutation]
    share: float
    writes: tuple[str, ...] = ()


PAIR = ("ann", "faces", "bob", "ann-newer", "faces-newer")
BOTH = ("ann", "faces")
ROADS: dict[str, Road] = {
    "pipe.load_meta_lora": Road(_pipeline, PAIR, BOTH, MUTATIONS, 6),
    "pipe.add_subject": Road(_add_subject, PAIR, BOTH, MUTATIONS, 3),
    "load_down": Road(_load_down, PAIR, ("faces",), MUTATIONS, 3),
    "load_subject": Road(_load_subject, PAIR, BOTH, MUTATIONS, 4),
    "hub.load": Road(_hub_load, PAIR, BOTH, MUTATIONS, 4),
    "PeftModel.from_pretrained": Road(_from_pretrained, PAIR, BOTH, MUTATIONS, 4),
    "PeftModel.load_adapter": Road(_load_adapter, PAIR, BOTH, MUTATIONS, 2),
    "push": Road(_push, PAIR, BOTH, MUTATIONS, 2),
    "pull": Road(_pull, PAIR, BOTH, MUTATIONS, 2, ("cache",)),
    "export": Road(_export, PAIR, BOTH, MUTATIONS, 3),
    "project": Road(_project_file, ("lora", "faces", "bob", "lora-newer"), ("lora",), MUTATIONS, 4),
    "read_photos": Road(_photos, ("people",), ("people",), PHOTOS, 3),
    "read_subjects": Road(_subjects, ("people",), ("people",), PHOTOS, 3),
    "state of a run": Road(_state, ("run",), ("run",), STATES, 2),
    "personalize, resumed": Road(_resume, ("run",), ("run",), STATES, 0.3, ("run",)),
    "cache": Road(_cache, ("cached",), ("cached",), CACHE, 1, ("cached",)),
    "settings": Road(_settings, ("settings",), ("settings",), SETTINGS, 2),
    "two readers, two writers": Road(_many_at_once, PAIR, ("ann",), {"none": _none}, 0.2, ("ann",)),
}


class Lab:
    """Good things of every kind, to be copied and damaged, and what they are read into."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.good, self.began_mb = folder, folder / "good", 0.0
        for version, ending in ((1, ""), (2, "-newer")):
            facts = {"domain": "faces", "subjects": 2, "version": version}
            save_down(self.good / f"faces{ending}", with_down(seed=version), "faces", facts=facts)
        self.models = {version: with_subject(with_down(), seed=version + 1) for version in (1, 2)}
        for version, ending in ((1, ""), (2, "-newer")):
            self.save(self.good / f"ann{ending}", version)
        bob = with_subject(with_down(), "bob", seed=5)
        save_subject(self.good / "bob", bob, "bob", down=self.good / "faces")
        self.down = load_down(self.good / "faces")
        for version, ending in ((1, ""), (2, "-newer")):
            VERSIONS["meta"][version] = load_down(self.good / f"faces{ending}").tensors
            source = load_subject(self.good / f"ann{ending}")
            VERSIONS["subject"][version] = source.tensors
            export_subject(source, self.good / f"lora{ending}", "peft")
        KNOWN[self.down.fingerprint] = self.down
        self._photos_and_runs()
        (self.good / "settings").mkdir()
        (self.good / "settings" / "settings.yaml").write_text("seed: 1\noutput_dir: x\nlearning_rate: 1e-3\n")
        (self.good / "elsewhere").mkdir()
        self.pipe = enable_meta_lora(TinyPipeline(TinyModel()))
        self._serve()
        # The first time of each thing imports; no case should pay for that.
        self.pipe.load_meta_lora(self.good / "ann", "case")
        self.pipe.unload_meta_lora()

    def save(self, folder: Path, version: int) -> None:
        """Write one of two versions of Ann, who says in her facts which she is."""
        facts = {"version": version, "trigger": "sks"}
        save_subject(folder, self.models[version], "ann", down=folder.parent / "faces", facts=facts)

    def _photos_and_runs(self) -> None:
        write_people(self.good / "people", subjects=2, each=2, sizes=((12, 12),))
        (self.good / "people" / "person-0" / "0.txt").write_text("a photo")
        (self.good / "people" / "people.json").write_text('{"person-0": {"sex": "female"}}')
        self.base = tiny_base()
        meta_train_on(self.base, tiny_examples(self.base), meta_config(max_train_steps=2), progress=False).save(
            str(self.good / "down")
        )
        restore(self.base.denoiser, every=True)
        self.personalize(self.personal(self.good, checkpointing_steps=1))
        examples = tiny_examples(tiny_base(), subjects=1)
        self.run = Personalization(tiny_base(), examples, self.personal(self.good), hub.load_down(self.good / "down"))
        subject = read_subjects(self.good / "people")[0]
        self.encoded = encode_subjects(self.base, [subject], self.personal(self.good), 1, progress=False)
        encode_subjects(
            self.base, [subject], self.personal(self.good, cache_dir=str(self.good / "cached")), 1, progress=False
        )

    def personalize(self, config: Any) -> None:
        """Stage 2 on the base that is here already."""
        try:
            with mock.patch.object(preparing, "open_base", lambda *_, **__: self.base):
                personalize(config, progress=False)
        finally:
            restore(self.base.denoiser, every=True)

    def personal(self, place: Path, **changes: Any) -> Any:
        """Settings of stage 2 in a place."""
        return personal_config(
            **{
                "instance_data_dir": str(self.good / "people" / "person-0"),
                "down": str(self.good / "down"),
                "output_dir": str(place / "run"),
                "max_train_steps": 2,
                "report_to": None,
                **changes,
            }
        )

    def _serve(self) -> None:
        patch = _Patch()
        self.hub = FakeHub().__enter__()
        point_at(self.hub.endpoint, self.folder / "hub-cache", patch)
        patch.setattr(huggingface_hub.utils._auth, "_get_token_from_environment", lambda: TOKEN)
        hub.push_down(self.good / "faces", "ann/faces")
        self._patch = patch

    def close(self) -> None:
        """Stop the Hub and point the client back at the real one."""
        self.hub.__exit__()
        self._patch.undo()


class _Patch:
    """pytest's monkeypatch, where there is no pytest."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def setattr(self, target: Any, name: str, value: Any, raising: bool = True) -> None:
        if not raising and not hasattr(target, name):
            return
        self._before.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def setenv(self, name: str, value: str) -> None:
        os.environ[name] = value

    def undo(self) -> None:
        for target, name, value in reversed(self._before):
            setattr(target, name, value)


def run_case(seed: int, lab: Lab) -> Outcome:
    """Make case number `seed`, go down its road, and look at what it left."""
    rng = random.Random(seed)
    name = rng.choices(list(ROADS), [road.share for road in ROADS.values()])[0]
    road = ROADS[name]
    damage = rng.choice(list(road.damage))
    place = lab.folder / f"case-{seed}"
    place.mkdir()
    for part in road.needs:
        shutil.copytree(lab.good / part, place / part)
    (place / "elsewhere").mkdir()
    case = Case(place, place / rng.choice(road.damaged), damage, rng, seed)
    road.damage[damage](case.target, rng)
    files = _files(place, road)
    result, error, harm = "done", "", ""
    started = time.process_time()
    try:
        with _no_longer_than(HANGS):
            road.go(lab, case)
    except MetaLoraError as caught:
        result, error = "refused", type(caught).__name__
    except HarmError as caught:
        harm = str(caught)[:300]
    except (Exception, Hung) as caught:
        result, error = type(caught).__name__, str(caught)[:200]
        frames = [frame.name for frame in traceback.extract_tb(caught.__traceback__)]
        if isinstance(caught, Exception) and ("_get_peft_type" in frames or not _is_ours(case.target)):
            result = "refused by PEFT" if name.startswith("Peft") else result
    seconds = time.process_time() - started
    if result != "done" and not all(same_state(before, state_of(model)) for model, before in case.before):
        harm = "the model"
    if name.startswith("pipe.") and not harm and not same_state(case.before[0][1], state_of(lab.pipe.transformer)):
        harm = "the model, after it was unloaded"
    after = _files(place, road)
    changed = sorted(path for path in files.keys() | after.keys() if files.get(path) != after.get(path))
    if changed and not harm:
        harm = f"files: {', '.join(changed[:3])}"
    _remove(place)
    return Outcome(seed, name, damage, result, error, harm, seconds)


def _is_ours(folder: Path) -> bool:
    """Whether PEFT hands a folder to us, as it does by one field of the configuration."""
    try:
        return json.loads((folder / CONFIG).read_bytes())["peft_type"] == "META_LORA"
    except Exception:
        return False


@contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _files(place: Path, road: Road) -> dict[str, tuple]:
    """What lies in a place and must not change: every name, and of what is no folder also its content's marks."""
    found: dict[str, tuple] = {}
    for folder, folders, files in os.walk(place):
        inside = os.path.relpath(folder, place)
        if inside == ".":
            folders[:] = [name for name in folders if name not in (*road.writes, "output", "elsewhere")]
            files = [name for name in files if name != "output"]
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            marks = (status.st_size, status.st_mtime_ns, status.st_ino) if not stat.S_ISDIR(status.st_mode) else ()
            found[os.path.join(inside, name)] = (status.st_mode, *marks)
    return found


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
