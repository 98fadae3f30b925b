# SPDX-License-Identifier: Apache-2.0
"""The rows for PEFT's image-generation benchmark: every start, rate and seed, and a table of what came out."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from PIL import Image

from peft_metalora import load_down, load_subject
from peft_metalora.cli import main
from pipelines_tiny import tiny_flux_pipeline
from training_tiny import save_tiny_down, teach_to_read

SCRIPTS = Path(__file__).parents[2] / "examples" / "image_gen"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with LoRA's row; three photos, of which two are trained on. Beside it a Down that reads photos."""
    save_tiny_down(tmp_path)
    teach_to_read(tmp_path / "down")
    folder = tmp_path / "image-gen"
    LoraConfig(r=32).save_pretrained(str(folder / "experiments" / "lora" / "flux2-klein-default"))
    photos = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255 * 2 - 1
    (tmp_path / "trained").mkdir()
    for number, pixels in enumerate(photos[:2]):
        image = ((pixels / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(image).save(tmp_path / "trained" / f"{number}.png")
    divided = {"pixel_values": list(photos[:2])}, [{"raw_image": photos[2]}], []
    for name, members in (
        ("data", {"get_train_valid_test_datasets": lambda train_config, print_fn=print: divided}),
        ("utils", {"get_train_config": lambda path: None}),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(folder)
    return folder


def test_every_start_rate_and_seed_is_an_experiment(benchmark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = benchmark.parent / "down"
    run(monkeypatch, "prepare.py", benchmark, "--down", down, "--rates", "1e-3", "0.01", "--seeds", 0, 2)
    found = sorted(path.name for path in (benchmark / "experiments" / "metalora").iterdir())
    assert len(found) == 4 * 2 * 2 and found[0] == "flux2-klein-lora-lr0.001-seed0"
    for name in found:
        folder = benchmark / "experiments" / "metalora" / name
        training = json.loads((folder / "training_params.json").read_text())
        assert training["optimizer_kwargs"]["lr"] == float(name.partition("-lr")[2].partition("-seed")[0])
        assert f"-seed{training['seed']}" in name and training["optimizer_kwargs"]["weight_decay"] == 1e-4
    # The benchmark's Makefile takes every configuration below experiments/ for an experiment.
    assert {path.parent.parent.name for path in (benchmark / "experiments").rglob("adapter_config.json")} == {
        "metalora",
        "lora",
    }


def test_the_read_start_is_that_of_the_training_photos(benchmark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    down = benchmark.parent / "down"
    run(monkeypatch, "prepare.py", benchmark, "--down", down, "--rates", "1e-3")
    subject = benchmark.parent / "subject"
    photos = str(benchmark.parent / "trained")
    assert main(["read", "--down", str(down), "--photos", photos, "--output_dir", str(subject), "--whole"]) == 0
    wanted = load_subject(subject).tensors
    assert load_down(benchmark / "metalora-downs" / "read").fingerprint == load_down(down).fingerprint
    for start in ("read", "mean"):
        # As the benchmark puts an experiment on.
        config = PeftConfig.from_pretrained(f"experiments/metalora/flux2-klein-{start}-lr0.001-seed0")
        model = get_peft_model(tiny_flux_pipeline().transformer, config)
        own = {name: value for name, value in model.named_parameters() if value.requires_grad}
        assert len(own) == len(wanted)
        equal = [
            torch.allclose(own[f"base_model.model.{name}.default"], tensor, atol=1e-6)
            for name, tensor in wanted.items()
        ]
        assert all(equal) if start == "read" else not any(equal)


def result(folder: Path, name: str, rate: float, valid: float, test: float) -> None:
    looks: list[dict[str, Any]] = [{"step": 100, "valid dino_similarity": valid}]
    looks.append({"step": 750, "test dino_similarity": test, "drift": 0.25})
    data = {
        "run_info": {"experiment_name": name, "train_config": {"optimizer_kwargs": {"lr": rate}}},
        "train_info": {
            "status": "success", "metrics": looks, "train_time": 700.0, "accelerator_memory_max": 2**33,
            "file_size": 14_000_000,
        },
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / f"{name.replace('/', '--')}.json").write_text(json.dumps(data))


def test_a_rate_is_chosen_by_the_validation_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, test in ((0, 0.6), (1, 0.7)):
        result(tmp_path / "results", f"metalora/flux2-klein-read-lr0.001-seed{seed}", 0.001, 0.8, test)
        result(tmp_path / "results", f"metalora/flux2-klein-read-lr0.01-seed{seed}", 0.01, 0.7, 0.9)
    run(monkeypatch, "rows.py", tmp_path / "results")
    lines = capsys.readouterr().out.splitlines()
    similarity, drift, rest = "0.65 [0.6, 0.7]", "0.25 [0.25, 0.25]", "700 [700, 700] | 8 [8, 8] | 14 [14, 14]"
    assert len(lines) == 3 and lines[2] == f"| read | 0.001 | 2 | {similarity} | {drift} | {rest} |"
