# SPDX-License-Identifier: Apache-2.0
"""A person in zero steps, on the embedded domain: encoders of subject spaces, their controls, and tuning from the read.

    python benchmarks/convergence.py --part encoders --recipe main:steps=8000 --output benchmarks/results/convergence

An encoder is named by a recipe, `name:key=value,...` with the keys of `Recipe`, and gives one file `<name>.json`: the
zero-step scores of people that no training has seen, on clean and on bad photos, with floors and the curve over the
target images seen. Part `tuning` goes on from each encoder of the same call. `--split tune` (the default) is for
choices; `--split held-out` is for the figures that are reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import origin
from PIL import Image, ImageDraw
from torch import Tensor, nn

from evaluation import Bench, People
from peft_metalora.bases import Base, base_for
from peft_metalora.data import load_image
from peft_metalora.demo.embedded import RESOLUTION, load_base
from peft_metalora.demo.faces import captions, render, sample_identities, sample_scenes, scene_from_labels, turned_photo
from peft_metalora.demo.scene import Scene
from peft_metalora.demo.scoring import INFERENCE_STEPS
from peft_metalora.encoder import EncoderConfig, SubjectEncoder, SubjectSpace, make_encoder
from peft_metalora.encoder.sources.latents import even_exposure
from peft_metalora.errors import TrainingError
from peft_metalora.evaluation.degrade import DEGRADATIONS, degrade
from peft_metalora.evaluation.rivals import RIVALS, put_on, take_off, vmap_ready
from peft_metalora.evaluation.summary import METRICS, interval
from peft_metalora.files import write_bytes
from peft_metalora.training.encoder_training import EncoderTraining, EncoderTrainingConfig, PhotoPairs, Reads
from peft_metalora.training.engine.stacked import AdapterStack, Recorded, RowGradients, denoising_inputs, train_stack
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions
from peft_metalora.tuner.down import DownSource

STRENGTHS = (0.5, 1.0)
ERASE = "erase"
SCALES = (0.9, 1.0, 1.1, 1.25)  # of the way from the mean subject to the one that was read
SETTLED = 10  # steps after which time is counted
FITTING_RATE = 0.05  # of codes, which are of length sqrt(k)
_RENDERED = 1024  # images drawn together on a GPU
_ENCODED = 512


@dataclass(frozen=True)
class Recipe:
    """How an encoder and its space are trained.

    Attributes:
        name: of its file. kind: what a code expands to: `meta` (Mid and Up on the demo's Down), `random` (on one
            that was never trained), `lora`, or `tokens` (context tokens beside the prompt: an image-prompt adapter).
        r: rank. tokens: number of them. k: size of the code.
        people, photos: in training. rows: people in a step. targets: photos of each in a step.
        worse: corruptions of half of the photos that are read: `all`, `none`, or `-name-name` for all but these.
        expose: 1: photos are brought to one exposure before they are read. erase: 1: boxes of photos are erased, too.
        brief: 1: judged on clean photos alone.
        width, hidden, dropout: of the encoder. lr, space_lr: rates. steps: of training. seed: of everything.
    """

    name: str
    kind: str = "meta"
    r: int = 4
    tokens: int = 16
    k: int = 128
    people: int = 1024
    photos: int = 8
    rows: int = 96
    targets: int = 4
    worse: str = "all"
    width: int = 64
    hidden: int = 512
    dropout: float = 0.2
    lr: float = 1e-3
    space_lr: float = 3e-4
    decay: float = 0.6
    expose: int = 1
    erase: int = 1
    brief: int = 0
    steps: int = 3000
    seed: int = 0

    @classmethod
    def parse(cls, text: str, changes: dict[str, str] | None = None) -> Recipe:
        """'name:key=value,...'"""
        name, _, rest = text.partition(":")
        values = {**(changes or {}), **dict(part.split("=", 1) for part in rest.split(",") if part)}
        kinds = {field.name: type(field.default) for field in dataclasses.fields(cls) if field.name != "name"}
        return cls(name, **{key: kinds[key](value) for key, value in values.items()})

    @property
    def corruptions(self) -> tuple[str, ...]:
        """Names of the corruptions that training sees."""
        if self.worse == "none":
            return ()
        left_out = self.worse.split("-")[1:]
        return tuple(name for name in DEGRADATIONS if name not in left_out) + ((ERASE,) * 2 if self.erase else ())


class TokenAdapter(nn.Module):
    """A denoiser that sees trained context tokens beside those of the prompt.

    With tokens that an encoder expands from a photo this is an image-prompt adapter on a frozen base.
    """

    def __init__(self, denoiser: nn.Module, count: int, width: int) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.tokens = nn.Parameter(0.02 * torch.randn(count, width, generator=torch.Generator().manual_seed(0)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("denoiser"), name)

    def forward(self, encoder_hidden_states: Tensor, txt_ids: Tensor, **kwargs: Any) -> Any:
        own = self.tokens.to(encoder_hidden_states.dtype).expand(len(encoder_hidden_states), -1, -1)
        sequence = torch.cat([encoder_hidden_states, own], dim=1)
        ids = torch.cat([txt_ids, txt_ids.new_zeros(len(self.tokens), txt_ids.shape[1])])
        return self.denoiser(encoder_hidden_states=sequence, txt_ids=ids, **kwargs)


class World(Bench):
    """The benchmark's base and judges in float32, a second base to train on, and people as tensors."""

    def __init__(self, args: argparse.Namespace, pool: Pool) -> None:
        super().__init__(args)
        self.pool = pool
        # People are scored between two steps, with another adapter.
        pipe, dtype = load_base(), {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
        pipe.transformer.to(dtype).requires_grad_(False).eval()
        self.train_base: Base = base_for(pipe)
        self.train_base.place(self.device, encoders=False)
        ids = self.pipe._prepare_latent_image_ids().to(dtype)
        pipe._prepare_latent_image_ids = lambda *_: ids
        self._photos: dict[tuple[int, int], tuple[np.ndarray[Any, Any], list[str]]] = {}
        self._targets: dict[tuple[int, int], Examples] = {}
        self._worse: dict[tuple[int, int, str], Tensor] = {}
        self._people: People | None = None
        self._references: np.ndarray[Any, Any] | None = None

    def photos(self, people: int, count: int) -> tuple[np.ndarray[Any, Any], list[str]]:
        """`count` photos of each of some training people, as bytes, and their captions; photo 0 faces forward."""
        key = people, count
        if key not in self._photos:
            generator = torch.Generator().manual_seed(20_000 + self.args.world_seed)
            identity = sample_identities(people, generator)
            front = scene_from_labels(people, yaw="forward", expression="neutral", generator=generator)
            scenes = Scene.cat([front, sample_scenes(people * (count - 1), generator)])
            # Person by person.
            order = torch.arange(people * count).view(count, people).T.flatten()
            scenes, identity = scenes[order], identity.repeat_interleave(count, 0)
            drawn = []
            for start in range(0, len(identity), _RENDERED):
                part = slice(start, start + _RENDERED)
                images = render(identity[part].to(self.device), scenes[part].to(self.device), RESOLUTION)
                drawn.append((images * 255).round().byte().permute(0, 2, 3, 1).cpu())
            self._photos[key] = torch.cat(drawn).numpy(), captions(scenes)
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
        key = people, count
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
            key = people, count, f"{recipe.corruptions} {recipe.expose}"
            if key not in self._worse:
                pixels = self.photos(people, count)[0]
                jobs = [
                    (part, recipe.corruptions, seed)
                    for seed, part in enumerate(np.array_split(pixels, min(64, len(pixels))))
                ]
                worse = self.pool.map(_make_worse, jobs)
                self._worse[key] = torch.cat(
                    [self.seen(np.concatenate(one), recipe) for one in zip(*worse, strict=True)]
                )
            # The clean photo thrice too: it is the half of what is read.
            versions = [clean, clean, clean, self._worse[key]]
        features = torch.cat(versions)
        photo = torch.arange(people * count, device=self.device).repeat(len(features) // len(clean))
        return Reads(features, photo // count, photo)

    def put(self, base: Base, recipe: Recipe, rows: int) -> AdapterStack:
        """The adapter of a recipe on a base, stacked."""
        take_off(base)
        if recipe.kind == "tokens":
            return AdapterStack(
                TokenAdapter(base.denoiser, recipe.tokens, self.text["sequence"].shape[2]).to(self.device), rows
            )
        kind = {"meta": "meta_lora_mean", "random": "random_down", "lora": "lora_r1"}[recipe.kind]
        rival = RIVALS[kind]
        if recipe.kind == "lora" and recipe.r != 1:
            rival = RIVALS[f"lora_r{recipe.r}"]
        down = of_rank(self.down, recipe.r)
        config = dataclasses.replace(self.config, seed=recipe.seed)
        stack = put_on(base, rival, down, config, rows, [recipe.seed])
        base.denoiser.to(base.dtype)  # what an adapter adds is float32
        return stack

    def test_people(self) -> People:
        """The people that scores are of."""
        if self._people is None:
            self._people = self.people(self.args.split, self.args.people)
        return self._people

    def test_photos(self) -> np.ndarray[Any, Any]:
        """Photos of the test people as bytes, (people, photos, h, w, 3), the reference first."""
        if self._references is None:
            people = []
            for subject in self.read(self.args.split, self.args.people):
                reference, others = subject.split()
                people.append(np.stack([np.array(load_image(photo.path)) for photo in (reference, *others)]))
            self._references = np.stack(people)
        return self._references


def of_rank(down: DownSource, r: int) -> DownSource:
    """The Down with starts of a lower rank: the first rows of Mid and columns of Up."""
    if r == down.config.r:
        return down
    cuts: dict[str, Callable[[Tensor], Tensor]] = {
        "metalora_down": lambda tensor: tensor,
        "metalora_mid_init": lambda tensor: tensor[:r],
        "metalora_mid": lambda tensor: tensor[:, :r],
        "metalora_up": lambda tensor: tensor[:, :, :r],
    }
    tensors = {name: cuts[name.rpartition(".")[2]](tensor).contiguous() for name, tensor in down.tensors.items()}
    # The scale stays: lora_alpha / r.
    config = dataclasses.replace(down.config, r=r, lora_alpha=down.config.lora_alpha / down.config.r * r)
    return DownSource(config, tensors, down.fingerprint)


def _make_worse(job: tuple[np.ndarray[Any, Any], tuple[str, ...], int]) -> list[np.ndarray[Any, Any]]:
    """Three bad versions of each photo, each of a random corruption and strength."""
    pixels, names, seed = job
    source = random.Random(seed)
    versions = []
    for _ in range(3):
        made = []
        for photo in pixels:
            name, strength = source.choice(names), source.uniform(0.2, 1.0)
            image = Image.fromarray(photo)
            made.append(np.array(_erase(image, strength, source) if name == ERASE else degrade(image, name, strength)))
        versions.append(np.stack(made))
    return versions


def _erase(image: Image.Image, strength: float, source: random.Random) -> Image.Image:
    """Boxes of one colour anywhere (random erasing, arXiv 1708.04896), one to three, up to 40 % of a side each."""
    erased = image.copy()
    draw = ImageDraw.Draw(erased)
    for _ in range(source.randint(1, 3)):
        width, height = (max(2, round(image.width * 0.4 * strength * source.uniform(0.4, 1))) for _ in range(2))
        left, top = source.uniform(0, image.width - width), source.uniform(0, image.height - height)
        colour = (source.randrange(256), source.randrange(256), source.randrange(256))
        draw.rectangle((left, top, left + width, top + height), colour)
    return erased


@dataclass
class Trained:
    """An encoder with its space and what training it took."""

    recipe: Recipe
    space: SubjectSpace
    encoder: SubjectEncoder
    facts: dict[str, Any]

    @torch.no_grad()
    def codes(self, latents: Tensor) -> Tensor:
        """Codes (n, k) of latents (n, c, h, w), or the mean codes of (n, photos, c, h, w)."""
        many = latents if latents.ndim == 5 else latents[:, None]
        return self.encoder(many.flatten(0, 1)).unflatten(0, many.shape[:2]).mean(1)

    @torch.no_grad()
    def subjects(self, latents: Tensor, scale: float = 1.0) -> Tensor:
        """Subjects (n, N) that are read from latents, `scale` of the way from the mean subject."""
        return self.space.mean + scale * (self.space(self.codes(latents)) - self.space.mean)


def score(
    world: World, recipe: Recipe, people: People, variants: Mapping[str, tuple[Tensor, int]]
) -> dict[str, dict[str, list[float]]]:
    """Scores of several subjects (people, N) of each of the people, each with the noise of a seed."""
    result: dict[str, dict[str, list[float]]] = {}
    names, count = list(variants), len(people.names)
    for start in range(0, len(names), world.args.variants):
        part = names[start : start + world.args.variants]
        stack = world.put(world.base, recipe, count * len(part))
        stack.values.copy_(torch.stack([variants[name][0] for name in part], dim=1).flatten(0, 1))
        scores = world.score(stack, people, stack.count, [variants[name][1] for name in part])
        for number, name in enumerate(part):
            result[name] = {metric: scores[metric][number :: len(part)] for metric in METRICS}
        del stack
        world.clear()
    return result


def train(world: World, recipe: Recipe) -> Trained:
    """Train a recipe's encoder and space; `facts` has the scores on the way."""
    args, begin = world.args, world.now()
    base = world.train_base
    stack = world.put(base, recipe, recipe.rows)
    layout = [(name, tuple(tensor.shape[1:])) for name, tensor in stack.parameters.items()]
    basis = torch.zeros(recipe.k, stack.values.shape[1], device=world.device)
    space = SubjectSpace(layout, stack.values[0], basis, world.down.fingerprint)
    shape = {"resolution": RESOLUTION, "code_size": recipe.k, "width": recipe.width, "hidden": recipe.hidden}
    config = EncoderConfig(**shape, dropout=recipe.dropout)
    encoder = make_encoder(config, world.base.encode_images, recipe.seed).to(world.device)
    trained = Trained(recipe, space, encoder, {})
    reads, examples = world.reads(recipe), world.targets(recipe.people, recipe.photos)
    run = EncoderTraining(
        RowGradients(base, stack, compiled=args.compile),
        space,
        encoder,
        PhotoPairs(reads, examples, torch.arange(len(examples))),
        reads,
        examples,
        EncoderTrainingConfig(
            steps=recipe.steps,
            targets=recipe.targets,
            learning_rate=recipe.lr,
            space_learning_rate=recipe.space_lr,
            warmup_steps=min(100, recipe.steps // 4),
            decay=recipe.decay,
            seed=recipe.seed,
        ),
        record=args.graph,
    )
    looks = {round(share * recipe.steps) for share in args.looks}
    people, latents = world.test_people(), world.seen(world.test_photos()[:, 0], recipe)
    curve: dict[str, Any] = {}
    losses: list[Tensor] = []
    ready = clock = world.now()
    counted = spent = 0.0
    for done in run.steps():
        if done % 100 == 0:
            losses.append(run.loss.clone())
            if len(losses) == 3 and not losses[-1] < 2 * losses[0] < 1:
                raise TrainingError(f"{recipe.name} diverges: losses {[float(loss) for loss in losses]}")
        if done == SETTLED:  # compiled and recorded by now
            clock = world.now()
            counted = done
        if done in looks:
            spent += world.now() - clock
            encoder.eval()
            scores = score(world, recipe, people, {"": (trained.subjects(latents), 0)})[""]
            encoder.train(done < recipe.steps)
            curve[str(done)] = {
                "images": done * recipe.rows * recipe.targets,
                "seconds": round(spent, 2),
                **{metric: interval(scores[metric])["value"] for metric in METRICS},
            }
            print(recipe.name, done, curve[str(done)], f"{world.left:.0f} s left", flush=True)
            clock = world.now()
    spent += world.now() - clock
    trained.facts = {
        "numbers": stack.values.shape[1],
        "encoder_numbers": sum(parameter.numel() for parameter in encoder.parameters()),
        "images": recipe.steps * recipe.rows * recipe.targets,
        "seconds_to_prepare": round(ready - begin, 1),
        "seconds": round(spent * recipe.steps / max(recipe.steps - counted, 1), 1),
        "steps_per_second": round((recipe.steps - counted) / spent, 2),
        "losses": [round(float(loss), 5) for loss in losses],
        "curve": curve,
    }
    del run, stack
    take_off(base)
    world.clear()
    return trained


def judge(world: World, trained: Trained) -> dict[str, Any]:
    """All zero-step scores of a trained encoder."""
    args, recipe = world.args, trained.recipe
    people, photos = world.test_people(), world.test_photos()
    latents = world.seen(photos, recipe)
    clean = latents[:, 0]
    subjects = trained.subjects(clean)
    variants = {f"clean, noise {seed}" if seed else "clean": (subjects, seed) for seed in range(args.seeds)}
    variants["mean subject"] = trained.space.mean.detach().expand(len(clean), -1), 0
    variants["another person's photo"] = subjects.roll(1, 0), 0
    if recipe.brief:
        return score(world, recipe, people, variants)
    variants["nearest training person"] = trained.subjects(nearest(world, recipe)), 0
    with torch.no_grad():
        variants["bfloat16 basis"] = trained.space.rounded()(trained.codes(clean)), 0
    for scale in SCALES:
        variants[f"scale {scale}"] = trained.subjects(clean, scale), 0
    variants["code fitted to other photos"] = fitted(world, trained), 0
    if args.conditions:
        for name in (*DEGRADATIONS, "yaw"):
            for strength in STRENGTHS:
                bad = [
                    turned_photo(args.split, number, strength, RESOLUTION)[0]
                    if name == "yaw"
                    else degrade(Image.fromarray(photo), name, strength)
                    for number, photo in enumerate(photos[:, 0])
                ]
                pixels = np.stack([np.array(image) for image in bad])
                variants[f"{name} {strength}"] = trained.subjects(world.seen(pixels, recipe)), 0
    result = score(world, recipe, people, variants)
    # Several photos are judged on those that none of these arms has read.
    unread = dataclasses.replace(people, others=people.others[:, 2:])
    several = {f"photos {count}": (trained.subjects(latents[:, :count]), 0) for count in (1, 2, 3)}
    return {**result, **score(world, recipe, unread, several)}


def nearest(world: World, recipe: Recipe) -> Tensor:
    """For each test person, latents of the reference of the training person who looks most like it to the judge."""
    pixels = world.photos(recipe.people, recipe.photos)[0][:: recipe.photos]
    vectors = world.embedder.embed(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).vectors
    found = (world.test_people().references @ vectors.T).argmax(1)
    return world.seen(pixels[found.numpy()], recipe)


def fitted(world: World, trained: Trained) -> Tensor:
    """A ceiling of the space: subjects whose codes were fitted to the other photos of the test people by gradient."""
    args, photos = world.args, world.test_photos()
    count = len(photos)
    captions_of = [photo.caption or "" for one in world.read(args.split, args.people) for photo in one.split()[1]]
    rows = {text: row for row, text in enumerate(dict.fromkeys(captions_of))}
    examples = Examples(
        world.latents(photos[:, 1:].reshape(-1, *photos.shape[2:])),
        encode_captions(world.base, list(rows)),
        torch.tensor([rows[text] for text in captions_of]),
        torch.arange(count).repeat_interleave(photos.shape[1] - 1),
    ).to(world.device)
    positions = torch.stack(examples.by_subject())
    stack = world.put(world.base, trained.recipe, count)
    gradients = Recorded(RowGradients(world.base, stack), args.graph and world.device.type == "cuda")
    codes = trained.codes(world.seen(photos[:, 0], trained.recipe)).clone().requires_grad_(True)
    optimizer = torch.optim.Adam([codes], lr=FITTING_RATE)
    generator = torch.Generator(world.device).manual_seed(0)
    for number in range(args.fitting_steps):
        optimizer.param_groups[0]["lr"] = FITTING_RATE * min(1, (number + 1) / 10) * (1 - number / args.fitting_steps)
        subjects = trained.space(codes)
        stack.values.copy_(subjects.detach())
        pick = torch.randint(positions.shape[1], (count, 8), generator=generator, device=world.device)
        index = positions.gather(1, pick).flatten()
        _, gradient = gradients(denoising_inputs(world.base, examples, index, generator))
        optimizer.zero_grad()
        subjects.backward(gradient)
        optimizer.step()
    del stack, gradients
    world.clear()
    return trained.space(codes).detach()


def tuning(world: World, trained: Trained) -> dict[str, Any]:
    """Stage 2 from the read start, at every rate, after each number of steps."""
    args, people, rates = world.args, world.test_people(), world.args.tuning_rates
    start = trained.subjects(world.seen(world.test_photos()[:, 0], trained.recipe))
    rows = len(start) * len(rates)
    stack = world.put(world.base, trained.recipe, rows)
    stack.values.copy_(start.repeat_interleave(len(rates), 0))
    result: dict[str, Any] = {str(rate): {} for rate in rates}

    def look(done: int) -> None:
        scores = world.score(stack, people, rows, [0] * len(rates))
        for number, rate in enumerate(rates):
            result[str(rate)][str(done)] = {metric: scores[metric][number :: len(rates)] for metric in METRICS}

    look(0)
    for done in train_stack(
        world.base,
        stack,
        people.examples,
        steps=max(args.at),
        batch_size=4,
        lr=torch.tensor(rates).repeat(len(start)),
        seed=0,
        subjects=[row // len(rates) for row in range(rows)],
        schedule=lambda number: min(1.0, (number + 1) / args.tuning_warmup),
        graph=args.graph,
    ):
        if done in args.at:
            look(done)
    take_off(world.base)
    return result


def save(trained: Trained, folder: Path) -> None:
    """Write an encoder and its space as a Down keeps them."""
    space = trained.space.rounded()
    # Of an adapter on a model, the name of a factor ends in the adapter's.
    layout = [(name.rpartition(".")[0], shape) for name, shape in space.layout]
    space = SubjectSpace(layout, space.mean, space.basis, space.down_fingerprint).cpu()
    (folder / trained.recipe.name).mkdir(parents=True, exist_ok=True)
    space.save(folder / trained.recipe.name)
    trained.encoder.save(folder / trained.recipe.name, space)


def summary(result: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and interval of each score of each variant."""
    return {name: {metric: interval(scores[metric]) for metric in METRICS} for name, scores in result.items()}


def line(scores: Mapping[str, Sequence[float]]) -> str:
    """R-FaceSim / adherence / copied wall, for the terminal."""
    values = [interval(scores[name])["value"] for name in ("r_facesim", "prompt_adherence", "copied_background")]
    return "/".join(f"{value:.3f}" for value in values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("encoders", "tuning"))
    parser.add_argument("--recipe", action="append", required=True, help="name:key=value,...; see Recipe")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing after so many")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--split", default="tune", choices=("tune", "held-out"))
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3, help="noises that a clean photo is judged with")
    parser.add_argument("--world-seed", type=int, default=0, help="of the training people")
    parser.add_argument("--looks", type=float, nargs="*", default=[0.25, 0.5, 0.75])
    parser.add_argument("--at", type=int, nargs="+", default=[5, 10, 25, 50, 100], help="tuning steps to score after")
    parser.add_argument("--tuning-rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--tuning-warmup", type=int, default=10)
    parser.add_argument("--fitting-steps", type=int, default=200)
    parser.add_argument("--no-conditions", dest="conditions", action="store_false")
    parser.add_argument("--variants", type=int, default=16, help="subjects of a person that are drawn together")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--inference-steps", type=int, default=INFERENCE_STEPS)
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 1))
    parser.add_argument("--save", action="store_true", help="also write encoder and space")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--compile", action="store_true", help="compile the pass")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the base in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.part = args.part or ["encoders", "tuning"]
    return args


def main() -> None:
    args = parse()
    with multiprocessing.get_context("fork").Pool(args.workers) as pool:  # before anything is on the GPU
        world = World(args, pool)
        facts = origin(world.device)
        print(f"ready after {args.seconds - world.left:.0f} s on {facts['machine']}", flush=True)
        with vmap_ready():
            for text in args.recipe:
                if world.left < 0:
                    print(f"out of time before {text}", flush=True)
                    break
                recipe = Recipe.parse(text)
                try:
                    trained = train(world, recipe)
                except TrainingError as error:
                    print(error, flush=True)
                    world.clear()
                    continue
                data = {**facts, "split": args.split, "recipe": dataclasses.asdict(recipe), **trained.facts}
                path = args.output / f"{recipe.name}.json"
                print(recipe.name, {key: value for key, value in trained.facts.items() if key != "losses"}, flush=True)
                if "encoders" in args.part:
                    data["zero_steps"] = judge(world, trained)
                    data["figures"] = summary(data["zero_steps"])
                    for name, scores in data["zero_steps"].items():
                        print(" ", recipe.name, name, line(scores), flush=True)
                    write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())
                if args.save and recipe.kind == "meta":
                    save(trained, args.output)
                if "tuning" in args.part and not recipe.brief:
                    data["tuning"] = tuning(world, trained)
                    for rate, at in data["tuning"].items():
                        print(" ", recipe.name, rate, {step: line(one) for step, one in at.items()}, flush=True)
                write_bytes(path, (json.dumps(data, indent=1) + "\n").encode())
                print(f"{world.left:.0f} s left", flush=True)


if __name__ == "__main__":
    main()
