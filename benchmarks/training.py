# SPDX-License-Identifier: Apache-2.0
"""What a training step costs on FLUX.1-dev's shapes, beside diffusers' LoRA recipe, in one run.

Random weights, bf16, 512 x 512 px (1024 image and 512 text tokens), adapters on all attention layers (266 linears).

    python benchmarks/training.py              one GPU with 80 GB, some minutes; with more of them `scaling` as well
    python benchmarks/training.py --part scaling --counts 1 2 4 8 --layouts whole --steps 5 --warmup 2
    python benchmarks/training.py --part steps --seconds 180    the file keeps the figures of other parts
    python benchmarks/training.py --small      a toy transformer on a CPU, to check the script

Writes `benchmarks/results/training.json` (`--output`) after each part: `steps` (stage 2 beside diffusers' recipe),
`kernels` (how long the GPU computes in a step of some of these, profiled),
`scaling` (stage 1 and the encoder's training on 1, 2, 4 and 8 GPUs, with a batch that grows and one that does not, the
base whole on each and divided by FSDP 2; `exchange_ms` is the sum of Down's gradient over the processes, timed alone,
`kernel_ms` and `nccl_ms` what the first GPU computes in a step, and of it what it sends or waits for others, profiled;
numbers of GPUs that the file has from before are not run again), `divided` (stage 1 on two GPUs, whole and divided,
its losses compared),
`recipe24` (stage 2 on a base of int8 weights, cached text, gradient checkpointing, batch 1: its peak of memory),
`compiled` (stage 2 beside itself with `dynamo_backend`) and `encoder` (a space and its encoder, codes of 128 numbers,
gradient checkpointing; people a second are those that are read, each judged by four photos), `embedded` (samples a
second of stage 1 on the embedded base, beside the version before steps were recorded) and `whole` (people an hour,
each whole: photo read from disk, views and caption encoded, trained and saved at default settings, base in memory).
Compared are, each step with forward, backward, clipping and AdamW: stage 2 of Meta-LoRA (r = 1, meta_r = 128, this
package's loop) and what diffusers' `train_dreambooth_lora_flux.py` does with `--rank 1 --cache_latents` (float32
adapter under bf16 autocast, uniform noise levels), as it is and in ways that are faster: AdamW fused, factors in
bf16, its pass recorded as a CUDA graph by the code that records ours. `best_lora` is the fastest of them; compiled
ones are in `layer.py`.
All are timed in turns, so that a drifting clock cancels. A turn's time is that of its steps
after a warm-up, one after another as a run does them, until the GPU has finished; figures are medians of the turns.
Where the GPU is busy for less than a step takes (`kernel_ms`), the host is the limit.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clock import forget_peak, median_of, now, peak_gib
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import cast_training_params
from flux_dev import ATTENTION, SHAPES, SMALL, with_random_weights
from origin import origin, write
from peft import LoraConfig
from PIL import Image
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from peft_metalora import load_down, save_down
from peft_metalora.bases import Base, base_for
from peft_metalora.demo.embedded import build_tokenizer, load_base
from peft_metalora.encoder import EncoderConfig, SubjectSpace, make_encoder
from peft_metalora.training.encoder_training import EncoderTraining, EncoderTrainingConfig, PhotoPairs, Reads
from peft_metalora.training.engine.processes import ALONE, Processes
from peft_metalora.training.engine.replay import WARM_UP, ReplayedLoss
from peft_metalora.training.engine.sharding import shard, wants_shards
from peft_metalora.training.engine.slot_gradients import SlotGradients
from peft_metalora.training.examples.batches import Examples
from peft_metalora.training.examples.encoding import encode_subjects
from peft_metalora.training.examples.sources import instance_subject
from peft_metalora.training.injecting import inject
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.training.stage_settings import MetaTrainConfig, PersonalizeConfig
from peft_metalora.tuner import DownSource, MetaLoraConfig, down_state, fingerprint
from peft_metalora.tuner.down import DOWN, given, subject_config
from peft_metalora.tuner.placing import restore

# cuDNN's attention is left to no recipe: its backward fails on these shapes in some builds of torch (seen with 2.11).
torch.backends.cuda.enable_cudnn_sdp(False)


def device_of(args: argparse.Namespace) -> torch.device:
    return torch.device("cpu" if args.small else "cuda")


def make_base(small: bool, device: torch.device) -> Base:
    """FLUX.1-dev's transformer with random weights in a pipeline that has nothing else."""
    make = partial(FluxTransformer2DModel, **(SMALL if small else SHAPES))
    transformer = with_random_weights(make, torch.float32 if small else torch.bfloat16, device)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return base_for(FluxPipeline(scheduler=scheduler, transformer=transformer, **nothing), max_sequence_length=512)


