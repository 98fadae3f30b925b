# SPDX-License-Identifier: Apache-2.0
"""PEFT's own tests, run on `MetaLoraConfig` in the place of `LoraConfig`, beside a run on LoRA itself.

As a pytest plugin this file needs PEFT's tests and takes no line of them: in the modules of PEFT's tests the name
`LoraConfig` becomes a Meta-LoRA config that understands LoRA's arguments, in the tables of tests the rows of LoRA
become ours, and the rows of other methods are left out. The models that PEFT's tests download are those of
`peft_hub.py`. As a script it runs both and says what only ours fails, each with the reason that is known for it; what
has none is listed as unexplained, and the exit status is 1:

    python benchmarks/peft_suite.py PEFT_SOURCE [--stage subject] [--tests test_custom_models.py ...]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import peft_hub
import pytest
import torch

from peft_metalora.tuner import DownSource, MetaLoraConfig, down, fingerprint
from peft_metalora.tuner import adding as plan
from peft_metalora.tuner.base_layers import base_of, factor_shape
from peft_metalora.tuner.layer import MetaLoraLayer
from peft_metalora.tuner.on_model import module_path

KNOWN = {field.name for field in dataclasses.fields(MetaLoraConfig)}
LORAS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
RENAMED = {"init_lora_weights": "init_weights", "lora_only": "meta_lora_only"}
FILES = (
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_stablediffusion.py",
    "test_initialization.py",
    "test_lora_conversion.py",
    "test_mixed.py",
    "test_low_level_api.py",
    "test_tuners_utils.py",
    "test_config.py",
    "test_other.py",
    "test_mapping.py",
    "test_helpers.py",
    "test_loraplus.py",
    "test_bufferdict.py",
)
# Why a test of LoRA's cannot pass on Meta-LoRA: what its name and its error's last line hold, and the reason.
REASONS = {
    r"NotOursError|eva_\w+_but_not|alt_weight_tying|no attribute '(\w+_config|use_bdlora)'": (
        "uses an argument of LoRA's that Meta-LoRA has no counterpart of"
    ),
    r"UnsupportedModuleError|use_dora is for linear": "adapts a module that Meta-LoRA refuses",
    r"lora_[AB]|KeyError: '(default|first|second)'|_magnitude_vector|missing_keys_warning|dora_save|dora_caching": (
        "looks for LoRA's parameters by their names"
    ),
    r"_register_custom_module|target_parameters": "looks for an attribute of LoraConfig",
    r"MetaLoraConfig, t|LayerRepr|status|module_type|model_type|peft_types|nb_params|KeyPrefixes": (
        "compares names of classes, or counts of parameters"
    ),
    r"devices_all_cpu_small|get_nb_trainable": "counts all by the adapter's name, and a Down has one of its own",
    r"PickleRefusedError": "loads a pickled file, which is refused",
    r"weighted_combination.*AssertionError$": (
        "wants PEFT's default of add_weighted_adapter, which cuts a sum to the largest rank"
    ),
    r"Hotswapping only supports LORA|for_compiled_hotswap|with `LoraLayer`s": (
        "uses PEFT's hotswap_adapter or rescale_adapter_scale, which take LoRA alone"
    ),
    r"Actual message|Expected regex|bias_argument.invalid": "compares the words or the kind of a refusal",
    r"state_dict_low_cpu_mem_usage": "wants the meta device for a buffer, which PEFT's low_cpu_mem_usage leaves alone",
    r"key_mapping.*FingerprintMismatchError": "renames modules of the base, which the fingerprint of a Down covers",
    r"dora_raises|DTYPE|dtype_casting.*DID NOT RAISE|targets_lora_layer_raises|lora_to_lora_works_and_warns": (
        "wants an error or a warning where Meta-LoRA works"
    ),
    r"test_delete_adapter.*AssertionError$": (
        "wants another adapter to be active once the active one is deleted; another person is not shown unasked"
    ),
    r"conversion MSE too high": "bounds the error of a random adapter cut to half its rank",
}


class NotOursError(TypeError):
    """An argument of LoRA's that Meta-LoRA has no counterpart of."""


