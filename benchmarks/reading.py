# SPDX-License-Identifier: Apache-2.0
"""A person from a photo on FLUX.1-dev's shapes: from the file to an installed subject, and codes that come and go.

Random weights, bf16, all attention layers, r = 1, meta_r = 128, codes of 128 numbers.

    python benchmarks/reading.py                 one GPU with 80 GB; writes benchmarks/results/reading.json
    python benchmarks/reading.py --small         a toy pipeline on a CPU, to check the script

`read_ms_flux` is from a file of 1024 px to a subject in its slot: decoding, VAE, encoder, expansion. As an adapter of
its own it takes longer (`read_as_adapter_ms_flux`), because PEFT walks over the model. `expand_ms_flux` is the
expansion of a code into a slot alone, called and waited for, `expand_in_a_row_ms` one of twenty that are waited for
together; `expand_over_bandwidth` divides the first by the time that its bytes (basis, mean and the slot's row) take at
the speed at which this card copies. A swap (`swap_ms_<n>_codes`) brings one of n codes that wait in host
memory into the only slot. Figures are medians, each call timed until the device has finished."""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from clock import median_of
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_dev import ATTENTION, Flux, with_random_weights
from origin import origin, write
from PIL import Image

from peft_metalora import MetaLoraConfig, enable_meta_lora, load_down, save_down
from peft_metalora.bases import base_for
from peft_metalora.checkpoint.space import SubjectCode, SubjectSpace
from peft_metalora.encoder import EncoderConfig, load_reader, make_encoder, save_reader
from peft_metalora.pipelines.table import tables_of

CODE_SIZE = 128


