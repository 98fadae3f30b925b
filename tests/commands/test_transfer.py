# SPDX-License-Identifier: Apache-2.0
"""`metalora push`, `pull`, `export`, `project`, `down-from-loras`: arguments to files, repositories and sentences."""

import json

import pytest
import torch
from safetensors.torch import save_file

from artefacts_tiny import write_pair
from peft_metalora import load_down, load_subject
from peft_metalora.cli import main


@pytest.fixture
def pair(tmp_path):
    return [str(folder) for folder in write_pair(tmp_path / "mine")]


def test_push_and_pull(server, pair, tmp_path, capsys):
    assert main(["push", "--folder", pair[0], "--repo_id", "ann/faces"]) == 0
    assert "pushed a Down to ann/faces, public" in capsys.readouterr().out
    assert main(["push", "--folder", pair[1], "--repo_id", "ann/me", "--down", "ann/faces"]) == 0
    assert "pushed a subject to ann/me, private" in capsys.readouterr().out
    assert server.repos["ann/me"].private and not server.repos["ann/faces"].private
    assert main(["pull", "--repo_id", "ann/me", "--output_dir", str(tmp_path / "pulled")]) == 0
    assert load_subject(tmp_path / "pulled").down.fingerprint
    assert main(["push", "--folder", pair[1], "--repo_id", "ann/all", "--down", "ann/faces", "--public"]) == 0
    assert not server.repos["ann/all"].private


def test_a_repository_that_is_private_stays_so_and_that_is_said(server, pair, capsys):
    """Bug: a Down that went into a private repository was said to be public."""
    server.add("ann/faces", {}, private=True)
    assert main(["push", "--folder", pair[0], "--repo_id", "ann/faces", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["public"] is False
    assert main(["push", "--folder", pair[0], "--repo_id", "ann/faces", "--public"]) == 0
    assert "pushed a Down to ann/faces, which is private and stays so" in capsys.readouterr().out
    assert server.repos["ann/faces"].private


def test_what_a_push_would_ignore_is_refused(server, pair, capsys):
    """Bug: a prompt without a picture, and a Down of a Down, were passed over in silence."""
    for arguments, told in (
        (["--prompt", "a photo"], "expected a picture for each prompt, found 1 prompts and 0 pictures"),
        (["--down", "ann/faces"], "expected --down with a subject alone, found"),
    ):
        assert main(["push", "--folder", pair[0], "--repo_id", "ann/faces", *arguments]) == 2
        assert told in capsys.readouterr().err
    assert server.repos == {}


def test_export_and_project(pair, tmp_path, capsys):
    lora, again = str(tmp_path / "lora.safetensors"), str(tmp_path / "again")
    assert main(["export", "--subject", pair[1], "--output", lora]) == 0
    assert main(["project", "--lora", lora, "--down", pair[0], "--output_dir", again]) == 0
    printed = capsys.readouterr().out
    assert "blocks.0.to_q    0.0000" in printed and "all layers together: 0.0000" in printed
    assert load_subject(again).down.fingerprint


def test_a_down_of_loras(tmp_path, capsys):
    """Bug besides: `info` did not know the name of the base in the package."""
    module = "transformer_blocks.0.attn.to_q"
    width = load_down("peft_metalora/demo-down").tensors[f"{module}.metalora_down"].shape[1]
    for name in ("ann", "bob"):
        (tmp_path / "loras" / name).mkdir(parents=True)
        factors = {"lora_A": torch.randn(2, width), "lora_B": torch.randn(width, 2)}
        tensors = {f"transformer.{module}.{part}.weight": tensor for part, tensor in factors.items()}
        save_file(tensors, tmp_path / "loras" / name / "pytorch_lora_weights.safetensors")
    base = ["--pretrained_model_name_or_path", "peft_metalora/demo-base"]
    made = ["down-from-loras", "--loras", str(tmp_path / "loras"), "--output_dir", str(tmp_path / "faces"), *base]
    assert main([*made, "--meta_rank", "4"]) == 0
    assert "faces: a Down of 2 LoRAs, which holds 1.00 of what they do" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "faces"), *base]) == 0
    assert "fits peft_metalora/demo-base" in capsys.readouterr().out
    assert main([*made, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 4
    alone = ["--loras", str(tmp_path / "loras" / "ann"), "--meta_rank", "2"]
    assert main([*made[:1], *alone, *made[3:]]) == 0  # bug: nothing said who would be public with a push
    assert "the mean subject is that person: push this Down with --no-public" in capsys.readouterr().out
    assert main([*made[:1], "--loras", str(tmp_path / "nothing"), *made[3:]]) == 2
    assert "nothing: expected LoRAs" in capsys.readouterr().err


def test_an_error_is_one_sentence_and_writes_nothing(pair, tmp_path, capsys):
    assert main(["export", "--subject", pair[1], "--output", str(tmp_path / "x"), "--format", "comfyui"]) == 2
    assert capsys.readouterr().err.startswith("metalora: expected layers with a name in the original model")
    assert not (tmp_path / "x").exists()