class AsOurs(type):
    """What is read from a file is a MetaLoraConfig, and as good as a stand-in."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, MetaLoraConfig)


class StandIn(MetaLoraConfig, metaclass=AsOurs):
    """A Meta-LoRA config that takes the place of LoraConfig and its arguments."""

    stand_in = "meta"
    target_parameters = None  # of LoRA alone, and read of every config

    def __init__(self, r: int = 8, lora_alpha: float = 8, **kwargs: Any) -> None:
        # A fresh Mid, because adapters of one test may differ in rank and a stored Mid has the rank of its Down.
        start = "fresh" if self.stand_in == "subject" else "stored"
        super().__init__(
            **{"stage": self.stand_in, "start": start, **translated({"r": r, "lora_alpha": lora_alpha, **kwargs})}
        )


StandIn.__name__ = MetaLoraConfig.__name__  # messages name the class


def translated(kwargs: dict[str, Any]) -> dict[str, Any]:
    """LoRA's arguments as ours.

    Raises:
        NotOursError: one is set that Meta-LoRA does not have.
    """
    ours: dict[str, Any] = {}
    for name, value in kwargs.items():
        if name == "peft_type":
            continue
        key = RENAMED.get(name, name)
        if key in KNOWN and not (name == "init_lora_weights" and not isinstance(value, bool)):
            ours[key] = RENAMED.get(value, value) if name == "bias" else value
        elif name not in LORAS:
            ours[key] = value  # what neither knows, for Python to refuse
        elif value:
            raise NotOursError(f"MetaLoraConfig has no counterpart of {name}={value!r}")
    return ours


def draw_a_down(model: Any, config: Any, planned: Any, targets: dict[str, Any]) -> None:
    """Before a subject looks for its Down: have one ready for these modules, always the same for the same modules."""
    tensors: dict[str, torch.Tensor] = {}
    for key, module in targets.items():
        row, d_out = factor_shape(base_of(module))
        r, meta_r, *_ = planned.ranks[key]
        generator = torch.Generator().manual_seed(len(module_path(key)) + d_out)
        for part, shape in {
            down.DOWN: (meta_r, *row),
            down.MID_INIT: (r, meta_r),
            down.MID: (1, r, meta_r),
            down.UP: (1, d_out, r),
        }.items():
            drawn = torch.randn(shape, generator=generator)
            tensors[f"{module_path(key)}.{part}"] = drawn / math.sqrt(3 * drawn[0].numel())
    source = DownSource(config, tensors, fingerprint(tensors))
    config.down = config.down or "tests/a-down"
    down.set_down_loader(lambda _: source)


# ---- the plugin ------------------------------------------------------------------------------------------------------

_outcomes: Path | None = None


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--config-of", choices=("lora", "meta", "subject"), default="meta")
    parser.addoption("--outcomes", type=Path, help="file that gets a line of JSON for each test")


def pytest_configure(config: Any) -> None:
    global _outcomes
    _outcomes = config.getoption("--outcomes")
    StandIn.stand_in = config.getoption("--config-of")
    if StandIn.stand_in == "subject":
        resolve = plan._resolve_down

        def with_a_down(*args: Any) -> None:
            draw_a_down(*args)
            resolve(*args)

        plan._resolve_down = with_a_down


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: Any) -> None:
    if not isinstance(collector, pytest.Module):
        return
    try:
        assert collector.obj  # imports the file, and what it needs
    except (pytest.skip.Exception, pytest.Collector.CollectError):
        return  # pytest meets it again, and reports it
    # Without hub_online_once, which would leave the offline mode.
    replaced: dict[str, Any] = {
        "hub_online_once": lambda *_: contextlib.nullcontext(),
        "load_dataset_english_quotes": peft_hub.quotes,
    }
    if StandIn.stand_in != "lora":
        replaced |= {"LoraConfig": StandIn, "LoraLayer": MetaLoraLayer}
    for module in [module for name, module in sys.modules.items() if name.startswith("tests.")]:
        for name, ours in replaced.items():
            if hasattr(module, name):
                setattr(module, name, ours)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: Any) -> None:
    marks = metafunc.definition.own_markers
    for number, mark in enumerate(marks):
        if mark.name != "parametrize":
            continue
        rows = [values(row) for row in mark.args[1]]
        if not any(config_class(cell) for row in rows for cell in row):
            continue
        kept = [made for row in rows if (made := as_ours(row)) is not None]
        single = isinstance(mark.args[0], str) and "," not in mark.args[0]
        kept = [row[0] if single and len(row) == 1 else row for row in kept]
        marks[number] = pytest.mark.parametrize(mark.args[0], kept).mark


def values(row: Any) -> tuple[Any, ...]:
    """The cells of a row of a table of tests."""
    if isinstance(row, type(pytest.param())):
        row = row.values[0] if len(row.values) == 1 else row.values
    return tuple(row) if isinstance(row, (list, tuple)) else (row,)


def config_class(cell: Any) -> type | None:
    """The class, if a cell is one of PEFT's configs or its class."""
    kind = cell if isinstance(cell, type) else type(cell)
    return kind if issubclass(kind, peft.PeftConfig) else None


