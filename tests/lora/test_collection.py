# SPDX-License-Identifier: Apache-2.0
"""A Down out of ordinary LoRAs: what they share is in its rows, their mean is its mean subject."""

from pathlib import Path

import pytest
import torch
from peft import inject_adapter_in_model
from safetensors.torch import save_file
from torch import nn

from artefacts_tiny import TinyModel
from peft_metalora import errors, load_down
from peft_metalora.lora.collection import down_from_loras, find_loras, mean_start
from peft_metalora.tuner.down import given, subject_config

SHAPES = {"blocks.0.to_q": (6, 8), "blocks.1.to_out": (8, 6)}
BASE = {"base_model": "me/base"}


def write_loras(folder: Path, count: int, rank: int = 2, shared: int | None = 3, shapes=SHAPES) -> list[dict]:
    """LoRAs of random people, whose A lie in `shared` directions of each layer; what each adds, by module."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    spaces = {
        module: torch.linalg.qr(torch.randn(inputs, shared or inputs, generator=generator)).Q.T
        for module, (_, inputs) in shapes.items()
    }
    people = []
    for number in range(count):
        tensors, adds = {}, {}
        for module, (outputs, _) in shapes.items():
            a = torch.randn(rank, len(spaces[module]), generator=generator) @ spaces[module]
            b = torch.randn(outputs, rank, generator=generator)
            tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
            adds[module] = b @ a
        save_file(tensors, folder / f"{number:03}.safetensors")
        people.append(adds)
    return people


def projector(rows: torch.Tensor) -> torch.Tensor:
    q = torch.linalg.qr(rows.double().T).Q
    return q @ q.T


def mean_subject(down, module: str) -> torch.Tensor:
    up, mid, rows = (down.tensors[f"{module}.metalora_{part}"] for part in ("up", "mid", "down"))
    return down.config.lora_alpha / down.config.r * up[0] @ mid[0] @ rows


def test_rows_are_what_the_loras_share_and_the_mean_subject_is_their_mean(tmp_path):
    people = write_loras(tmp_path / "loras", 7)
    done = down_from_loras([tmp_path / "loras"], TinyModel(), tmp_path / "faces", r=3, meta_r=3, domain="faces", **BASE)
    assert (done.loras, done.rows, done.left_out) == (7, 3, [])
    assert done.kept == pytest.approx(1, abs=1e-6)
    down = load_down(tmp_path / "faces")
    assert down.config.stage == "meta" and down.config.base_model_name_or_path == "me/base"
    assert down.config.facts["subjects"] == 7 and down.config.facts["domain"] == "faces"
    for module in SHAPES:
        adds = torch.cat([person[module] for person in people])
        found = projector(down.tensors[f"{module}.metalora_down"])
        torch.testing.assert_close(adds.double() @ found, adds.double(), rtol=1e-5, atol=1e-5)
        mean = torch.stack([person[module] for person in people]).mean(0)
        torch.testing.assert_close(mean_subject(down, module), mean, rtol=1e-4, atol=1e-5)


def test_of_many_loras_the_leading_directions_remain(tmp_path):
    """More rows than are held at once: they are brought together on the way, and hardly anything is lost."""
    people = write_loras(tmp_path / "loras", 60, rank=3, shared=None)
    done = down_from_loras([tmp_path / "loras"], TinyModel(), tmp_path / "faces", r=2, meta_r=4, **BASE)
    inside = whole = 0.0
    for module in SHAPES:
        values = torch.linalg.svdvals(torch.cat([person[module] for person in people]).double()).square()
        inside, whole = inside + values[:4].sum().item(), whole + values.sum().item()
    assert 0.97 * inside / whole < done.kept <= inside / whole + 1e-6


def test_people_learn_on_it_from_the_mean(tmp_path):
    """Bug in waiting: a row of Mid and a column of Up that are both 0 have no gradient, ever."""
    write_loras(tmp_path / "loras", 1, rank=1)
    done = down_from_loras([tmp_path / "loras"], TinyModel(), tmp_path / "faces", r=2, meta_r=4, **BASE)
    assert done.rows == 1, "the others are random"
    down, model = load_down(tmp_path / "faces"), TinyModel()
    with given(down):
        inject_adapter_in_model(subject_config(down, start="mean", inference_mode=False), model, "ann")
    model(torch.randn(5, 8)).square().mean().backward()
    for name, parameter in model.named_parameters():
        if "metalora_up" in name:
            assert parameter.grad.abs().sum(1).gt(0).all(), name


def test_a_layer_that_not_all_have_is_left_out_and_named(tmp_path):
    write_loras(tmp_path / "loras", 2)
    write_loras(tmp_path / "more", 1, shapes={"blocks.0.to_q": (6, 8), "blocks.7.to_v": (4, 8)})
    done = down_from_loras([tmp_path / "loras", tmp_path / "more"], TinyModel(), tmp_path / "faces", meta_r=4, **BASE)
    assert done.loras == 3 and done.left_out == ["blocks.1.to_out", "blocks.7.to_v"]
    assert {name.rpartition(".")[0] for name in load_down(tmp_path / "faces").tensors} == {"blocks.0.to_q"}


def test_convolutions_have_rows_of_their_shape(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

    torch.manual_seed(0)
    factors = {"conv.lora_A.weight": torch.randn(2, 3, 3, 3), "conv.lora_B.weight": torch.randn(5, 2, 1, 1)}
    save_file(factors, tmp_path / "lora.safetensors")
    down_from_loras([tmp_path / "lora.safetensors"], Model(), tmp_path / "faces", r=2, meta_r=2, **BASE)
    down = load_down(tmp_path / "faces")
    assert down.tensors["conv.metalora_down"].shape == (2, 3, 3, 3)
    found = projector(down.tensors["conv.metalora_down"].flatten(1))
    a = factors["conv.lora_A.weight"].flatten(1).double()
    torch.testing.assert_close(a @ found, a, rtol=1e-5, atol=1e-5)
    weight = factors["conv.lora_B.weight"].flatten(1) @ factors["conv.lora_A.weight"].flatten(1)
    up, mid, rows = (down.tensors[f"conv.metalora_{part}"] for part in ("up", "mid", "down"))
    torch.testing.assert_close(up[0] @ mid[0] @ rows.flatten(1), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "error", "told"),
    [
        ({"blocks.0.to_q": (6, 9)}, errors.BaseModelMismatchError, "002.safetensors: expected a base model whose"),
        ({"blocks.0.norm": (8, 8)}, errors.WrongKindError, "the others have too, found blocks.0.norm"),
    ],
)
def test_a_lora_of_another_base_is_named_and_nothing_is_written(tmp_path, shapes, error, told):
    write_loras(tmp_path / "loras", 2)
    write_loras(tmp_path / "other", 1, shapes=shapes)
    (tmp_path / "other" / "000.safetensors").rename(tmp_path / "loras" / "002.safetensors")
    with pytest.raises(error, match=told):
        down_from_loras([tmp_path / "loras"], TinyModel(), tmp_path / "faces", meta_r=4, **BASE)
    assert not (tmp_path / "faces").exists()


def test_loras_that_were_never_trained_are_no_down(tmp_path):
    tensors = {"blocks.0.to_q.lora_A.weight": torch.ones(2, 8), "blocks.0.to_q.lora_B.weight": torch.zeros(6, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(errors.WrongKindError, match="expected LoRAs that change something, found 1 of zeros"):
        down_from_loras([tmp_path / "lora.safetensors"], TinyModel(), tmp_path / "faces", meta_r=4, **BASE)
    assert not (tmp_path / "faces").exists()


def test_what_is_no_lora_is_refused_and_inputs_stay(tmp_path):
    write_loras(tmp_path / "loras", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.ArtefactNotFoundError, match="empty: expected LoRAs"):
        down_from_loras([tmp_path / "loras", tmp_path / "empty"], TinyModel(), tmp_path / "faces", **BASE)
    for folder in (tmp_path / "loras", tmp_path / "loras" / "new"):
        with pytest.raises(errors.ConfigError, match="apart from loras"):
            down_from_loras([tmp_path / "loras"], TinyModel(), folder, **BASE)
    with pytest.raises(errors.ConfigError, match="meta_r"):
        down_from_loras([tmp_path / "loras"], TinyModel(), tmp_path / "faces", r=8, meta_r=0, **BASE)
    assert sorted(path.name for path in (tmp_path / "loras").iterdir()) == ["000.safetensors", "001.safetensors"]
    assert find_loras([tmp_path / "loras", tmp_path / "loras" / "001.safetensors"]) == [
        tmp_path / "loras" / "000.safetensors",
        tmp_path / "loras" / "001.safetensors",
    ]


def test_a_person_counts_once_by_whatever_path(tmp_path):
    """Bug: a link, or a path by way of another folder, counted somebody twice in rows, mean and `subjects`."""
    write_loras(tmp_path / "loras", 2)
    (tmp_path / "loras" / "ann.safetensors").symlink_to(tmp_path / "loras" / "000.safetensors")
    given = [tmp_path / "loras", tmp_path / "loras" / ".." / "loras", tmp_path / "loras" / "ann.safetensors"]
    done = down_from_loras(given, TinyModel(), tmp_path / "faces", meta_r=4, **BASE)
    assert done.loras == load_down(tmp_path / "faces").config.facts["subjects"] == 2


def test_nobody_in_a_folder_is_passed_over(tmp_path):
    """Bug: who lay in a folder of their own under another name than diffusers' went unsaid, and everybody did where one
    file beside theirs had that name."""
    write_loras(tmp_path / "loras", 2)
    write_loras(tmp_path / "loras" / "bob", 1)
    (tmp_path / "loras" / "001.safetensors").rename(tmp_path / "loras" / "pytorch_lora_weights.safetensors")
    (tmp_path / "loras" / "._000.safetensors").touch()
    (tmp_path / "loras" / "pictures").mkdir()
    names = ["000.safetensors", "bob/000.safetensors", "pytorch_lora_weights.safetensors"]
    assert find_loras([tmp_path / "loras"]) == [tmp_path / "loras" / name for name in names]
    assert find_loras([tmp_path / "loras" / "bob"]) == [tmp_path / "loras" / "bob" / "000.safetensors"]
    write_loras(tmp_path / "loras" / "bob", 2)
    with pytest.raises(errors.ConfigError, match=r"expected one LoRA in .*bob, found 2: 000\.safetensors, 001"):
        find_loras([tmp_path / "loras"])


def test_a_lora_behind_a_link_is_not_written_over(tmp_path):
    """Bug: its folder could be the output, and with `overwrite` the person was gone."""
    write_loras(tmp_path / "ann", 1)
    (tmp_path / "ann" / "000.safetensors").rename(tmp_path / "ann" / "pytorch_lora_weights.safetensors")
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "ann").symlink_to(tmp_path / "ann")
    with pytest.raises(errors.ConfigError, match="apart from loras"):
        down_from_loras([tmp_path / "loras"], TinyModel(), tmp_path / "ann", meta_r=4, overwrite=True, **BASE)
    assert [path.name for path in (tmp_path / "ann").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_numbers_that_cannot_be_are_refused_in_words(tmp_path):
    """Bug: a product beyond float32 became a Down of random rows that holds 1.00 of the LoRAs, and meta_r without an
    end an error of torch's."""
    write_loras(tmp_path / "loras", 1)
    with pytest.raises(errors.ConfigError, match="at most as many rows as a layer has inputs, 8, found meta_r=100000"):
        down_from_loras([tmp_path / "loras"], TinyModel(), tmp_path / "faces", meta_r=10**11, **BASE)
    tensors = {"blocks.0.to_q.lora_A.weight": torch.ones(2, 8), "blocks.0.to_q.lora_B.weight": torch.ones(6, 2)}
    save_file({name: 1e30 * tensor for name, tensor in tensors.items()}, tmp_path / "loras" / "000.safetensors")
    with pytest.raises(errors.NonFiniteError, match=r"000.safetensors: expected finite numbers in blocks\.0\.to_q"):
        down_from_loras([tmp_path / "loras"], TinyModel(), tmp_path / "faces", meta_r=4, **BASE)
    assert not (tmp_path / "faces").exists()


def test_the_size_of_the_mean_is_in_up():
    torch.manual_seed(0)
    a, b, down = torch.randn(2, 8), torch.randn(6, 2), torch.randn(8, 8)
    mid, up = mean_start(a, 1e3 * b, down, 3, scaling=0.5)
    torch.testing.assert_close(0.5 * up @ mid @ down, 1e3 * b @ a, rtol=1e-3, atol=1e-2)
    assert mid[:2].norm(dim=1).tolist() == pytest.approx([3**-0.5] * 2, rel=1e-5)
    assert mid[2].norm() > 0 and up[:, 2].eq(0).all()