def make_examples(base: Base, subjects: int, small: bool, each: int = 4) -> Examples:
    """Random latents of each subject (512 px: 64 x 64), one caption."""
    config, side, tokens = base.denoiser.config, (8 if small else 64), (16 if small else 512)
    text = {
        "sequence": torch.randn(1, tokens, config.joint_attention_dim),
        "pooled": torch.randn(1, config.pooled_projection_dim),
    }
    count = each * subjects
    latents = torch.randn(count, config.in_channels // 4, side, side)
    owners = torch.arange(subjects).repeat_interleave(each)
    return Examples(latents, text, torch.zeros(count, dtype=torch.int64), owners)


def make_down(base: Base, meta_r: int) -> DownSource:
    """A random Down of rank `meta_r` for r = 1."""
    config = MetaLoraConfig(r=1, lora_alpha=1, meta_r=meta_r, target_modules=ATTENTION)
    base.denoiser.add_adapter(config, adapter_name="down")
    tensors = {name: tensor.clone().cpu() for name, tensor in down_state(base.denoiser, "down").items()}
    restore(base.denoiser, every=True)
    return DownSource(config, tensors, fingerprint(tensors))


def settings(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    shared = {"pretrained_model_name_or_path": "random", "output_dir": "unused", "gradient_checkpointing": False}
    return {**shared, "mixed_precision": "no" if args.small else "bf16", **changes}


def meta_lora_steps(
    base: Base, down: DownSource, args: argparse.Namespace, people: int, batch: int, **changes: Any
) -> Iterator[Any]:
    """Stage 2 of this package, `batch` samples a person."""
    config = PersonalizeConfig(**settings(args, train_batch_size=batch, max_train_steps=10_000, **changes))
    run = Personalization(base, make_examples(base, people, args.small), config, down)
    try:
        yield from run.steps()
    finally:
        run.remove()


class LoraWay(NamedTuple):
    """A way to run diffusers' recipe; the first three are what its script does."""

    factors: str = "autocast"
    fused: bool = False
    recorded: bool = False


LORA_WAYS = {
    "diffusers_lora_r1": LoraWay(),
    "lora_r1_fused": LoraWay(fused=True),
    "lora_r1_bf16": LoraWay("bf16", fused=True),
    "lora_r1_graph": LoraWay(fused=True, recorded=True),
    "lora_r1_bf16_graph": LoraWay("bf16", fused=True, recorded=True),
}


def diffusers_steps(base: Base, args: argparse.Namespace, batch: int, way: LoraWay) -> Iterator[Any]:
    """The training step of `train_dreambooth_lora_flux.py`, written out for cached latents and text."""
    denoiser, device = base.denoiser, base.device
    lora = LoraConfig(r=1, lora_alpha=1, init_lora_weights="gaussian", target_modules=ATTENTION)
    denoiser.add_adapter(lora)
    cast_training_params(denoiser, dtype=torch.bfloat16 if way.factors == "bf16" else torch.float32)
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"fused": True} if way.fused else {}
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8, **options)
    examples = make_examples(base, 1, args.small).to(device)
    pipe, dtype = base.pipeline, base.dtype
    denoiser.train()
    side = examples.latents.shape[-1]
    ids = pipe._prepare_latent_image_ids(batch, side // 2, side // 2, device, dtype)

    def loss_of(given: dict[str, torch.Tensor], _: object) -> torch.Tensor:
        latents, noise, sigmas = given["latents"], given["noise"], given["sigmas"]
        _, channels, height, width = latents.shape
        spread = sigmas.view(-1, 1, 1, 1).to(dtype)
        noisy = (1 - spread) * latents + spread * noise
        autocast = way.factors == "autocast" and not args.small
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = denoiser(
                hidden_states=pipe._pack_latents(noisy, batch, channels, height, width),
                timestep=sigmas if autocast else sigmas.to(dtype),
                guidance=torch.ones(batch, device=device),
                pooled_projections=given["pooled"].to(dtype),
                encoder_hidden_states=given["sequence"].to(dtype),
                txt_ids=torch.zeros(given["sequence"].shape[1], 3, device=device, dtype=dtype),
                img_ids=ids,
                return_dict=False,
            )[0]
        output = pipe._unpack_latents(output, height * 8, width * 8, 8)
        return (output.float() - (noise - latents).float()).square().flatten(1).mean(1).mean()

    recorded = way.recorded and device.type == "cuda"
    loss_like = ReplayedLoss(loss_of, denoiser, parameters, why_not=None if recorded else "as it is written")
    while True:
        latents, text = examples.pick(torch.randint(4, (batch,), device=device))
        latents = latents.to(dtype)
        noise, sigmas = torch.randn_like(latents), torch.rand(batch, device=device)
        loss = loss_like({"latents": latents, "noise": noise, "sigmas": sigmas, **text})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def encoder_steps(
    base: Base, down: DownSource, args: argparse.Namespace, people: int, processes: Processes = ALONE
) -> Iterator[Any]:
    """Training of a space and the encoder that reads it: one photo of each person, judged by `--targets` others."""
    targets, device = args.targets, base.device
    config = PersonalizeConfig(**settings(args, gradient_checkpointing=True))
    rows = people // processes.count
    adapter = subject_config(down, num_slots=rows, start="mean", down="in memory", inference_mode=False)
    with given(down):
        inject(base, adapter, "default", config)
    torch.manual_seed(0)  # all processes have the same examples
    examples = make_examples(base, 2 * people, args.small, targets + 1).to(device)
    photo = torch.arange(len(examples), device=device)
    # Latents of what is read are as those of what is drawn.
    reads = Reads(torch.randn(examples.latents.shape), examples.subject, photo)
    of_encoder = EncoderConfig(resolution=64 if args.small else 512, code_size=6 if args.small else 128)
    encoder = make_encoder(of_encoder, lambda pixels: torch.zeros(len(pixels), *reads.features.shape[1:])).to(device)
    gradients = SlotGradients(base, mixed_precision=config.mixed_precision)
    run = EncoderTraining(
        gradients,
        SubjectSpace.around(down, of_encoder.code_size).ordered(gradients.names).to(device),
        encoder,
        PhotoPairs(reads.to(device, features=False), examples, photo),
        reads.to(device, features=False),
        examples,
        EncoderTrainingConfig(targets=targets),
        processes=processes,
    )
    yield from run.steps()


def stage_1_steps(
    base: Base, args: argparse.Namespace, subjects: int, processes: Processes, **changes: Any
) -> Iterator[Any]:
    """Stage 1 of this package, one sample a subject."""
    config = MetaTrainConfig(
        **settings(
            args,
            rank=1,
            meta_rank=8 if args.small else 128,
            subjects_per_batch=subjects,
            warmup_steps=0,
            max_train_steps=10_000,
            target_modules=",".join(ATTENTION),
            **changes,
        )
    )
    torch.manual_seed(0)  # all processes have the same examples
    run = MetaTraining(base, make_examples(base, 2 * subjects, args.small), config, processes)
    yield from run.steps()


def seconds_a_step(steps: Iterator[Any], warmup: int, count: int, device: torch.device) -> float:
    """Mean time of `count` steps after `warmup` others, with all that they leave to the GPU."""
    for _ in range(warmup):
        next(steps)
    start = now(device)
    for _ in range(count):
        next(steps)
    return (now(device) - start) / count


def kernel_milliseconds(steps: Iterator[Any]) -> dict[str, float]:
    """How long the GPU computes in one more step, by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        next(steps)
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == DeviceType.CUDA]
    return {event.key: event.self_device_time_total / 1000 for event in kernels if not event.is_user_annotation}


class Clock:
    """Times steps and watches the peak of GPU memory."""

    def __init__(self, base: Base, args: argparse.Namespace) -> None:
        self.base, self.args = base, args
        self.seconds: dict[str, list[float]] = {}
        self.peak: dict[str, float] = {}

    def turn(self, name: str, make: Callable[[], Iterator[Any]]) -> None:
        """Warm up and time a few steps of a recipe; the denoiser is bare again afterwards."""
        forget_peak(self.base.device)
        steps = make()
        # The warm-up is as long as it takes until a step is recorded.
        seconds = seconds_a_step(steps, max(self.args.warmup, WARM_UP + 2), self.args.steps, self.base.device)
        self.seconds.setdefault(name, []).append(seconds)
        if (peak := peak_gib(self.base.device)) is not None:
            self.peak[name] = max(self.peak.get(name, 0.0), peak)
        del steps
        gc.collect()
        restore(self.base.denoiser, every=True)
        self.base.denoiser.requires_grad_(False)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])


def stage_2(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures and details of the part `steps`; the first round is always run, later ones while there is time."""
    base = make_base(args.small, device_of(args))
    down = make_down(base, 8 if args.small else 128)
    clock, batch, people = Clock(base, args), args.batch_size, args.people
    rounds = 0
    while rounds == 0 or (rounds < args.rounds and time.monotonic() < args.until):
        for name, way in LORA_WAYS.items():
            clock.turn(name, partial(diffusers_steps, base, args, batch, way))
            clock.turn(f"{name}_b1", partial(diffusers_steps, base, args, 1, way))
        clock.turn("meta_lora", lambda: meta_lora_steps(base, down, args, 1, batch))
        clock.turn("meta_lora_serial", lambda: meta_lora_steps(base, down, args, 1, 1))
        clock.turn("meta_lora_slots", lambda: meta_lora_steps(base, down, args, people, 1))
        rounds += 1
    hour = 3600 / args.iterations
    best = {end: min((f"{name}{end}" for name in LORA_WAYS), key=clock.median) for end in ("", "_b1")}
    written = min((f"{name}_b1" for name, way in LORA_WAYS.items() if not way.recorded), key=clock.median)
    figures = {
        "step_over_diffusers_lora_r1": clock.median("meta_lora") / clock.median("diffusers_lora_r1"),
        "mem_over_diffusers_lora_r1": clock.peak["meta_lora"] / clock.peak["diffusers_lora_r1"] if clock.peak else None,
        "step_over_best_lora_r1": clock.median("meta_lora") / clock.median(best[""]),
        "mem_over_best_lora_r1": clock.peak["meta_lora"] / clock.peak[best[""]] if clock.peak else None,
        "step_over_best_lora_r1_b1": clock.median("meta_lora_serial") / clock.median(best["_b1"]),
        "step_over_eager_lora_r1_b1": clock.median("meta_lora_serial") / clock.median(written),
        "people_per_gpu_hour_serial": hour / clock.median("meta_lora_serial"),
        "people_per_gpu_hour_slots": hour * people / clock.median("meta_lora_slots"),
    }
    step_ms = {name: 1000 * clock.median(name) for name in clock.seconds}
    details = {"step_ms": step_ms, "peak_gib": clock.peak, "rounds": rounds}
    return figures, {**details, "best_lora_r1": best}


def kernels(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time of the kernels of a step, in milliseconds."""
    if args.small:
        return {}, {}
    base = make_base(args.small, device_of(args))
    down, batch = make_down(base, 128), args.batch_size
    recipes: dict[str, Callable[[], Iterator[Any]]] = {
        "meta_lora_serial": lambda: meta_lora_steps(base, down, args, 1, 1),
        "meta_lora": lambda: meta_lora_steps(base, down, args, 1, batch),
    }
    for name in ("diffusers_lora_r1", "lora_r1_bf16", "lora_r1_bf16_graph"):
        recipes[f"{name}_b1"] = partial(diffusers_steps, base, args, 1, LORA_WAYS[name])
        recipes[name] = partial(diffusers_steps, base, args, batch, LORA_WAYS[name])
    found = {}
    for name, make in recipes.items():
        steps = make()
        for _ in range(WARM_UP + 2):
            next(steps)
        found[name] = sum(kernel_milliseconds(steps).values())
        del steps
        gc.collect()
        restore(base.denoiser, every=True)
        base.denoiser.requires_grad_(False)
    return {}, {"kernel_ms": found}


BEFORE = "53257b8"  # the last commit before slots stepped together and steps were recorded


def embedded(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Samples a second of stage 1 on the embedded base, of this version over the one at `BEFORE`, in turns."""
    here = Path(__file__).parent
    command = [sys.executable, str(here / "stage1_embedded.py"), "--steps", str(2 if args.small else 100)]
    command += ["--people", "16", "--subjects-per-batch", "4"] if args.small else []
    speed: dict[str, list[float]] = {"now": [], "before": []}
    with tempfile.TemporaryDirectory() as place:
        if args.before is None:
            archive = subprocess.run(["git", "-C", str(here.parent), "archive", BEFORE, "src"], capture_output=True)
            if archive.returncode:  # no history here
                return {}, {"embedded_left_out": archive.stderr.decode().strip()}
            subprocess.run(["tar", "-x", "-C", place], input=archive.stdout, check=True)
        sources = {"before": str(args.before or f"{place}/src"), "now": str(here.parent / "src")}
        for _ in range(1 if args.small else args.rounds):
            for version_of, source in sources.items():
                environment = {**os.environ, "PYTHONPATH": source}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                speed[version_of].append(json.loads(done.stdout.strip().splitlines()[-1])["samples_per_second"])
    ratios = [now_ / before for now_, before in zip(speed["now"], speed["before"], strict=True)]
    return {"stage1_speedup_embedded": statistics.median(ratios)}, {"embedded_samples_per_second": speed}


def whole_base(args: argparse.Namespace, device: torch.device) -> Base:
    """A pipeline of FLUX.1-dev's shapes with all of its models, random weights; with --small the embedded base."""
    if args.small:
        return base_for(load_base())
    pipe, dtype = make_base(False, device).pipeline, torch.bfloat16
    tokenizer, tokenizer_2 = build_tokenizer(), build_tokenizer()
    tokenizer.model_max_length, tokenizer_2.model_max_length = 77, 512
    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    vae = partial(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    models = {
        "vae": with_random_weights(vae, dtype, device),
        "text_encoder": with_random_weights(lambda: CLIPTextModel(clip), dtype, device),
        "text_encoder_2": with_random_weights(lambda: T5EncoderModel(t5), dtype, device),
    }
    whole = FluxPipeline(
        scheduler=pipe.scheduler, transformer=pipe.transformer, tokenizer=tokenizer, tokenizer_2=tokenizer_2, **models
    )
    return base_for(whole)


def whole(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """People an hour whose photo lies on disk and who lie there as subjects afterwards; the base stays in memory."""
    device = device_of(args)
    base = whole_base(args, device)
    base.place(device, encoders=True)
    seconds: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        adapter = MetaLoraConfig(r=1, lora_alpha=1, meta_r=8 if args.small else 128, target_modules=ATTENTION)
        base.denoiser.add_adapter(adapter, adapter_name="down")
        save_down(place / "down", base.denoiser, "down")
        restore(base.denoiser, every=True)
        base.denoiser.requires_grad_(False)
        down = load_down(place / "down")
        for number in range(args.whole_people + 1):  # the first brings kernels and files into their caches
            size = (64, 64) if args.small else (1024, 1024)
            Image.effect_noise(size, 64).convert("RGB").save(place / f"{number}.jpg", quality=92)
            seconds.append(_whole_person(base, down, place, number, args, short=number == 0))
    seconds = seconds[1:]
    total = statistics.median(sum(one.values()) for one in seconds)
    return {"people_per_gpu_hour_whole": 3600 / total}, {"whole_seconds": seconds}


def _whole_person(
    base: Base, down: DownSource, place: Path, number: int, args: argparse.Namespace, short: bool
) -> dict[str, float]:
    """Seconds of each phase; settings are the defaults, but with --small and `short` for the number of steps."""
    small: dict[str, Any] = {"max_train_steps": 2 * WARM_UP} if short else {}
    if args.small:
        small = {"resolution": 64, "max_train_steps": 4, "mixed_precision": "no"}
    device, clock = base.device, [now(base.device)]
    config = PersonalizeConfig(
        pretrained_model_name_or_path="random",
        instance_data_dir=str(place / f"{number}.jpg"),
        instance_prompt="a photo of a person",
        down=str(place / "down"),
        output_dir=str(place / f"person-{number}"),
        **small,
    ).settled(False)
    base.place(device, encoders=True)
    views = encode_subjects(base, [instance_subject(config)], config, config.views_per_image, progress=False)
    base.place(device, encoders=False)
    clock.append(now(device))
    run = Personalization(base, views, config, down)
    for _ in run.steps():
        pass
    clock.append(now(device))
    run.save(config.output_dir)
    run.remove()
    clock.append(now(device))
    encoded, trained, saved = (after - before for before, after in pairwise(clock))
    return {"encoding": encoded, "training": trained, "saving": saved}


def encoder(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """People a second and peak memory of training an encoder: rank 1, codes of 128 numbers, gradient checkpointing."""
    base = make_base(args.small, device_of(args))
    down = make_down(base, 8 if args.small else 128)
    clock = Clock(base, args)
    clock.turn("encoder", lambda: encoder_steps(base, down, args, args.encoder_people))
    seconds = clock.median("encoder")
    figures = {
        "encoder_train_people_per_second_flux": args.encoder_people / seconds,
        "encoder_train_peak_gib_flux": clock.peak.get("encoder"),
    }
    return figures, {"encoder_step_ms": 1000 * seconds}


def recipe24(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Peak memory of stage 2 that fits a card of 24 GB: int8 weights, cached text, gradient checkpointing, batch 1."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # the other parts run without it

    base = make_base(args.small, device_of(args))
    down = make_down(base, 8 if args.small else 128)
    quantize_(base.denoiser, Int8WeightOnlyConfig())
    clock = Clock(base, args)
    clock.turn("recipe24", lambda: meta_lora_steps(base, down, args, 1, 1, gradient_checkpointing=True))
    details = {
        "recipe24_step_ms": 1000 * clock.median("recipe24"),
        "recipe24_base": f"torchao {version('torchao')} int8 weights",
    }
    return {"flux_24gb_peak_gib": clock.peak.get("recipe24")}, details


JOBS = ["stage1_weak", "stage1_strong", "encoder_weak", "encoder_strong"]
LAYOUTS: dict[str, dict[str, str]] = {"whole": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}


def scaling(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stage 1 and the encoder's training on 1, 2, 4 and 8 processes: the share of ideal speed.

    Weak: a process has as many samples on any number of processes. Strong: the batch is the same, of a size for which
    one process has to recompute activations, as then all do. Each number of processes is a launch that does all of
    this on one base, which is whole on each or divided over them.
    """
    there = 2 if args.small else torch.cuda.device_count()
    before = json.loads(args.output.read_text()).get("details", {}) if args.output.exists() else {}
    seen: dict[str, dict[int, Any]] = {
        layout: {int(count): jobs for count, jobs in known.items()}
        for layout, known in before.get("scaling", {}).items()
    }
    for layout in args.layouts:
        for count in (count for count in args.counts if count <= there):
            done = seen.get(layout, {}).get(count, {})
            jobs = [job for job in args.jobs if job not in done]
            if time.monotonic() > args.until or (count == 1 and LAYOUTS[layout]) or not jobs:
                continue
            done = {**done, **on_processes(count, args, jobs, **LAYOUTS[layout])}
            seen.setdefault(layout, {})[count] = done
            print(json.dumps({f"{layout}, {count}": done}), file=sys.stderr, flush=True)
    return scaling_figures(seen), {"scaling": seen}


def scaling_figures(seen: dict[str, dict[int, Any]]) -> dict[str, Any]:
    """Shares of the ideal speed, of what was measured by layout and number of processes."""
    figures: dict[str, Any] = {}
    whole = seen.get("whole", {})
    for count in [count for count in whole if count > 1 and 1 in whole]:
        for job in whole[count].keys() & whole[1].keys():
            name = f"{job.replace('_weak', '_weak_scaling').replace('_strong', '_strong_scaling')}_{count}gpu"
            figures[name] = whole[count][job]["per_second"] / whole[1][job]["per_second"] / count
    if "stage1_weak_scaling_2gpu" in figures:
        figures["stage1_scaling_2gpu"] = 2 * figures["stage1_weak_scaling_2gpu"]
    return figures


def divided(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stage 1 on two processes with the base divided over them, beside the same with the base whole on each."""
    if not args.small and torch.cuda.device_count() < 2:
        return {}, {}
    whole, parts = (on_processes(2, args, ["stage1_weak"], **LAYOUTS[name])["stage1_weak"] for name in LAYOUTS)
    apart = max(abs(a - b) for a, b in zip(whole["losses"], parts["losses"], strict=True))
    figures = {
        "divided_step_over_whole_2gpu": whole["per_second"] / parts["per_second"],
        "divided_peak_gib_2gpu": parts["peak_gib"],
        "whole_peak_gib_2gpu": whole["peak_gib"],
    }
    return figures, {"divided_largest_difference_of_losses": apart}


def compiled(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """A step of stage 2 with its blocks compiled beside the same step in eager mode, at two batch sizes."""
    base = make_base(args.small, device_of(args))
    down = make_down(base, 8 if args.small else 128)
    clock, sizes = Clock(base, args), {"b4": args.batch_size, "b1": 1}
    for label, batch in sizes.items():
        for name, backend in ((label, "no"), (f"{label}_compiled", "eager" if args.small else "inductor")):
            clock.turn(name, partial(meta_lora_steps, base, down, args, 1, batch, dynamo_backend=backend))
    figures = {
        f"compiled_over_eager_{label}": clock.median(f"{label}_compiled") / clock.median(label) for label in sizes
    }
    step_ms = {name: 1000 * clock.median(name) for name in clock.seconds}
    return figures, {"compiled_step_ms": step_ms, "compiled_peak_gib": clock.peak}


PARTS = {
    "steps": stage_2,
    "scaling": scaling,
    "recipe24": recipe24,
    "compiled": compiled,
    "divided": divided,
    "encoder": encoder,
    "embedded": embedded,
    "whole": whole,
    "kernels": kernels,
}
FIGURES = (
    "step_over_diffusers_lora_r1",
    "mem_over_diffusers_lora_r1",
    "step_over_best_lora_r1",
    "mem_over_best_lora_r1",
    "step_over_best_lora_r1_b1",
    "step_over_eager_lora_r1_b1",
    "people_per_gpu_hour_whole",
    "stage1_speedup_embedded",
    "people_per_gpu_hour_serial",
    "people_per_gpu_hour_slots",
    "stage1_scaling_2gpu",
    *(f"{job}_scaling_{count}gpu" for job in JOBS for count in (2, 4, 8)),
    "flux_24gb_peak_gib",
    "compiled_over_eager_b4",
    "compiled_over_eager_b1",
    "divided_step_over_whole_2gpu",
    "divided_peak_gib_2gpu",
    "whole_peak_gib_2gpu",
    "encoder_train_people_per_second_flux",
    "encoder_train_peak_gib_flux",
)


def work(args: argparse.Namespace) -> None:
    """One process of several (started by the launcher); the main one prints what it saw of each job as JSON."""
    device = torch.device("cpu")
    if not args.small:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    processes = Processes.of_environment(device)
    base = make_base(args.small, device)
    torch.manual_seed(0)  # all processes have the same Down
    down = make_down(base, 8 if args.small else 128)
    config = PersonalizeConfig(**settings(args))
    if wants_shards(processes, config):
        base.denoiser.to("cpu")
        shard(base, device, processes, config)
    seen: dict[str, Any] = {}
    for job in args.worker:
        alike = job.replace("strong", "weak")
        if job.startswith("encoder") and processes.count == 1 and alike in seen:  # one process has one batch
            seen[job] = seen[alike]
        else:
            seen[job] = measured(base, down, args, job, processes)
        if processes.is_main:
            print(job, json.dumps(seen[job]), file=sys.stderr, flush=True)
    if processes.is_main:
        print(json.dumps(seen))


def measured(base: Base, down: DownSource, args: argparse.Namespace, job: str, processes: Processes) -> dict[str, Any]:
    """Speed, peak of memory and losses of a job, and where a step's time goes on the main process."""
    kind, _, way = job.partition("_")
    shares = processes.count if way == "weak" else 1
    if kind == "stage1":
        size = shares * args.subjects_per_process if way == "weak" else args.strong_subjects
        steps = stage_1_steps(base, args, size, processes, gradient_checkpointing=way == "strong")
    else:
        size = shares * args.encoder_people
        steps = encoder_steps(base, down, args, size, processes)
    device, losses = base.device, []
    gc.collect()  # of the job before
    forget_peak(device)
    warmup = max(args.warmup, WARM_UP + 2) if kind == "stage1" else args.warmup
    seconds = seconds_a_step((losses.append(step.loss) for step in steps), warmup, args.steps, device)
    seen = {"per_second": size / seconds, "batch": size, "step_ms": 1000 * seconds, "peak_gib": peak_gib(device)}
    seen |= {"losses": losses}
    if device.type == "cuda":
        kernels = kernel_milliseconds(steps)
        seen["kernel_ms"] = sum(kernels.values())
        seen["nccl_ms"] = sum(spent for name, spent in kernels.items() if "nccl" in name)
    if kind == "stage1" and processes.count > 1:
        downs = [torch.zeros(tensor.shape, device=device) for name, tensor in down.tensors.items() if DOWN in name]
        seen["exchanged_mb"] = sum(one.nbytes for one in downs) / 1e6
        seen["exchange_ms"] = 1000 * median_of(lambda: processes.sum_(downs), device, 5)
    processes.wait()
    steps.close()
    del steps
    restore(base.denoiser, every=True)
    base.denoiser.requires_grad_(False)
    return seen


def on_processes(count: int, args: argparse.Namespace, jobs: list[str], **environment: str) -> dict[str, Any]:
    """What the main one of `count` processes saw of each job."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", __file__]
    command += ["--worker", *jobs] + ["--small"] * args.small
    for name in ("steps", "warmup", "subjects_per_process", "strong_subjects", "encoder_people", "targets"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    seen: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy transformer on a CPU")
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no part or round after this time")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--people", type=int, default=8, help="people at once in slots, one sample each in a step")
    parser.add_argument("--iterations", type=int, default=375, help="steps that make a person")
    parser.add_argument("--subjects-per-process", type=int, default=4, help="of a weak batch of stage 1")
    parser.add_argument("--strong-subjects", type=int, default=32, help="of a strong batch of stage 1")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8], help="processes of the part scaling")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS, help="of that part")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="of its base")
    parser.add_argument("--encoder-people", type=int, default=8, help="people in a step of the encoder's training")
    parser.add_argument("--targets", type=int, default=4, help="photos of each of them that are drawn")
    parser.add_argument("--before", type=Path, help="sources of the version before, if there is no history here")
    parser.add_argument("--whole-people", type=int, default=2, help="people of the part whole, after a first one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--worker", nargs="+", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "training.json")
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    unsaid = "output", "worker", "seconds", "before"
    given = {name: value for name, value in vars(args).items() if name not in unsaid}
    args.until = time.monotonic() + args.seconds
    report: dict[str, Any] = {
        **origin(device_of(args)),
        "figures": dict.fromkeys(FIGURES),
        "details": {"settings": given},
    }
    if args.part and args.output.exists():
        before = json.loads(args.output.read_text())
        report["figures"].update(before["figures"])
        report["details"] = {**before["details"], "settings": given}
    for name in args.part or PARTS:
        if time.monotonic() > args.until:
            report["details"].setdefault("left_out", []).append(name)
        else:
            figures, details = PARTS[name](args)
            report["figures"].update(figures)
            report["details"].update(details)
            forget_peak(device_of(args))
        write(args.output, report)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
