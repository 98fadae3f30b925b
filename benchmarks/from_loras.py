# SPDX-License-Identifier: Apache-2.0
"""A Down and a subject space out of a collection of people's ordinary LoRAs, on the embedded domain: do they help?

    python benchmarks/from_loras.py --seconds 470 --output benchmarks/results
    python benchmarks/from_loras.py --small --output DIR

PEFT's LoRAs of people of `meta` are trained by the stacked step, from one common start (the same A, B 0) and each from
its own. Of them are made, layer by layer:

- a Down: the leading right singular vectors of all people's B A (`products`), of the same each as long as the others
  (`equal`), or of the factors A (`factors`); its mean subject is the nearest to the mean of the B A;
- a space: mean and leading directions of the people's Mid and Up in that Down, after weights2weights
  (arXiv 2406.09413). Mid and Up are A and B themselves where the start is common, turned towards the mean subject where
  it is not, or, with as many ranks as Down has, no matter of turns (`products`).

Each is an arm of a family, and learns people of `tune` from one photo at every rate; the best arm of each family, with
its rate, then learns the held-out people, once. Scores are after equal steps. Controls: the trained Down; a random one,
by itself and with the mean of the same LoRAs; one that starts from activations; a LoRA, from nothing and from the mean
LoRA. `kept` is how much of the LoRAs of people who had no part in it a Down holds. `from_loras.json` is written again
after each arm.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from lora_collection import Loras, codes_of, directions, down_source, kept, space_of, subjects_of
from origin import origin, write
from torch import Tensor, nn

from evaluation import BATCH, Bench, OutOfTimeError, People, among_themselves
from peft_metalora.checkpoint.space import SubjectSpace
from peft_metalora.demo.embedded import RESOLUTION
from peft_metalora.demo.scoring import INFERENCE_STEPS
from peft_metalora.encoder import EncoderConfig, make_encoder
from peft_metalora.evaluation.adapters import NAME
from peft_metalora.evaluation.rivals import RIVALS, Rival, put_on, vmap_ready
from peft_metalora.evaluation.summary import interval
from peft_metalora.training.engine.stacked import AdapterStack, Gradients, Recorded, train_stack
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_captions
from peft_metalora.tuner import init_down_from_data, set_slots
from peft_metalora.tuner.down import DOWN, DownSource
from peft_metalora.tuner.on_model import meta_lora_layers

CODE_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)  # numbers of a code have variance 1 over the people of the space
SHOWN = ("r_facesim", "prompt_adherence", "copied_background")
CONTROLS = ("random", "random, mean of LoRAs", "trained", "LoRA, mean of LoRAs")
SPACE_CONTROLS = ("space, random", "space, LoRA")
_SEEN = 64  # photos whose activations a Down starts from


# People, and what learns them.


class CodeStack:
    """What `train_stack` trains where a row is a code of a space, shown by a stack of adapters."""

    recordable: ClassVar[bool] = True

    def __init__(self, shown: AdapterStack, space: SubjectSpace, codes: Tensor) -> None:
        names = [name.rpartition(".")[0] for name in shown.parameters]
        self.shown, self.space = shown, space.ordered(names).to(codes.device)
        self.values, self.count = codes.clone(), len(codes)
        self.parameters = {"code": self.values}
        self.expand()

    def expand(self) -> None:
        """Show what the codes say now."""
        self.shown.values.copy_(self.space(self.values))

    def gradients(self, base: Any) -> Gradients:
        of_rows = self.shown.gradients(base)

        def of_codes(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            self.expand()
            losses, gradients = of_rows(inputs)
            return losses, gradients @ self.space.basis.T

        return of_codes


def draw_by_replays(stack: AdapterStack, wanted: bool) -> None:
    """Let a stack draw by replays of one recorded pass: to launch its kernels takes longer than they do."""
    install = stack.installed_in
    passes: list[Recorded[Tensor]] = []

    @contextmanager
    def installed_in(pipe: Any) -> Iterator[None]:
        with install(pipe):
            denoiser = pipe.transformer
            if not passes:
                eager = denoiser.forward
                passes.append(Recorded(lambda inputs: eager(**inputs, return_dict=False)[0], wanted))

            def forward(**given: Any) -> tuple[Tensor]:
                return (passes[0]({name: one for name, one in given.items() if isinstance(one, Tensor)}),)

            denoiser.forward = forward
            yield

    stack.installed_in = installed_in  # type: ignore[method-assign]


@dataclass
class Collected:
    """People of `meta`: photos (people * photos, 3, h, w) in [0, 1], as what is denoised, and how many of each."""

    images: Tensor
    examples: Examples
    photos: int


def collect(bench: Bench, count: int, photos: int) -> Collected:
    """Draw people and encode their photos, person by person; photo 0 of each is a reference."""
    domain, generator = bench.domain, torch.Generator().manual_seed(20_000)
    identity = domain.sample_identities(count, generator, "meta")
    scenes = domain.cat(
        [
            domain.sample_scenes(identity, generator, reference=True),
            domain.sample_scenes(identity.repeat(photos - 1, 1), generator),
        ]
    )[torch.arange(count * photos).view(photos, count).T.flatten()]
    identity = identity.repeat_interleave(photos, 0)
    parts, latents = [], []
    for start in range(0, len(identity), 512):
        part = slice(start, start + 512)
        parts.append(domain.render(identity[part].to(bench.device), scenes[part].to(bench.device)))
        latents.append(latents_of(bench, parts[-1]))
    texts = domain.captions(scenes)
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    examples = Examples(
        torch.cat(latents),
        encode_captions(bench.base, list(rows), batch_size=512),
        torch.tensor([rows[text] for text in texts]),
        torch.arange(count).repeat_interleave(photos),
    )
    return Collected(torch.cat(parts), examples.to(bench.device), photos)


@torch.no_grad()
def latents_of(bench: Bench, images: Tensor) -> Tensor:
    """Latents of images in [0, 1]."""
    return bench.base.latents_of(images.to(bench.device) * 2 - 1)


def train_loras(bench: Bench, people: Collected, common: bool) -> tuple[Loras, list[float]]:
    """LoRAs of all people, from one start or each from its own; and the R-FaceSim of some, on photos they learned."""
    args, count = bench.args, people.examples.num_subjects
    generator = torch.Generator(bench.device).manual_seed(1)
    kept_of: list[dict[str, Tensor]] = []
    scores: list[float] = []
    for first in range(0, count, args.together):
        numbers = list(range(first, min(first + args.together, count)))
        stack = put_on(bench.base, RIVALS["lora_r4"], bench.down, bench.config, len(numbers), [0])
        for name, tensor in stack.parameters.items():
            if not common and ".lora_A" in name:  # as PEFT draws it
                bound = 1 / math.sqrt(tensor.shape[-1])
                tensor.uniform_(-bound, bound, generator=generator)
        for _ in train_stack(
            bench.base,
            stack,
            people.examples,
            steps=args.lora_steps,
            batch_size=BATCH,
            lr=args.lora_rate,
            seed=first,
            numbers=numbers,
            graph=args.graph,
        ):
            if bench.left < 0:
                raise OutOfTimeError
        if not first:
            shown = min(args.people, len(numbers))
            some = AdapterStack(bench.base.denoiser, shown)
            some.values.copy_(stack.values[:shown])
            scores = bench.score(some, learned(bench, people, shown), shown, [0])["r_facesim"]
            del some
        kept_of.append({name: tensor.clone() for name, tensor in stack.parameters.items()})
        del stack
        bench.clear()
    return Loras.of({name: torch.cat([part[name] for part in kept_of]) for name in kept_of[0]}), scores


def learned(bench: Bench, people: Collected, count: int) -> People:
    """The first people of a collection, to be compared with their other photos."""
    images = people.images[: count * people.photos]
    vectors = bench.embedder.embed(images).vectors.unflatten(0, (count, people.photos))
    walls = [seen[bench.domain.backdrop] for seen in bench.judge.read(images[:: people.photos])]
    return People([str(one) for one in range(count)], people.examples, vectors[:, 0], vectors[:, 1:], walls, [])


def untrained(bench: Bench, people: Collected, meta_r: int, activations: bool) -> dict[str, Tensor]:
    """The rows of a Down as the library draws them, or as they start from activations."""
    config = dataclasses.replace(bench.down.config, meta_r=meta_r)
    put_on(bench.base, RIVALS["random_down"], dataclasses.replace(bench.down, config=config), bench.config, 1, [0])
    denoiser = bench.base.denoiser
    if activations:
        index = torch.arange(0, len(people.examples), max(1, len(people.examples) // _SEEN), device=bench.device)
        latents, text = people.examples.pick(index)
        generator = torch.Generator(bench.device).manual_seed(0)
        noise = torch.randn(latents.shape, generator=generator, device=bench.device)
        times = bench.base.sample_times(latents, generator)
        set_slots(denoiser, None)
        with torch.no_grad():
            init_down_from_data(denoiser, lambda: bench.base.loss(latents, text, noise, times), NAME)
    rows = {path: layer.metalora_down[NAME].detach().clone() for path, layer in meta_lora_layers(denoiser)}
    bench.clear()
    return rows


@dataclass
class Arm:
    """A way to learn a person.

    Attributes:
        name: of the arm in its family. down: that the rival gets. rival: see `evaluation.rivals`. rates: to choose
            from. start: where every row starts, by parameter name. space: whose codes are trained instead. read: codes
            (people, k) to start from, of people.
    """

    name: str
    down: DownSource
    rival: Rival
    rates: Sequence[float]
    start: dict[str, Tensor] | None = None
    space: SubjectSpace | None = None
    read: Callable[[People], Tensor] | None = None


def learn(
    bench: Bench, arm: Arm, people: People, at: Sequence[int], rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Any]:
    """Scores by rate and number of steps; rows are people, each with every rate or with the noise of every seed."""
    args, count = bench.args, len(people.names)
    each = max(len(rates), len(seeds))
    rows = count * each
    shown = put_on(bench.base, arm.rival, arm.down, bench.config, rows, list(seeds), arm.start)
    assert isinstance(shown, AdapterStack)
    draw_by_replays(shown, args.graph and bench.device.type == "cuda")
    stack: AdapterStack | CodeStack = shown
    if arm.space is not None:
        codes = torch.zeros(count, arm.space.code_size) if arm.read is None else arm.read(people)
        stack = CodeStack(shown, arm.space, codes.to(bench.device).repeat_interleave(each, 0))
    found: dict[str, Any] = {str(rate): {} for rate in rates}

    def look(done: int) -> None:
        if isinstance(stack, CodeStack):
            stack.expand()
        scores = bench.score(shown, people, rows, seeds if len(seeds) == each else [*seeds] * each)
        for number, rate in enumerate(rates):
            own = slice(number, None, each) if len(rates) > 1 else slice(None)
            found[str(rate)][str(done)] = {metric: scores[metric][own] for metric in SHOWN}

    if 0 in at:
        look(0)
    for done in train_stack(
        bench.base,
        stack,
        people.examples,
        steps=max(at),
        batch_size=BATCH,
        lr=torch.tensor(rates).repeat(rows // len(rates)),
        seed=0,
        numbers=[row // each for row in range(rows)],
        graph=args.graph,
    ):
        if bench.left < 0:
            raise OutOfTimeError
        if done in at:
            look(done)
    return found


def reading(bench: Bench, people: Collected, codes: Tensor, apart: int) -> tuple[Callable[[People], Tensor], float]:
    """An encoder that regresses codes (n, k) from a photo; and what share of them it explains, of the last people."""
    args, k = bench.args, codes.shape[1]
    config = EncoderConfig(resolution=RESOLUTION, code_size=k, dropout=0.2)
    encoder = make_encoder(config, bench.base.encode_images, 0).to(bench.device)
    # Without the encoder's last norm: what a photo does not tell is to be left out, which makes a code shorter.
    network = nn.Sequential(encoder.trunk, encoder.head)
    latents = people.examples.latents.unflatten(0, (-1, people.photos))
    known = len(codes) - apart
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.reading_steps)
    generator = torch.Generator(bench.device).manual_seed(0)
    for _ in range(args.reading_steps):
        who, which = (
            torch.randint(most, (128,), generator=generator, device=bench.device) for most in (known, people.photos)
        )
        loss = (network(latents[who, which]) - codes[who]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    with torch.no_grad():
        wanted = codes[known:]
        left = (network(latents[known:, 0]) - wanted).square().sum() / wanted.square().sum()

    @torch.no_grad()
    def read(others: People) -> Tensor:
        images = [torch.from_numpy(np.array(photo.load())) for photo in others.learned]
        return network(latents_of(bench, torch.stack(images).permute(0, 3, 1, 2) / 255))

    return read, 1 - float(left)


# The comparison.


class Collection:
    """LoRAs of a collection of people, and the arms that are made of them.

    Attributes:
        loras: by start, `common` and `many`; of all people. part: who takes part in Downs and spaces; the others are
            apart. facts: what was seen on the way.
    """

    def __init__(self, bench: Bench) -> None:
        args = self.args = bench.args
        self.bench, self.like = bench, bench.down
        self.part, self.apart = slice(0, args.meta_people - args.apart), slice(-args.apart, None)
        self.facts: dict[str, Any] = {"loras": {}, "kept": {}, "explained": {}}
        self.loras: dict[str, Loras] = {}
        self._directions: dict[tuple[str, str], dict[str, Tensor]] = {}

    def train(self) -> None:
        """Draw the people and train their LoRAs."""
        bench, args = self.bench, self.args
        self.people = collect(bench, args.meta_people, args.photos)
        for start in args.starts:
            begin = bench.now()
            self.loras[start], scores = train_loras(bench, self.people, start == "common")
            self.facts["loras"][start] = {"r_facesim": scores, "seconds": round(bench.now() - begin, 1)}
            print(f"LoRAs, {start}: {interval(scores)['value']:.3f}, {bench.left:.0f} s left", flush=True)

    def families(self) -> dict[str, Callable[[], list[Arm]]]:
        """What makes the arms of each family, the most needed first."""
        whole = self.like.config.meta_r
        made: dict[str, Callable[[], list[Arm]]] = {
            "random": lambda: self.drawn(whole, "random", False),
            "random, mean of LoRAs": lambda: self.drawn(whole, "random", True),
            "common": lambda: self.from_loras(whole, "common"),
            "many": lambda: self.from_loras(whole, "many"),
            "trained": self.trained,
            "LoRA, mean of LoRAs": self.mean_lora,
            "space, common": lambda: self.spaces("common", ("factors", "products")),
            "space, LoRA": self.lora_space,
            "space, many": lambda: self.spaces("many", ("turned", "products")),
            "space, random": lambda: self.space_on(self.drawn(whole, "random", True)[0].down),
        }
        for rows in self.args.meta_r:
            made |= {
                f"random, {rows} rows": lambda rows=rows: self.drawn(rows, "random", False),
                f"random, mean of LoRAs, {rows} rows": lambda rows=rows: self.drawn(rows, "random", True),
                f"common, {rows} rows": lambda rows=rows: self.from_loras(rows, "common"),
                f"many, {rows} rows": lambda rows=rows: self.from_loras(rows, "many"),
            }
        return made | {
            "LoRA": lambda: [Arm("new", self.like, RIVALS["lora_r4"], RIVALS["lora_r4"].rates)],
            "space, common, read": self.read,
            "space, trained": lambda: self.space_on(self.like),
            "activations": lambda: self.drawn(whole, "activations", False),
            "activations, mean of LoRAs": lambda: self.drawn(whole, "activations", True),
        }

    def keeps(self, name: str, downs: Mapping[str, Tensor]) -> None:
        """Note what Downs keep of the LoRAs of people who are apart."""
        self.facts["kept"][name] = {start: round(kept(one[self.apart], downs), 4) for start, one in self.loras.items()}

    def directions(self, start: str, how: str, meta_r: int) -> dict[str, Tensor]:
        """The rows of a Down of a start's LoRAs."""
        if (start, how) not in self._directions:
            self._directions[start, how] = directions(self.loras[start][self.part], how)
        return {module: rows[:meta_r] for module, rows in self._directions[start, how].items()}

    def trained(self) -> list[Arm]:
        self.keeps("trained", rows_in(self.like, self.bench.device))
        return [_arm(name, self.like) for name in ("mean", "stored")]

    def drawn(self, meta_r: int, how: str, moved: bool) -> list[Arm]:
        """On a Down of no LoRAs, with a new Mid or from the mean of LoRAs of one start."""
        rows = untrained(self.bench, self.people, meta_r, how == "activations")
        self.keeps(f"{how}, {meta_r} rows", rows)
        loras = self.loras["common"][self.part] if moved else None
        return [_arm("mean" if moved else "stored", down_source(self.like, rows, loras, self.args.rank))]

    def from_loras(self, meta_r: int, start: str) -> list[Arm]:
        loras, found = self.loras[start][self.part], []
        for how in ("products", "equal", "factors") if meta_r == self.like.config.meta_r else ("products",):
            rows = self.directions(start, how, meta_r)
            self.keeps(f"{start}, {how}, {meta_r} rows", rows)
            down = down_source(self.like, rows, loras, self.args.rank)
            found += [_arm(name, down, f"{how}, {name}") for name in ("mean", "stored")[: 1 + (how == "products")]]
        return found

    def mean_lora(self) -> list[Arm]:
        loras, rival = self.loras["common"][self.part], RIVALS["mean_lora"]
        halves = {"A": loras.a, "B": loras.b}
        start = {
            f"{module}.lora_{half}.{NAME}.weight": part.mean(0)
            for half, parts in halves.items()
            for module, part in parts.items()
        }
        return [Arm("mean", self.like, rival, rival.rates, start)]

    def spaces(self, start: str, ways: Sequence[str]) -> list[Arm]:
        """Codes on the Down of a start's LoRAs."""
        loras, found = self.loras[start][self.part], []
        rows = self.directions(start, "products", self.like.config.meta_r)
        for how in ways:
            rank = len(next(iter(rows.values()))) if how == "products" else self.args.rank
            found.append(self._codes(how, down_source(self.like, rows, loras, rank), start))
        return found

    def space_on(self, down: DownSource) -> list[Arm]:
        """Codes on another Down, of the LoRAs of one start."""
        return [self._codes("factors", down, "common")]

    def _codes(self, how: str, down: DownSource, start: str) -> Arm:
        subjects = subjects_of(self.loras[start][self.part], down, how)
        space = space_of(subjects, self._k, down.fingerprint)
        return Arm(how, down, RIVALS["meta_lora_mean"], CODE_RATES, space=space)

    def lora_space(self) -> list[Arm]:
        """Codes of LoRAs without a Down, as weights2weights has them."""
        loras = self.loras["common"][self.part]
        subjects = {f"{module}.lora_A.{NAME}": one for module, one in loras.a.items()}
        subjects |= {f"{module}.lora_B.{NAME}": one for module, one in loras.b.items()}
        return [Arm("factors", self.like, RIVALS["lora_r4"], CODE_RATES, space=space_of(subjects, self._k, ""))]

    def read(self) -> list[Arm]:
        """Codes from where an encoder begins that was taught the codes of the collection."""
        arm = self.spaces("common", ("factors",))[0]
        assert arm.space is not None
        codes = codes_of(arm.space, subjects_of(self.loras["common"], arm.down, "factors"))
        read, explained = reading(self.bench, self.people, codes, self.args.apart)
        self.facts["explained"]["space, common, read"] = round(explained, 4)
        return [dataclasses.replace(arm, read=read)]

    @property
    def _k(self) -> int:
        return min(self.args.k, self.part.stop - 1)


