# SPDX-License-Identifier: Apache-2.0
"""What a command would take is said from shapes, before anything is loaded, and where memory was wanting."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from families_tiny import FAMILIES
from peft_metalora.bases import base_for
from peft_metalora.bases.footprint import GIB, held, one_pass, streamed
from peft_metalora.bases.memory import Whole
from peft_metalora.bases.parts import Parts
from peft_metalora.cli import main
from peft_metalora.commands import estimate
from pipelines_tiny import PIPELINES, tiny_flux_pipeline
from training_tiny import save_tiny_down, teach_to_read, write_people

REPOSITORY = Path(__file__).parents[2]
FLUX = {
    "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "in_channels": 64, "guidance_embeds": True,
}  # fmt: skip
SDXL = {
    "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816, "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip


@pytest.fixture(scope="module")
def flux():
    """FLUX.1-dev's transformer in a tiny pipeline whose autoencoder divides by 8, without a number."""
    pipe = tiny_flux_pipeline()
    with torch.device("meta"):
        pipe.transformer = FluxTransformer2DModel(**FLUX)
    pipe.vae_scale_factor = 8
    return base_for(pipe, max_sequence_length=512)


@pytest.mark.parametrize(("quantize", "gib"), [("none", 22.2), ("int8", 11.2), ("nf4", 6.0)])
def test_weights_take_what_they_took_on_a_gpu(flux, quantize, gib):
    """22.2 and 11.2 GiB were seen on an H100 (benchmarks/results/training.json), 6 is what others see of NF4."""
    found = held(flux.denoiser, Whole(quantize), torch.bfloat16, quantized=quantize != "none") / GIB
    assert found == pytest.approx(gib, rel=0.05)
    waiting = streamed(flux.denoiser, Whole(quantize), torch.bfloat16, quantized=quantize != "none") / GIB
    assert waiting < 0.1 * found


def test_a_pass_takes_what_it_took_on_a_gpu(flux):
    """512 px with 512 tokens of text, on an H100: batches of 4 and 1 differ by 17.6 GiB (training.json)."""
    own = one_pass(flux, 512)
    assert own.kept / GIB == pytest.approx(17.6 / 3, rel=0.1)
    assert own.checkpointed / GIB == pytest.approx(0.7, rel=0.3)
    assert own.operations == pytest.approx(1536 * 2 * 7e9, rel=0.1)
    assert one_pass(flux, 1024).operations > 2.5 * own.operations


def test_a_unet_is_seen_at_all_its_resolutions():
    pipe = PIPELINES["sdxl"]()
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(**SDXL)
    pipe.vae_scale_factor = 8
    own = one_pass(base_for(pipe), 1024)
    assert own.operations == pytest.approx(6e12, rel=0.2)  # 5.98 T, as its papers count a step of 1024 px
    assert 1 < own.kept / GIB < 20 and own.checkpointed < 0.5 * own.kept


def test_a_denoiser_that_names_no_blocks_is_one(monkeypatch):
    """Bug: as one that is newer than its pipeline's class may, it ended in a traceback."""
    base = base_for(PIPELINES["z_image"]())
    in_blocks = one_pass(base, 32)
    monkeypatch.setattr(type(base.denoiser), "_repeated_blocks", [])
    monkeypatch.setattr(type(base.denoiser), "_no_split_modules", [])
    assert one_pass(base, 32).operations >= in_blocks.operations > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_estimated_without_a_weight(family, tmp_path, monkeypatch, capsys):
    PIPELINES[family]().save_pretrained(tmp_path / "base")
    monkeypatch.setattr(Parts, "bring", lambda *_: pytest.fail("weights are loaded"))
    base = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out")]
    found = []
    for command in (
        ["personalize", "--method", "lora", "--instance_data_dir", "x", "--resolution", "32"],
        ["personalize", "--method", "lora", "--instance_data_dir", "x", "--resolution", "32", "--quantize", "nf4"],
        ["generate", "--prompt", "a photo", "--resolution", "32"],
    ):
        assert main(["estimate", *command, *base, "--json"]) == 0
        out = capsys.readouterr().out
        found.append(json.loads(out[out.index("{\n") :]))
        assert found[-1]["measured"] is None and found[-1]["download"] == 0 and found[-1]["seconds"] > 0
        assert found[-1]["gib"] == max(found[-1]["phases"].values())
    whole, quantized, _ = found
    assert quantized["phases"]["training"] < whole["phases"]["training"]
    assert not (tmp_path / "out").exists()


