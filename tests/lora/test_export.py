# SPDX-License-Identifier: Apache-2.0
"""A subject in the files of other tools: the same image through ours and through stock diffusers and PEFT."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from peft.functional import set_adapter
from safetensors.torch import load_file, save_file

from artefacts_tiny import RANKS, TinyModel, write_pair, write_subjects
from families_tiny import FAMILIES, TARGETS, denoiser, picture, tiny_pipeline
from peft_metalora import errors, load_subject
from peft_metalora.checkpoint.folded import fold_subject
from peft_metalora.lora.export import export_subject, in_original_layers
from peft_metalora.lora.lora_file import LOADERS, read_lora
from peft_metalora.lora.original_names import original_names
from peft_metalora.lora.projection import project
from peft_metalora.pipelines.loader import enable_meta_lora

# Largest difference of a pixel in [0, 1] between our image and another tool's, in float32.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """For each family: a subject's folder, the image it shows, and the base's image."""
    made = {}

    def make(family, targets=None):
        key = (family, tuple(targets or ()))
        if key in made:
            return made[key]
        folder = tmp_path_factory.mktemp(family)
        pipe = tiny_pipeline(family)
        base = picture(pipe, family)
        settings = {"lora_alpha": 5, "use_rslora": True, "target_modules": targets or TARGETS[family]}
        write_subjects(folder, denoiser(pipe), "ann", **settings)
        ours = enable_meta_lora(tiny_pipeline(family))
        ours.load_meta_lora(folder / "ann")
        made[key] = folder / "ann", picture(ours, family), base
        return made[key]

    return make


def assert_same(one, other, base):
    assert np.abs(one - other).max() < TOLERANCE
    assert np.abs(one - base).max() > 20 * TOLERANCE, "the adapter must be visible, or the comparison says nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_shows_the_same_image_from_the_subjects_own_folder(subjects, family):
    folder, wanted, base = subjects(family)
    pipe = tiny_pipeline(family)
    pipe.load_lora_weights(folder)
    assert_same(picture(pipe, family), wanted, base)


STOCK = """
import sys
import numpy
sys.path.insert(0, sys.argv[1])
from families_tiny import picture, tiny_pipeline
pipe = tiny_pipeline("flux")
pipe.load_lora_weights(sys.argv[2])
numpy.save(sys.argv[3], picture(pipe, "flux"))
assert not any(name.startswith("peft_metalora") for name in sys.modules)
"""


def test_a_process_that_never_imports_us_shows_the_same_image(subjects, tmp_path):
    folder, wanted, base = subjects("flux")
    arguments = [str(Path(__file__).parents[1]), str(folder), str(tmp_path / "image.npy")]
    subprocess.run([sys.executable, "-c", STOCK, *arguments], check=True, capture_output=True)
    assert_same(np.load(tmp_path / "image.npy"), wanted, base)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_lora_folder_shows_the_same_image(subjects, family, tmp_path):
    folder, wanted, base = subjects(family)
    export_subject(load_subject(folder), tmp_path / "lora", "peft")
    pipe = tiny_pipeline(family)
    merged = peft.PeftModel.from_pretrained(denoiser(pipe), tmp_path / "lora").merge_and_unload()
    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", merged)
    assert_same(picture(pipe, family), wanted, base)


# FLUX.1's single blocks and SD3 are checked below: diffusers converts those of the real width alone, and no SD3.
FLUX_DOUBLE = ["attn.to_out.0", "attn.add_q_proj", "attn.add_v_proj", "norm1.linear", "ff.net.2"]
KOHYA = dict.fromkeys(("sd15", "sdxl", "flux", "flux2", "z_image", "qwen_image", "wan")) | {"flux": FLUX_DOUBLE}


@pytest.mark.parametrize("family", KOHYA)
def test_stock_diffusers_shows_the_same_image_from_a_kohya_file(subjects, family, tmp_path):
    folder, wanted, base = subjects(family, KOHYA[family])
    path = export_subject(load_subject(folder), tmp_path / "ann.safetensors", "kohya")
    pipe = tiny_pipeline(family)
    pipe.load_lora_weights(path)
    assert_same(picture(pipe, family), wanted, base)


@pytest.mark.parametrize("family", ["flux2", "qwen_image", "krea2", "wan"])
def test_stock_diffusers_shows_the_same_image_from_a_comfyui_file(subjects, family, tmp_path):
    folder, wanted, base = subjects(family)
    path = export_subject(load_subject(folder), tmp_path, "comfyui")
    pipe = tiny_pipeline(family)
    pipe.load_lora_weights(path)
    assert_same(picture(pipe, family), wanted, base)


@pytest.mark.parametrize(
    ("family", "format"),
    [
        *((family, "kohya") for family in KOHYA),
        *((family, "comfyui") for family in ("flux2", "qwen_image", "krea2", "wan")),
    ],
)
def test_a_file_of_another_tool_is_read_as_the_lora_that_it_was(subjects, family, format, tmp_path):
    """Bug: `project` refused what kohya's scripts and ComfyUI call a LoRA."""
    source = load_subject(subjects(family, KOHYA[family] if format == "kohya" else None)[0])
    path = export_subject(source, tmp_path / "ann.safetensors", format)
    wanted = fold_subject(source.config, source.down.tensors, source.tensors)
    found = read_lora(path, source.config.auto_mapping["base_model_class"], wanted.keys())
    assert found.keys() >= wanted.keys()
    for module, (a, b) in found.items():  # a layer that is one with others has a product of zeros
        delta = b.flatten(1) @ a.flatten(1)
        pair = wanted.get(module)
        expected = torch.zeros_like(delta) if pair is None else pair.b.flatten(1) @ pair.a.flatten(1)
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)


