# SPDX-License-Identifier: Apache-2.0
"""What a Meta-LoRA layer costs on FLUX.1-dev's shapes, beside the bare base and PEFT's LoRA, in one run.

Random weights, bf16, 512 x 512 px (1024 image and 512 text tokens), adapters on all attention layers (266 linears).

    python benchmarks/layer.py                 one GPU with 80 GB, about 3 minutes; writes benchmarks/results/layer.json
    python benchmarks/layer.py --small         a toy transformer on a CPU, to check the script (--no-compile: seconds)

All variants stand side by side on one set of base weights and are timed in turns, one call each, so that a drifting
clock meets all alike; figures are medians over the rounds, of times and of ratios within a round. At batch 1 a call is
bound by the Python of the host, which varies far more than the GPU: there are four times the rounds. On a CPU, "memory"
is the bytes that autograd saves for backward."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from clock import forget_peak, median_of, once, peak_gib
from flux_dev import ATTENTION, Flux
from origin import origin, write
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from peft_metalora.tuner import MetaLoraConfig, fold, set_slots
from peft_metalora.tuner.on_model import meta_lora_layers


class Bench:
    """A model, its inputs and a clock."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.repeats, self.small = arguments.repeats, arguments.small
        blocks = arguments.layers
        changes = {"num_layers": blocks[0], "num_single_layers": blocks[1]} if blocks else {}
        self.flux = Flux(arguments.small, **changes)
        self.model, self.inputs, self.forward = self.flux.model, self.flux.inputs, self.flux.forward
        self.meta_r, self.lora_r = (8, 4) if arguments.small else (128, 16)
        self.results: dict[str, float] = {}  # milliseconds and GiB
        self.ratios: dict[str, float] = {}

    def in_turns(self, models: dict[str, nn.Module], batch: int, rounds: int) -> None:
        """Time all models in turns; note each one's median, and the medians of its ratios to the first and to LoRA."""
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
            self.note(f"{name}_b{batch}", statistics.median(values))
            for other in ("base", "lora_r1"):
                ratio = statistics.median(one / two for one, two in zip(values, times[other], strict=True))
                self.ratios[f"{name}_over_{other}_b{batch}"] = round(ratio, 4)

    def note(self, name: str, value: float, unit: str = "ms") -> None:
        self.results[name] = round(value * 1000 if unit == "ms" else value, 6)
        print(f"{name:<40}{self.results[name]:>12.3f} {unit}", flush=True)

    # ---- adapters ------------------------------------------------------------------------------------------------

    def lora(self, r: int) -> Any:
        model = self.flux.twin()
        config = LoraConfig(r=r, lora_alpha=r, target_modules=ATTENTION, init_lora_weights=False)
        inject_adapter_in_model(config, model)
        return model

    def meta_lora(self, slots: int = 1) -> Any:
        """A subject on a Down that a second adapter of the model holds."""
        model = self.flux.twin()
        shared = {"r": 1, "lora_alpha": 1, "meta_r": self.meta_r, "target_modules": ATTENTION, "init_weights": False}
        inject_adapter_in_model(MetaLoraConfig(**shared), model, "down")
        subject = MetaLoraConfig(**shared, stage="subject", down="down", num_slots=slots)
        inject_adapter_in_model(subject, model, "subject")
        for _, layer in meta_lora_layers(model):
            layer.set_adapter("subject")
        return model

    def variants(self) -> dict[str, Any]:
        """The base, LoRA and a subject in each state. The merged one has its own copy of the adapted weights."""
        found = {"base": self.model, "lora_r1": self.lora(1), f"lora_r{self.lora_r}": self.lora(self.lora_r)}
        found["unfolded"], found["folded"], found["merged"] = (self.meta_lora() for _ in range(3))
        fold(found["folded"])
        for _, layer in meta_lora_layers(found["merged"]):
            layer.merge()
        return found

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, model: Any, batch: int = 4) -> tuple[float, float]:
        """One training step: forward, backward, fused AdamW on float32 adapter weights. No checkpointing.

        Returns:
            Seconds, and the peak of memory in GiB.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        inputs, target = self.inputs(batch), self.inputs(batch)["hidden_states"]
        saved = 0

        def step() -> None:
            loss = (model(**inputs, return_dict=False)[0].float() - target.float()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        model.train()
        forget_peak(self.flux.device)
        seconds = median_of(step, self.flux.device, self.repeats, warm_up=2)
        peak = peak_gib(self.flux.device)
        if peak is None:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                step()
            peak = saved / 2**30
        model.eval()
        return seconds, peak

    def training(self, rounds: int = 3) -> None:
        """LoRA's and a subject's training step in turns."""
        models = {"lora_r1": self.lora(1), "subject": self.meta_lora()}
        steps: dict[str, list[float]] = {name: [] for name in models}
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            for name, model in models.items():
                seconds, peak = self.train(model)
                steps[name].append(seconds)
                self.results[f"{name}_memory_b4"] = round(peak, 4)
        gc.enable()
        for name, values in steps.items():
            self.note(f"{name}_step_b4", statistics.median(values))
        ratios = [ours / theirs for ours, theirs in zip(steps["subject"], steps["lora_r1"], strict=True)]
        self.ratios["subject_step_over_lora_r1_b4"] = round(statistics.median(ratios), 4)
        memory = self.results["subject_memory_b4"] / self.results["lora_r1_memory_b4"]
        self.ratios["subject_memory_over_lora_r1_b4"] = round(memory, 4)

    # ---- compiled ------------------------------------------------------------------------------------------------

    def compiled(self) -> None:
        """The base and a folded subject, each kind of block compiled once; timed in turns."""
        torch._dynamo.reset()
        models = {"base": self.model, "folded": self.meta_lora()}
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
        ratios = [one / two for one, two in zip(times["folded"], times["base"], strict=True)]
        self.ratios["folded_over_base_compiled_b4"] = round(statistics.median(ratios), 4)

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self, compile_too: bool) -> dict[str, float]:
        models = self.variants()
        self.in_turns(models, 1, 4 * self.repeats)
        models["four_subjects_unfolded"], models["four_subjects_folded"] = self.meta_lora(4), self.meta_lora(4)
        for name in ("four_subjects_unfolded", "four_subjects_folded"):
            set_slots(models[name], [0, 1, 2, 3])
        fold(models["four_subjects_folded"])
        self.in_turns(models, 4, self.repeats)
        del models
        self.training()
        if compile_too:
            self.compiled()
        return self.figures()

    def figures(self) -> dict[str, float]:
        names = {
            "unfolded_over_lora_r1_b4": "unfolded_over_lora_r1_b4",
            "folded_over_base_b1": "folded_over_base_b1",
            "folded_over_base_b4": "folded_over_base_b4",
            "unfolded_over_base_b4": "unfolded_over_base_b4",
            "folded_over_base_compiled_b4": "folded_over_base_compiled_b4",
            "merged_over_base_b4": "merged_over_base_b4",
            "train_step_over_lora_r1_b4": "subject_step_over_lora_r1_b4",
            "train_mem_over_lora_r1_b4": "subject_memory_over_lora_r1_b4",
        }
        return {name: self.ratios[source] for name, source in names.items() if source in self.ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy transformer on the CPU: a check of this script")
    parser.add_argument("--layers", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="blocks of each kind")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of timed calls; at batch 1 four times as many")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled variants")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "layer.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    # cuDNN's attention has no backward for these shapes in some versions; both sides use the same kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    bench = Bench(arguments)
    figures = bench.run(not arguments.no_compile)
    report = {**origin(bench.flux.device), "figures": figures}
    write(arguments.out, report)
    details = arguments.out.with_name(f"{arguments.out.stem}_details.json")
    write(details, {**report, "figures": {**bench.results, **bench.ratios}})
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
