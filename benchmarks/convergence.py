# SPDX-License-Identifier: Apache-2.0
"""A person in zero steps, on the embedded domain: encoders of subject spaces, their controls, their rivals.

    python benchmarks/factor_reader.py --output DIR
    python benchmarks/convergence.py --plan --split held-out --compile --precision bf16 --output DIR
    python benchmarks/convergence.py --recipe main:steps=3000 --output DIR

An encoder is named by a recipe, `name:key=value,...` with the keys of `encoder_world.Recipe`, and gives one file
`DIR/<name>.json`: zero-step scores on clean and on bad photos, with floors and ceilings, the curve over the target
images seen, and stage 2 from the read start. `--plan` makes every file of the report; those that are there are kept,
so that a run goes on where another stopped. The rates of rivals are chosen on `tune` people. `DIR/convergence.json`
is made again from all files of DIR at the end of every run; `--onto FILE` adds its rows to an earlier run's. Choices
are made with `--split tune`, the default.

`--domain typefaces --assets DIR` does the same with fonts (`benchmarks/typefaces`) and writes `DIR/typefaces.json`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convergence_figures import add, summarise
from domains import DOMAINS, Setting
from encoder_world import Known, Recipe, World, helpers
from known_truth import FIT_STEPS, same_scenes
from origin import origin
from PIL import Image
from torch import Tensor

from evaluation import People, mean_lora_start
from peft_metalora.data.degrade import DEGRADATIONS, degrade
from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.demo.faces import turned_photo
from peft_metalora.demo.scoring import INFERENCE_STEPS
from peft_metalora.encoder import EncoderConfig, SubjectEncoder, SubjectSpace, make_encoder, save_code
from peft_metalora.errors import TrainingError
from peft_metalora.evaluation.rivals import FURTHER, RIVALS, put_on, take_off, vmap_ready
from peft_metalora.evaluation.summary import METRICS, interval
from peft_metalora.files import write_bytes
from peft_metalora.training.encoder_training import EncoderTraining, EncoderTrainingConfig, PhotoPairs
from peft_metalora.training.engine.stacked import Recorded, RowGradients, denoising_inputs, train_stack
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions

STRENGTHS = (0.5, 1.0)
SCALES = (0.9, 1.1, 1.25)  # of the way from the mean subject to the one that was read
METHODS = RIVALS | FURTHER
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)  # of noise, at which losses are compared
SETTLED = 10  # steps after which time is counted
SHOWN = 300  # steps after which a machine has shown how fast it is
FITTING_RATE = 0.05  # of codes, which are of length sqrt(k)

SPEED = 64.0  # steps a second of an encoder on an H100
COMPILING = 75.0  # seconds there, once for recipes of one shape
PREPARING = 75.0  # and once for training people: photos, what is read, what is denoised


def expected(world: World, job: Recipe | str) -> float:
    """Seconds on an H100: what each took on an H200, and a tenth more, at the speed that this machine has shown.

    Args:
        job: a recipe, or the name of a rival.
    """
    if isinstance(job, str):
        return {"mean_lora": 130.0, "textual_inversion": 160.0, "dora": 160.0, "oft": 140.0}.get(job, 110.0)
    whole = 105 if world.args.truth else 45
    seconds = job.steps / world.speed / (1.3 if job.kind == "image_prompt" else 1) + (whole, 30, 18)[job.brief]
    if world.args.compile and not world.ready_to_train(job):
        seconds += COMPILING
    return seconds if world.prepared(job) else seconds + PREPARING


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
            result[name] = {metric: values[number :: len(part)] for metric, values in scores.items()}
        del stack
        world.clear()
    return result


def train(world: World, recipe: Recipe) -> Trained:
    """Train a recipe's encoder and space; `facts` has the scores on the way."""
    args, begin = world.args, world.now()
    stack, gradients = world.to_train(recipe)
    layout = [(name, tuple(tensor.shape[1:])) for name, tensor in stack.parameters.items()]
    basis = torch.zeros(recipe.k, stack.values.shape[1], device=world.device)
    space = SubjectSpace(layout, stack.values[0], basis, world.down.fingerprint)
    shape = {"resolution": RESOLUTION, "code_size": recipe.k, "width": recipe.width, "hidden": recipe.hidden}
    config = EncoderConfig(**shape, dropout=recipe.dropout)
    encoder = make_encoder(config, world.base.encode_images, recipe.seed).to(world.device)
    trained = Trained(recipe, space, encoder, {})
    reads, examples = world.reads(recipe), world.targets(recipe.people, recipe.photos)
    run = EncoderTraining(
        gradients,
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
    people, latents = world.known(), world.seen(world.known().photos[:, 0], recipe)
    curve: dict[str, Any] = {}
    losses: list[float] = []
    ready = clock = world.now()
    counted = spent = 0.0
    for step in run.steps():
        done = step.number
        if done % 100 == 0:
            losses.append(step.loss)
            if len(losses) == 3 and not losses[-1] < 2 * losses[0] < 1:
                raise TrainingError(f"{recipe.name} diverges: losses {losses}")
        if done == SHOWN and done < recipe.steps:
            world.speed = min(SPEED, (done - counted) / (spent + world.now() - clock))
            if (recipe.steps - done) / world.speed > world.left:
                raise TrainingError(f"{recipe.name} would not end in time at {world.speed:.0f} steps/s")
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
        "losses": [round(loss, 5) for loss in losses],
        "curve": curve,
    }
    del run, stack, gradients
    world.clear()
    return trained