def test_a_kohya_file_of_the_real_flux_is_read(tmp_path):
    """Tiny ones have no single blocks in it: diffusers knows where q, k, v and MLP meet by the real width alone."""
    width, layer = 3072, "lora_unet_single_blocks_0_linear1"
    down, up = torch.randn(4, width), torch.randn(7 * width, 4)
    factors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    save_file({f"{layer}.{name}": tensor for name, tensor in factors.items()}, tmp_path / "lora.safetensors")
    single = "single_transformer_blocks.0"
    parts = {"attn.to_q": width, "attn.to_k": width, "attn.to_v": width, "proj_mlp": 4 * width}
    found = read_lora(tmp_path / "lora.safetensors", "FluxTransformer2DModel", {f"{single}.attn.to_q"})
    assert found.keys() == {f"{single}.{part}" for part in parts}
    for part, rows in zip(parts, up.split([*parts.values()]), strict=True):
        a, b = found[f"{single}.{part}"]
        torch.testing.assert_close(b @ a, 0.5 * rows @ down)


@pytest.mark.parametrize(
    ("names", "of"),
    [
        # Bug in waiting: diffusers doubles such an alpha for ever.
        (
            {"lora_unet_x.lora_down.weight": (2, 8), "lora_unet_x.lora_up.weight": (8, 2), "lora_unet_x.alpha": ()},
            "Qwen",
        ),
        # and names a variable that it has not set.
        ({"diffusion_model.img_in.lora_A.weight": (2, 8), "diffusion_model.img_in.lora_B.weight": (8, 2)}, "Wan"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (8, 2)}, "Flux"),
    ],
)
def test_what_diffusers_cannot_rename_is_read_as_it_is_or_refused(tmp_path, names, of):
    model_class = next(name for name in LOADERS if name.startswith(of))
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "lora.safetensors")
    try:
        found = read_lora(tmp_path / "lora.safetensors", model_class, {"blocks.0.to_q"})
    except errors.MetaLoraError:
        return
    assert found.keys() == {"lora_unet_x" if of == "Qwen" else "img_in"}


