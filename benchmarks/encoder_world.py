# SPDX-License-Identifier: Apache-2.0
"""What `convergence.py` trains and judges: recipes, the people they learn from, and what codes expand to."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from typing import Any, Protocol

import numpy as np
import torch
from embedded_down import of_rank
from factor_reader import FactorReader
from known_truth import STRANGERS, mark_shown, same_scenes, strangers, write_people
from PIL import Image
from prompt_adapters import ImagePromptAdapter, TokenAdapter
from torch import Tensor

from evaluation import PHOTOS, Bench, People, among_themselves
from peft_metalora.bases import Base, base_for
from peft_metalora.data import Subject, load_image, read_subjects
from peft_metalora.data.degrade import DEGRADATIONS, make_worse
from peft_metalora.demo.domain import FACES, Domain, Drawn
from peft_metalora.encoder.sources.latents import even_exposure
from peft_metalora.evaluation.rivals import RIVALS, put_on, take_off
from peft_metalora.evaluation.textual_inversion import WordStack
from peft_metalora.training.encoder_training import Reads
from peft_metalora.training.engine.stacked import AdapterStack, RowGradients
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions
from peft_metalora.tuner.down import DownSource
from peft_metalora.tuner.on_model import meta_lora_layers

SECOND, CHANCE, FACTORS, MARK = "second_r_facesim", "copied_by_chance", "factor_distance", "mark"
CONTENT, COPIED_CONTENT = "content_right", "copied_content"
_RENDERED = 1024  # images drawn together on a GPU
_ENCODED = 512
_THREADS = 8


@dataclass(frozen=True)
class Recipe:
    """How an encoder and its space are trained.

    Attributes:
        name: of its file. kind: what a code expands to: `meta` (Mid and Up on the demo's Down), `random` (on one
            that was never trained), `lora`, or an adapter of `prompt_adapters`: `image_prompt` or `tokens`.
        r: rank. tokens: of prompt adapters. k: size of the code.
        people, photos: in training. rows: people in a step. targets: photos of each in a step.
        worse: corruptions of photos that are read: `all`, `none`, or `-name-name` for all but these. bad: the share of
            reads that are made worse.
        expose: 1: dark photos are made brighter before they are read. erase: 1: boxes of photos are erased, too.
        brief: 1: judged on clean photos alone. 2: and not tuned.
        width, hidden, dropout: of the encoder. lr, space_lr: rates. decay: the share of the steps, the last, over which
            they fall to 0. shift: of the noise levels of training, above 1 to more noise. steps: of training. seed: of
            everything.
    """

    name: str
    kind: str = "meta"
    r: int = 4
    tokens: int = 16
    k: int = 128
    people: int = 4096
    photos: int = 8
    rows: int = 96
    targets: int = 4
    worse: str = "all"
    # On tune people, 4,000 steps, one seed, R-FaceSim of clean photos and its mean over blur 1.0, low light 0.5 and
    # sunglasses 0.5: bad 0.5 with dropout 0.2 gave 0.656 and 0.628, bad 0.25 0.673 and 0.628, with dropout 0.1 0.687
    # and 0.640; bad 0.125 with dropout 0.2 0.689 and 0.627.
    bad: float = 0.25
    width: int = 64
    hidden: int = 512
    dropout: float = 0.1
    lr: float = 1e-3
    space_lr: float = 3e-4
    shift: float = 1.0
    decay: float = 0.6
    expose: int = 1
    erase: int = 1
    brief: int = 0
    steps: int = 12_000
    seed: int = 0

    @classmethod
    def parse(cls, text: str, changes: dict[str, str] | None = None) -> Recipe:
        """'name:key=value,...'; `changes` win."""
        name, _, rest = text.partition(":")
        values = {**dict(part.split("=", 1) for part in rest.split(",") if part), **(changes or {})}
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls) if field.name != "name"}
        return cls(name, **{key: kinds[key](value) for key, value in values.items()})

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Names of the corruptions that training sees."""
        if self.worse == "none":
            return ()
        left_out = self.worse.split("-")[1:]
        return tuple(name for name in DEGRADATIONS if name not in left_out)


