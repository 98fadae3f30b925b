# SPDX-License-Identifier: Apache-2.0
"""People and prompts to a table: every method learns the same references and draws the same prompts and seeds.

After Meta-LoRA's own protocol (arXiv 2503.22352): one reference a person, R-FaceSim against the person's other photos.
A *cell* is one method and one person. It lies in `output/<method>/<person>/`: images as
`<steps>/<prompt>-<seed>.png`, and `cell.json`, which is written last and says what the cell was made from, so that a
rerun recomputes only what is missing or was made from something else. Images of other systems enter as folders.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, CorruptFileError, MetaLoraError, TrainingError
from ..training.settings import setting

DEMO = "demo"
_OPTIONS = {
    "base": (),
    "meta-lora": ("start", "down", "lr"),
    "random-down": ("down", "lr"),
    "lora": ("r", "lr"),
    "dora": ("r", "lr"),
    "loha": ("r", "lr"),
    "lokr": ("r", "lr"),
    "oft": ("block", "lr"),
    "vera": ("r", "lr"),
    "full": ("lr",),
}


@dataclass(kw_only=True)
class EvaluateConfig:
    """Compare methods on a folder of people: images, scores and a report.

    Raises:
        ConfigError: a value that cannot be.
    """

    data: str = setting("Folder of people: DIR/<person>/*.png, one reference each and other photos.")
    output: str = setting("Folder for images, scores and report; a rerun goes on where it stopped.")
    base: str = setting("Base model: a diffusers folder, a repository id, or 'demo' for the embedded one.", DEMO)
    method: list[str] = field(
        default_factory=list,
        metadata={"help": f"Methods, as 'lora:r=4,lr=1e-2'. Kinds: {', '.join(_OPTIONS)}; full trains every weight."},
    )
    images: list[str] = field(
        default_factory=list,
        metadata={"help": "Images made elsewhere, NAME=DIR with the file names of --export_prompts."},
    )
    export_prompts: str | None = setting("Write the prompts, seeds and file names to this JSONL file.", None)
    prompts: str | None = setting(
        "YAML file, lists of prompts by kind, {subject} for the person. Default: the set of this package.", None
    )
    subject_name: str = setting("What {subject} in prompts becomes.", "a person")
    down: str | None = setting("The Down: a folder or a repository id. Default: with base 'demo' its own.", None)
    instance_prompt: str | None = setting("Caption of references that have none.", "a photo of a person")
    steps: list[int] = field(default_factory=lambda: [375], metadata={"help": "Numbers of steps to draw after."})
    seeds: int = setting("Images of each person and prompt, seeds 0, 1, ...", 1)
    learning_rate: float = setting("Learning rate of methods that name no lr.", 1e-3)
    train_batch_size: int = setting("Views in a batch.", 4)
    views_per_image: int = setting("Crops of a reference.", 32)
    resolution: int | None = setting("Height and width in pixels. Default: 512; 64 with base 'demo'.", None)
    num_inference_steps: int = setting("Steps of the sampler.", 20)
    embedder: str = setting("Face model: 'insightface', or module:function. Base 'demo' has its own.", "insightface")
    clip_model: str | None = setting("CLIP model for CLIP-T and CLIP-I. Default: none.", None)
    dino_model: str | None = setting("DINO model, e.g. facebook/dino-vits16. Default: none.", None)
    mixed_precision: str = setting("Precision.", "auto", choices=("auto", "no", "bf16"))
    local_files_only: bool = setting("Never ask the network.", False)
    device: str | None = setting("Device. Default: this process's GPU when there is one.", None)
    gallery: int = setting("People shown in the report's galleries.", 4)

    def __post_init__(self) -> None:
        for name in ("seeds", "train_batch_size", "views_per_image", "num_inference_steps", "gallery"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.steps or min(self.steps) < 1:
            raise ConfigError(f"steps must be one or more numbers of at least 1, found {self.steps}")
        if not (self.method or self.images or self.export_prompts):
            raise ConfigError("expected something to do, found none: give method, images or export_prompts")
        for text in self.images:
            name, folder = _named(text)
            if not (name and folder and Path(folder).is_dir()):
                raise ConfigError(f"images must be NAME=DIR with a folder that is there, found {text!r}")
        names = [Method.parse(text).folder for text in self.method]
        names += [_safe(_named(text)[0]) for text in self.images]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"expected each method once, found {', '.join(twice)} twice: leave one out or rename it")


@dataclass(frozen=True)
class Method:
    """A method as the command line names it: kind, options, and the text itself."""

    text: str
    kind: str
    options: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Method:
        """'lora:r=4,lr=1e-2' -> kind 'lora', r and lr.

        Raises:
            ConfigError: no such kind, or an option that it has not.
        """
        kind, _, rest = text.partition(":")
        if kind not in _OPTIONS:
            raise ConfigError(f"method must be one of {', '.join(_OPTIONS)}, found {text!r}")
        options = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        for name, value in options.items():
            if name not in _OPTIONS[kind]:
                known = ", ".join(_OPTIONS[kind]) or "none"
                raise ConfigError(f"method {text!r}: expected options {known}, found {name!r}")
            if name in ("r", "block") and not (value.isdecimal() and int(value) > 0):
                raise ConfigError(f"method {text!r}: expected {name} to be a whole number above 0, found {value!r}")
            if name == "lr" and not _is_rate(value):
                raise ConfigError(f"method {text!r}: expected lr to be a number above 0, found {value!r}")
        return cls(text, kind, options)

    @property
    def folder(self) -> str:
        """Its name as a folder."""
        return _safe(self.text)

    def number(self, name: str, default: int) -> int:
        """A whole-number option."""
        return int(self.options.get(name, default))


@dataclass(frozen=True)
class Prompt:
    """A prompt of the set and what kind of thing it asks for."""

    kind: str
    text: str


def read_prompts(path: str | Path | None, subject_name: str) -> list[Prompt]:
    """The prompts of a YAML file (lists by kind), or of the set in this package.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    import yaml

    source = importlib.resources.files(__package__).joinpath("prompts.yaml") if path is None else Path(path)
    try:
        found = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"expected a YAML file of prompts at {source}, found: {error}") from error
    if not isinstance(found, dict) or not all(
        isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in found.values()
    ):
        raise ConfigError(f"{source}: expected lists of prompts by kind ('scenes: [...]'), found something else")
    return [
        Prompt(str(kind), text.replace("{subject}", subject_name)) for kind, texts in found.items() for text in texts
    ]