def judge(world: World, trained: Trained) -> dict[str, Any]:
    """All zero-step scores of a trained encoder."""
    args, recipe = world.args, trained.recipe
    people = world.known()
    photos = people.photos
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
    for name in args.conditions:
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
    found = (world.known().references @ vectors.T).argmax(1)
    return world.seen(pixels[found.numpy()], recipe)


def other_photos(world: World) -> Examples:
    """The photos of the test people that are not read, as what is denoised."""
    args, photos = world.args, world.known().photos
    captions_of = [photo.caption or "" for one in world.read(args.split, args.people) for photo in one.split()[1]]
    rows = {text: row for row, text in enumerate(dict.fromkeys(captions_of))}
    return Examples(
        world.latents(photos[:, 1:].reshape(-1, *photos.shape[2:])),
        encode_captions(world.base, list(rows)),
        torch.tensor([rows[text] for text in captions_of]),
        torch.arange(len(photos)).repeat_interleave(photos.shape[1] - 1),
    ).to(world.device)


def fitted(world: World, trained: Trained) -> Tensor:
    """A ceiling of the space: subjects whose codes were fitted to the other photos of the test people by gradient."""
    args, photos, examples = world.args, world.known().photos, other_photos(world)
    world.base.shift = trained.recipe.shift
    count = len(photos)
    positions = torch.stack(examples.by_subject()).to(world.device)
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


def denoised(world: World, trained: Trained) -> dict[str, dict[str, list[float]]]:
    """By noise level: the loss on other photos with the mean subject, and what share of it the read one saves.

    It moves long before pictures do, and needs no judge. Noises are the same for all.
    """
    people, examples = world.known(), other_photos(world)
    index = torch.stack(examples.by_subject()).flatten().to(world.device)
    read_subjects = as_read(world, trained, people)
    base = world.base
    stack = world.put(base, trained.recipe, len(people.names))
    latents, text, _ = examples.batch(index)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    found = {}
    for level in LEVELS:
        times = torch.full((len(latents),), level, device=world.device)
        losses = []
        for subjects in (trained.space.mean.detach(), read_subjects, read_subjects.roll(1, 0)):
            stack.values.copy_(subjects)
            with torch.no_grad(), stack.installed_in(base.pipeline):
                losses.append(base.loss(latents, text, noise, times).view(stack.count, -1).mean(1).cpu())
        mean, own, another = losses
        columns = {"loss": mean, "saved": 1 - own / mean, "saved by another's": 1 - another / mean}
        found[str(level)] = {name: [round(value, 5) for value in column.tolist()] for name, column in columns.items()}
    del stack
    world.clear()
    return found