@dataclass
class Known(People):
    """People of whom the renderer knows all.

    Attributes:
        photos: (people, photos, h, w, 3) bytes, the reference first. identity: (people, factors).
        marked: whether a mark is looked for. shown: what each reference shows, where other photos show something else.
    """

    photos: np.ndarray[Any, Any]
    identity: Tensor
    marked: bool
    shown: list[str]


def helpers(count: int) -> Pool:
    """Processes of one thread that make photos worse; to be called before anything is on a GPU.

    This one keeps eight threads at most: images are small, and on a host of several GPUs others like it run beside it.
    With all cores for each of them, one of 64 had 800 threads waiting, and an encoder had no step in nine minutes.
    """
    torch.set_num_threads(min(_THREADS, torch.get_num_threads()))
    return multiprocessing.get_context("fork").Pool(count, torch.set_num_threads, (1,))


class SecondJudge(Protocol):
    """A judge that no choice has used: images to unit vectors (n, d) on the CPU."""

    def embed(self, images: Tensor) -> Tensor: ...


class World(Bench):
    """The benchmark's base and judges in float32, a second base to train on, and people as tensors.

    Attributes:
        taught: what training people are drawn from; the domain itself, if nothing else is said.
        second_judge: if there is one, its scores are kept beside the others'.
        drawn: images that were drawn last, (n, 3, h, w). speed: steps a second of an encoder, as far as it is known.
    """

    def __init__(
        self, args: argparse.Namespace, pool: Pool, domain: Domain = FACES, down: DownSource | None = None
    ) -> None:
        super().__init__(args, domain, down)
        self.pool = pool
        self.taught: Drawn = domain
        # People are scored between two steps, with another adapter.
        pipe, dtype = domain.load_base(), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
        pipe.transformer.to(dtype).requires_grad_(False).eval()
        self.train_base: Base = base_for(pipe)
        self.train_base.place(self.device, encoders=False)
        ids = self.pipe._prepare_latent_image_ids().to(dtype)
        pipe._prepare_latent_image_ids = lambda *_: ids
        self._photos: dict[tuple[str, int, int], tuple[np.ndarray[Any, Any], list[str]]] = {}
        self._targets: dict[tuple[str, int, int], Examples] = {}
        self._worse: dict[tuple[str, int, int, str], Tensor] = {}
        self.second_judge: SecondJudge | None = None
        self.drawn = torch.empty(0)
        self.speed = 0.0
        self._known: dict[str, Known] = {}
        self._training: tuple[Any, AdapterStack, RowGradients] | None = None

    def photos(self, people: int, count: int) -> tuple[np.ndarray[Any, Any], list[str]]:
        """`count` photos of each of some training people, as bytes, and their captions; photo 0 is a reference."""
        key = self.taught.name, people, count
        if key not in self._photos:
            domain = self.taught
            generator = torch.Generator().manual_seed(20_000 + self.args.world_seed)
            identity = domain.sample_identities(people, generator, "meta")
            front = domain.sample_scenes(identity, generator, reference=True)
            scenes = domain.cat([front, domain.sample_scenes(identity.repeat(count - 1, 1), generator)])
            # Person by person.
            order = torch.arange(people * count).view(count, people).T.flatten()
            scenes, identity = scenes[order], identity.repeat_interleave(count, 0)
            drawn = []
            for start in range(0, len(identity), _RENDERED):
                part = slice(start, start + _RENDERED)
                images = domain.render(identity[part].to(self.device), scenes[part].to(self.device))
                drawn.append((images * 255).round().byte().permute(0, 2, 3, 1).cpu())
            self._photos[key] = torch.cat(drawn).numpy(), domain.captions(scenes)
        return self._photos[key]

    def latents(self, pixels: np.ndarray[Any, Any], expose: bool = False) -> Tensor:
        """Latents of photos as bytes, on the device."""
        parts = []
        with torch.no_grad():
            for start in range(0, len(pixels), _ENCODED):
                part = torch.from_numpy(pixels[start : start + _ENCODED]).to(self.device).permute(0, 3, 1, 2) / 255
                parts.append(self.base.latents_of((even_exposure(part) if expose else part) * 2 - 1))
        return torch.cat(parts)

    def seen(self, pixels: np.ndarray[Any, Any], recipe: Recipe) -> Tensor:
        """Photos as bytes, (..., h, w, 3), as the encoder of a recipe sees them."""
        latents = self.latents(pixels.reshape(-1, *pixels.shape[-3:]), bool(recipe.expose))
        return latents.unflatten(0, pixels.shape[:-3])

    def targets(self, people: int, count: int) -> Examples:
        """Training people as examples: what their photos are denoised as."""
        key = self.taught.name, people, count
        if key not in self._targets:
            pixels, texts = self.photos(people, count)
            rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
            self._targets[key] = Examples(
                self.latents(pixels),
                encode_captions(self.base, list(rows), batch_size=_ENCODED),
                torch.tensor([rows[text] for text in texts]),
                torch.arange(people).repeat_interleave(count),
            ).to(self.device)
        return self._targets[key]

    def reads(self, recipe: Recipe) -> Reads:
        """Training people as an encoder sees them: each photo as it is and, with corruptions, made worse thrice."""
        people, count = recipe.people, recipe.photos
        clean = self.seen(self.photos(people, count)[0], recipe)
        versions = [clean]
        if recipe.corruptions:
            key = self.taught.name, people, count, f"{recipe.corruptions} {recipe.expose} {recipe.erase}"
            if key not in self._worse:
                pixels = self.photos(people, count)[0]
                jobs = [
                    (part, recipe.corruptions, bool(recipe.erase), seed)
                    for seed, part in enumerate(np.array_split(pixels, min(64, len(pixels))))
                ]
                worse = self.pool.map(_make_worse, jobs)
                self._worse[key] = torch.cat(
                    [self.seen(np.concatenate(one), recipe) for one in zip(*worse, strict=True)]
                )
            # Clean photos as often as the share says.
            versions = [clean] * round(3 * (1 - recipe.bad) / recipe.bad) + [self._worse[key]]
        features = torch.cat(versions)
        photo = torch.arange(people * count, device=self.device).repeat(len(features) // len(clean))
        return Reads(features, photo // count, photo)

    def read(self, split: str, count: int, photos: int = PHOTOS) -> list[Subject]:
        """As the bench reads; also people of `known_truth.STRANGERS`."""
        if split not in STRANGERS:
            return super().read(split, count, photos)
        folder = self.home / split
        if not folder.exists():
            write_people(folder, *strangers(split, count, photos, self._seed_of_strangers))
        return read_subjects(folder)

    @property
    def _seed_of_strangers(self) -> int:
        return 40_000 if self.args.split == "tune" else 41_000

    def known(self, split: str | None = None) -> Known:
        """The people that scores are of, or strangers."""
        split = split or self.args.split
        if split not in self._known:
            count = self.args.strangers if split in STRANGERS else self.args.people
            photos = np.stack(
                [
                    np.stack([np.array(load_image(photo.path)) for photo in (reference, *others)])
                    for reference, others in (subject.split() for subject in self.read(split, count))
                ]
            )
            if split in STRANGERS:
                identity, _, _ = strangers(split, count, 1, self._seed_of_strangers)
            else:
                identity = self.domain.subject_identities(split, count)
            people = self.people(split, count)
            marked = split in ("marked", "unmarked")
            shown = []
            if self.domain.content:
                texts = [subject.split()[0].caption or "" for subject in self.read(split, count)]
                shown = [self.domain.parse_caption(text)[self.domain.content] for text in texts]
            self._known[split] = Known(**vars(people), photos=photos, identity=identity, marked=marked, shown=shown)
        return self._known[split]

    def draw(self, stack: AdapterStack | WordStack | None, rows: int, seeds: Sequence[int]) -> Tensor:
        """As the bench draws."""
        self.drawn = super().draw(stack, rows, seeds)
        return self.drawn

    def score(
        self, stack: AdapterStack | WordStack | None, people: People, rows: int, seeds: Sequence[int]
    ) -> dict[str, Any]:
        """As the bench scores, and what more can be said of known people.

        That is what a copied wall is by chance (the share of other people's references whose wall an image shows, where
        the prompt leaves it open), what the second judge says, how far the factors that are read off a row's images are
        from the person's, and, of strangers who may have a mark, how much of it is shown. Where photos differ in what
        they show of a person: how often it is what was asked for, and how often what the reference shows.
        """
        scores: dict[str, Any] = super().score(stack, people, rows, seeds)
        if not isinstance(people, Known):
            return scores
        whose = [row // len(seeds) for row in range(rows)]
        scores[CHANCE] = self._by_chance(people, whose)
        if people.shown:
            scores |= self._content(people, whose)
        if isinstance(self.second_judge, FactorReader):
            read = self.second_judge.read(self.drawn).view(rows, len(self.prompts), -1).mean(1)
            scores[FACTORS] = [round(value, 4) for value in (read - people.identity[whose]).abs().mean(1).tolist()]
        if self.second_judge is not None:
            made = self.second_judge.embed(self.drawn).view(rows, len(self.prompts), -1)
            real = embedded(self.second_judge.embed, people.photos)[whose, 1:]
            similar = torch.einsum("rpd,rod->rpo", made, real).mean((1, 2))
            scores[SECOND] = [round(value, 4) for value in similar.tolist()]
        if people.marked:
            identity = people.identity[whose].repeat_interleave(len(self.prompts), 0)
            shown = mark_shown(self.drawn, identity, self.judge.read(self.drawn), self.args.truth_steps)
            scores[MARK] = [round(value, 4) for value in shown.view(rows, -1).nanmean(1).tolist()]
        return scores

    def _by_chance(self, people: People, whose: Sequence[int]) -> list[float]:
        backdrop = self.domain.backdrop
        free = [backdrop not in asked for asked in self.asked]
        walls = [shown[backdrop] for shown in self.judge.read(self.drawn)]
        found = []
        for row, own in enumerate(whose):
            others = [wall for person, wall in enumerate(people.walls) if person != own]
            drawn = walls[row * len(free) : (row + 1) * len(free)]
            shares = [others.count(wall) / len(others) for wall, is_free in zip(drawn, free, strict=True) if is_free]
            found.append(round(sum(shares) / len(shares), 4))
        return found

    def _content(self, people: Known, whose: Sequence[int]) -> dict[str, list[float]]:
        label = self.domain.content or ""
        shown = [seen[label] for seen in self.judge.read(self.drawn)]
        rows = [shown[row * len(self.asked) : (row + 1) * len(self.asked)] for row in range(len(whose))]
        wanted = [asked[label] for asked in self.asked]
        right = [[one == want for one, want in zip(row, wanted, strict=True)] for row in rows]
        copied = [[one == people.shown[own] for one in row] for row, own in zip(rows, whose, strict=True)]
        return {
            name: [round(sum(hits) / len(hits), 4) for hits in found]
            for name, found in ((CONTENT, right), (COPIED_CONTENT, copied))
        }

    def from_render(self, images: Tensor, identity: Tensor) -> Tensor:
        """(n,): how far the face in each image is from the true render of an identity in the same scene."""
        return same_scenes(images, identity, self.judge.read(images), self.args.truth_steps)[1].cpu()

    def through_base(self, photos: np.ndarray[Any, Any]) -> Tensor:
        """Photos as bytes, (..., h, w, 3), as well as the base's autoencoder can draw them: (n, 3, h, w)."""
        latents = self.latents(photos.reshape(-1, *photos.shape[-3:]))
        vae = self.pipe.vae
        with torch.no_grad():
            parts = [
                vae.decode(part / vae.config.scaling_factor + vae.config.shift_factor).sample
                for part in latents.split(_ENCODED)
            ]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def ceiling(self, people: Known) -> list[float]:
        """What photos of each person reach among themselves, the reference left out."""
        return among_themselves(embedded(lambda images: self.embedder.embed(images).vectors, people.photos)[:, 1:])

    def second_ceiling(self, people: Known) -> list[float] | None:
        """The same for the second judge, if there is one."""
        return among_themselves(embedded(self.second_judge.embed, people.photos)[:, 1:]) if self.second_judge else None

    def put(self, base: Base, recipe: Recipe, rows: int) -> AdapterStack:
        """The adapter of a recipe on a base, stacked."""
        self.take_off(base)
        if recipe.kind == "tokens":
            width = self.text["sequence"].shape[2]
            return AdapterStack(TokenAdapter(base.denoiser, recipe.tokens, width).to(self.device), rows)
        if recipe.kind == "image_prompt":
            return AdapterStack(ImagePromptAdapter(base.denoiser, recipe.tokens).to(self.device), rows)
        kind = {"meta": "meta_lora_mean", "random": "random_down", "lora": "lora_r1"}[recipe.kind]
        rival = RIVALS[kind]
        if recipe.kind == "lora" and recipe.r != 1:
            rival = RIVALS[f"lora_r{recipe.r}"]
        down = of_rank(self.down, recipe.r)
        config = dataclasses.replace(self.config, seed=recipe.seed)
        stack = put_on(base, rival, down, config, rows, [recipe.seed])
        base.denoiser.to(base.dtype)  # what an adapter adds is float32
        return stack

    def to_train(self, recipe: Recipe) -> tuple[AdapterStack, RowGradients]:
        """The adapter of a recipe on the base that encoders are trained on, at its start, and its gradients.

        Compiling them takes longer than a short training: recipes of one shape share them, whatever their Down.
        """
        start = self.put(self.base, recipe, 1).values[0].clone()
        downs = _downs(self.base)
        self.take_off(self.base)
        if not self.ready_to_train(recipe):
            self._training = None
            stack = self.put(self.train_base, recipe, recipe.rows)
            gradients = RowGradients(self.train_base, stack, compiled=self.args.compile)
            self._training = self._shape(recipe), stack, gradients
        assert self._training
        _, stack, gradients = self._training
        for old, new in zip(_downs(self.train_base), downs, strict=True):
            old.copy_(new)
        stack.values.copy_(start.expand_as(stack.values))
        self.train_base.shift = recipe.shift
        return stack, gradients

    def ready_to_train(self, recipe: Recipe) -> bool:
        """Whether the last recipe that was trained had the same shape."""
        return self._training is not None and self._training[0] == self._shape(recipe)

    def prepared(self, recipe: Recipe) -> bool:
        """Whether the people that a recipe learns from have been drawn."""
        return (self.taught.name, recipe.people, recipe.photos) in self._photos

    @staticmethod
    def _shape(recipe: Recipe) -> tuple[Any, ...]:
        return recipe.kind, recipe.r, recipe.tokens, recipe.rows, recipe.targets

    def take_off(self, base: Base) -> None:
        """A base as it was."""
        take_off(base)
        ImagePromptAdapter.remove(base.denoiser)

    def clear(self) -> None:
        """As the bench clears."""
        super().clear()
        self.take_off(self.base)


def _downs(base: Base) -> list[Tensor]:
    """The Down that is installed on a base, layer by layer."""
    return [down.detach() for _, layer in meta_lora_layers(base.denoiser) for down in layer.metalora_down.values()]


def embedded(embed: Callable[[Tensor], Tensor], photos: np.ndarray[Any, Any]) -> Tensor:
    """Embeddings (people, photos, d) of photos as bytes, (people, photos, h, w, 3)."""
    pixels = torch.from_numpy(photos.reshape(-1, *photos.shape[2:])).permute(0, 3, 1, 2) / 255
    return embed(pixels).unflatten(0, photos.shape[:2])


def _make_worse(job: tuple[np.ndarray[Any, Any], tuple[str, ...], bool, int]) -> list[np.ndarray[Any, Any]]:
    """Three bad versions of each photo, each of a random corruption and strength."""
    pixels, names, erasing, seed = job
    source = random.Random(seed)
    versions = []
    for _ in range(3):
        made = [make_worse(Image.fromarray(photo), source, names, erasing) for photo in pixels]
        versions.append(np.stack([np.array(image) for image in made]))
    return versions
