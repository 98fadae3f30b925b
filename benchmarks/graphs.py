# SPDX-License-Identifier: Apache-2.0
"""Steps as CUDA graphs beside the same steps as they are written, on a small transformer of FLUX's kind: equal, or not.

    python benchmarks/graphs.py        a GPU, a minute; writes benchmarks/results/graphs.json
    python benchmarks/graphs.py --steps 6    on a CPU, where nothing is recorded: a check of this script

Each case trains twice from one start, recorded and not. `loss` is the largest relative difference of the losses of a
step, `factors` the relative distance of what was learned. A case is `equal` if it was recorded and both are below the
bound of its precision; it ends with exit code 1 if any is not. `attention` says of each backend of PyTorch's attention
whether it has a backward pass on FLUX.1-dev's shapes.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from clock import now
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from flux_dev import ATTENTION, SMALL
from origin import origin, write

from peft_metalora.bases import Base, base_for
from peft_metalora.training import stage_1, stage_2
from peft_metalora.training.engine.replay import WARM_UP, ReplayedLoss
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.training.stage_settings import MetaTrainConfig, PersonalizeConfig
from peft_metalora.tuner.placing import restore
from training import LORA_WAYS, diffusers_steps, make_down, make_examples, settings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BOUNDS = {"no": (1e-4, 1e-3), "bf16": (1e-2, 3e-2)}  # of losses and of factors
SHAPE = {**SMALL, "attention_head_dim": 64, "axes_dims_rope": (16, 24, 24), "joint_attention_dim": 64}
STAGE_2: dict[str, dict[str, Any]] = {
    "one subject": {},
    "one subject, float32": {"mixed_precision": "no"},
    "several": {"subjects": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "several, checkpointing": {"subjects": 3, "gradient_checkpointing": True},
    "accumulation": {"subjects": 2, "gradient_accumulation_steps": 3},
    "int8 base, checkpointing": {"int8": True, "gradient_checkpointing": True},
    "LoRA": {"method": "lora"},
    "LoRA, checkpointing, float32": {"method": "lora", "gradient_checkpointing": True, "mixed_precision": "no"},
}
STAGE_1: dict[str, dict[str, Any]] = {
    "warm-up": {"warmup_steps": 7},
    "warm-up, float32": {"warmup_steps": 7, "mixed_precision": "no"},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "images_per_subject": 2},
}


def make_base(precision: str, int8: bool = False) -> Base:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**SHAPE).requires_grad_(False)
    transformer.to(DEVICE, torch.float32 if precision == "no" else torch.bfloat16)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    base = base_for(FluxPipeline(scheduler=scheduler, transformer=transformer, **nothing), max_sequence_length=16)
    if int8:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(base.denoiser, Int8WeightOnlyConfig())
    return base


def of_stage_2(changes: dict[str, Any]) -> tuple[Any, ReplayedLoss]:
    changes = {"mixed_precision": "bf16", "max_train_steps": 10_000, "train_batch_size": 2, **changes}
    subjects, int8 = changes.pop("subjects", 1), changes.pop("int8", False)
    base = make_base(changes["mixed_precision"])
    down = None if changes.get("method") == "lora" else make_down(base, 8)
    if int8:
        base = make_base(changes["mixed_precision"], int8)
    if down is None:
        changes["target_modules"] = ",".join(ATTENTION)
    config = PersonalizeConfig(**settings(Namespace(small=True), **changes))
    run = Personalization(base, make_examples(base, subjects, True), config, down)
    return run, run._replayed


def of_stage_1(changes: dict[str, Any]) -> tuple[Any, ReplayedLoss]:
    given = {"mixed_precision": "bf16", "warmup_steps": 0, "max_train_steps": 10_000, "rank": 1, "meta_rank": 8}
    given |= {"subjects_per_batch": 2, "target_modules": ",".join(ATTENTION), **changes}
    base = make_base(given["mixed_precision"])
    run = MetaTraining(base, make_examples(base, 4, True), MetaTrainConfig(**settings(Namespace(small=True), **given)))
    return run, run._replayed


def learned(run: Any, steps: int) -> tuple[list[float], torch.Tensor, float]:
    """Losses, what was learned as one vector, and seconds of a step at the end."""
    losses, done, start = [], run.steps(), 0.0
    for number in range(steps):
        if number == steps // 2:
            start = now(DEVICE)
        losses.append(next(done).loss)
    seconds = (now(DEVICE) - start) / (steps - steps // 2)
    trained = [one.detach().float().flatten() for one in run.base.denoiser.parameters() if one.requires_grad]
    return losses, torch.cat(trained), seconds


def compared(make: Callable[[dict[str, Any]], tuple[Any, ReplayedLoss]], case: dict[str, Any], steps: int) -> Any:
    """A case, recorded and not."""
    torch.manual_seed(1)
    run, replayed = make(case)
    losses, factors, recorded_s = learned(run, steps)
    recordings, why_not = len(replayed._recordings), replayed.why_not
    del run, replayed
    gc.collect()
    torch.manual_seed(1)
    run, replayed = make(case)
    replayed.why_not = "for comparison"
    wanted, own, written_s = learned(run, steps)
    loss = max(abs(one - other) / abs(other) for one, other in zip(losses, wanted, strict=True))
    apart = ((factors - own).norm() / own.norm()).item()
    of_losses, of_factors = BOUNDS[case.get("mixed_precision", "bf16")]
    figures = {"recordings": recordings, "why_not": why_not, "loss": loss, "factors": apart}
    figures |= {"ms": 1000 * recorded_s, "ms_as_written": 1000 * written_s}
    return {**figures, "equal": bool(recordings) and loss <= of_losses and apart <= of_factors}


def of_diffusers(recorded: bool, steps: int) -> list[float]:
    """Losses of diffusers' recipe, whose loop holds a step's loss while the next one is computed."""
    torch.manual_seed(1)
    base = make_base("bf16")
    run: Iterator[float] = diffusers_steps(
        base, Namespace(small=True), 2, LORA_WAYS["lora_r1_graph" if recorded else "lora_r1_fused"]
    )
    torch.manual_seed(2)
    losses = [next(run) for _ in range(steps)]
    run.close()
    restore(base.denoiser, every=True)
    return losses


def held(steps: int) -> Any:
    """A loss that is held over to the next step, with all that belongs to it."""
    pairs = zip(of_diffusers(True, steps), of_diffusers(False, steps), strict=True)
    loss = max(abs(one - other) / abs(other) for one, other in pairs)
    return {"loss": loss, "equal": loss <= BOUNDS["bf16"][0]}


def refused(steps: int) -> Any:
    """A loss that cannot be recorded goes on as it is written, and the next one is recorded."""
    model = torch.nn.Linear(4, 4, device=DEVICE)

    def asks(given: dict[str, torch.Tensor], _: object) -> torch.Tensor:
        loss: torch.Tensor = model(given["x"]).square().mean()
        return loss * 1 if loss.item() > -1 else loss

    def works(given: dict[str, torch.Tensor], _: object) -> torch.Tensor:
        return model(given["x"]).square().mean()

    reasons, grads = [], []
    for function in (asks, works):
        replayed = ReplayedLoss(function, model, list(model.parameters()))
        generator = torch.Generator(DEVICE).manual_seed(0)
        for _ in range(steps):
            model.zero_grad(set_to_none=True)
            replayed({"x": torch.randn(8, 4, device=DEVICE, generator=generator)}).backward()
        reasons.append(replayed.why_not)
        grads.append(model.weight.grad.clone())
    apart = (grads[0] - grads[1]).abs().max().item()
    same_stream = DEVICE.type == "cpu" or torch.cuda.current_stream() == torch.cuda.default_stream()
    equal = apart < 1e-6 and reasons[1] is None and reasons[0] is not None and same_stream
    return {"why_not": reasons[0], "why_not_after": reasons[1], "factors": apart, "equal": equal}


ATTENTION_PROBE = """
import sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
name, batch = sys.argv[1], int(sys.argv[2])
q, k, v = (torch.randn(batch, 1536, 24, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
def run():
    out = torch.nn.functional.scaled_dot_product_attention(*(one.permute(0, 2, 1, 3) for one in (q, k, v)))
    out.permute(0, 2, 1, 3).flatten(2, 3).sum().backward()
    torch.cuda.synchronize()
if name == "default":
    run()
else:
    with sdpa_kernel(getattr(SDPBackend, name)):
        run()
"""


def attention() -> dict[str, str]:
    """Whether each backend of attention can go backward, each in a process of its own."""
    found = {}
    for name in ("default", "CUDNN_ATTENTION", "FLASH_ATTENTION"):
        for batch in (1, 4):
            command = [sys.executable, "-c", ATTENTION_PROBE, name, str(batch)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            found[f"{name}_b{batch}"] = "ok" if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:300]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "graphs.json")
    options = parser.parse_args()
    if DEVICE.type == "cpu":  # an eager pass, so that everything here is gone through
        stage_1.why_not_recorded = stage_2.why_not_recorded = lambda *_: "there is no GPU"
    jobs: dict[str, Callable[[], Any]] = {}
    for name, case in STAGE_2.items():
        jobs[f"stage 2: {name}"] = lambda case=case: compared(of_stage_2, case, options.steps)
    for name, case in STAGE_1.items():
        jobs[f"stage 1: {name}"] = lambda case=case: compared(of_stage_1, case, options.steps)
    jobs["a loss that is held"] = lambda: held(options.steps)
    jobs["a loss that is refused"] = lambda: refused(max(options.steps, WARM_UP + 2))
    figures: dict[str, Any] = {}
    for name, job in jobs.items():
        start = time.perf_counter()
        try:
            figures[name] = job()
        except ModuleNotFoundError as error:  # torchao
            figures[name] = {"left_out": str(error)}
        except Exception as error:
            traceback.print_exc()
            figures[name] = {"equal": False, "error": f"{type(error).__name__}: {error}"[:500]}
        print(f"{name}: {json.dumps(figures[name])} ({time.perf_counter() - start:.1f} s)", flush=True)
        write(options.output, {**origin(DEVICE), "figures": figures})
    if DEVICE.type == "cuda":
        found = attention()
        print(json.dumps(found))
        write(options.output, {**origin(DEVICE), "figures": figures, "attention": found})
        sys.exit(not all(case["equal"] for case in figures.values() if "left_out" not in case))


if __name__ == "__main__":
    main()
