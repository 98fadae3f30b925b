# SPDX-License-Identifier: Apache-2.0
"""Ordinary LoRAs brought onto a Down: exact where they can be, the nearest elsewhere, the error said."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from artefacts_tiny import TARGETS, TinyModel, edit_config, edit_tensors, write_pair
from peft_metalora import errors, load_down, load_subject
from peft_metalora.checkpoint.folded import fold_subject
from peft_metalora.lora.export import export_subject
from peft_metalora.lora.lora_file import read_lora
from peft_metalora.lora.projection import nearest, project


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def deltas(pairs):
    return {module: b.flatten(1).double() @ a.flatten(1).double() for module, (a, b) in pairs.items()}


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_a_subjects_own_fold_comes_back(pair, tmp_path, format):
    subject = load_subject(pair[1])
    lora = export_subject(subject, tmp_path / "lora", format)
    done = project(lora, subject.down, tmp_path / "again", down_reference=str(pair[0]))
    assert max(done.relative_error.values()) < 1e-5 and done.total_error < 1e-5 and done.dropped == []
    again = load_subject(done.folder)
    one = deltas(fold_subject(subject.config, subject.down.tensors, subject.tensors))
    other = deltas(fold_subject(again.config, again.down.tensors, again.tensors))
    for module in one:
        torch.testing.assert_close(other[module], one[module], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3, 7])  # Down has 4
def test_it_is_the_nearest_and_the_error_is_right(rank):
    torch.manual_seed(0)
    a, b, down = torch.randn(5, 8), torch.randn(6, 5), torch.randn(4, 8)
    mid, up, residual, norm = nearest(a, b, down, rank, 1.5)
    target, reached = b.double() @ a.double(), 1.5 * up @ mid @ down.double()
    assert float(torch.linalg.norm(target - reached)) == pytest.approx(residual, rel=1e-9)
    assert float(torch.linalg.norm(target)) == pytest.approx(norm, rel=1e-6)
    # The reference: project onto Down's rows with the pseudo-inverse, then truncate a full SVD.
    inside = target @ torch.linalg.pinv(down.double()) @ down.double()
    u, s, v = torch.linalg.svd(inside)
    kept = min(rank, 4)
    torch.testing.assert_close(reached, u[:, :kept] * s[:kept] @ v[:kept])


def test_a_down_with_dependent_rows_serves_as_well():
    torch.manual_seed(0)
    down = torch.randn(4, 8)
    down[3] = down[0] + down[1]
    mid, up, residual, _ = nearest(torch.randn(2, 4) @ down, torch.randn(6, 2), down, 2, 1.0)
    assert residual < 1e-5 and torch.isfinite(mid).all() and torch.isfinite(up).all()


def test_an_ordinary_lora_keeps_its_alpha(tmp_path):
    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": False}
    model = peft.get_peft_model(TinyModel(), peft.LoraConfig(**settings, alpha_pattern={"to_out": 1}))
    model.save_pretrained(tmp_path / "lora")
    found = deltas(read_lora(tmp_path / "lora"))
    layers = dict(model.base_model.model.named_modules())
    for module, delta in found.items():
        torch.testing.assert_close(delta, layers[module].get_delta_weight("default").double(), rtol=1e-5, atol=1e-6)


def test_layers_that_the_down_lacks_are_named(pair, tmp_path):
    names = ["transformer.blocks.0.to_q", "transformer.blocks.9.to_z"]
    tensors = {f"{name}.lora_A.weight": torch.randn(1, 8) for name in names}
    tensors |= {f"{name}.lora_B.weight": torch.randn(6, 1) for name in names}
    save_file(tensors, tmp_path / "lora.safetensors")
    done = project(tmp_path / "lora.safetensors", load_down(pair[0]), tmp_path / "new", down_reference=str(pair[0]))
    assert done.dropped == ["blocks.9.to_z"] and set(done.relative_error) == {"blocks.0.to_q"}
    assert 0 < done.relative_error["blocks.0.to_q"] <= 1 and done.total_error > 0.5
    untouched = load_subject(tmp_path / "new").tensors["blocks.1.to_q.metalora_up"]
    assert not untouched.any()


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({"blocks.0.to_q.lora_magnitude_vector": torch.ones(6)}, errors.ForeignKeysError, "DoRA"),
        ({"a.lora_A.weight": torch.ones(1, 8)}, errors.RankMismatchError, "two factors"),
        (
            {"a.lora_A.weight": torch.ones(1, 8), "a.lora_B.weight": torch.ones(6, 1)},
            errors.WrongKindError,
            "same base model",
        ),
        (
            {"blocks.0.to_q.lora_A.weight": torch.ones(1, 9), "blocks.0.to_q.lora_B.weight": torch.ones(6, 1)},
            errors.WrongKindError,
            "base model",
        ),
        # Bug: of factors that are no matrices, or several alphas, torch's own errors came out.
        (
            {"a.lora_A.weight": torch.ones(2, 8), "a.lora_B.weight": torch.ones(6, 2, 3, 3)},
            errors.RankMismatchError,
            "two factors",
        ),
        (
            {"a.lora_A.weight": torch.ones(1), "a.lora_B.weight": torch.ones(6, 1)},
            errors.RankMismatchError,
            "two factors",
        ),
        (
            {"a.lora_A.weight": torch.ones(1, 8), "a.lora_B.weight": torch.ones(6, 1), "a.alpha": torch.ones(2)},
            errors.RankMismatchError,
            "expected one number as the alpha of a",
        ),
        (
            {"a.lora_A.weight": torch.full((1, 8), float("nan")), "a.lora_B.weight": torch.ones(6, 1)},
            errors.NonFiniteError,
            "finite",
        ),
    ],
)
def test_what_cannot_be_projected_is_refused(pair, tmp_path, tensors, error, words):
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(error, match=words):
        project(tmp_path / "lora.safetensors", load_down(pair[0]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(errors.ArtefactNotFoundError):
        project(tmp_path / "nothing", load_down(pair[0]), tmp_path / "new")


def test_on_a_down_of_dora_the_subject_is_a_plain_one(pair, tmp_path):
    """Bug: it was written as one with magnitudes, had none, and did not load."""
    lora = export_subject(load_subject(pair[1]), tmp_path / "lora", "diffusers")
    edit_config(pair[0], use_dora=True)
    project(lora, load_down(pair[0]), tmp_path / "new", down_reference=str(pair[0]))
    assert not load_subject(tmp_path / "new").config.use_dora


def test_keys_with_the_name_of_an_adapter_are_read(pair, tmp_path):
    """Bug: what PEFT's state_dict holds, `to_q.lora_A.default.weight`, was refused as no plain LoRA."""
    lora = export_subject(load_subject(pair[1]), tmp_path / "lora", "diffusers")
    expected = read_lora(lora)
    tensors = {
        name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): tensor
        for name, tensor in load_file(lora).items()
    }
    save_file(tensors, tmp_path / "named.safetensors")
    found = read_lora(tmp_path / "named.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[module][part], expected[module][part]) for module in found for part in (0, 1))
    second = {name.replace("default", "other"): tensor.clone() for name, tensor in tensors.items()}
    save_file({**tensors, **second}, tmp_path / "two.safetensors")
    with pytest.raises(errors.ForeignKeysError, match="expected one LoRA, found 2: default, other"):
        read_lora(tmp_path / "two.safetensors")


@pytest.mark.parametrize(
    "changes",
    [{"alpha_pattern": 1.5}, {"lora_alpha": "x"}, {"lora_alpha": 1e300}, {"alpha_pattern": {"(a+)+$": 1}}],
    ids=str,
)
def test_a_scale_of_a_wrong_kind_is_refused_in_words(pair, tmp_path, changes):
    """Bug: TypeErrors came out, or an expression that takes for ever was matched."""
    subject = load_subject(pair[1])
    lora = export_subject(subject, tmp_path / "lora", "peft")
    edit_config(lora, **changes)
    with pytest.raises(errors.CheckpointError, match=f"expected {next(iter(changes))} to be"):
        project(lora, subject.down, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_factor_of_one_dimension_is_refused_in_words(pair, tmp_path):
    """Bug: an IndexError came out."""
    subject = load_subject(pair[1])
    lora = export_subject(subject, tmp_path / "lora", "peft")
    edit_tensors(lora, lambda tensors: tensors.update({name: one.flatten() for name, one in tensors.items()}))
    with pytest.raises(errors.RankMismatchError, match="expected two factors of one rank"):
        project(lora, subject.down, tmp_path / "again")


def test_a_scale_costs_a_lora_in_float16_no_digits(tmp_path):
    """Bug: factor times scale was rounded to the file's type, to steps of 10 % and more, or was infinite in it."""
    torch.manual_seed(0)
    a, b = torch.randn(32, 64).half(), (1e-3 * torch.randn(48, 32)).half()
    for alpha in (1e-2, 1e9):
        factors = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(alpha)}
        save_file({f"to_q.{name}": tensor for name, tensor in factors.items()}, tmp_path / "lora.safetensors")
        found = deltas(read_lora(tmp_path / "lora.safetensors"))["to_q"]
        torch.testing.assert_close(found, alpha / 32 * b.double() @ a.double(), rtol=1e-5, atol=1e-5 * alpha / 32)
    factors |= {"lora_up.weight": 1e30 * b.float(), "alpha": torch.tensor(1e30)}
    save_file({f"to_q.{name}": tensor for name, tensor in factors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(errors.NonFiniteError):
        read_lora(tmp_path / "lora.safetensors")


FLUX, FLUX_2, UNET, WAN = (
    ("FluxTransformer2DModel", "double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0"),
    ("Flux2Transformer2DModel", "double_blocks_0_img_attn_proj", "transformer_blocks.0.attn.to_out.0"),
    ("UNet2DConditionModel", "down_blocks_0_attentions_0_proj_in", "down_blocks.0.attentions.0.proj_in"),
    ("WanTransformer3DModel", "blocks.0.self_attn.q", "blocks.0.attn1.to_q"),
)


def kohya_layer(name, alpha):
    return {
        f"{name}.lora_down.weight": torch.randn(2, 8),
        f"{name}.lora_up.weight": torch.randn(8, 2),
        f"{name}.alpha": torch.tensor(alpha),
    }


@pytest.mark.parametrize(
    ("family", "other", "found"),
    [
        (FLUX, "lora_te3_encoder_block_0_layer_0_SelfAttention_q", None),
        (FLUX_2, "lora_unet_double_stream_modulation_img_lin", None),
        (UNET, "lora_unet_input_blocks_1_1_proj_in", None),
        (FLUX, "lora_unet_final_layer_linear", "proj_out"),
    ],
)
@pytest.mark.parametrize("alpha", [1.0, 0.0, -3.0])
def test_what_diffusers_leaves_out_is_there_under_its_own_name(tmp_path, family, other, found, alpha):
    """Bug: layers went with a warning, or without one; `dropped` did not name them, and `total_error` was that of the
    rest. The alpha of FLUX's last layer was passed over, and one of 0 kept the whole file from being read."""
    of, ours, module = family
    tensors = kohya_layer(f"lora_unet_{ours}", 1.0) | kohya_layer(other, alpha)
    save_file(tensors, tmp_path / "lora.safetensors")
    pairs = deltas(read_lora(tmp_path / "lora.safetensors", of, {module}))
    assert pairs.keys() == {module, found or other}
    wanted = alpha / 2 * tensors[f"{other}.lora_up.weight"] @ tensors[f"{other}.lora_down.weight"]
    torch.testing.assert_close(pairs[found or other], wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", ["diff", "diff_b"])
def test_a_change_of_a_norm_is_refused_unless_it_is_none(tmp_path, part):
    """Bug: diffusers passes it over, and the person was another one than their file's, unsaid."""
    of, ours, module = WAN
    change = torch.zeros(8)
    tensors = kohya_layer(f"diffusion_model.{ours}", 1.0) | {f"diffusion_model.blocks.0.norm3.{part}": change}
    save_file(tensors, tmp_path / "lora.safetensors")
    assert read_lora(tmp_path / "lora.safetensors", of, {module}).keys() == {module}
    change[3] = 1.0
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(errors.ForeignKeysError, match="norm3"):
        read_lora(tmp_path / "lora.safetensors", of, {module})


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_that_moved_its_base_is_refused(tmp_path, start):
    """Bug: the factors alone were taken for what such a LoRA changes."""
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=start)
    peft.get_peft_model(TinyModel(), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(errors.WrongKindError, match=f"found the start '{start}', which moved the base"):
        read_lora(tmp_path / "lora")