def make_vae(small: bool, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """FLUX.1-dev's autoencoder, which makes 16 channels of latents and divides both sides by 8; random weights."""
    widths = (8, 8) if small else (128, 256, 512, 512)
    make = partial(
        AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1 if small else 2,
        latent_channels=16,
        norm_num_groups=8 if small else 32,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return with_random_weights(make, dtype, device).eval()


class Bench:
    """A pipeline without text encoders, a Down that reads photos in a folder, a photo, and a clock."""

    def __init__(self, small: bool, repeats: int, waiting: int, folder: Path) -> None:
        self.small, self.repeats, self.waiting, self.folder = small, repeats, waiting, folder
        self.flux = Flux(small)
        self.device = self.flux.device
        self.figures: dict[str, float] = {}
        nothing = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        vae = make_vae(small, self.flux.dtype, self.device)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        pipe = FluxPipeline(scheduler=scheduler, vae=vae, transformer=self.flux.model, **nothing)
        self.pipe = enable_meta_lora(pipe)
        self._write_down()
        self.photo = folder / "ann.jpg"
        side = 64 if small else 1024
        blobs = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(blobs).resize((side, side), Image.Resampling.BICUBIC).save(self.photo, quality=95)

    def _write_down(self) -> None:
        """A Down of random numbers with a random space and encoder."""
        model = self.flux.model
        meta_rank = 8 if self.small else 128
        config = {"r": 1, "lora_alpha": 1, "meta_r": meta_rank, "target_modules": ATTENTION, "init_weights": False}
        model.add_adapter(MetaLoraConfig(**config), "faces")
        self.down = self.folder / "faces"
        save_down(self.down, model, "faces")
        self.pipe.unload_meta_lora()
        space = SubjectSpace.around(load_down(self.down), CODE_SIZE).to(self.device)
        with torch.no_grad():
            space.basis.normal_(std=0.001)
        settings = {"resolution": 16, "width": 8, "hidden": 16} if self.small else {}
        encoder = make_encoder(EncoderConfig(code_size=CODE_SIZE, **settings), base_for(self.pipe).encode_images)
        save_reader(self.down, space.rounded().cpu(), encoder)

    def note(self, name: str, value: float) -> None:
        """Keep a figure and print it."""
        self.figures[name] = round(value, 4)
        print(f"{name:<28}{self.figures[name]:>14.4f}", flush=True)

    def milliseconds(self, work: Callable[[], object], repeats: int | None = None) -> float:
        """Median wall time of one call, all of its kernels included."""
        return 1000 * median_of(work, self.device, repeats or self.repeats)

    def read(self) -> None:
        """A photo's file to a subject in its slot; to an adapter of its own; and what of it the parts take."""
        pipe, model = self.pipe, self.flux.model

        def into_slot() -> None:
            name = pipe.read_subject(self.photo, "ann", down=self.down, as_adapter=False)
            next(iter(tables_of(model).values())).bring([name])

        self.note("read_ms_flux", self.milliseconds(into_slot))
        numbers = iter(range(10**6))
        as_adapter = self.milliseconds(lambda: pipe.read_subject(self.photo, f"bob-{next(numbers)}", down=self.down), 3)
        self.note("read_as_adapter_ms_flux", as_adapter)
        pipe.unload_meta_lora()
        encode = base_for(pipe).encode_images
        encoder = load_reader(self.down, load_down(self.down), encode).encoder.to(self.device)
        image = Image.open(self.photo).convert("RGB")
        features = encoder.source.features([image]).to(self.device)

        def opened() -> None:
            Image.open(self.photo).convert("RGB")

        with torch.no_grad():
            self.note("decoding_ms", self.milliseconds(opened))
            self.note("vae_ms", self.milliseconds(lambda: encoder.source.features([image])))
            self.note("encoder_ms", self.milliseconds(lambda: encoder(features)))

    def copy_speed(self) -> float:
        """GB a second that the device reads and writes while it copies a gigabyte."""
        one = torch.zeros(2**20 if self.small else 2**30, dtype=torch.uint8, device=self.device)
        other = torch.empty_like(one)
        return 2 * one.nbytes / self.milliseconds(lambda: other.copy_(one), 10 * self.repeats) / 1e6

    def codes(self) -> None:
        """An expansion beside what its bytes cost; swaps among a few and very many codes; host memory of a code."""
        pipe = self.pipe
        pipe.load_meta_lora(self.down, "faces")
        table = pipe.enable_subject_slots(1)
        space = load_reader(self.down, load_down(self.down), base_for(pipe).encode_images).space
        marks = space.down_fingerprint, space.fingerprint
        codes = torch.randn(1024, CODE_SIZE, generator=torch.Generator().manual_seed(0))
        waiting: list[str] = []

        def more(count: int) -> None:
            for number in range(len(waiting), count):
                table.register_code(str(number), SubjectCode(codes[number % len(codes)], *marks), space)
                waiting.append(str(number))

        more(2)
        placed, slot = table.space(space.fingerprint), table._flat[0]
        assert placed is not None
        self.note("code_bytes", codes[0].nbytes)
        moved = placed.basis.nbytes + placed.mean.nbytes + slot.nbytes
        ms = self.milliseconds(lambda: placed.expand_into(codes[0], slot), 10 * self.repeats)
        self.note("expand_ms_flux", ms)
        self.note("expand_mb", moved / 1e6)
        row = self.milliseconds(lambda: [placed.expand_into(code, slot) for code in codes[:20]])
        self.note("expand_in_a_row_ms", row / 20)
        speed = self.copy_speed()
        self.note("copy_gb_per_s", speed)
        self.note("expand_over_bandwidth", ms / (moved / 1e6 / speed))
        most = self.waiting
        order = random.Random(0)
        for count in (1, 1000, most):
            give_back()
            before, held = len(waiting), resident_bytes()
            more(count)
            if count == most:
                self.note("host_bytes_per_code", (resident_bytes() - held) / (count - before))
            names = [waiting[order.randrange(max(count, 2))] for _ in range(100)] if count > 1 else ["0", "1"] * 60
            turns = iter(names * 2)
            self.note(f"swap_ms_{count}_codes", self.milliseconds(lambda it=turns: table.bring([next(it)]), 100))
        pipe.unload_meta_lora()


def give_back() -> None:
    """Give the system what was freed: else new codes would lie in old memory, and seem to take less than they hold."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_bytes() -> int:
    """Host memory that this process holds (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Run everything and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="A toy pipeline on the CPU.")
    parser.add_argument("--repeats", type=int, default=10, help="Timings a figure is the median of.")
    parser.add_argument("--waiting", type=int, help="Codes in host memory at the end: 1,000,000, small 10,000.")
    parts = ("read", "codes")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "reading.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        waiting = options.waiting or (10_000 if options.small else 1_000_000)
        bench = Bench(options.small, options.repeats, waiting, Path(folder))
        report = origin(bench.device)
        for part in options.parts:
            getattr(bench, part)()
            write(options.output, {**report, "figures": bench.figures})


if __name__ == "__main__":
    main()