def truth(world: World, trained: Trained) -> dict[str, Any]:
    """What the renderer says: distance to true renders; people outside the range of training, and marked ones.

    `render` has, by person, the distance of the face to the render of the person, to that of the next person, and what
    the autoencoder leaves of real photos. `marked` is tuned on the marked photo, too.
    """
    recipe, people = trained.recipe, world.known()
    stack = world.put(world.base, recipe, len(people.names))
    stack.values.copy_(as_read(world, trained, people))
    images = world.draw(stack, stack.count, [0])
    del stack
    world.clear()
    if recipe.name in world.args.save:
        sheet(world, people, images).save(world.args.output / f"{recipe.name}.png")
    found: dict[str, Any] = {"render": {}}
    photos = world.through_base(people.photos[:, 1:])
    for label, shown, shift in (("own", images, 0), ("another's", images, 1), ("photos", photos, 0)):
        each = len(shown) // len(people.names)
        distance = world.from_render(shown, people.identity.roll(shift, 0).repeat_interleave(each, 0))
        found["render"][label] = [round(value, 4) for value in distance.view(-1, each).mean(1).tolist()]
    for kind in ("outside", "unmarked"):
        others = world.known(kind)
        subjects = as_read(world, trained, others)
        variants = {"clean": (subjects, 0), "another person's photo": (subjects.roll(1, 0), 0)}
        found[kind] = {"ceiling": world.ceiling(others), **score(world, recipe, others, variants)}
    marked = world.known("marked")
    found["marked"] = tuning(world, trained, marked, world.args.tuning_rates[:1], 1)
    return found


def sheet(world: World, people: Known, images: Tensor, count: int = 4) -> Image.Image:
    """Some people: reference and another photo, what is drawn for four prompts, and the true render of each scene."""
    drawn = images.unflatten(0, (-1, len(world.prompts)))[:count, [0, 1, 2, 5]].flatten(0, 1)
    each = len(drawn) // count
    identity = people.identity[:count].repeat_interleave(each, 0).to(drawn.device)
    scenes, _ = same_scenes(drawn, identity, world.judge.read(drawn), world.args.truth_steps)
    with torch.no_grad():
        true = world.domain.render(identity, scenes)
    real = torch.from_numpy(people.photos[:count, :2]).permute(0, 1, 4, 2, 3).to(drawn.device) / 255
    blank = torch.ones_like(real)
    upper = torch.cat([real, drawn.unflatten(0, (count, each))], dim=1)
    lower = torch.cat([blank, true.unflatten(0, (count, each))], dim=1)
    rows = torch.stack([upper, lower], dim=1).flatten(0, 1)  # (2 * count, 2 + each, 3, h, w)
    pixels = (rows.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2) * 255).round().byte().cpu().numpy()
    whole = Image.fromarray(pixels)
    return whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST)


def as_read(world: World, trained: Trained, people: Known) -> Tensor:
    """Subjects (people, N), each read from the reference."""
    return trained.subjects(world.seen(people.photos[:, 0], trained.recipe))


