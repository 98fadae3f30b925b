# SPDX-License-Identifier: Apache-2.0
"""Meta-LoRA and its rivals on the embedded domain: every method on the same people, images, steps and noise.

    python benchmarks/evaluation.py --seconds 540 --output benchmarks/results

Parts, in this order: `rivals` and `robustness` (evaluation.json), `variants` (variants.json). `figures` in a file has
each method's headline scores, parameters and seconds with their intervals; what they were made from follows it. For
each method the learning rate is chosen on the `tune` people, who are in no reported figure. A file is rewritten after
each method, and `--resume DIR` goes on from the files of an earlier run. `--small` is what a CPU does in minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from clock import now
from embedded_down import embedded_down
from origin import origin, write
from torch import Tensor

from peft_metalora import hub
from peft_metalora.bases import base_for
from peft_metalora.data import Photo, Subject, load_image, read_subjects
from peft_metalora.data.degrade import DEGRADATIONS, degrade
from peft_metalora.demo.domain import FACES, Domain
from peft_metalora.demo.embedded import MAX_SEQUENCE_LENGTH, RESOLUTION
from peft_metalora.demo.faces import turned_photo
from peft_metalora.demo.judges import adherence
from peft_metalora.demo.scoring import INFERENCE_STEPS
from peft_metalora.evaluation.rivals import RIVALS, VARIANTS, Rival, put_on, take_off, vmap_ready
from peft_metalora.evaluation.summary import METRICS, interval, summarise
from peft_metalora.evaluation.textual_inversion import WordStack
from peft_metalora.metrics import Embeddings, copy_paste, real_ceiling
from peft_metalora.training.engine.stacked import AdapterStack, train_stack
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_subjects
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_settings import MetaTrainConfig, PersonalizeConfig
from peft_metalora.tuner import init_down_from_data, set_slots
from peft_metalora.tuner.down import DownSource
from peft_metalora.tuner.on_model import meta_lora_layers
from peft_metalora.tuner.starts import start_down

PHOTOS = 7
HEADLINE = 100  # steps, as in the demo; fixed before any figure was seen
BATCH = 4
BLOCK = 25  # steps between two looks at the clock
STRENGTHS = (0.5, 1.0)
ROBUST = ("meta_lora_stored", "meta_lora_mean", "lora_r1", "lora_r4")
DOWN_STARTS = ("uniform", "orthogonal", "pissa", "eva")


COPIED = "copy_paste"


class OutOfTimeError(Exception):
    """The budget does not allow the next thing."""


@dataclass
class People:
    """Who is learned, from which encoded views, and what their images are compared with."""

    names: list[str]
    examples: Examples
    references: Tensor  # (n, d) face embeddings
    others: Tensor  # (n, m, d)
    walls: list[str]
    learned: list[Photo]


class Bench:
    """The base, its judges, the clock and the people; everything stays on one device.

    Args:
        domain: whose people they are. down: of its base.
    """

    def __init__(self, args: argparse.Namespace, domain: Domain = FACES, down: DownSource | None = None) -> None:
        self.args, self.domain, self.started = args, domain, time.perf_counter()
        self.device = torch.device(args.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.pipe = domain.load_base()
        self.base = base_for(self.pipe)
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        self.base.place(self.device, encoders=True)
        # One size of image: made once, so that nothing is copied from the host while a step is recorded.
        side = RESOLUTION // self.base.pixel_multiple
        ids = self.pipe._prepare_latent_image_ids(1, side, side, self.device, torch.float32)
        self.pipe._prepare_latent_image_ids = lambda *_: ids
        self.embedder, self.judge = domain.load_embedder().to(self.device), domain.load_judge().to(self.device)
        self.down = down or embedded_down()
        self.home = Path(tempfile.mkdtemp())
        self.config = PersonalizeConfig(
            pretrained_model_name_or_path=str(domain.base_folder),
            output_dir=str(self.home / "none"),
            resolution=RESOLUTION,
            mixed_precision="no",
        )
        self.prompts = list(domain.prompts)
        self.asked = [domain.parse_caption(prompt) for prompt in self.prompts]
        self.text = {name: tensor.to(self.device) for name, tensor in self.base.encode_text(self.prompts).items()}

    @property
    def left(self) -> float:
        return self.args.seconds - (time.perf_counter() - self.started)

    def read(self, split: str, count: int, photos: int = PHOTOS) -> list[Subject]:
        folder = self.home / f"{split}-{count}-{photos}"
        if not folder.exists():
            self.domain.write_dataset(folder, split, count, photos)
        return read_subjects(folder)

    def people(self, split: str, count: int) -> People:
        subjects = self.read(split, count)
        references = [subject.split()[0] for subject in subjects]
        return self.with_references(subjects, references)

    def with_references(self, subjects: list[Subject], references: list[Photo]) -> People:
        """People learned from these photos; compared with what they are on clean ones."""
        learned = [Subject(str(number), [photo]) for number, photo in enumerate(references)]
        examples = encode_subjects(self.base, learned, self.config, self.args.views, progress=False)
        clean = [[load_image(photo.path) for photo in subject.photos] for subject in subjects]
        vectors = self.embedder.embed([image for own in clean for image in own]).vectors
        vectors = vectors.view(len(subjects), -1, vectors.shape[-1])
        shown = self.judge.read([load_image(photo.path) for photo in references])
        walls = [seen[self.domain.backdrop] for seen in shown]
        names = [subject.name for subject in subjects]
        return People(names, examples.to(self.device), vectors[:, 0], vectors[:, 1:], walls, references)

    def noise(self, seed: int) -> Tensor:
        """Packed noise of each prompt's image, as the pipeline would draw it from that seed."""
        shape = 1, self.base.denoiser.config.in_channels // 4, 16, 16
        drawn = [
            torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + number))
            for number in range(len(self.prompts))
        ]
        return self.pipe._pack_latents(torch.cat(drawn), len(drawn), *shape[1:])

    def draw(self, stack: AdapterStack | WordStack | None, rows: int, seeds: Sequence[int]) -> Tensor:
        """Every prompt for every row: (rows * prompts, 3, 64, 64) in [0, 1]."""
        noise = torch.cat([self.noise(seeds[row % len(seeds)]) for row in range(rows)]).to(self.device)
        if isinstance(stack, WordStack):
            text = stack.text_of(self.prompts)
        else:
            text = {name: tensor.repeat(rows, *[1] * (tensor.ndim - 1)) for name, tensor in self.text.items()}

        def call() -> Tensor:
            images: Tensor = self.pipe(
                prompt_embeds=text["sequence"],
                pooled_prompt_embeds=text["pooled"],
                latents=noise,
                height=RESOLUTION,
                width=RESOLUTION,
                num_inference_steps=self.args.inference_steps,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                output_type="pt",
            ).images
            return images.float()

        if not isinstance(stack, AdapterStack):
            return call()
        with stack.installed_in(self.pipe):
            return call()

    def score(
        self, stack: AdapterStack | WordStack | None, people: People, rows: int, seeds: Sequence[int]
    ) -> dict[str, Any]:
        """The four metrics of each row, as `demo.scoring.Scorer` computes them; row n is person n // len(seeds).

        Beside them `copy_paste`, as `metrics.copy_paste` defines it.
        """
        images = self.draw(stack, rows, seeds)
        made = self.embedder.embed(images).vectors.view(rows, len(self.prompts), -1)
        person = [row // len(seeds) for row in range(rows)]
        seen, asked, backdrop = self.judge.read(images), self.asked, self.domain.backdrop
        result: dict[str, list[float]] = {name: [] for name in METRICS}
        others = torch.nn.functional.normalize(people.others, dim=-1)[person]
        references = torch.nn.functional.normalize(people.references, dim=-1)[person]
        result["r_facesim"] = torch.einsum("rpd,rod->rpo", made, others).mean((1, 2)).tolist()
        result["face_sim"] = torch.einsum("rpd,rd->rp", made, references).mean(1).tolist()
        result[COPIED] = []
        for row in range(rows):
            result[COPIED].append(
                float(copy_paste(*map(_seen, (made[row], references[row, None], others[row]))).mean())
            )
            own = seen[row * len(asked) : (row + 1) * len(asked)]
            result["prompt_adherence"].append(adherence(asked, own)["all"])
            wall = people.walls[person[row]]
            free = [shown[backdrop] == wall for shown, want in zip(own, asked, strict=True) if backdrop not in want]
            result["copied_background"].append(sum(free) / len(free))
        return {name: [round(value, 4) for value in values] for name, values in result.items()}

    def examples(self, stack: AdapterStack | WordStack, people: People) -> Examples:
        """What a stack learns people from."""
        if not isinstance(stack, WordStack):
            return people.examples
        return stack.examples(people.learned, replace(self.config, views_per_image=self.args.views))

    def train(
        self,
        stack: AdapterStack | WordStack,
        people: People,
        rival: Rival,
        lr: float | Tensor,
        at: Sequence[int],
        seeds: int = 1,
    ) -> Iterator[tuple[int, list[float]]]:
        """Train to each number of steps in `at`; yields it and the seconds of each block of steps so far."""
        rows = stack.count
        clock, blocks = self.now(), []
        steps = train_stack(
            self.base,
            stack,
            self.examples(stack, people),
            steps=max(at),
            batch_size=BATCH,
            lr=lr,
            seed=0,
            numbers=[row // seeds for row in range(rows)],
            scale=(lambda name: rival.up_rate if "metalora_up" in name else 1.0) if rival.up_rate != 1 else None,
            graph=self.args.graph,
        )
        for done in steps:
            if done % min(BLOCK, *at) == 0:
                blocks.append(self.now() - clock)
                if self.left < 0:
                    raise OutOfTimeError
            if done in at:
                yield done, blocks
            if done % min(BLOCK, *at) == 0:
                clock = self.now()

    def now(self) -> float:
        return now(self.device)

    def clear(self) -> None:
        take_off(self.base)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def tune(bench: Bench, rival: Rival, people: People, start: dict[str, Tensor] | None) -> dict[str, Any]:
    """R-FaceSim of the tune people after the headline's steps, for every rate; all rates in one stack."""
    args = bench.args
    count, rates = len(people.names), rival.rates
    if not args.tune_people:
        return {"rate": rates[len(rates) // 2], "tried": {}}
    rows = count * len(rates)
    stack = put_on(bench.base, rival, bench.down, bench.config, rows, [0], start)
    for _ in bench.train(stack, people, rival, torch.tensor(rates).repeat(count), [args.tune_steps], len(rates)):
        pass
    # Every rate gets the noise of the same seed.
    scores = torch.tensor(bench.score(stack, people, rows, [0] * len(rates))["r_facesim"]).view(count, len(rates))
    means = scores.nan_to_num(-1).mean(0)
    del stack
    bench.clear()
    best = int(means.argmax())
    return {
        "rate": rates[best],
        "at_edge": best in (0, len(rates) - 1),
        "tried": {str(rate): round(mean, 4) for rate, mean in zip(rates, means.tolist(), strict=True)},
    }


def report(
    bench: Bench,
    rival: Rival,
    people: People,
    lr: float,
    at: Sequence[int],
    seeds: Sequence[int],
    start: dict[str, Tensor] | None = None,
    down: DownSource | None = None,
) -> dict[str, Any]:
    """Train and score a method on all people and seeds at once."""
    rows = len(people.names) * len(seeds)
    stack = put_on(bench.base, rival, down or bench.down, bench.config, rows, list(seeds), start)
    curve: dict[str, Any] = {}
    if rival.moved:
        curve["0"] = {**bench.score(stack, people, rows, seeds), "seconds": 0.0}
    blocks: list[float] = []
    for done, blocks in bench.train(stack, people, rival, lr, at, len(seeds)):
        curve[str(done)] = {**bench.score(stack, people, rows, seeds), "seconds": round(sum(blocks) / rows, 4)}
    per_block = min(BLOCK, *at)
    result = {
        "label": rival.label,
        "note": rival.note,
        "learning_rate": lr,
        "parameters": stack.values.shape[1],
        "rows": rows,
        # The first block holds the recording of the graph.
        "step_seconds": [round(block / per_block / rows, 6) for block in blocks[1:] or blocks],
        "recorded_graph": bench.args.graph,
        "curve": curve,
    }
    del stack
    bench.clear()
    return result


def among_themselves(vectors: Tensor) -> list[float]:
    """`metrics.real_ceiling` of each person's photos (people, photos, d)."""
    return [round(real_ceiling(_seen(photos)), 4) for photos in vectors]


def _seen(vectors: Tensor) -> Embeddings:
    return Embeddings(vectors, torch.ones(len(vectors), dtype=torch.bool))


def mean_lora_start(bench: Bench) -> dict[str, Tensor]:
    """LoRAs of many meta people, trained from one start, averaged: what LoRA gets for a stage 1."""
    args, rival = bench.args, RIVALS["mean_lora"]
    examples = encode_subjects(bench.base, bench.read("meta", args.meta_people, 8), bench.config, 4, progress=False)
    people = People([], examples.to(bench.device), torch.empty(0), torch.empty(0), [], [])
    stack = put_on(bench.base, rival, bench.down, bench.config, args.meta_people, [0])
    for _ in bench.train(stack, people, rival, 3e-3, [args.mean_steps]):
        pass
    start = {name: tensor.mean(0) for name, tensor in stack.parameters.items()}
    del stack
    bench.clear()
    return start


def rivals(bench: Bench, file: File) -> None:
    args = bench.args
    held_out, tuned = bench.people("held-out", args.people), None
    seeds = list(range(args.seeds))
    if "base" not in file.data:
        rows = args.people * args.seeds
        file.put("base", bench.score(None, held_out, rows, seeds))
    if "real_photos" not in file.data:
        file.put("real_photos", among_themselves(held_out.others))
    mean_start = None
    spent = 0.0
    for name in args.method or RIVALS:
        rival = RIVALS[name]
        if name in file.data["methods"]:
            continue
        if bench.left < 1.1 * spent:
            raise OutOfTimeError
        begin = bench.now()
        if tuned is None and args.tune_people:
            tuned = bench.people("tune", args.tune_people)
        if name == "mean_lora":
            mean_start = mean_lora_start(bench)
        start = mean_start if name == "mean_lora" else None
        choice = tune(bench, rival, tuned, start) if tuned else tune(bench, rival, held_out, start)
        result = report(bench, rival, held_out, choice["rate"], args.at, seeds, start)
        spent = bench.now() - begin
        file.put(name, {**result, "tuning": choice, "wall_seconds": round(spent, 1)}, "methods")
        print(line(name, result), f"{spent:.0f} s, {bench.left:.0f} s left", flush=True)


def robustness(bench: Bench, file: File) -> None:
    """The same reference, made worse; how near are the images to the person on clean photos?"""
    args = bench.args
    subjects = bench.read("held-out", args.robust_people)
    conditions, references = [("clean", 0.0)], [subject.split()[0] for subject in subjects]
    folder = bench.home / "degraded"
    folder.mkdir(exist_ok=True)
    for name in (*DEGRADATIONS, "yaw"):
        for strength in STRENGTHS:
            conditions.append((name, strength))
            for number, subject in enumerate(subjects):
                photo = subject.split()[0]
                if name == "yaw":
                    image, caption = turned_photo("held-out", number, strength, RESOLUTION)
                else:
                    image, caption = degrade(load_image(photo.path), name, strength), photo.caption
                path = folder / f"{name}-{strength}-{number}.png"
                image.save(path)
                references.append(Photo(path, caption, True))
    people = bench.with_references(subjects * len(conditions), references)
    for name in ROBUST:
        if name in file.data["robustness"] or name not in file.data["methods"]:
            continue
        if bench.left < 15:
            raise OutOfTimeError
        rival, lr = RIVALS[name], file.data["methods"][name]["learning_rate"]
        curve = report(bench, rival, people, lr, [args.robust_steps], [0])["curve"][str(args.robust_steps)]
        count = len(subjects)
        table = {
            f"{condition} {strength}" if strength else condition: {
                metric: curve[metric][number * count : (number + 1) * count] for metric in METRICS
            }
            for number, (condition, strength) in enumerate(conditions)
        }
        file.put(name, table, "robustness")
        print("robustness", name, f"{bench.left:.0f} s left", flush=True)


def variants(bench: Bench, file: File) -> None:
    args = bench.args
    seeds = list(range(args.seeds))
    held_out = bench.people("held-out", args.people)
    tuned = bench.people("tune", args.tune_people) if args.tune_people else held_out
    at = [step for step in args.at if step <= HEADLINE] or args.at
    spent = 0.0
    for name, rival in VARIANTS.items():
        if name in file.data["variants"]:
            continue
        if bench.left < 1.1 * spent:
            raise OutOfTimeError
        begin = bench.now()
        choice = tune(bench, rival, tuned, None)
        result = report(bench, rival, held_out, choice["rate"], at, seeds)
        spent = bench.now() - begin
        file.put(name, {**result, "tuning": choice}, "variants")
        print("variant", line(name, result), f"{bench.left:.0f} s left", flush=True)
    examples = encode_subjects(bench.base, bench.read("meta", args.meta_people, 8), bench.config, 1, progress=False)
    spent = 0.0
    for how in DOWN_STARTS:
        if how in file.data["down_starts"]:
            continue
        if bench.left < 1.1 * spent:
            raise OutOfTimeError
        begin = bench.now()
        down, seconds = short_stage_1(bench, examples.to(bench.device), how)
        table: dict[str, Any] = {"stage_1_steps": args.stage_1_steps, "stage_1_seconds": round(seconds, 1)}
        for start in ("stored", "mean"):
            rival = RIVALS[f"meta_lora_{start}"]
            table[start] = report(bench, rival, held_out, args.variant_rate, at, [0], down=down)
            print("Down", line(f"{how} {start}", table[start]), f"{bench.left:.0f} s left", flush=True)
        file.put(how, table, "down_starts")
        spent = bench.now() - begin


def short_stage_1(bench: Bench, examples: Examples, how: str) -> tuple[DownSource, float]:
    """A short stage 1 from another start of Down; everything else is equal."""
    args, begin = bench.args, bench.now()
    config = MetaTrainConfig(
        pretrained_model_name_or_path=str(bench.domain.base_folder),
        output_dir=str(bench.home / f"down-{how}"),
        resolution=RESOLUTION,
        mixed_precision="no",
        max_train_steps=args.stage_1_steps,
        subjects_per_batch=min(32, args.meta_people),
        images_per_subject=2,
        learning_rate=2e-3,
        down_learning_rate=1e-3,
        warmup_steps=min(10, args.stage_1_steps - 1),
    )
    run = MetaTraining(bench.base, examples, config)
    denoiser = bench.base.denoiser
    if how == "eva":
        # Deep layers see what earlier ones make of noisy latents: the inputs of a training batch.
        index = torch.arange(0, len(examples.latents), max(1, len(examples.latents) // 64), device=bench.device)
        latents, text = examples.pick(index)
        generator = torch.Generator(bench.device).manual_seed(0)
        noise = torch.randn(latents.shape, generator=generator, device=bench.device)
        times = bench.base.sample_times(latents, generator)
        set_slots(denoiser, None)
        with torch.no_grad():
            init_down_from_data(denoiser, lambda: bench.base.loss(latents, text, noise, times), "stage_1")
    elif how != "uniform":
        for _, layer in meta_lora_layers(denoiser):
            start_down(layer.metalora_down["stage_1"].data, how, layer._rows_of_weight)
    for _ in run.steps():
        if bench.left < 0:
            raise OutOfTimeError
    run.finish().save(config.output_dir, config.pretrained_model_name_or_path)
    seconds = bench.now() - begin
    bench.clear()
    return hub.load_down(config.output_dir), seconds


class File:
    """One JSON file, whole at every moment."""

    def __init__(self, path: Path, resume: Path | None, empty: dict[str, Any]) -> None:
        self.path, self.data = path, empty
        earlier = resume / path.name if resume else None
        if earlier and earlier.exists():
            self.data = {**empty, **json.loads(earlier.read_text())}

    def put(self, name: str, value: Any, group: str | None = None) -> None:
        (self.data[group] if group else self.data)[name] = value
        self.write()

    def write(self) -> None:
        summarise(self.data)
        write(self.path, self.data)


def line(name: str, result: dict[str, Any]) -> str:
    """R-FaceSim / adherence after each number of steps, for the terminal."""
    cells = [
        f"{step}: {interval(scores['r_facesim'])['value']:.3f}/{interval(scores['prompt_adherence'])['value']:.3f}"
        for step, scores in result["curve"].items()
    ]
    return f"{name} lr {result['learning_rate']:g} " + " ".join(cells)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=("rivals", "robustness", "variants"))
    parser.add_argument("--method", action="append", choices=tuple(RIVALS), help="only these rivals")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start nothing that would end later")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run's results")
    parser.add_argument("--small", action="store_true", help="few people, methods and steps; rates are not chosen")
    parser.add_argument("--people", type=int)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--at", type=int, nargs="+", help="steps to score after")
    parser.add_argument("--tune-people", type=int)
    parser.add_argument("--tune-steps", type=int, default=HEADLINE)
    parser.add_argument("--robust-people", type=int)
    parser.add_argument("--robust-steps", type=int, default=HEADLINE)
    parser.add_argument("--meta-people", type=int, default=128)
    parser.add_argument("--mean-steps", type=int, default=200)
    parser.add_argument("--stage-1-steps", type=int, default=150)
    parser.add_argument("--variant-rate", type=float, default=3e-3)
    parser.add_argument("--views", type=int, default=32, help="crops of a reference")
    parser.add_argument("--inference-steps", type=int, default=INFERENCE_STEPS)
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    preset: dict[str, Any] = {"people": 32, "seeds": 3, "at": [25, 50, 100, 200, 300], "tune_people": 10}
    preset |= {"robust_people": 12, "part": ["rivals", "robustness", "variants"], "method": None}
    if args.small:
        preset |= {"people": 4, "seeds": 1, "at": [25, 50], "tune_people": 0, "robust_people": 1, "part": ["rivals"]}
        preset |= {"method": ["lora_r1", "meta_lora_stored", "meta_lora_mean", "random_down"]}
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse()
    bench = Bench(args)
    facts = {
        **origin(bench.device),
        "torch": torch.__version__,
        "subjects": args.people,
        "seeds": args.seeds,
        "prompts": len(bench.prompts),
        "headline_steps": HEADLINE if HEADLINE in args.at else max(args.at),
    }
    evaluation = File(
        args.output / "evaluation.json", args.resume, {**facts, "figures": {}, "methods": {}, "robustness": {}}
    )
    other = File(
        args.output / "variants.json", args.resume, {**facts, "figures": {}, "variants": {}, "down_starts": {}}
    )
    print(f"ready after {args.seconds - bench.left:.0f} s on {facts['machine']}", flush=True)
    parts = {"rivals": (rivals, evaluation), "robustness": (robustness, evaluation), "variants": (variants, other)}
    with vmap_ready():
        for name in parts:
            if name not in args.part:
                continue
            run, file = parts[name]
            try:
                run(bench, file)
            except OutOfTimeError:
                print(f"{name}: out of time, go on with --resume", flush=True)
                bench.clear()
    print(f"{args.seconds - bench.left:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
