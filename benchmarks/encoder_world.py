# SPDX-License-Identifier: Apache-2.0
"""What `convergence.py` trains and judges: recipes, the people they learn from, and what codes expand to."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from evaluation import Bench, People
from peft_metalora.bases import Base, base_for
from peft_metalora.data import load_image
from peft_metalora.data.degrade import DEGRADATIONS, make_worse
from peft_metalora.demo.embedded import RESOLUTION, load_base
from peft_metalora.demo.faces import sample_identities
from peft_metalora.demo.judges import FaceEmbedder
from peft_metalora.demo.make_base import train_embedder
from peft_metalora.demo.render import render
from peft_metalora.demo.scene import Scene, captions, sample_scenes, scene_from_labels
from peft_metalora.encoder.sources.latents import even_exposure
from peft_metalora.evaluation.rivals import RIVALS, put_on, take_off
from peft_metalora.files import write_tensors
from peft_metalora.training.encoder_training import Reads
from peft_metalora.training.engine.stacked import AdapterStack
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions
from peft_metalora.tuner.down import DownSource

SECOND = "second_r_facesim"
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
        return tuple(name for name in DEGRADATIONS if name not in left_out)


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


class SecondJudge(FaceEmbedder):
    """Another face embedder, which no choice has used: a small vision transformer, trained on other people."""

    def __init__(self) -> None:
        super().__init__()
        width = 192
        layer = nn.TransformerEncoderLayer(width, 6, 3 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.trunk = nn.Sequential(  # type: ignore[assignment]
            nn.Conv2d(3, width, 8, stride=8),
            nn.Flatten(2),
            _WithPlaces(width, (RESOLUTION // 8) ** 2),
            nn.TransformerEncoder(layer, 4, enable_nested_tensor=False),
            nn.LayerNorm(width),
            _Mean(),
        )
        self.head = nn.Linear(width, 128)


class _WithPlaces(nn.Module):
    """(n, width, places) -> (n, places, width), told where each token is."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.places = nn.Parameter(0.02 * torch.randn(places, width))

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) + self.places


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def second_judge(path: Path, steps: int, device: torch.device) -> FaceEmbedder:
    """The second judge, trained once and kept in a file."""
    if path.exists():
        judge: FaceEmbedder = SecondJudge()
        judge.load_state_dict(load_file(path))
        judge = judge.to(device).eval()
    else:
        judge = train_embedder(steps, device, network=SecondJudge, seed=1_000_901)
        write_tensors(path, judge.state_dict())
    return judge.requires_grad_(False)


class World(Bench):
    """The benchmark's base and judges in float32, a second base to train on, and people as tensors.

    Attributes:
        second: another judge, whose scores are kept beside the others' as `second_r_facesim`.
    """

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
        self.second: FaceEmbedder | None = None
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
            key = people, count, f"{recipe.corruptions} {recipe.expose} {recipe.erase}"
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
            # The clean photo thrice too: it is the half of what is read.
            versions = [clean, clean, clean, self._worse[key]]
        features = torch.cat(versions)
        photo = torch.arange(people * count, device=self.device).repeat(len(features) // len(clean))
        return Reads(features, photo // count, photo)

    def draw(self, stack: AdapterStack | None, rows: int, seeds: Sequence[int]) -> Tensor:
        """As the bench draws; what was drawn last is kept for the second judge."""
        self._drawn = super().draw(stack, rows, seeds)
        return self._drawn

    def score(self, stack: AdapterStack | None, people: People, rows: int, seeds: Sequence[int]) -> dict[str, Any]:
        """As the bench scores, and what the second judge says of the same images."""
        scores: dict[str, Any] = super().score(stack, people, rows, seeds)
        if self.second is not None and people is self._people:
            made = self.second.embed(self._drawn).vectors.view(rows, len(self.prompts), -1)
            others = self.vectors(self.second)[:, 1:][[row // len(seeds) for row in range(rows)]]
            scores[SECOND] = torch.einsum("rpd,rod->r", made, others).div(made.shape[1] * others.shape[1]).tolist()
        return scores

    def vectors(self, embedder: FaceEmbedder) -> Tensor:
        """Embeddings (people, photos, d) of the test people's photos, the reference first."""
        photos = self.test_photos()
        pixels = torch.from_numpy(photos.reshape(-1, *photos.shape[2:])).permute(0, 3, 1, 2) / 255
        return embedder.embed(pixels).vectors.unflatten(0, photos.shape[:2])

    def ceiling(self) -> list[float]:
        """What photos of each test person reach among themselves, the reference left out."""
        vectors = self.vectors(self.embedder)[:, 1:]
        similar = vectors @ vectors.mT
        count = vectors.shape[1]
        found = (similar.sum((1, 2)) - similar.diagonal(dim1=1, dim2=2).sum(1)) / (count * (count - 1))
        return [round(value, 4) for value in found.tolist()]

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


def _make_worse(job: tuple[np.ndarray[Any, Any], tuple[str, ...], bool, int]) -> list[np.ndarray[Any, Any]]:
    """Three bad versions of each photo, each of a random corruption and strength."""
    pixels, names, erasing, seed = job
    source = random.Random(seed)
    versions = []
    for _ in range(3):
        made = [make_worse(Image.fromarray(photo), source, names, erasing) for photo in pixels]
        versions.append(np.stack([np.array(image) for image in made]))
    return versions
