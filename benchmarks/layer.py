# SPDX-License-Identifier: Apache-2.0
"""What a Meta-LoRA layer costs on FLUX.1-dev's shapes, beside the bare base and PEFT's LoRA, in one run.

Random weights, bf16, 512 x 512 px (1024 image and 512 text tokens), adapters on all attention layers (266 linears).

    python benchmarks/layer.py                 one GPU with 80 GB, 15 minutes; writes benchmarks/results/layer.json
    python benchmarks/layer.py --part train    one part; figures of the others stay as the file has them
    python benchmarks/layer.py --part train --batch 4 --seconds 400    one batch, with no new round after that time
    python benchmarks/layer.py --part host     prints what a call of a tiny layer costs one thread of this CPU; seconds
    python benchmarks/layer.py --small         a toy transformer on a CPU, to check the script (--no-compile: seconds)

All variants stand side by side on one set of base weights and are timed in turns, one call each, so that a drifting
clock meets all alike; figures are medians over the rounds, of times and of ratios within a round. At batch 1 a call is
bound by the Python of the host, which varies far more than the GPU: there are four times the rounds. On a CPU, "memory"
is the bytes that autograd saves for backward.

LoRA trains in each way that people train it: factors in float32 as they are or under bfloat16 autocast, or in bfloat16;
as it is written, with compiled blocks, and as a CUDA graph, which is recorded by the same code as ours, of both. All
steps have fused AdamW and no checkpointing. `eager` compares a step of ours, which is recorded by itself, with LoRA's
fastest eager one; `graphed`, `compiled` and `compiled_graph` like with like; `best` the fastest of both. `frozen` is
the floor: the base alone, through which a gradient goes to the biases of its embedders. What cannot be run is left out,
and the details say why. `default` is what the README shows: a pipeline that loads a folder, and calls.

The part `quantized` has three double and six single blocks, written to disk and quantised as they are loaded."""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import tempfile
import time
import timeit
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clock import forget_peak, median_of, once, peak_gib
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from flux_dev import ATTENTION, Flux
from origin import origin, write
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from peft_metalora import enable_meta_lora, save_down, save_subject
from peft_metalora.bases.memory import QUANTIZERS, Whole, quantization
from peft_metalora.errors import MetaLoraError
from peft_metalora.training.engine.replay import WARM_UP, ReplayedLoss
from peft_metalora.tuner import MetaLoraConfig, fold, set_slots
from peft_metalora.tuner.on_model import meta_lora_layers

PARTS = "forward", "train", "compiled", "quantized"
HOST = "host"
FACTORS = "fp32", "autocast", "bf16"


class Way(NamedTuple):
    """How a step is trained: the precision of factors and products ("own": as they are), and what runs it."""

    factors: str
    run: str

    def __str__(self) -> str:
        return f"{self.factors}_{self.run}"


