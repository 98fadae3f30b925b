# SPDX-License-Identifier: Apache-2.0
"""What a Meta-LoRA layer costs on FLUX.1-dev's shapes, beside the bare base and PEFT's LoRA, in one run.

Random weights, bf16, 512 x 512 px (1024 image and 512 text tokens), adapters on all attention layers (266 linears).

    python benchmarks/layer.py                 one GPU with 80 GB, about 4 minutes; writes benchmarks/results/layer.json
    python benchmarks/layer.py --small         a toy transformer on a CPU, to check the script (--no-compile: seconds)

Each variant is timed between two timings of the same bare base, and its ratio is taken against their mean, so that a
drifting clock cancels. Figures are medians. On a CPU, "memory" is the bytes that autograd saves for backward."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from peft_metalora.tuner import MetaLoraConfig, fold, set_subjects, unfold
from peft_metalora.tuner.subjects import meta_lora_layers

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FLUX_DEV = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
SMALL = {
    **FLUX_DEV,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
}


class Bench:
    """A model, its inputs and a clock."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.repeats, self.small = arguments.repeats, arguments.small
        self.device = torch.device("cuda" if torch.cuda.is_available() and not arguments.small else "cpu")
        self.dtype = torch.float32 if arguments.small else torch.bfloat16
        config = dict(SMALL if arguments.small else FLUX_DEV)
        if arguments.layers:
            config["num_layers"], config["num_single_layers"] = arguments.layers
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with self.device:
            self.model = FluxTransformer2DModel(**config).eval().requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        self.image_tokens, self.text_tokens = (16, 8) if arguments.small else (1024, 512)
        self.config = config
        self.meta_r, self.lora_r = (8, 4) if arguments.small else (128, 16)
        self.results: dict[str, float] = {}

    def inputs(self, batch: int) -> dict[str, Tensor]:
        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=self.dtype)

        return {
            "hidden_states": noise(batch, self.image_tokens, self.config["in_channels"]),
            "encoder_hidden_states": noise(batch, self.text_tokens, self.config["joint_attention_dim"]),
            "pooled_projections": noise(batch, self.config["pooled_projection_dim"]),
            "timestep": torch.full((batch,), 0.5, device=self.device, dtype=self.dtype),
            "guidance": torch.full((batch,), 3.5, device=self.device, dtype=self.dtype),
            "img_ids": torch.zeros(self.image_tokens, 3, device=self.device, dtype=self.dtype),
            "txt_ids": torch.zeros(self.text_tokens, 3, device=self.device, dtype=self.dtype),
        }

    def seconds(self, work: Callable[[], object], warm_up: int = 3) -> float:
        """Median wall time of one call, all of its kernels included."""
        for _ in range(warm_up):
            work()
        times = []
        for _ in range(self.repeats):
            self.synchronise()
            start = time.perf_counter()
            work()
            self.synchronise()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forward(self, batch: int) -> float:
        inputs = self.inputs(batch)
        with torch.no_grad():
            return self.seconds(lambda: self.model(**inputs, return_dict=False))

    def note(self, name: str, value: float, unit: str = "ms") -> None:
        self.results[name] = round(value * 1000 if unit == "ms" else value, 6)
        print(f"{name:<40}{self.results[name]:>12.3f} {unit}", flush=True)

    # ---- adapters ------------------------------------------------------------------------------------------------

    @contextmanager
    def lora(self, r: int) -> Iterator[None]:
        config = LoraConfig(r=r, lora_alpha=r, target_modules=ATTENTION, init_lora_weights=False)
        inject_adapter_in_model(config, self.model)
        yield
        self.model.unload_lora()

    @contextmanager
    def meta_lora(self, slots: int = 1) -> Iterator[None]:
        """A subject on a Down that a second adapter of the model holds."""
        shared = {"r": 1, "lora_alpha": 1, "meta_r": self.meta_r, "target_modules": ATTENTION, "init_weights": False}
        inject_adapter_in_model(MetaLoraConfig(**shared), self.model, "down")
        subject = MetaLoraConfig(**shared, stage="subject", down="down", num_slots=slots)
        inject_adapter_in_model(subject, self.model, "subject")
        for _, layer in meta_lora_layers(self.model):
            layer.set_adapter("subject")
        yield
        self.model.unload_lora()

    def both_batches(self, name: str) -> None:
        for batch in (1, 4):
            self.note(f"{name}_b{batch}", self.forward(batch))

    # ---- training ------------------------------------------------------------------------------------------------

    def train(self, name: str, batch: int = 4) -> None:
        """One training step: forward, backward, fused AdamW on float32 adapter weights. No checkpointing."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        inputs, target = self.inputs(batch), self.inputs(batch)["hidden_states"]
        saved = 0

        def step() -> None:
            loss = (self.model(**inputs, return_dict=False)[0].float() - target.float()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.nbytes
            return tensor

        self.model.train()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.note(f"{name}_step_b{batch}", self.seconds(step, warm_up=2))
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                step()
            peak = saved / 2**30
        self.note(f"{name}_memory_b{batch}", peak, "GiB")
        self.model.eval()

    # ---- compiled ------------------------------------------------------------------------------------------------

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Compile each kind of block once; all blocks of a kind share the code."""
        torch._dynamo.reset()
        self.model.compile_repeated_blocks(fullgraph=True)
        yield
        for module in self.model.modules():
            module._compiled_call_impl = None

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self, compile_too: bool) -> dict[str, float]:
        self.both_batches("base_before")
        with self.lora(1):
            self.both_batches("lora_r1")
        self.both_batches("base_between")
        with self.meta_lora():
            self.both_batches("unfolded")
            fold(self.model)
            self.both_batches("folded")
            unfold(self.model)
        self.both_batches("base_after")
        with self.meta_lora():
            for _, layer in meta_lora_layers(self.model):
                layer.merge()
            self.both_batches("merged")
            for _, layer in meta_lora_layers(self.model):
                layer.unmerge()
        self.both_batches("base_end")
        with self.meta_lora(slots=4):
            set_subjects(self.model, [0, 1, 2, 3])
            self.note("four_subjects_unfolded_b4", self.forward(4))
            fold(self.model)
            self.note("four_subjects_folded_b4", self.forward(4))
        with self.lora(self.lora_r):
            self.both_batches(f"lora_r{self.lora_r}")
        with self.lora(1):
            self.train("lora_r1")
        with self.meta_lora():
            self.train("subject")
        if compile_too:
            with self.compiled():
                self.note("base_compiled_b4", self.forward(4))
            with self.meta_lora():
                fold(self.model)
                with self.compiled():
                    self.note("folded_compiled_b4", self.forward(4))
            with self.compiled():
                self.note("base_compiled_again_b4", self.forward(4))
        return self.figures(compile_too)

    def figures(self, compile_too: bool) -> dict[str, float]:
        of = self.results

        def ratio(name: str, *others: str) -> float:
            return round(of[name] / statistics.mean(of[other] for other in others), 4)

        figures = {
            "unfolded_over_lora_r1_b4": ratio("unfolded_b4", "lora_r1_b4"),
            "folded_over_base_b1": ratio("folded_b1", "base_between_b1", "base_after_b1"),
            "folded_over_base_b4": ratio("folded_b4", "base_between_b4", "base_after_b4"),
            "unfolded_over_base_b4": ratio("unfolded_b4", "base_between_b4", "base_after_b4"),
        }
        if compile_too:
            figures["folded_over_base_compiled_b4"] = ratio(
                "folded_compiled_b4", "base_compiled_b4", "base_compiled_again_b4"
            )
        return {
            **figures,
            "merged_over_base_b4": ratio("merged_b4", "base_after_b4", "base_end_b4"),
            "train_step_over_lora_r1_b4": ratio("subject_step_b4", "lora_r1_step_b4"),
            "train_mem_over_lora_r1_b4": ratio("subject_memory_b4", "lora_r1_memory_b4"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy transformer on the CPU: a check of this script")
    parser.add_argument("--layers", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="blocks of each kind")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls of each variant")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled variants")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "layer.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
    # cuDNN's attention has no backward for these shapes in some versions; both sides use the same kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    bench = Bench(arguments)
    figures = bench.run(not arguments.no_compile)
    gpu = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"{platform.machine()} CPU"
    report = {
        "machine": f"1 x {gpu}",
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "figures": figures,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    details = arguments.out.with_name(f"{arguments.out.stem}_details.json")
    details.write_text(json.dumps({**report, "figures": bench.results}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