def test_text_encoders_in_a_kohya_file_are_named_as_left_out(subjects, tmp_path):
    """Bug: one file of kohya's scripts holds UNet and text encoders, and was refused for them."""
    source = load_subject(subjects("sdxl", None)[0])
    path = export_subject(source, tmp_path / "ann.safetensors", "kohya")
    layers = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_te2_text_model_encoder_layers_0_mlp_fc1"
    tensors = load_file(path)
    for layer in layers:
        tensors |= {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    done = project(
        path, source.down, tmp_path / "again", down_reference=str(subjects("sdxl", None)[0].parent / "faces")
    )
    assert len(done.dropped) == 2 and all(name.startswith("text_encoder") for name in done.dropped)
    assert max(done.relative_error.values()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_layers_add_what_their_parts_add(subjects, family):
    source = load_subject(subjects(family)[0])
    pairs = fold_subject(source.config, source.down.tensors, source.tensors)
    whole = in_original_layers(source.config, pairs)
    names = original_names(source.config.auto_mapping["base_model_class"], pairs)
    covered = {name: torch.zeros_like(pair.b @ pair.a.flatten(1)) for name, pair in whole.items()}
    for module, pair in pairs.items():
        name, delta = names[module], pair.b.flatten(1) @ pair.a.flatten(1)
        unit = delta.shape[0] // (name.parts[name.part] if name.parts else 1)
        top = unit * sum(name.parts[: name.part]) if name.parts else 0
        covered[name.name][top : top + delta.shape[0]] += delta
    for name, pair in whole.items():
        torch.testing.assert_close(pair.b @ pair.a.flatten(1), covered[name], rtol=1e-5, atol=1e-6)


def test_original_names_of_the_real_models():
    """Pairs read from the published checkpoints' own key lists."""
    flux = original_names(
        "FluxTransformer2DModel",
        ["transformer_blocks.18.attn.add_k_proj", "single_transformer_blocks.37.proj_mlp", "proj_out"],
    )
    assert [(name.name, name.part, name.parts) for name in flux.values()] == [
        ("double_blocks.18.txt_attn.qkv", 1, (1, 1, 1)),
        ("single_blocks.37.linear1", 3, (1, 1, 1, 4)),
        ("final_layer.linear", 0, None),
    ]
    sdxl = [
        "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
        "up_blocks.0.attentions.2.proj_in",
        "up_blocks.1.resnets.0.conv1",
        "down_blocks.1.downsamplers.0.conv",
        "mid_block.resnets.1.time_emb_proj",
    ]
    assert [name.name for name in original_names("UNet2DConditionModel", sdxl).values()] == [
        "input_blocks.5.1.transformer_blocks.1.attn2.to_k",
        "middle_block.1.transformer_blocks.9.ff.net.2",
        "output_blocks.2.1.proj_in",
        "output_blocks.3.0.in_layers.2",
        "input_blocks.6.0.op",
        "middle_block.2.emb_layers.1",
    ]
    sd3 = original_names("SD3Transformer2DModel", ["transformer_blocks.3.ff_context.net.0.proj"])
    assert next(iter(sd3.values())).name == "joint_blocks.3.context_block.mlp.fc1"
    z_image = original_names(
        "ZImageTransformer2DModel", ["layers.29.attention.to_v", "noise_refiner.1.feed_forward.w3"]
    )
    assert [(name.name, name.part) for name in z_image.values()] == [
        ("layers.29.attention.qkv", 2),
        ("noise_refiner.1.feed_forward.w3", 0),
    ]
    krea2 = original_names("Krea2Transformer2DModel", ["transformer_blocks.27.attn.to_gate", "img_in"])
    assert [name.name for name in krea2.values()] == ["blocks.27.attn.gate", "first"]


def test_the_scale_is_folded_in_and_alpha_is_the_rank(subjects, tmp_path):
    source = load_subject(subjects("sd15")[0])
    kohya = load_file(export_subject(source, tmp_path / "k.safetensors", "kohya"))
    assert {float(value) for name, value in kohya.items() if name.endswith(".alpha")} == {2.0}
    config = json.loads((export_subject(source, tmp_path / "p", "peft") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 2, False)
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = fold_subject(source.config, source.down.tensors, source.tensors)[module]
    mid, up = source.tensors[f"{module}.metalora_mid"][0], source.tensors[f"{module}.metalora_up"][0]
    down = source.down.tensors[f"{module}.metalora_down"].double()
    dense = 5 / 2**0.5 * up.double() @ mid.double() @ down
    torch.testing.assert_close(pair.b.double() @ pair.a.double(), dense, rtol=1e-5, atol=1e-7)


def test_ranks_that_differ_stay_exact_in_a_peft_folder(tmp_path):
    model = TinyModel()
    settings = {"target_modules": ["to_q", "to_out"], "rank_pattern": {"to_q": 1}, "alpha_pattern": {"to_out": 7}}
    write_subjects(tmp_path, model, "ann", **{**RANKS, **settings})
    set_adapter(model, "ann")
    x = torch.randn(5, 8)
    lora = export_subject(load_subject(tmp_path / "ann"), tmp_path / "lora", "peft")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(TinyModel(), lora)(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_a_format_cannot_say_is_refused(tmp_path):
    source = load_subject(write_pair(tmp_path)[1])
    with pytest.raises(errors.ExportError, match="diffusers, kohya, comfyui, peft"):
        export_subject(source, tmp_path / "x", "onnx")
    with pytest.raises(errors.ExportError, match=r"blocks\.0\.to_out.*Export to diffusers"):
        export_subject(source, tmp_path / "x", "comfyui")
    assert not (tmp_path / "x").exists()


class Nested(torch.nn.Module):
    """A layer `block.proj`, and one of another size whose path ends so too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 6)})
        self.outer = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"proj": torch.nn.Linear(6, 8)})})

    def forward(self, x):
        return self.outer["block"]["proj"](torch.relu(self.block["proj"](x)))


def test_a_peft_folder_adapts_no_other_module_of_the_same_ending(tmp_path):
    """Bug: a path with a dot was taken for unique, so that `block.proj` wrapped `outer.block.proj` too."""
    model = Nested()
    write_subjects(tmp_path, model, "ann", target_modules=r"block\.proj")
    lora = export_subject(load_subject(tmp_path / "ann"), tmp_path / "lora", "peft")
    plain = peft.PeftModel.from_pretrained(Nested(), lora)
    wrapped = [name for name, module in plain.named_modules() if hasattr(module, "lora_A")]
    assert wrapped == ["base_model.model.block.proj"]
    set_adapter(model, "ann")
    x = torch.randn(5, 8)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["diffusers", "kohya", "comfyui", "peft"])
def test_an_export_replaces_no_lora_unasked(format, subjects, tmp_path):
    """Bug: whatever lay at the place of an export, another person's LoRA or one that cannot be had again, was gone."""
    source = load_subject(subjects("flux2")[0])
    lora = tmp_path / "loras"
    lora.mkdir()
    name = f"{format}.safetensors" if format in ("kohya", "comfyui") else "pytorch_lora_weights.safetensors"
    (lora / name).write_bytes(b"somebody's")
    targets = [lora] if format == "peft" else [lora, lora / name]
    for target in targets:
        with pytest.raises(errors.OutputExistsError, match=r"a LoRA does not say whose it is.*overwrite=True"):
            export_subject(source, target, format)
    assert [path.read_bytes() for path in lora.iterdir()] == [b"somebody's"]
    export_subject(source, lora, format, overwrite=True)
    assert b"somebody's" not in [path.read_bytes() for path in lora.iterdir()]
