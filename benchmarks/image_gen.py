# SPDX-License-Identifier: Apache-2.0
"""The part of PEFT's image-generation benchmark that needs no weights: a step's time and memory, parameters, file size.

PEFT compares its methods on FLUX.2 klein 4B (`method_comparison/image-gen` in its repository). Here its training step
is written out on the same shapes with random weights and its default settings: bf16, batch of 2, 512 x 512 px (1024
image and 512 text tokens), gradient checkpointing, float32 adapters without autocast, AdamW, gradients clipped at 1.
Meta-LoRA comes from the configurations in `examples/image_gen`, the others have the values of PEFT's experiments. LoRA
also runs in the ways that are faster than PEFT's: factors in bf16, or bf16 autocast, each with fused AdamW; ours with
fused AdamW beside them. `subject_over_best_lora_r32_step_ms` compares the fastest of each.

    python benchmarks/image_gen.py --output DIR      one GPU; writes DIR/image_gen.json
    python benchmarks/image_gen.py --small           a toy transformer on a CPU, to check the script

All methods take turns in each round, so that a drifting clock cancels; times are medians. What needs the weights
(similarity on the test set, drift) stays null under `open`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from clock import forget_peak, now, peak_gib
from diffusers import Flux2Transformer2DModel
from flux_dev import with_random_weights
from origin import origin, write
from peft import LoKrConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor

import peft_metalora  # noqa: F401 - makes META_LORA known to PEFT

EXPERIMENTS = Path(__file__).parents[1] / "examples" / "image_gen" / "experiments" / "metalora"
KLEIN = {
    "in_channels": 128,
    "num_layers": 5,
    "num_single_layers": 20,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
SMALL = {
    **KLEIN,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "timestep_guidance_channels": 8,
    "axes_dims_rope": (8, 8, 8, 8),
}
OPEN = ("test dino_similarity", "drift")


class Bench:
    """The transformer, its inputs, and what was measured of each method."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cpu" if arguments.small else "cuda")
        self.dtype = torch.float32 if arguments.small else torch.bfloat16
        self.shape = SMALL if arguments.small else KLEIN
        make = partial(Flux2Transformer2DModel, **self.shape)
        self.model = with_random_weights(make, self.dtype, self.device)
        # Its positions are no parameters, and to_empty left them undefined.
        self.model.pos_embed = type(self.model.pos_embed)(
            theta=self.model.config.rope_theta, axes_dim=self.model.config.axes_dims_rope
        )
        self.model.enable_gradient_checkpointing()
        self.inputs = self._inputs(batch=2)
        self.seconds: dict[str, list[float]] = {}
        self.details: dict[str, dict[str, float]] = {}

    def _inputs(self, batch: int) -> dict[str, Tensor]:
        side, tokens = (4, 8) if self.arguments.small else (32, 512)
        place = {"device": self.device, "dtype": self.dtype}
        image_ids = torch.zeros(batch, side * side, 4, device=self.device)
        image_ids[..., 1] = torch.arange(side, device=self.device).repeat_interleave(side)
        image_ids[..., 2] = torch.arange(side, device=self.device).repeat(side)
        text_ids = torch.zeros(batch, tokens, 4, device=self.device)
        text_ids[..., 3] = torch.arange(tokens, device=self.device)
        return {
            "hidden_states": torch.randn(batch, side * side, self.shape["in_channels"], **place),
            "encoder_hidden_states": torch.randn(batch, tokens, self.shape["joint_attention_dim"], **place),
            "timestep": torch.rand(batch, device=self.device),
            "img_ids": image_ids,
            "txt_ids": text_ids,
        }

    def turn(self, name: str, config: PeftConfig) -> None:
        """Put a method on, time some steps, note memory, parameters and file size, and take it off again."""
        forget_peak(self.device)
        fused, bf16, autocast = "_fused" in name, "_bf16" in name, "_autocast" in name
        wrapped = get_peft_model(self.model, config, autocast_adapter_dtype=not bf16).to(self.device).train()
        trained, _ = wrapped.get_nb_trainable_parameters()
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, weight_decay=1e-4, fused=fused or None)
        target = torch.randn_like(self.inputs["hidden_states"])
        for number in range(self.arguments.warmup + self.arguments.steps):
            start = now(self.device)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                output = wrapped(**self.inputs, return_dict=False)[0]
            loss = (output.float() - target.float()).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            if not loss.isfinite():  # reading the loss, as the benchmark does, waits for the GPU
                raise RuntimeError(f"{name}: expected a finite loss, found {loss.item()}")
            if number >= self.arguments.warmup:
                self.seconds.setdefault(name, []).append(now(self.device) - start)
        details = self.details.setdefault(name, {})
        if (peak := peak_gib(self.device)) is not None:
            details["peak_allocated_gib"] = peak
            details["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        details["trained_parameters"] = trained
        if "file_bytes" not in details:
            with tempfile.TemporaryDirectory() as folder:
                wrapped.save_pretrained(folder)
                details["file_bytes"] = (Path(folder) / "adapter_model.safetensors").stat().st_size
        wrapped.unload()
        self.model.requires_grad_(False)

    def save_down(self, folder: Path) -> None:
        """A random Down with the ranks of the experiment `flux2-klein-meta`."""
        wrapped = get_peft_model(self.model, experiment("meta"))
        wrapped.save_pretrained(folder)
        wrapped.unload()
        self.model.requires_grad_(False)

    def figures(self) -> dict[str, float]:
        """Each method's values, and those of a Meta-LoRA subject over LoRA's."""
        found: dict[str, float] = {}
        for name, details in self.details.items():
            found[f"{name}_step_ms"] = round(1000 * statistics.median(self.seconds[name]), 2)
            if "peak_allocated_gib" in details:
                found[f"{name}_peak_gib"] = round(details["peak_allocated_gib"], 3)
            found[f"{name}_parameters"] = int(details["trained_parameters"])
            found[f"{name}_file_mb"] = round(details["file_bytes"] / 1e6, 3)
        for quantity in ("step_ms", "peak_gib", "parameters", "file_mb"):
            ours, theirs = f"meta_lora_subject_{quantity}", f"lora_r32_{quantity}"
            if ours in found and theirs in found:
                found[f"subject_over_lora_r32_{quantity}"] = round(found[ours] / found[theirs], 4)
        for quantity in ("step_ms", "peak_gib"):
            fastest = []
            for method in ("meta_lora_subject", "lora_r32"):
                ways = [name for name in self.seconds if name.startswith(method) and f"{name}_{quantity}" in found]
                fastest += [min(ways, key=lambda name: found[f"{name}_step_ms"])] if ways else []
            if len(fastest) == 2:
                ours, theirs = (found[f"{name}_{quantity}"] for name in fastest)
                found[f"subject_over_best_lora_r32_{quantity}"] = round(ours / theirs, 4)
        return found


def experiment(stage: str) -> Any:
    """The configuration of an experiment of ours, read as PEFT's benchmark reads it."""
    return PeftConfig.from_pretrained(str(EXPERIMENTS / f"flux2-klein-{stage}"))


def rivals(modules: list[str]) -> dict[str, PeftConfig]:
    """PEFT's own experiments: `lora/flux2-klein-default` and so on."""
    return {
        **{
            f"lora_r32{way}": LoraConfig(r=32, lora_alpha=32, target_modules=modules)
            for way in ("", "_fused", "_bf16_fused", "_autocast_fused")
        },
        "oft": OFTConfig(r=0, oft_block_size=32, use_cayley_neumann=True, target_modules=modules),
        "lokr": LoKrConfig(r=32, alpha=32, target_modules=modules),
        "vera": VeraConfig(r=32, target_modules=modules),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy transformer on the CPU: a check of this script")
    parser.add_argument("--seconds", type=float, default=80, help="after the first round, start no turn later")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each turn")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the figures")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    # cuDNN's attention has no backward for some shapes in some versions; all methods use the same kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    bench = Bench(arguments)
    report: dict[str, Any] = {**origin(bench.device), "figures": {}, "open": dict.fromkeys(OPEN)}
    out = arguments.output / "image_gen.json"
    with tempfile.TemporaryDirectory() as folder:
        bench.save_down(Path(folder))
        meta, subject = experiment("meta"), experiment("subject")
        subject.down = folder
        others = rivals(sorted(meta.target_modules))
        ours = {"meta_lora_subject": subject, "meta_lora_subject_fused": subject}
        methods = {**ours, **others, "meta_lora_meta": meta}
        for number in range(arguments.rounds):
            for name, config in methods.items():
                if number and time.monotonic() > until:
                    break
                bench.turn(name, copy.deepcopy(config))
                report["figures"] = bench.figures()
                turns = {one: len(times) for one, times in bench.seconds.items()}
                report["details"] = {"timed_steps": turns, **bench.details}
                write(out, report)
                print(f"round {number + 1}: {name} {report['figures'][f'{name}_step_ms']} ms", flush=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