def as_ours(row: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A row of LoRA's as ours, in the run on LoRA itself; None for one of another method or without counterpart."""
    if {config_class(cell) for cell in row} - {None} != {peft.LoraConfig} or is_refused(row):
        return None
    try:
        ours = tuple(cell_as_ours(cell) for cell in row)
    except NotOursError:
        return None
    return row if StandIn.stand_in == "lora" else ours


def is_refused(row: tuple[Any, ...]) -> bool:
    """Whether a row is about what Meta-LoRA refuses: attention modules, embeddings, grouped or DoRA convolutions.

    Our own tests check that these are refused, with a sentence, before the model is changed.
    """
    settings = [vars(cell) if isinstance(cell, peft.LoraConfig) else cell for cell in row]
    targets = [str(cell.get("target_modules")) for cell in settings if isinstance(cell, dict)]
    decomposed = any(cell.get("use_dora") for cell in settings if isinstance(cell, dict))
    models = [cell for cell in row if isinstance(cell, str)]
    return (
        any(model == "MHA" or model.startswith("Conv2dGroups") for model in models)
        or any("emb'" in target for target in targets)
        or (decomposed and any("conv" in target and "conv1d" not in target for target in targets))
        or (decomposed and "Conv1d" in models)
    )


def cell_as_ours(cell: Any) -> Any:
    if cell is peft.LoraConfig:
        return StandIn
    if isinstance(cell, peft.LoraConfig):
        default = peft.LoraConfig()
        changed = {name: value for name, value in vars(cell).items() if value != getattr(default, name)}
        ours = translated(changed)
        return cell if StandIn.stand_in == "lora" else StandIn(**ours)
    return translated(cell) if isinstance(cell, dict) else cell


def pytest_runtest_logreport(report: Any) -> None:
    if _outcomes is not None and (report.when == "call" or report.outcome != "passed"):
        name = report.nodeid.replace(StandIn.__name__, "LoraConfig")
        lines = [line for line in report.longreprtext.strip().splitlines() if "/docs/troubleshooting.md#" not in line]
        last = (lines or [""])[-1]
        with _outcomes.open("a") as file:
            file.write(json.dumps([name, report.outcome, last]) + "\n")


# ---- the script ------------------------------------------------------------------------------------------------------


def outcomes(checkout: Path, config_of: str, tests: list[str]) -> dict[str, tuple[str, str]]:
    """Run PEFT's tests with one config: the outcome and the last line of each test, by its name."""
    plugin, checkout = Path(__file__).resolve(), checkout.resolve()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outcomes"
        path.touch()
        peft_hub.fill(Path(folder) / "hub")
        command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, f"--rootdir={checkout}", "-p", plugin.stem]
        command += ["--tb=short", f"--config-of={config_of}", f"--outcomes={path}"]
        command += [str(checkout / "tests" / name) for name in tests]
        paths = os.pathsep.join(filter(None, [str(plugin.parent), os.environ.get("PYTHONPATH")]))
        environment = {
            **os.environ,
            "PYTHONPATH": paths,
            "HF_HOME": folder,
            "HF_HUB_OFFLINE": "1",
            "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # or test_torch_compile.py skips itself
        }
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode not in (0, 1):  # 1: some tests failed
            raise SystemExit(f"PEFT's tests did not run to their end:\n{done.stdout[-2000:]}")
        return {name: (outcome, last) for name, outcome, last in map(json.loads, path.read_text().splitlines())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="PEFT's source with tests, of the version that is installed")
    parser.add_argument("--stage", choices=("meta", "subject"), default="meta")
    parser.add_argument("--tests", nargs="+", default=list(FILES), help="files below its tests folder")
    arguments = parser.parse_args()
    lora, ours = (outcomes(arguments.checkout, kind, arguments.tests) for kind in ("lora", arguments.stage))
    for title, run in (("LoRA", lora), (f"Meta-LoRA, stage {arguments.stage}", ours)):
        print(f"{title}: {dict(Counter(outcome for outcome, _ in run.values()))}")
    alone = {
        name: last
        for name, (outcome, last) in ours.items()
        if outcome == "failed" and lora.get(name, ("",))[0] == "passed"
    }
    known: Counter[str] = Counter()
    for name, last in alone.items():
        reason = next((reason for pattern, reason in REASONS.items() if re.search(pattern, f"{name} {last}")), None)
        known[reason or "unexplained"] += 1
        if reason is None:
            print(f"unexplained: {name}\n    {last}")
    print(f"Passed by LoRA and failed by Meta-LoRA: {len(alone)}")
    for reason, count in known.most_common():
        print(f"{count:5d}  {reason}")
    return int(known["unexplained"] > 0)


if __name__ == "__main__":
    sys.exit(main())
