# SPDX-License-Identifier: Apache-2.0
"""Serving many subjects on FLUX.1-dev's shapes: swaps, mixed batches, merging, beside stock diffusers and PEFT.

Random weights, bf16, 512 x 512 px (1024 image and 512 text tokens), all attention layers, r = 1, meta_r = 128.

    python benchmarks/serving.py                 one GPU with 80 GB; writes benchmarks/results/serving.json
    python benchmarks/serving.py --parts loads   one part; figures of the others stay as the file has them
    python benchmarks/serving.py --small         a toy transformer on a CPU, to check the script
    python benchmarks/serving.py --small --layers 19 38 --parts loads    as many layers as FLUX.1-dev has, each a toy

A swap brings a subject from host memory into a slot that another one leaves, kernels included. Figures are medians; a
ratio is taken between two timings that alternate, so that a drifting clock cancels. `one_by_one_over_mixed` chooses a
subject before each pass, as today's code of ours has to; `alone_over_mixed` does not, `lora_alone_over_mixed` is
PEFT's LoRA r=1 one by one, and `fused_lora_alone_over_mixed` LoRAs that somebody fused before, at no cost. Loads are
those of `load_meta_lora` from one folder under other names, an adapter each, in seconds of the median of fifty."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from clock import median_of, once
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_dev import ATTENTION, Flux
from origin import origin, write
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict

from peft_metalora import MetaLoraConfig, enable_meta_lora, save_down, save_subject, set_slots
from peft_metalora.pipelines.table import SubjectTable
from peft_metalora.tuner import down_fingerprint
from peft_metalora.tuner.on_model import down_on_model, meta_lora_layers
from peft_metalora.tuner.placing import activate, remember, restore


class Bench:
    """A model, its inputs and a clock."""

    def __init__(self, small: bool, repeats: int, layers: Sequence[int] | None = None) -> None:
        self.small, self.repeats = small, repeats
        changes = {"num_layers": layers[0], "num_single_layers": layers[1]} if layers else {}
        self.flux = Flux(small, **changes)
        self.model = self.flux.model
        self.settings = {"r": 1, "lora_alpha": 1, "meta_r": 8 if small else 128, "target_modules": ATTENTION}
        self.figures: dict[str, float] = {}

    def note(self, name: str, value: float) -> None:
        """Keep a figure and print it."""
        self.figures[name] = round(value, 4)
        print(f"{name:<28}{self.figures[name]:>12.4f}", flush=True)

    def milliseconds(self, work: Callable[[], object], repeats: int | None = None, warm_up: int = 3) -> float:
        """Median wall time of one call, all of its kernels included."""
        return 1000 * median_of(work, self.flux.device, repeats or self.repeats, warm_up)

    def forward(self, batch: int, model: torch.nn.Module | None = None) -> Callable[[], object]:
        """A forward pass of one batch, of the model with the subjects by default."""
        return self.flux.forward(self.model if model is None else model, batch)

    def ratio(self, one: Callable[[], float], other: Callable[[], float], rounds: int = 3) -> float:
        """The median of `one` over `other`, taken in turns."""
        return statistics.median(one() / other() for _ in range(rounds))

    # Ours

    def table(self, capacity: int) -> SubjectTable:
        """A Down of random numbers on the model, with slots for its subjects."""
        remember(self.model)
        if not list(meta_lora_layers(self.model)):
            inject_adapter_in_model(MetaLoraConfig(**self.settings, init_weights=False), self.model, "down")
        down = down_on_model(self.model, down_fingerprint(self.model, "down"))
        assert down is not None
        table = SubjectTable(self.model, down, capacity)
        self.tensors = {k: v for k, v in down.tensors.items() if k.endswith(("metalora_mid", "metalora_up"))}
        return table

    def swaps(self) -> None:
        """A subject of 2, 100 or 1000 that wait in host memory, into the only slot."""
        table = self.table(1)
        factors = [
            part[table.adapter_name]
            for _, layer in meta_lora_layers(self.model)
            for part in (layer.metalora_mid, layer.metalora_up)
        ]
        self.note("subject_mb", sum(factor[0].nbytes for factor in factors) / 1e6)
        for count in (1, 100, 1000):
            for number in range(len(table.names()), max(count, 2)):
                table.register(str(number), table.config, self.tensors)
            names = iter([str(number % max(count, 2)) for number in range(10_000)])
            self.note(f"swap_ms_{count}", self.milliseconds(lambda it=names: table.bring([next(it)]), 100))
        restore(self.model)

    def mixed(self) -> None:
        """Different subjects in a batch against one subject and against one by one; recompilations over the mixes."""
        lora = self.flux.twin()
        inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=ATTENTION, init_lora_weights=False), lora)
        lora_alone, fused_alone = self.forward(1, lora), self.forward(1, self.flux.twin())
        table = self.table(8)
        for number in range(16):
            table.register(str(number), table.config, self.tensors)
        slots = list(table.bring(map(str, range(8))).values())
        activate(self.model, [table.adapter_name])
        alone = self.forward(1)
        rivals = {"alone": alone, "lora_alone": lora_alone, "fused_lora_alone": fused_alone}
        for batch in (4, 8):
            run, different = self.forward(batch), slots[:batch]

            def one_by_one(subjects: list[int] = different) -> None:
                for slot in subjects:
                    set_slots(self.model, [slot])
                    alone()

            def timed(index: list[int] | None, run: Callable[[], object] = run) -> float:
                set_slots(self.model, index)
                return self.milliseconds(run)

            self.note(f"mixed_over_single_b{batch}", self.ratio(lambda d=different: timed(d), lambda: timed(None)))
            by_turns = self.ratio(lambda f=one_by_one: self.milliseconds(f, warm_up=1), lambda d=different: timed(d), 1)
            self.note(f"one_by_one_over_mixed_b{batch}", by_turns)
            for name, single in rivals.items():

                def in_turn(single: Callable[[], object] = single, count: int = batch) -> float:
                    set_slots(self.model, slots[:1])
                    return count * self.milliseconds(single)

                self.note(f"{name}_over_mixed_b{batch}", self.ratio(in_turn, lambda d=different: timed(d)))
        self.compiled(table)
        set_slots(self.model, None)
        restore(self.model)

    def compiled(self, table: SubjectTable) -> None:
        """A compiled mixed batch against a compiled batch of one subject, and the graphs that appear after the first
        ones while subjects come, go and mix."""
        torch._dynamo.reset()
        self.model.compile_repeated_blocks(fullgraph=True, backend="eager" if self.small else "inductor")
        run, graphs = self.forward(4), torch._dynamo.utils.counters["stats"]
        set_slots(self.model, None)
        single = self.milliseconds(run)
        set_slots(self.model, list(table.bring(map(str, range(4))).values()))
        self.note("mixed_over_single_compiled_b4", self.milliseconds(run) / single)
        before = graphs["unique_graphs"]
        if not before:
            raise RuntimeError("expected compiled graphs, found none: the count below would mean nothing")
        for turn in range(5):
            slots = table.bring(str((turn * 3 + number) % 16) for number in range(4))
            set_slots(self.model, [*list(slots.values())[:3], -1])
            run()
        self.note("recompilations", graphs["unique_graphs"] - before)
        for module in self.model.modules():
            module._compiled_call_impl = None

    def merging(self) -> None:
        """A merged subject against the base at batch 4, in turns, and the time to put another one in its place."""
        bare = self.flux.twin()
        table = self.table(2)
        table.register("0", table.config, self.tensors)
        table.bring(["0"])
        activate(self.model, [table.adapter_name])
        layers = [layer for _, layer in meta_lora_layers(self.model)]

        def another() -> None:
            for layer in layers:
                if layer.merged:
                    layer.unmerge()
                layer.merge(adapter_names=[table.adapter_name])

        self.note("merge_ms", self.milliseconds(another))
        merged, base = self.forward(4), self.forward(4, bare)
        once = lambda run: self.milliseconds(run, 1, 0)  # noqa: E731
        merged(), base()
        self.note("merged_over_base", self.ratio(lambda: once(merged), lambda: once(base), 2 * self.repeats))
        restore(self.model)

    def loads(self, count: int = 1000, few: int = 50) -> None:
        """The last of a thousand subjects that are loaded as adapters, against the first ones after their Down."""
        trained = self.flux.twin()
        shared = {**self.settings, "init_weights": False}
        inject_adapter_in_model(MetaLoraConfig(**shared), trained, "down")
        inject_adapter_in_model(MetaLoraConfig(**shared, stage="subject", down="down"), trained, "subject")
        nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = enable_meta_lora(FluxPipeline(scheduler=scheduler, transformer=self.flux.twin(), **nothing))
        seconds = []
        with tempfile.TemporaryDirectory() as place:
            save_down(f"{place}/down", trained, "down")
            save_subject(f"{place}/someone", trained, "subject", down=f"{place}/down", fold=False)
            del trained
            for number in range(count + 1):
                seconds.append(once(lambda n=number: pipe.load_meta_lora(f"{place}/someone", str(n)), self.flux.device))
        first, last = statistics.median(seconds[1 : few + 1]), statistics.median(seconds[-few:])
        self.note("load_ms_first", 1000 * first)
        self.note("load_ms_1000th", 1000 * last)
        self.note("load_1000th_over_first", last / first)

    # Stock

    def stock(self) -> None:
        """diffusers' set_adapters with 50 LoRAs of rank 1, and its hotswap."""
        config = LoraConfig(r=1, lora_alpha=1, target_modules=ATTENTION, init_lora_weights=False)
        inject_adapter_in_model(config, self.model, "0")
        state = get_peft_model_state_dict(self.model, adapter_name="0")
        self.note("stock_lora_r1_mb", sum(tensor.nbytes for tensor in state.values()) / 1e6)
        self.model._hf_peft_config_loaded = True
        state = {f"transformer.{name}": tensor.clone() for name, tensor in state.items()}

        def hotswap() -> None:
            self.model.load_lora_adapter(state, prefix="transformer", adapter_name="0", hotswap=True)

        self.note("stock_hotswap_ms", self.milliseconds(hotswap, 5, warm_up=1))
        for number in range(1, 50):
            inject_adapter_in_model(config, self.model, str(number))
        names = iter([str(number % 50) for number in range(1000)])
        self.note("stock_set_adapters_ms_50", self.milliseconds(lambda: self.model.set_adapters(next(names)), 5))
        self.model.unload_lora()


def main() -> None:
    """Run everything and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="A toy transformer on the CPU.")
    parser.add_argument("--layers", type=int, nargs=2, metavar=("DOUBLE", "SINGLE"), help="Blocks of each kind.")
    parser.add_argument("--repeats", type=int, default=10, help="Timings a figure is the median of.")
    parts = ("swaps", "mixed", "merging", "loads", "stock")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="Others keep the file's figures.")
    default = Path(__file__).parent / "results" / "serving.json"
    parser.add_argument("--output", type=Path, default=default)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    bench = Bench(options.small, options.repeats, options.layers)
    before: dict[str, Any] = {"figures": {}}
    if tuple(options.parts) != parts and options.output.exists():
        before = json.loads(options.output.read_text())
    own = origin(bench.flux.device)
    for part in options.parts:
        getattr(bench, part)()
        report = {**own, "figures": {**before["figures"], **bench.figures}}
        if before["figures"]:  # a file says where its figures are from, and of others that they are not
            others = {**before.get("from_other_runs", {}), **dict.fromkeys(bench.figures, own)}
            report = {**before, "figures": report["figures"], "from_other_runs": others}
        write(options.output, report)


if __name__ == "__main__":
    main()