def test_what_is_read_and_taught_is_estimated_and_a_gpu_is_not_needed(tmp_path, capsys):
    write_people(tmp_path / "people", subjects=2)
    save_tiny_down(tmp_path)
    teach_to_read(tmp_path / "down")
    down = ["--down", str(tmp_path / "down"), "--output_dir", str(tmp_path / "out")]
    assert main(["estimate", "read", *down, "--photos", "ann.jpg"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"GPU memory  about \d+\.\d GiB at most \(reading \d+\.\d\)\n", told) and "from shapes" in told
    for command in ("train-encoder", "--train_data_dir"), ("personalize", "--instance_data_dir"):
        arguments = ["estimate", command[0], *down, command[1], str(tmp_path / "people"), "--resolution", "32"]
        assert main(arguments) == 0
        assert "training" in capsys.readouterr().out
    people = ["--train_data_dir", str(tmp_path / "people"), "--pretrained_model_name_or_path", str(tmp_path / "base")]
    assert main(["estimate", "meta-train", *people, "--output_dir", str(tmp_path / "out"), "--resolution", "32"]) == 0
    assert "encoding" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert main(["estimate", "demo"]) == 2
    assert "expected meta-train, train-encoder, personalize, read or generate" in capsys.readouterr().err


def test_what_was_measured_is_said_before_what_shapes_say(tmp_path, monkeypatch, capsys):
    pipe = tiny_flux_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    numbers = sum(parameter.numel() for parameter in pipe.transformer.parameters())
    held = {"resolution": 32, "quantize": "nf4", "offload": "group", "gradient_checkpointing": True}
    row = {"command": "personalize", "denoiser": "FluxTransformer2DModel", "numbers": numbers, **held}
    rows = [{"occasion": {**row, "train_batch_size": 1}, "gib": 6.25, "machine": "a card"}]
    monkeypatch.setattr(estimate, "_rows", lambda: rows)
    base = ["--pretrained_model_name_or_path", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out")]
    command = ["personalize", "--method", "lora", "--instance_data_dir", "x", "--resolution", "32", *base]
    command += ["--gradient_checkpointing", "--quantize", "nf4", "--offload", "group"]
    for size, said in (("1", "6.2 GiB, measured (a card); from shapes enc"), ("2", "about ")):
        assert main(["estimate", *command, "--train_batch_size", size]) == 0
        told = capsys.readouterr().out
        assert f"GPU memory  {said}" in told
        assert "loading" not in told, "4-bit weights that will wait are on the device one after another"


def test_the_table_is_what_the_benchmark_found():
    found = json.loads((REPOSITORY / "benchmarks" / "results" / "memory.json").read_text())
    measured = [
        (one["gib"], one["machine"]) for kind in ("details", "cells") for one in found[kind].values() if one["fits"]
    ]
    assert [(row["gib"], row["machine"]) for row in estimate._rows()] == measured
    commands = [one["command"] for one in found["details"].values()]
    for row, command in zip(estimate._rows(), commands, strict=False):
        recipe = yaml.safe_load((REPOSITORY / re.search(r"examples/recipes/\S+", command)[0]).read_text())
        same = recipe.keys() & row["occasion"].keys()
        assert {key: recipe[key] for key in same} == {key: row["occasion"][key] for key in same}, command


def test_want_of_memory_says_what_less_would_need(tmp_path, monkeypatch, capsys):
    """Bug: which of the flags would have been enough had to be tried."""
    save_tiny_down(tmp_path)

    def full(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.")

    monkeypatch.setattr("peft_metalora.commands.train.run_personalize", full)
    arguments = ["--down", str(tmp_path / "down"), "--output_dir", str(tmp_path / "out"), "--instance_data_dir", "x"]
    assert main(["personalize", *arguments, "--resolution", "32"]) == 2
    told = capsys.readouterr().err
    assert re.search(r"--gradient_checkpointing \(about \d\.\d GiB\), --quantize int8 \(about \d\.\d GiB\)", told)
    assert re.search(r"a device with more memory; these together about \d\.\d GiB; now about \d\.\d GiB, from sh", told)