def tuning(world: World, trained: Trained, people: Known, rates: Sequence[float], seeds: int) -> dict[str, Any]:
    """Stage 2 from the read start, at every rate and with the noise of every seed, after each number of steps."""
    args, start = world.args, as_read(world, trained, people)
    world.base.shift = trained.recipe.shift
    each = len(rates) * seeds
    rows = len(start) * each
    stack = world.put(world.base, trained.recipe, rows)
    stack.values.copy_(start.repeat_interleave(each, 0))
    result: dict[str, Any] = {str(rate): {} for rate in rates}

    def look(done: int) -> None:
        scores = world.score(stack, people, rows, list(range(seeds)) * len(rates))
        for number, rate in enumerate(rates):
            result[str(rate)][str(done)] = {}
            for metric, values in scores.items():
                of_rate = torch.tensor(values).view(-1, len(rates), seeds)[:, number]
                result[str(rate)][str(done)][metric] = [round(value, 4) for value in of_rate.mean(1).tolist()]

    look(0)
    for done in train_stack(
        world.base,
        stack,
        people.examples,
        steps=max(args.at),
        batch_size=4,
        lr=torch.tensor(rates).repeat_interleave(seeds).repeat(len(start)),
        seed=0,
        numbers=[row // each for row in range(rows)],
        schedule=lambda number: min(1.0, (number + 1) / args.tuning_warmup),
        graph=args.graph,
    ):
        if done in args.at:
            look(done)
    world.take_off(world.base)
    return result


def save(trained: Trained, folder: Path) -> None:
    """Write an encoder and its space as a Down keeps them."""
    space = trained.space.rounded()
    # Of an adapter on a model, the name of a factor ends in the adapter's.
    layout = [(name.rpartition(".")[0], shape) for name, shape in space.layout]
    space = SubjectSpace(layout, space.mean, space.basis, space.down_fingerprint).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    space.save(folder)
    trained.encoder.save(folder, space)


def line(scores: Mapping[str, Sequence[float]]) -> str:
    """R-FaceSim / adherence / copied wall, for the terminal."""
    values = [interval(scores[name])["value"] for name in ("r_facesim", "prompt_adherence", "copied_background")]
    return "/".join(f"{value:.3f}" for value in values)


def rival(world: World, name: str) -> dict[str, Any]:
    """A fine-tuned method on the test people: with a constant rate, and warmed up and decayed to 0 over a run.

    Each rate is the best of `tune` people at its best number of steps, and so are the noise levels, of the constant
    rate; every number of steps is kept.
    """
    args = world.args
    tune, people = world.people("tune", args.tune_people), world.known()
    result, starts, shifts = {}, {}, args.rival_shifts
    for length in (0, *args.decays):
        at = [length] if length else args.rival_steps
        tried: dict[tuple[float, str], dict[str, Any]] = {}
        for shift in shifts:
            world.base.shift = shift
            if shift not in starts:
                starts[shift] = mean_lora_start(world) if name == "mean_lora" else None
            found = _rival(world, tune, name, METHODS[name].rates, at, length, [0], starts[shift])
            tried |= {(shift, rate): curve for rate, curve in found.items()}
        best = max(tried, key=lambda key: max(interval(one["r_facesim"])["value"] for one in tried[key].values()))
        shift, rate = best
        shifts = [shift]
        world.base.shift = shift
        label = f"{name}, decay over {length}" if length else name
        seeds = list(range(args.seeds))
        result[label] = {
            "learning_rate": float(rate),
            "shift": shift,
            "tuning": {
                rate if shift == 1 else f"{rate}, shift {shift:g}": {step: line(one) for step, one in curve.items()}
                for (shift, rate), curve in tried.items()
            },
            "curve": _rival(world, people, name, [float(rate)], at, length, seeds, starts[shift])[rate],
        }
        shown = {step: line(one) for step, one in result[label]["curve"].items()}
        print(label, rate, f"shift {shift:g}", shown, flush=True)
        if name == "lora_r1" and not length and args.truth:
            marked = world.known("marked")
            result[label]["marked"] = _rival(world, marked, name, [float(rate)], at, length, [0], starts[shift])[rate]
    world.base.shift = 1.0
    return result


def _rival(
    world: World,
    people: People,
    name: str,
    rates: Sequence[float],
    at: Sequence[int],
    length: int,
    seeds: Sequence[int],
    start: dict[str, Tensor] | None,
) -> dict[str, dict[str, Any]]:
    """Curves of a method by rate; rows are people, each with every rate or with every seed."""
    each = len(rates) if len(rates) > 1 else len(seeds)
    rows = len(people.names) * each
    found: dict[str, dict[str, Any]] = {str(rate): {} for rate in rates}
    stack = put_on(
        world.base, METHODS[name], world.down, world.config, rows, list(seeds), start if name == "mean_lora" else None
    )
    for done in train_stack(
        world.base,
        stack,
        world.examples(stack, people),
        steps=max(at),
        batch_size=4,
        lr=torch.tensor(rates).repeat(rows // len(rates)),
        seed=0,
        numbers=[row // each for row in range(rows)],
        schedule=(lambda number: min(1, (number + 1) / 10) * (1 - number / length)) if length else None,
        graph=world.args.graph,
    ):
        if done in at:
            scores = world.score(stack, people, rows, [0] * each if len(rates) > 1 else seeds)
            for number, rate in enumerate(rates):
                step = slice(number, None, each) if len(rates) > 1 else slice(None)
                found[str(rate)][str(done)] = {metric: values[step] for metric, values in scores.items()}
    take_off(world.base)
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", default=[], help="name:key=value,...; see encoder_world.Recipe")
    parser.add_argument("--changes", default="", help="key=value,... of every recipe, whatever it says")
    parser.add_argument("--plan", action="store_true", help="the recipes and rivals of the report")
    parser.add_argument("--rival", action="append", default=[], choices=tuple(METHODS), help="a fine-tuned method")
    parser.add_argument("--rival-steps", type=int, nargs="+", default=[25, 50, 100, 200, 300, 500, 700])
    parser.add_argument(
        "--rival-shifts", type=float, nargs="+", default=[1.0], help="of a rival's noise levels, to choose from"
    )
    parser.add_argument("--decays", type=int, nargs="*", default=[100, 300], help="steps of runs that decay")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing that would end later")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--onto", type=Path, metavar="FILE", help="figures of an earlier run, to add its new rows to")
    parser.add_argument("--domain", default="faces", choices=tuple(DOMAINS), help="whose people they are")
    parser.add_argument(
        "--assets", type=Path, help="folder of a domain's networks, where the package does not bring them"
    )
    parser.add_argument("--split", default="tune", choices=("tune", "held-out"))
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--tune-people", type=int, default=10)
    parser.add_argument("--meta-people", type=int, default=128)
    parser.add_argument("--mean-steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="noises that a clean photo is judged with")
    parser.add_argument("--world-seed", type=int, default=0, help="of the training people")
    parser.add_argument("--looks", type=float, nargs="*", default=[0.1, 0.25, 0.5, 0.75])
    parser.add_argument("--at", type=int, nargs="+", default=[5, 10, 25, 50, 100], help="tuning steps to score after")
    # Of 1e-4, 3e-4 and 1e-3 on tune people: the middle one had gained the most after 25 steps at unharmed adherence.
    parser.add_argument("--tuning-rates", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--tuning-warmup", type=int, default=10)
    parser.add_argument("--fitting-steps", type=int, default=100)
    parser.add_argument("--conditions", nargs="*", help="of bad photos; default: all")
    parser.add_argument("--variants", type=int, default=16, help="subjects of a person that are drawn together")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--inference-steps", type=int, default=INFERENCE_STEPS)
    parser.add_argument("--workers", type=int, default=min(16, max(1, len(os.sched_getaffinity(0)) - 1)))
    parser.add_argument("--save", nargs="*", default=[], help="recipes whose encoder and space are written, too")
    parser.add_argument("--strangers", type=int, default=16, help="people whom no training has seen the like of")
    parser.add_argument("--no-truth", dest="truth", action="store_false", help="ask the renderer of faces nothing")
    parser.add_argument("--truth-steps", type=int, default=FIT_STEPS, help="of the search for the same scene")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--compile", action="store_true", help="compile the pass")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="of the base in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    # Heads are turned, marked and wear sunglasses, letters do not.
    faces = args.domain == "faces"
    if args.conditions is None:
        args.conditions = [*DEGRADATIONS, "yaw"] if faces else [name for name in DEGRADATIONS if name != "sunglasses"]
    args.truth = args.truth and faces
    return args


def claimed(path: Path) -> bool:
    """Take a file as this process's to make: False where it is there, or another process has taken it."""
    if path.exists():
        return False
    try:
        path.with_suffix(".claim").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def train_and_judge(world: World, recipe: Recipe) -> dict[str, Any]:
    """Train and judge a recipe."""
    args = world.args
    trained = train(world, recipe)
    data: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe),
        **trained.facts,
        "ceiling": world.ceiling(world.known()),
        "second_ceiling": world.second_ceiling(world.known()),
    }
    print(recipe.name, f"{trained.facts['seconds']} s, {trained.facts['steps_per_second']} steps/s", flush=True)
    data["zero_steps"] = judge(world, trained)
    for name, scores in data["zero_steps"].items():
        print(" ", recipe.name, name, line(scores), flush=True)
    data["denoised"] = denoised(world, trained)
    saved = {level: f"{100 * sum(one['saved']) / len(one['saved']):.2f} %" for level, one in data["denoised"].items()}
    print(" ", recipe.name, "saves of the loss", saved, flush=True)
    if recipe.brief < 2:
        data["tuning"] = tuning(world, trained, world.known(), args.tuning_rates, args.seeds)
        for rate, at in data["tuning"].items():
            print(" ", recipe.name, rate, {step: line(scores) for step, scores in at.items()}, flush=True)
    if args.truth and not recipe.brief:
        data["truth"] = truth(world, trained)
        distances = {label: interval(values)["value"] for label, values in data["truth"]["render"].items()}
        print(" ", recipe.name, "from the true render", distances, flush=True)
    if recipe.kind in ("meta", "random"):
        with tempfile.TemporaryDirectory() as folder:
            save(trained, args.output / recipe.name if recipe.name in args.save else Path(folder))
            space = trained.space.rounded().cpu()
            data["code_file_bytes"] = save_code(folder, space.coded(torch.zeros(recipe.k))).stat().st_size
    return data


def main() -> None:
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.automatic_dynamic_shapes = False  # recipes differ in shapes, a recipe's steps do not
    torch._dynamo.config.recompile_limit = 64
    with helpers(args.workers) as pool:
        setting: Setting = DOMAINS[args.domain](args.assets, torch.device(args.device))
        world = World(args, pool, setting.domain, setting.down)
        world.second_judge = setting.second_judge(args.output, world.device)
        facts = {**origin(world.device), "split": args.split, "people": args.people, "noises": args.seeds}
        print(f"ready after {args.seconds - world.left:.0f} s on {facts['machine']}", flush=True)
        world.speed = SPEED
        changes = dict(part.split("=", 1) for part in args.changes.split(",") if part)
        with vmap_ready():
            for job in (*args.recipe, *args.rival, *(setting.plan if args.plan else ())):
                recipe = None if job in METHODS else Recipe.parse(job, changes)
                path = args.output / (f"{recipe.name}.json" if recipe else f"rivals-{job}.json")
                if not path.exists() and world.left < expected(world, recipe or job):
                    print(f"no time for {job}: {world.left:.0f} s left", flush=True)
                    continue
                if not claimed(path):
                    continue
                try:
                    data = train_and_judge(world, recipe) if recipe else {"methods": rival(world, job)}
                except TrainingError as error:
                    print(error, flush=True)
                    world.clear()
                    continue
                write_bytes(path, (json.dumps({**facts, **data}, indent=1) + "\n").encode())
                print(f"{path.name}, {world.left:.0f} s left", flush=True)
    whole = summarise(args.output, args.domain)
    if args.onto:
        add(whole, args.onto)


if __name__ == "__main__":
    main()