def evaluate(config: EvaluateConfig, *, progress: bool = True) -> Path:
    """Train, draw and score every method on every person, and write the report.

    Started by `accelerate launch`, the people are divided among the processes.

    Returns:
        The report, `output/report.html`; beside it `report.md`, `results.jsonl` (a line an image) and the images.

    Raises:
        DataError, ConfigError: the people or the settings cannot be used; MetaLoraError in general.
    """
    from accelerate import PartialState
    from tqdm.auto import tqdm

    from ..data import read_subjects
    from ..training.adapters import choose_device
    from .report import write_report

    subjects = read_subjects(config.data, min_photos=2)
    prompts = _prompts(config)
    if config.export_prompts:
        export_prompts(config, prompts)
    if not (config.method or config.images):
        return Path(str(config.export_prompts))
    methods = [Method.parse(text) for text in config.method]
    # Without cpu=True accelerate starts no process group on a machine without GPUs, and every process does all.
    state = PartialState(cpu=choose_device(config.device).type == "cpu")
    mine = subjects[state.process_index :: state.num_processes]
    bench = _Bench(config, prompts)
    jobs = [partial(bench.learn, method, subject) for method in methods for subject in mine]
    jobs += [partial(bench.take, *_named(text), subject) for text in config.images for subject in mine]
    for job in tqdm(jobs, desc="evaluating", unit="cell", disable=not progress):
        job()
    state.wait_for_everyone()
    report = Path(config.output) / "report.html"
    if state.is_main_process:
        names = [method.text for method in methods] + [_named(text)[0] for text in config.images]
        write_report(Path(config.output), read_cells(config.output, names), gallery=config.gallery)
    return report