def rows_in(down: DownSource, device: torch.device) -> dict[str, Tensor]:
    """The rows of a Down by module."""
    suffix = f".{DOWN}"
    return {name.removesuffix(suffix): rows.to(device) for name, rows in down.tensors.items() if name.endswith(suffix)}


def _arm(start: str, down: DownSource, name: str = "") -> Arm:
    rival = RIVALS[f"meta_lora_{start}"]
    return Arm(name or start, down, rival, rival.rates)


def compare(bench: Bench, makes: Callable[[], list[Arm]], tune: People, people: People) -> dict[str, Any]:
    """What is best of a family for `tune` people after the most steps, arm and rate; and its curve on other people."""
    args, last = bench.args, max(bench.args.at)
    tried: dict[str, dict[str, float]] = {}
    best: tuple[float, float, Arm] | None = None
    for arm in makes():
        first = max(0, (len(arm.rates) - args.rates) // 2)
        rates = arm.rates[first : first + args.rates]
        tried[arm.name] = {}
        for rate, curve in learn(bench, arm, tune, [last], rates, [0]).items():
            score = interval(curve[str(last)]["r_facesim"])["value"]
            tried[arm.name][rate] = round(score, 4)
            if best is None or score > best[0]:
                best = score, float(rate), arm
        bench.clear()
    assert best is not None
    _, rate, arm = best
    curve = learn(bench, arm, people, [0, *args.at], [rate], list(range(args.seeds)))[str(rate)]
    bench.clear()
    return {"arm": arm.name, "rate": rate, "tried": tried, "curve": curve}


def figures(families: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Scores of each family by steps, and what its R-FaceSim has more than others', person by person."""
    shown = {
        name: {step: {metric: interval(one, seeds) for metric, one in scores.items()} for step, scores in found.items()}
        for name, found in ((name, one["curve"]) for name, one in families.items())
    }
    differences = {}
    for name, one in families.items():
        rows = name.partition(", ")[2] if name.endswith(" rows") else ""
        for control in (*CONTROLS, *SPACE_CONTROLS) if name.startswith("space") else CONTROLS:
            other = families.get(f"{control}, {rows.rpartition(', ')[2]}" if rows else control) or families.get(control)
            if other is not None and other is not one:
                differences[f"{name} - {control}"] = {
                    step: interval(_less(scores, other["curve"][step]), seeds) for step, scores in one["curve"].items()
                }
    return {"scores": shown, "differences": differences}


def _less(scores: Mapping[str, Any], others: Mapping[str, Any]) -> list[float]:
    return [own - other for own, other in zip(scores["r_facesim"], others["r_facesim"], strict=True)]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop then; what is done is kept")
    parser.add_argument("--small", action="store_true", help="a few people, steps and rates: does it run?")
    parser.add_argument("--family", action="append", help="only these")
    parser.add_argument("--starts", nargs="+", default=["common", "many"], choices=("common", "many"), help="of LoRAs")
    parser.add_argument("--meta-people", type=int, default=384, help="whose LoRAs are collected")
    parser.add_argument("--apart", type=int, default=32, help="of them, without a part in Downs and spaces")
    parser.add_argument("--photos", type=int, default=8, help="of each")
    parser.add_argument("--lora-steps", type=int, default=200)
    parser.add_argument("--lora-rate", type=float, default=3e-3)
    parser.add_argument("--together", type=int, default=128, help="LoRAs that are trained at once")
    parser.add_argument("--rank", type=int, default=4, help="of subjects; LoRAs have 4")
    parser.add_argument("--meta-r", type=int, nargs="*", default=[8], help="further sizes of Downs")
    parser.add_argument("--k", type=int, default=128, help="numbers of a code")
    parser.add_argument("--reading-steps", type=int, default=2000)
    parser.add_argument("--people", type=int, default=32)
    parser.add_argument("--split", default="held-out", choices=("held-out", "tune"), help="whom figures are of")
    parser.add_argument("--tune-people", type=int, default=10)
    parser.add_argument("--rates", type=int, default=5, help="how many of an arm's are tried, those in the middle")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at", type=int, nargs="+", default=[25, 50, 100], help="steps to score after")
    parser.add_argument("--views", type=int, default=32)
    parser.add_argument("--inference-steps", type=int, default=INFERENCE_STEPS)
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="eager steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    small = {"meta_people": 6, "apart": 2, "photos": 2, "lora_steps": 2, "together": 4, "k": 3, "reading_steps": 2}
    small |= {"people": 2, "tune_people": 2, "rates": 1, "seeds": 1, "at": [2], "views": 2, "inference_steps": 1}
    if parser.parse_known_args(argv)[0].small:
        parser.set_defaults(**small)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    bench = Bench(args)
    report: dict[str, Any] = {**origin(bench.device), "split": args.split, "people": args.people, "seeds": args.seeds}
    report |= {"meta_people": args.meta_people, "prompts": len(bench.prompts), "figures": {}, "families": {}}
    args.output.mkdir(parents=True, exist_ok=True)
    collection = Collection(bench)
    families = collection.families()
    names = args.family or list(families)
    if unknown := set(names) - set(families):
        raise SystemExit(f"expected families among {', '.join(families)}, found {', '.join(unknown)}")
    report["collection"] = collection.facts
    with vmap_ready():
        try:
            collection.train()
            tune, people = (
                bench.people(split, count) for split, count in (("tune", args.tune_people), (args.split, args.people))
            )
            report["real_photos"] = among_themselves(people.others)
            for name in names:
                found = report["families"][name] = compare(bench, families[name], tune, people)
                report["figures"] = figures(report["families"], args.seeds)
                write(args.output / "from_loras.json", report)
                shown = {step: line(one) for step, one in report["figures"]["scores"][name].items()}
                print(f"{name}: {found['arm']}, rate {found['rate']:g}", shown, f"{bench.left:.0f} s left", flush=True)
        except OutOfTimeError:
            print("out of time", flush=True)


def line(scores: Mapping[str, Any]) -> str:
    """R-FaceSim / adherence / copied wall, for the terminal."""
    return "/".join(f"{scores[metric]['value']:.3f}" for metric in SHOWN)


if __name__ == "__main__":
    main()
