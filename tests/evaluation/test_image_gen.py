# SPDX-License-Identifier: Apache-2.0
"""Our experiments for PEFT's image-generation benchmark, and the script that measures what needs no weights."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from peft import PeftConfig, PeftModel, get_peft_model

from peft_metalora import MetaLoraConfig

ROOT = Path(__file__).parents[2]
EXPERIMENTS = ROOT / "examples" / "image_gen" / "experiments" / "metalora"


@pytest.fixture(scope="module")
def klein() -> Flux2Transformer2DModel:
    """FLUX.2 klein 4B, its shapes alone."""
    with torch.device("meta"):
        return Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        )


def test_the_script_measures_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, out = ROOT / "benchmarks" / "image_gen.py", tmp_path / "image_gen.json"
    arguments = ["--small", "--rounds", "1", "--warmup", "1", "--steps", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.syspath_prepend(str(script.parent))  # as for a script that is started
    runpy.run_path(str(script), run_name="__main__")
    report = json.loads(out.read_text())
    figures = report["figures"]
    for method in ("meta_lora_subject", "meta_lora_meta", "lora_r32", "oft", "lokr", "vera"):
        assert figures[f"{method}_step_ms"] > 0 and figures[f"{method}_parameters"] > 0
        assert figures[f"{method}_file_mb"] == round(report["details"][method]["file_bytes"] / 1e6, 3) > 0
    assert figures["meta_lora_subject_parameters"] < figures["meta_lora_meta_parameters"]
    assert figures["meta_lora_subject_file_mb"] < figures["lora_r32_file_mb"] / 5
    assert set(report["open"].values()) == {None}


@pytest.mark.parametrize("name", ["flux2-klein-meta", "flux2-klein-subject"])
def test_peft_reads_the_experiments_and_can_log_them(name: str) -> None:
    config = PeftConfig.from_pretrained(str(EXPERIMENTS / name))
    assert isinstance(config, MetaLoraConfig) and config.stage == name.removeprefix("flux2-klein-")
    # The benchmark writes the configuration into its results, sets as lists.
    logged = {key: list(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    assert json.loads(json.dumps(logged))["peft_type"] == "META_LORA"


def test_the_experiment_adapts_the_layers_that_the_others_adapt(klein: Flux2Transformer2DModel) -> None:
    config = PeftConfig.from_pretrained(str(EXPERIMENTS / "flux2-klein-meta"))
    sizes = [
        (module.in_features, module.out_features)
        for name, module in klein.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".{name}".endswith(f".{one}") for one in config.target_modules)
    ]
    # 38 338 560 parameters have PEFT's results for LoRA of rank 32, on 80 layers.
    assert len(sizes) == 80 and sum(32 * (d_in + d_out) for d_in, d_out in sizes) == 38_338_560
    model = get_peft_model(klein, config, low_cpu_mem_usage=True)
    assert isinstance(model, PeftModel)
    expected = sum(64 * d_in + 4 * 64 + 4 * d_out for d_in, d_out in sizes)
    assert model.get_nb_trainable_parameters()[0] == expected
    model.unload()