def export_prompts(config: EvaluateConfig, prompts: Sequence[Prompt]) -> Path:
    """Write what another system needs to draw the same images: a JSON line an image, with the file to write."""
    from ..data import read_subjects
    from ..files import write_bytes

    lines = []
    for subject in read_subjects(config.data, min_photos=2):
        reference = subject.split()[0]
        for number, prompt in enumerate(prompts):
            for seed in range(config.seeds):
                line = {
                    "file_name": f"{subject.name}/{_image_name(number, seed)}",
                    "subject": subject.name,
                    "reference": str(reference.path),
                    "kind": prompt.kind,
                    "prompt": prompt.text,
                    "seed": seed,
                    "resolution": _resolution(config),
                }
                lines.append(json.dumps(line) + "\n")
    path = Path(str(config.export_prompts))
    write_bytes(path, "".join(lines).encode())
    return path


def read_cells(output: str | Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The finished cells of some methods, as `cell.json` has them, in the order of the names.

    Raises:
        CorruptFileError: a cell that is no JSON.
    """
    return [_read(path) for name in names for path in sorted((Path(output) / _safe(name)).glob("*/cell.json"))]


class _Bench:
    """What stays from cell to cell: the base, the judges, the prompts."""

    def __init__(self, config: EvaluateConfig, prompts: Sequence[Prompt]) -> None:
        self.config, self.prompts = config, list(prompts)
        self.home = Path(config.output)
        self._base: Any = None
        self._downs: dict[str, Any] = {}
        self._judge: Any = None

    @property
    def base(self) -> Any:
        """The base model, loaded when a cell needs it."""
        from ..training.adapters import choose_device, choose_dtype
        from ..training.bases import load_base

        if self._base is None:
            config, device = self.config, choose_device(self.config.device)
            self._base = load_base(
                _base_path(config),
                dtype=choose_dtype(config.mixed_precision, device),
                local_files_only=config.local_files_only,
            )
            self._base.pipeline.set_progress_bar_config(disable=True)
            self._base.place(device, encoders=True)
        return self._base

    @property
    def judge(self) -> Any:
        """What scores, loaded when a cell needs it."""
        if self._judge is None:
            from .judging import judge_for

            self._judge = judge_for(self.config)
        return self._judge

    def learn(self, method: Method, subject: Any) -> None:
        """Make the cell of a trained method, if it is not there already."""
        reference, _ = subject.split()
        config = self.config
        training = ("base", "down", "instance_prompt", "learning_rate", "train_batch_size", "views_per_image")
        made_from = {
            "method": method.text,
            **{name: getattr(config, name) for name in (*training, "num_inference_steps", "mixed_precision")},
            "resolution": _resolution(config),
            "steps": sorted(set(config.steps)),
            "caption": reference.caption,
        }
        folder = self.home / method.folder / subject.name
        key = self._key(made_from, subject)
        if _complete(folder, key):
            return
        cell: dict[str, Any] = {"rows": [], "points": [], "failure": None}
        try:
            for steps, seconds, parameters in self._train(method, reference):
                images = self._draw()
                cell["rows"] += self._score(folder, images, subject, steps)
                cell["points"].append({"steps": steps, "seconds": round(seconds, 3)})
                cell["parameters"] = parameters
        except TrainingError as error:
            cell["failure"] = str(error)
            done = {point["steps"] for point in cell["points"]}
            for steps in set(config.steps) - done:
                cell["rows"] += self._score(folder, [None] * self._count, subject, steps)
        self._finish(folder, key, method.text, subject, cell)

    def take(self, name: str, source: str, subject: Any) -> None:
        """Make the cell of images that were drawn elsewhere; those that are not there are misses."""
        from ..data import load_image

        folder = self.home / _safe(name) / subject.name
        paths = [
            Path(source) / subject.name / _image_name(number, seed)
            for number in range(len(self.prompts))
            for seed in range(self.config.seeds)
        ]
        hashes = [_hash(path) if path.is_file() else None for path in paths]
        key = self._key({"images": hashes}, subject)
        if _complete(folder, key):
            return
        images = [load_image(path) if path.is_file() else None for path in paths]
        cell = {"rows": self._score(folder, images, subject, 0), "points": [], "failure": None}
        self._finish(folder, key, name, subject, cell)

    @property
    def _count(self) -> int:
        return len(self.prompts) * self.config.seeds

    def _key(self, made_from: dict[str, Any], subject: Any) -> str:
        """Changes with whatever a cell is made from or scored by."""
        config, (reference, others) = self.config, subject.split()
        everything = {
            **made_from,
            "photos": [_hash(photo.path) for photo in (reference, *others)],
            "prompts": [prompt.text for prompt in self.prompts],
            "seeds": config.seeds,
            "judges": [config.base == DEMO, config.embedder, config.clip_model, config.dino_model],
        }
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    def _train(self, method: Method, reference: Any) -> Iterator[tuple[int, float, int]]:
        """Learn a reference; yields steps, seconds of training and trained parameters where images are wanted."""
        from .methods import run_method

        if method.kind == "base":
            yield 0, 0.0, 0
            return
        run = run_method(self.base, method, reference, self.config, self._down(method), _resolution(self.config))
        wanted, seconds = set(self.config.steps), 0.0
        try:
            start = time.perf_counter()
            for step in run.steps():
                if step.number in wanted:
                    seconds += time.perf_counter() - start
                    self.base.denoiser.eval()
                    yield step.number, seconds, run.trainable_parameters
                    self.base.denoiser.train(run.trains_in_train_mode)
                    start = time.perf_counter()
        finally:
            run.remove()

    def _down(self, method: Method) -> Any:
        from .. import hub

        if method.kind not in ("meta-lora", "random-down"):
            return None
        name = down_name(self.config, method)
        if name not in self._downs:
            self._downs[name] = hub.load_down(name, local_files_only=self.config.local_files_only)
        return self._downs[name]

    def _draw(self) -> list[Any]:
        """Every prompt with every seed; the noise of an image depends on its seed alone."""
        import torch

        from ..training.adapters import autocast

        base, config = self.base, self.config
        side = _resolution(config)
        options = {"height": side, "width": side, "num_inference_steps": config.num_inference_steps}
        if base.takes_sequence_length:
            options["max_sequence_length"] = base.max_sequence_length
        images: list[Any] = []
        with autocast(config.mixed_precision, base.device), torch.no_grad():
            for prompt in self.prompts:
                generators = [torch.Generator().manual_seed(seed) for seed in range(config.seeds)]
                texts = [prompt.text] * config.seeds
                images += base.pipeline(prompt=texts, generator=generators, **options).images
        return images

    def _score(self, folder: Path, images: Sequence[Any], subject: Any, steps: int) -> list[dict[str, Any]]:
        """Write images and give a row each; None is an image that could not be made."""
        from ..data import load_image
        from ..files import write_bytes
        from ..training.validation import png

        reference, others = subject.split()
        asked = [(number, seed) for number in range(len(self.prompts)) for seed in range(self.config.seeds)]
        there = [index for index, image in enumerate(images) if image is not None]
        scores: list[dict[str, Any]] = []
        if there:
            scores = self.judge.score(
                [images[index] for index in there],
                [self.prompts[asked[index][0]].text for index in there],
                load_image(reference.path),
                [load_image(photo.path) for photo in others],
            )
        of_image = dict(zip(there, scores, strict=True))
        rows = []
        for index, (number, seed) in enumerate(asked):
            prompt = self.prompts[number]
            row = {"steps": steps, "kind": prompt.kind, "prompt": prompt.text, "number": number, "seed": seed}
            row["file"] = None
            if index in of_image:
                path = folder / f"{steps:05d}" / _image_name(number, seed)
                write_bytes(path, png(images[index]))
                row["file"] = path.relative_to(self.home).as_posix()
            rows.append({**row, **of_image.get(index, {"found": False, "r_facesim": 0.0, "face_sim": 0.0})})
        return rows

    def _finish(self, folder: Path, key: str, name: str, subject: Any, cell: dict[str, Any]) -> None:
        from ..files import write_bytes

        reference, _ = subject.split()
        whole = {
            "key": key,
            "method": name,
            "subject": subject.name,
            "reference": str(reference.path),
            "tags": read_tags(self.config.data).get(subject.name, {}),
            **cell,
        }
        # The images are there by now: what has a cell.json is complete.
        write_bytes(folder / "cell.json", (json.dumps(whole, indent=1) + "\n").encode())


def read_tags(data: str | Path) -> dict[str, dict[str, str]]:
    """What `DIR/people.json` says of the people, e.g. {"ann": {"sex": "female", "age": "30-39"}}; {} without it.

    Raises:
        ConfigError: it is something else.
    """
    path = Path(data) / "people.json"
    if not path.is_file():
        return {}
    try:
        tags = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected JSON, found: {error}") from error
    if not isinstance(tags, dict) or not all(isinstance(one, dict) for one in tags.values()):
        raise ConfigError(f'{path}: expected {{"person": {{"sex": "..."}}}}, found something else')
    return {name: {str(k): str(v) for k, v in one.items()} for name, one in tags.items()}


def down_name(config: EvaluateConfig, method: Method) -> str:
    """The Down of a method: its own, the run's, or the demo's.

    Raises:
        ConfigError: there is none.
    """
    name = method.options.get("down") or config.down
    if name is None and config.base == DEMO:
        from ..demo.base import ASSETS

        name = str(ASSETS / "down")
    if name is None:
        raise ConfigError(f"method {method.text!r} needs a Down, found none: give down")
    return name


def _named(text: str) -> tuple[str, str]:
    """NAME=DIR."""
    name, _, folder = text.partition("=")
    return name, folder


def _prompts(config: EvaluateConfig) -> list[Prompt]:
    if config.base == DEMO and config.prompts is None:
        from ..demo.scoring import PROMPTS

        return [Prompt("demo", text) for text in PROMPTS]
    return read_prompts(config.prompts, config.subject_name)


def _base_path(config: EvaluateConfig) -> str:
    if config.base != DEMO:
        return config.base
    from ..demo.base import BASE

    return str(BASE)


def _resolution(config: EvaluateConfig) -> int:
    return config.resolution or (64 if config.base == DEMO else 512)


def _complete(folder: Path, key: str) -> bool:
    if not (folder / "cell.json").is_file():
        return False
    try:
        cell = _read(folder / "cell.json")
    except MetaLoraError:
        return False
    home = folder.parents[1]
    return cell.get("key") == key and all(row["file"] is None or (home / row["file"]).is_file() for row in cell["rows"])


def _read(path: Path) -> dict[str, Any]:
    try:
        cell: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptFileError(f"{path}: expected a cell in JSON, found: {error}. Remove it and run again.") from error
    return cell


def _image_name(prompt: int, seed: int) -> str:
    return f"{prompt:03d}-{seed:03d}.png"


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=,-]+", "_", name).lstrip(".") or "_"


def _is_rate(value: str) -> bool:
    try:
        return 0 < float(value) < math.inf
    except ValueError:
        return False