class Bench:
    """A model, its inputs and a clock."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.repeats, self.small = arguments.repeats, arguments.small
        self.batches, self.compile_too = arguments.batch, not arguments.no_compile
        self.until = time.monotonic() + arguments.seconds
        blocks = arguments.layers
        changes = {"num_layers": blocks[0], "num_single_layers": blocks[1]} if blocks else {}
        self.flux = Flux(arguments.small, **changes)
        self.model, self.inputs, self.forward = self.flux.model, self.flux.inputs, self.flux.forward
        self.meta_r, self.lora_r = (8, 4) if arguments.small else (128, 16)
        self.results: dict[str, float] = {}  # milliseconds and GiB
        self.ratios: dict[str, float] = {}
        self.fastest: dict[str, str] = {}  # which way of LoRA was
        self.left_out: dict[str, str] = {}  # and why

    def in_turns(self, models: dict[str, nn.Module], batch: int, rounds: int, held: str = "") -> None:
        """Time all models in turns; note each one's median, and the medians of its ratios to the base and to LoRA."""
        runs = {name: self.forward(model, batch) for name, model in models.items()}
        for run in (*runs.values(), *runs.values()):
            run()
        gc.collect()
        gc.disable()  # its pauses would be one variant's
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(once(run, self.flux.device))
        gc.enable()
        for name, values in times.items():
            self.note(f"{name}{held}_b{batch}", statistics.median(values))
            for other in ("base", "lora_r1"):
                ratio = statistics.median(one / two for one, two in zip(values, times[other], strict=True))
                self.ratios[f"{name}_over_{other}{held}_b{batch}"] = round(ratio, 4)

    def note(self, name: str, value: float, unit: str = "ms") -> None:
        self.results[name] = round(value * 1000 if unit == "ms" else value, 6)
        print(f"{name:<40}{self.results[name]:>12.3f} {unit}", flush=True)

    # ---- adapters ------------------------------------------------------------------------------------------------

    def lora(self, r: int, model: Any = None) -> Any:
        model = model or self.flux.twin()
        config = LoraConfig(r=r, lora_alpha=r, target_modules=ATTENTION, init_lora_weights=False)
        inject_adapter_in_model(config, model)
        return model

    def meta_lora(self, slots: int = 1, model: Any = None) -> Any:
        """A subject on a Down that a second adapter of the model holds."""
        model = model or self.flux.twin()
        shared = {"r": 1, "lora_alpha": 1, "meta_r": self.meta_r, "target_modules": ATTENTION, "init_weights": False}
        inject_adapter_in_model(MetaLoraConfig(**shared), model, "down")
        subject = MetaLoraConfig(**shared, stage="subject", down="down", num_slots=slots)
        inject_adapter_in_model(subject, model, "subject")
        for _, layer in meta_lora_layers(model):
            layer.set_adapter("subject")
            down = layer.metalora_down["down"]
            down.data = down.data.to(self.flux.dtype)  # as one lies there that a subject brings along
        return model

    def default(self) -> Any:
        """A subject that a pipeline has loaded from a folder, as the README shows."""
        trained = self.meta_lora()
        with tempfile.TemporaryDirectory() as place:
            save_down(f"{place}/down", trained, "down")
            save_subject(f"{place}/someone", trained, "subject", down=f"{place}/down", fold=False)
            nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
            scheduler = FlowMatchEulerDiscreteScheduler()
            pipe = enable_meta_lora(FluxPipeline(scheduler=scheduler, transformer=self.flux.twin(), **nothing))
            pipe.load_meta_lora(f"{place}/someone")
        return pipe.transformer

    def frozen(self) -> Any:
        """The base alone, with a gradient that goes all the way back to the biases of its embedders."""
        model = self.flux.twin()
        for embedder in (model.x_embedder, model.context_embedder):
            embedder.bias = nn.Parameter(embedder.bias.detach().clone())
        return model

    def variants(self) -> dict[str, Any]:
        """The base, LoRA and a subject in each state. The merged one has its own copy of the adapted weights."""
        found = {"base": self.model, "lora_r1": self.lora(1), f"lora_r{self.lora_r}": self.lora(self.lora_r)}
        found["unfolded"], found["folded"], found["merged"] = (self.meta_lora() for _ in range(3))
        fold(found["folded"])
        for _, layer in meta_lora_layers(found["merged"]):
            layer.merge()
        found["default"] = self.default()
        return found

    # ---- training ------------------------------------------------------------------------------------------------

    def step(self, model: Any, batch: int, way: Way) -> tuple[Callable[[], None], ReplayedLoss]:
        """A training step: forward, backward, fused AdamW; and what records its passes."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained if way.factors in FACTORS else ():
            parameter.data = parameter.data.to(torch.bfloat16 if way.factors == "bf16" else torch.float32)
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        inputs, device = self.inputs(batch), self.flux.device
        target = torch.randn_like(inputs["hidden_states"])

        def loss(given: dict[str, Tensor], _: object) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=way.factors == "autocast"):
                output = model(**given, return_dict=False)[0]
            return (output.float() - target.float()).square().mean()

        recorded = way.run.endswith("graph") and device.type == "cuda"
        replayed = ReplayedLoss(loss, model, trained, why_not=None if recorded else "as it is written")

        def run() -> None:
            replayed(inputs).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run, replayed

    def train(self, model: Any, batch: int, way: Way) -> tuple[float, float]:
        """Seconds of a step, and the peak of memory in GiB."""
        model.train()
        if way.run.startswith("compiled"):
            torch._dynamo.reset()
            model.compile_repeated_blocks(fullgraph=True)
        forget_peak(self.flux.device)
        step, replayed = self.step(model, batch, way)
        try:
            seconds = median_of(step, self.flux.device, self.repeats, warm_up=WARM_UP + 2)
            if way.run.endswith("graph") and not self.small and replayed.why_not is not None:
                raise RuntimeError(f"not recorded: {replayed.why_not}")
            peak = self.peak(step)
        finally:
            for module in model.modules():
                module._compiled_call_impl = None
            model.eval()
            model.zero_grad(set_to_none=True)
        del step, replayed
        gc.collect()
        return seconds, peak

    def peak(self, step: Callable[[], None]) -> float:
        """GiB that a step took at the most."""
        peak = peak_gib(self.flux.device)
        if peak is None:
            saved = 0

            def count(tensor: Tensor) -> Tensor:
                nonlocal saved
                saved += tensor.nbytes
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                step()
            peak = saved / 2**30
        return peak

    def training(self, batch: int, rounds: int = 3) -> Iterator[None]:
        """Every way of LoRA's and ours in turns, then the compiled ones once, as compiling takes minutes.

        Yields whenever there are figures.
        """
        models = {"lora_r1": self.lora(1), "subject": self.meta_lora(), "frozen": self.frozen()}
        turns = [("lora_r1", Way(factors, run)) for factors in FACTORS for run in ("eager", "graph")]
        turns += [("subject", Way("fp32", run)) for run in ("eager", "graph")] + [("frozen", Way("own", "graph"))]
        compiled = [("subject", Way("fp32", "compiled")), ("lora_r1", Way("bf16", "compiled"))]
        compiled += [(name, way._replace(run="compiled_graph")) for name, way in compiled]
        compiled += [("frozen", Way("own", "compiled_graph")), ("lora_r1", Way("autocast", "compiled"))]
        steps: dict[tuple[str, Way], list[float]] = {}
        for number in range(rounds + 1):
            if number == rounds and not self.compile_too:
                break
            for name, way in turns if number < rounds else compiled:
                if (number and time.monotonic() > self.until) or f"{name}_{way}_b{batch}" in self.left_out:
                    continue
                self.turn(models[name], name, way, batch, steps)
            found = {which: statistics.median(values) for which, values in steps.items()}
            for (name, way), seconds in found.items():
                self.note(f"{name}_{way}_step_b{batch}", seconds)
            self.compare(found, steps, batch)
            yield

    def turn(self, model: Any, name: str, way: Way, batch: int, steps: dict[tuple[str, Way], list[float]]) -> None:
        """Time a way once more, or note why it cannot be."""
        gc.collect()
        gc.disable()  # its pauses would be one variant's
        try:
            seconds, peak = self.train(model, batch, way)
        except RuntimeError as error:
            self.left_out[f"{name}_{way}_b{batch}"] = f"{type(error).__name__}: {error}"[:2000]
            steps.pop((name, way), None)
            print(f"{name} {way} left out: {error}", flush=True)
        else:
            steps.setdefault((name, way), []).append(seconds)
            self.results[f"{name}_{way}_memory_b{batch}"] = round(peak, 4)
        finally:
            gc.enable()

    def compare(self, found: dict[Any, float], steps: dict[Any, list[float]], batch: int) -> None:
        """Ratios of our steps to LoRA's: to one way of it within a round, to its fastest."""

        def within_rounds(ours: Way, theirs: Way, of: str = "subject") -> float:
            pairs = zip(steps[of, ours], steps["lora_r1", theirs], strict=False)
            return round(statistics.median(one / two for one, two in pairs), 4)

        ways = {of: {way: t for (name, way), t in found.items() if name == of} for of in ("lora_r1", "subject")}

        def fastest(of: str, *runs: str) -> Way:
            return min((way for way in ways[of] if way.run in runs), key=lambda way: ways[of][way])

        eager, pairs = Way("fp32", "eager"), {}
        pairs["eager"] = fastest("subject", "graph", "eager"), fastest("lora_r1", "eager")  # ours is recorded by itself
        for rival, run in (("graphed", "graph"), ("compiled", "compiled"), ("compiled_graph", "compiled_graph")):
            if all(any(way.run == run for way in of) for of in ways.values()):
                pairs[rival] = Way("fp32", run), fastest("lora_r1", run)
            if rival in pairs and ("frozen", Way("own", run)) in steps:
                floor = within_rounds(Way("own", run), pairs[rival][1], "frozen")
                self.ratios[f"frozen_step_over_{rival}_lora_r1_b{batch}"] = floor
        pairs["best"] = tuple(min(of, key=lambda way: of[way]) for of in (ways["subject"], ways["lora_r1"]))
        self.ratios[f"subject_step_over_lora_r1_b{batch}"] = within_rounds(eager, eager)
        for rival, (ours, theirs) in pairs.items():
            self.ratios[f"step_over_{rival}_lora_r1_b{batch}"] = within_rounds(ours, theirs)
            memory = self.results[f"subject_{ours}_memory_b{batch}"] / self.results[f"lora_r1_{theirs}_memory_b{batch}"]
            self.ratios[f"memory_over_{rival}_lora_r1_b{batch}"] = round(memory, 4)
            self.fastest[f"{rival}_b{batch}"] = f"{ours} / {theirs}"
        memory = self.results[f"subject_{eager}_memory_b{batch}"] / self.results[f"lora_r1_{eager}_memory_b{batch}"]
        self.ratios[f"subject_memory_over_lora_r1_b{batch}"] = round(memory, 4)

    # ---- compiled ------------------------------------------------------------------------------------------------

    def compiled(self) -> None:
        """The base, a folded subject and the default road, each kind of block compiled once; timed in turns."""
        torch._dynamo.reset()
        models = {"base": self.model, "folded": self.meta_lora(), "default": self.default()}
        fold(models["folded"])
        runs = {}
        for name, model in models.items():
            model.compile_repeated_blocks(fullgraph=True)
            runs[name] = self.forward(model, 4)
            for _ in range(3):
                runs[name]()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                times[name].append(once(run, self.flux.device))
        for name, values in times.items():
            self.note(f"{name}_compiled_b4", statistics.median(values))
            ratios = [one / two for one, two in zip(values, times["base"], strict=True)]
            self.ratios[f"{name}_over_base_compiled_b4"] = round(statistics.median(ratios), 4)
        for model in models.values():
            for module in model.modules():
                module._compiled_call_impl = None

    # ---- quantised -----------------------------------------------------------------------------------------------

    def quantized(self) -> None:
        """The base, LoRA and a subject in each state, on weights of fewer bits."""
        few = Flux(self.small, num_layers=3, num_single_layers=6) if not self.small else self.flux
        with tempfile.TemporaryDirectory() as place:
            few.model.save_pretrained(place)
            for kind in QUANTIZERS:
                torch._dynamo.reset()

                def load(kind: str = kind) -> Any:
                    recipe = None if kind == "none" else quantization(Whole(kind), few.model, few.dtype)
                    options = {"quantization_config": recipe, "torch_dtype": few.dtype}
                    model = FluxTransformer2DModel.from_pretrained(place, **options)
                    return model.to(few.device).eval().requires_grad_(False)

                try:
                    models = {"base": load(), "lora_r1": self.lora(1, load())}
                    models["unfolded"], models["folded"], merged = (self.meta_lora(1, load()) for _ in range(3))
                except (ImportError, ValueError, RuntimeError) as error:
                    self.left_out[kind] = f"{type(error).__name__}: {error}"[:2000]
                    continue
                fold(models["folded"])
                try:
                    for _, layer in meta_lora_layers(merged):
                        layer.merge()
                    models["merged"] = merged
                except MetaLoraError as error:
                    self.left_out[f"merged_{kind}"] = str(error)
                for batch in (1, 4):
                    self.in_turns(models, batch, 4 * self.repeats // batch, f"_{kind}")

    # ---- the run -------------------------------------------------------------------------------------------------

    def forwards(self) -> None:
        """Inference at batch 1 and 4."""
        models = self.variants()
        self.in_turns(models, 1, 4 * self.repeats)
        models["four_subjects_unfolded"], models["four_subjects_folded"] = self.meta_lora(4), self.meta_lora(4)
        for name in ("four_subjects_unfolded", "four_subjects_folded"):
            set_slots(models[name], [0, 1, 2, 3])
        fold(models["four_subjects_folded"])
        self.in_turns(models, 4, self.repeats)

    def run(self, parts: Sequence[str]) -> Iterator[None]:
        """Run the parts; yields whenever there are new figures."""
        if "forward" in parts:
            self.forwards()
            yield
        for batch in self.batches if "train" in parts else ():
            yield from self.training(batch)
        if self.compile_too and "compiled" in parts and time.monotonic() < self.until:
            self.compiled()
            yield
        if "quantized" in parts and time.monotonic() < self.until:
            self.quantized()
            yield

    def figures(self) -> dict[str, float]:
        names = {
            "unfolded_over_lora_r1_b4": "unfolded_over_lora_r1_b4",
            "folded_over_base_b1": "folded_over_base_b1",
            "folded_over_base_b4": "folded_over_base_b4",
            "unfolded_over_base_b4": "unfolded_over_base_b4",
            "default_over_base_b1": "default_over_base_b1",
            "default_over_base_b4": "default_over_base_b4",
            "folded_over_base_compiled_b4": "folded_over_base_compiled_b4",
            "default_over_base_compiled_b4": "default_over_base_compiled_b4",
            "merged_over_base_b4": "merged_over_base_b4",
            "train_step_over_lora_r1_b4": "subject_step_over_lora_r1_b4",
            "train_mem_over_lora_r1_b4": "subject_memory_over_lora_r1_b4",
            "train_step_over_eager_lora_r1_b1": "step_over_eager_lora_r1_b1",
            "train_step_over_graphed_lora_r1_b1": "step_over_graphed_lora_r1_b1",
            "train_step_over_compiled_lora_r1_b1": "step_over_compiled_lora_r1_b1",
            "train_step_over_best_lora_r1_b1": "step_over_best_lora_r1_b1",
            "train_step_over_graphed_lora_r1_b4": "step_over_graphed_lora_r1_b4",
            "train_step_over_best_lora_r1_b4": "step_over_best_lora_r1_b4",
            "frozen_step_over_graphed_lora_r1_b1": "frozen_step_over_graphed_lora_r1_b1",
            "frozen_step_over_graphed_lora_r1_b4": "frozen_step_over_graphed_lora_r1_b4",
            **{
                f"{state}_over_base_{kind}_b{batch}": f"{state}_over_base_{kind}_b{batch}"
                for kind in QUANTIZERS[1:]
                for state in ("lora_r1", "unfolded", "folded", "merged")
                for batch in (1, 4)
            },
            "train_mem_over_graphed_lora_r1_b4": "memory_over_graphed_lora_r1_b4",
            "train_mem_over_best_lora_r1_b4": "memory_over_best_lora_r1_b4",
        }
        return {name: self.ratios[source] for name, source in names.items() if source in self.ratios}


def host(calls: int = 200) -> dict[str, float]:
    """Microseconds of one thread for a call of a layer 64 x 64 with four tokens: there Python is all that counts."""
    import bitsandbytes
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def layer(kind: str) -> nn.Module:
        torch.manual_seed(0)
        holder = nn.Sequential(nn.Linear(64, 64))
        if kind == "int8":
            quantize_(holder, Int8WeightOnlyConfig())
        elif kind == "nf4":
            plain = holder[0].state_dict()
            holder[0] = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
            holder[0].load_state_dict(plain)
            holder[0].to("cpu")
        return holder.requires_grad_(False).eval()

    def ours(kind: str) -> nn.Module:
        holder, shared = layer(kind), {"r": 1, "lora_alpha": 1, "meta_r": 2, "target_modules": ["0"]}
        inject_adapter_in_model(MetaLoraConfig(**shared), holder, "down")
        subject = MetaLoraConfig(**shared, stage="subject", down="down", init_weights=False, inference_mode=True)
        inject_adapter_in_model(subject, holder, "subject")
        for _, one in meta_lora_layers(holder):
            one.set_adapter("subject", inference_mode=True)
        return holder.eval()

    torch.set_num_threads(1)
    x, figures = torch.randn(1, 4, 64), {}
    for kind in ("none", "int8", "nf4"):
        lora = layer(kind)
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), lora)
        for name, holder in {"base": layer(kind), "lora_r1": lora.eval(), "ours": ours(kind)}.items():
            with torch.no_grad():
                timer = timeit.Timer(functools.partial(holder[0], x), timer=time.thread_time)
                figures[f"{name}_{kind}_us"] = round(min(timer.repeat(100, calls)) / calls * 1e6, 1)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy transformer on the CPU: a check of this script")
    parser.add_argument("--layers", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="blocks of each kind")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of timed calls; at batch 1 four times as many")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled variants")
    parser.add_argument(
        "--part", action="append", choices=(*PARTS, HOST), help="repeatable; by default all but host, which is alone"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="of the part train")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after this time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "layer.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    # cuDNN's attention has no backward for these shapes in some versions; both sides use the same kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if HOST in (arguments.part or ()):
        print(json.dumps(host(), indent=2))
        return
    bench = Bench(arguments)
    kept = arguments.part is not None
    for _ in bench.run(arguments.part or list(PARTS)):
        details = {**bench.results, **bench.ratios, "fastest_lora": bench.fastest, "left_out": bench.left_out}
        for path, own in (
            (arguments.out, bench.figures()),
            (arguments.out.with_name(f"{arguments.out.stem}_details.json"), details),
        ):
            before = json.loads(path.read_text())["figures"] if kept and path.exists() else {}
            write(path, {**origin(bench.flux.device), "figures": {**before, **own}})
    print(json.dumps(bench.figures(), indent=2))


if __name__ == "__main__":
    main()
