# SPDX-License-Identifier: Apache-2.0
"""Makes cells: trains a method on a person, draws the prompts, scores the images and keeps all of it on disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import hub
from ..bases import Base, load_base
from ..bases.generic import base_class, written_as
from ..bases.precision import autocast, choose_device, choose_dtype
from ..checkpoint.base_model import require_class
from ..checkpoint.reader_files import READER_FILES
from ..data import Photo, Subject, load_image, read_tags
from ..data.images import png
from ..encoder.reader import Reader, load_reader, no_encoder
from ..errors import ConfigError, MetricInputError, TrainingError
from ..files import open_regular, write_bytes
from ..hub.loading import folder_of
from ..metrics.by_name import code_of
from ..tuner import DownSource
from ..tuner.down import digest_of
from .cells import Cell, hash_of, home_of, is_complete, remove_cell
from .conditions import Condition, bad_reference
from .evaluation_settings import DEMO, EvaluateConfig, Method, safe
from .judging import Judge, Known, judge_for
from .methods import down_name, run_method
from .prompts import Prompt, image_name

# Of the settings, what the images of a trained cell depend on.
_MADE_FROM = (
    "base", "instance_prompt", "learning_rate", "train_batch_size", "views_per_image", "num_inference_steps",
    "mixed_precision", "subject_name",
)  # fmt: skip
_START = 2**20  # bytes, more than a header has
_JUDGES = "base", "embedder", "match_threshold", "face_pack", "clip_model", "dino_model", "dinov2_model", "lpips"


@dataclass(frozen=True)
class Stop:
    """A method at a number of steps at which images are wanted.

    Attributes:
        seconds: of training so far. parameters: that train. subject_name: who prompts have to ask for.
    """

    steps: int
    seconds: float
    parameters: int
    subject_name: str


class Bench:
    """What stays from cell to cell: the base, the judges, the prompts."""

    def __init__(self, config: EvaluateConfig, prompts: Sequence[Prompt]) -> None:
        self.config, self.prompts = config, list(prompts)
        self.output = Path(config.output)
        self._asked = [(number, seed) for number in range(len(self.prompts)) for seed in range(config.seeds)]
        self._base: Base | None = None
        self._downs: dict[str, DownSource] = {}
        self._digests: dict[str, str] = {}
        self._readers: dict[str, Reader] = {}
        self._judge: Judge | None = None
        self._people: dict[str, Known] = {}

    @property
    def base(self) -> Base:
        """The base model, loaded when a cell needs it."""
        if self._base is None:
            self._check()
            config, device = self.config, choose_device(self.config.device)
            self._base = load_base(
                _base_path(config),
                device=device,
                memory=config,
                generic=config.generic,
                dtype=choose_dtype(config.mixed_precision, device),
                local_files_only=config.local_files_only,
            )
            self._base.pipeline.set_progress_bar_config(disable=True)
            self._base.place(device, encoders=True)
        return self._base

    @cached_property
    def _base_files(self) -> dict[str, str]:
        """What a base in a folder is made of, so that one that was trained anew there is another.

        Trained weights differ nearly everywhere: the start of a file tells them apart.
        """
        folder = Path(self.config.base)
        if self.config.base == DEMO or not folder.is_dir():
            return {}
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")):
            with open_regular(path) as file:
                start = file.read(_START)
            digest.update(f"{path.relative_to(folder).as_posix()}|{path.stat().st_size}|".encode() + start)
        return {"base files": digest.hexdigest()}

    @cached_property
    def _generic(self) -> dict[str, Any]:
        """The class of somebody's own, and what tells it from itself after an edit."""
        name = self.config.generic
        return {} if name is None else {"generic": [name, written_as(base_class(name))]}

    @cached_property
    def _code(self) -> dict[str, str]:
        """What tells judges and readers of somebody's own from themselves after an edit."""
        names = self.config.embedder, self.config.lpips, self.config.face_model
        return {f"{name}|{part}": digest for name in names for part, digest in code_of(name).items()}

    def _check(self) -> None:
        """Have the judge and the Downs of all methods there before the base is opened."""
        _ = self.judge
        for method in map(Method.parse, self.config.method):
            down = self.down(method)
            if down is not None and method.reads and down.config.encoder_fingerprint is None:
                raise no_encoder(down_name(self.config, method))

    @property
    def judge(self) -> Judge:
        """What scores, loaded when a cell needs it."""
        if self._judge is None:
            self._judge = judge_for(self.config)
        return self._judge

    def learn(self, method: Method, subject: Subject, condition: Condition | None = None) -> None:
        """Make the cell of a trained method, if it is not there already.

        Args:
            condition: learn the reference made worse; images are then drawn after the last step alone.
        """
        config, home = self.config, home_of(self.output, condition)
        reference, _ = subject.split()
        if condition is not None:
            reference = bad_reference(config.data, subject, condition, home / "references")
        steps = sorted(set(config.steps)) if condition is None else [max(config.steps)]
        steps = [count for count in steps if count or method.reads]
        edits = config.edits if condition is None else 0
        made_from = {
            "method": method.text,
            "down": self._mark(method),
            **{name: getattr(config, name) for name in _MADE_FROM},
            **({} if config.quantize == "none" else {"quantize": config.quantize}),  # cells of before stay valid
            **self._generic,
            **self._base_files,
            "resolution": config.side,
            "steps": steps,
            "caption": reference.caption,
            **({"edits": [config.edits, config.edit_strength]} if edits else {}),
            "learned": hash_of(reference.path),
            **({} if reference.mask is None else {"mask": hash_of(reference.mask)}),
        }
        folder, key = home / method.folder / subject.name, self._key(made_from, subject)
        if is_complete(self.output, folder, key):
            return
        _ = self.base  # whatever is missing is told before anything is written
        remove_cell(self.output, folder)
        cell: Cell = {"rows": [], "points": [], "failure": None, "reference": self._show(folder, reference)}
        if condition is not None:
            cell |= {"condition": condition.name, "strength": condition.strength}
        try:
            for stop in self._train(method, reference, steps):
                images = self._draw(stop.subject_name)
                cell["rows"] += self._score(folder, images, subject, stop.steps)
                if edits and stop.steps == (0 if method.kind == "base" else max(steps)):
                    cell["edited"] = self.edit(folder, images, subject, stop)
                cell["points"].append({"steps": stop.steps, "seconds": round(stop.seconds, 3)})
                cell["parameters"] = stop.parameters
        except TrainingError as error:
            cell["failure"] = str(error)
            done = {point["steps"] for point in cell["points"]}
            for step in set(steps) - done:
                cell["rows"] += self._score(folder, [None] * len(self._asked), subject, step)
        self._finish(folder, key, method.text, subject, cell)

    def take(self, name: str, source: str, subject: Subject) -> None:
        """Make the cell of images that were drawn elsewhere; those that are not there are misses."""
        folder = self.output / safe(name) / subject.name
        paths = [Path(source) / subject.name / image_name(*asked) for asked in self._asked]
        key = self._key({"images": [hash_of(path) if path.is_file() else None for path in paths]}, subject)
        if is_complete(self.output, folder, key):
            return
        images = [load_image(path) if path.is_file() else None for path in paths]
        remove_cell(self.output, folder)
        rows = self._score(folder, images, subject, 0)
        reference = self._show(folder, subject.split()[0])
        cell = {"rows": rows, "points": [], "failure": None, "reference": reference}
        self._finish(folder, key, name, subject, cell)

    def _show(self, folder: Path, reference: Photo) -> str:
        """A small copy of a reference beside a cell, without what else its file says; its place in `output`."""
        path = reference.path
        if not path.is_relative_to(self.output):
            image, path = load_image(path), folder / "reference.png"
            image.thumbnail((self.config.side, self.config.side))
            write_bytes(path, png(image))
        return path.relative_to(self.output).as_posix()

    def _key(self, made_from: dict[str, Any], subject: Subject) -> str:
        """Changes with whatever a cell is made from or scored by."""
        reference, others = subject.split()
        return hash_of(
            {
                **made_from,
                "photos": [hash_of(photo.path) for photo in (reference, *others)],
                "prompts": [prompt.text for prompt in self.prompts],
                "seeds": self.config.seeds,
                "judges": [getattr(self.config, name) for name in _JUDGES],
                **({"code": self._code} if self._code else {}),
            }
        )

    def _train(self, method: Method, reference: Photo, steps: Sequence[int]) -> Iterator[Stop]:
        """Learn a reference, and stop where images are wanted."""
        if method.kind == "base":
            yield Stop(0, 0.0, 0, self.config.subject_name)
            return
        down, begin = self.down(method), time.perf_counter()
        read = [] if down is None or not method.reads else [self._reader(method, down).read([reference], down)]
        seconds = time.perf_counter() - begin if read else 0.0
        run = run_method(self.base, method, reference, self.config, down, steps=max(steps), read=read)
        try:
            if 0 in steps:
                self.base.denoiser.eval()
                yield Stop(0, seconds, run.trainable_parameters, run.subject_name)
                self.base.denoiser.train(run.trains_in_train_mode)
            start = time.perf_counter()
            for step in run.steps():
                if step.number in steps:
                    seconds += time.perf_counter() - start
                    self.base.denoiser.eval()
                    yield Stop(step.number, seconds, run.trainable_parameters, run.subject_name)
                    self.base.denoiser.train(run.trains_in_train_mode)
                    start = time.perf_counter()
            seconds += time.perf_counter() - start
            self.base.denoiser.eval()
            for count in steps:  # from a read start it stops by itself, and stays what it is
                if count > run.steps_done:
                    yield Stop(count, seconds, run.trainable_parameters, run.subject_name)
        finally:
            run.remove()

    def _reader(self, method: Method, down: DownSource) -> Reader:
        """What reads for a method's Down, loaded once.

        Raises:
            ConfigError: it sees with the eyes of the judge. As `load_reader`.
        """
        name = down_name(self.config, method)
        if name not in self._readers:
            folder = folder_of(name, READER_FILES, local_files_only=self.config.local_files_only)
            self._readers[name] = load_reader(folder, down, self.base.encode_images, self.config.face_model)
            self._readers[name].encoder.to(self.base.device)
            kind, _, own = self._readers[name].encoder.config.source.partition(":")
            judge = self.config.embedder or ("" if self.config.base == DEMO else "insightface")
            if kind == "face" and (own or "insightface") == judge:
                raise ConfigError(
                    f"method {method.text!r}: expected a judge that the encoder does not read through, found "
                    f"{judge!r} for both: give another embedder"
                )
        return self._readers[name]

    def down(self, method: Method) -> DownSource | None:
        """The Down that a method needs, loaded once.

        Raises:
            ConfigError: there is none. As `require_class`.
        """
        if method.kind not in ("meta-lora", "random-down"):
            return None
        name = down_name(self.config, method)
        if name not in self._downs:
            down = hub.load_down(name, local_files_only=self.config.local_files_only)
            require_class(down.config, self.config.generic, name)
            self._downs[name] = down
        return self._downs[name]

    def _mark(self, method: Method) -> list[str | None] | None:
        """What of its Down and of who reads for it a method depends on: what they are, whatever their names."""
        down = self.down(method)
        if down is None:
            return None
        name = down_name(self.config, method)
        if name not in self._digests:
            self._digests[name] = digest_of(down.tensors)
        return [self._digests[name], down.config.encoder_fingerprint, self.config.face_model]

    def _draw(self, subject_name: str) -> list[Image.Image]:
        """Every prompt with every seed; the noise of an image depends on its seed alone."""
        base, config = self.base, self.config
        options = {"height": config.side, "width": config.side, "num_inference_steps": config.num_inference_steps}
        if base.takes_sequence_length:
            options["max_sequence_length"] = base.max_sequence_length
        images: list[Image.Image] = []
        with autocast(config.mixed_precision, base.device), torch.no_grad():
            for prompt in self.prompts:
                generators = [torch.Generator().manual_seed(seed) for seed in range(config.seeds)]
                texts = [prompt.about(subject_name)] * config.seeds
                images += base.draw(prompt=texts, generator=generators, **options)
        return images

    def _score(
        self, folder: Path, images: Sequence[Image.Image | None], subject: Subject, steps: int
    ) -> list[dict[str, Any]]:
        """Write images and give a row each; None is an image that could not be made."""
        there = {index: image for index, image in enumerate(images) if image is not None}
        asked = [self.prompts[self._asked[index][0]].text for index in there]
        of_image = dict(zip(there, self._judged(subject, list(there.values()), asked) if there else [], strict=True))
        rows = []
        for index, (number, seed) in enumerate(self._asked):
            prompt = self.prompts[number]
            row = {"steps": steps, "kind": prompt.kind, "prompt": prompt.text, "number": number, "seed": seed}
            row["file"] = None
            if index in there:
                path = folder / f"{steps:05d}" / image_name(number, seed)
                write_bytes(path, png(there[index]))
                row["file"] = path.relative_to(self.output).as_posix()
            rows.append({**row, **of_image.get(index, {"found": False, "r_facesim": 0.0, "face_sim": 0.0})})
        return rows

    def _judged(self, subject: Subject, images: list[Image.Image], prompts: list[str]) -> list[dict[str, Any]]:
        try:
            return self.judge.score(images, prompts, self._known(subject))
        except MetricInputError as error:
            raise MetricInputError(f"{subject.name}: {error}") from error

    def _known(self, subject: Subject) -> Known:
        """What the judge sees on a person's photos, looked at once."""
        if subject.name not in self._people:
            reference, others = subject.split()
            photos = [load_image(photo.path) for photo in others]
            self._people[subject.name] = self.judge.know(load_image(reference.path), photos)
        return self._people[subject.name]

    def edit(self, folder: Path, drawn: Sequence[Image.Image], subject: Subject, stop: Stop) -> list[dict[str, Any]]:
        """Edit the images of seed 0 again and again, each by the prompts that follow its own; a row for each edit.

        Args:
            folder: in `output`, for the images. drawn: of every prompt with every seed. stop: with whom on the base.
        """
        pipe, config = image_to_image(self.base.pipeline), self.config
        sizes = {"height": config.side, "width": config.side} if "height" in signature(pipe.__call__).parameters else {}
        if self.base.takes_sequence_length:
            sizes["max_sequence_length"] = self.base.max_sequence_length
        images, rows = list(drawn[:: config.seeds]), []
        for count in range(1, config.edits + 1):
            prompts = [self.prompts[(number + count) % len(images)] for number in range(len(images))]
            with autocast(config.mixed_precision, self.base.device), torch.no_grad():
                for number, prompt in enumerate(prompts):
                    [images[number]] = pipe(
                        prompt=prompt.about(stop.subject_name),
                        image=images[number],
                        strength=config.edit_strength,
                        num_inference_steps=config.num_inference_steps,
                        generator=torch.Generator().manual_seed(0),
                        **sizes,
                    ).images
            scores = self._judged(subject, images, [prompt.text for prompt in prompts])
            for number, (image, prompt, row) in enumerate(zip(images, prompts, scores, strict=True)):
                path = folder / "edits" / f"{number:02d}-{count}.png"
                write_bytes(path, png(image))
                file = path.relative_to(self.output).as_posix()
                rows.append({"edits": count, "prompt": prompt.text, "number": number, "file": file, **row})
        return rows

    def _real_ceiling(self, subject: Subject) -> float | None:
        """R-FaceSim of the person's photos among themselves; None where there are no two with a face."""
        found = self.judge.real_ceiling(self._known(subject))
        return None if math.isnan(found) else round(found, 4)

    def _finish(self, folder: Path, key: str, name: str, subject: Subject, cell: Cell) -> None:
        tags = read_tags(self.config.data).get(subject.name, {})
        about = {"method": name, "subject": subject.name, "tags": tags, "real_ceiling": self._real_ceiling(subject)}
        whole = {"key": key, **about, **cell}
        # The images are there by now: what has a cell.json is complete.
        write_bytes(folder / "cell.json", (json.dumps(whole, indent=1) + "\n").encode())


def image_to_image(pipeline: Any) -> Any:
    """The pipeline of diffusers that edits images with the same models.

    Raises:
        ConfigError: there is none for this base.
    """
    from diffusers import AutoPipelineForImage2Image

    try:
        pipe: Any = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        raise ConfigError(
            f"edits needs a base that diffusers edits images with, found {type(pipeline).__name__}: leave edits out"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _base_path(config: EvaluateConfig) -> str:
    if config.base != DEMO:
        return config.base
    from ..demo.embedded import BASE

    return str(BASE)
