# SPDX-License-Identifier: Apache-2.0
"""Exported files against the rules of ComfyUI's and kohya's loaders, which are not run here (`host_loaders`)."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from artefacts_tiny import write_subjects
from families_tiny import FAMILIES, denoiser, tiny_pipeline
from host_loaders import (
    READS_DIFFUSERS,
    comfyui_names,
    load_by_comfyui,
    original_weights,
    patched,
    places,
    refused_by_kohya,
)
from peft_metalora import load_subject
from peft_metalora.checkpoint.folded import fold_subject
from peft_metalora.lora.export import FORMATS, export_subject, lora_tensors
from peft_metalora.lora.original_names import original_names

WIDTH = {"z_image": lambda config: config.dim}


class Exported:
    """A subject on every layer of a family that has an original name, and what the host has in their places."""

    def __init__(self, family, folder):
        model = denoiser(tiny_pipeline(family))
        layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
        self.names = original_names(type(model).__name__, layers)
        mine = [name for name, original in self.names.items() if original and name in places(family, model)]
        unit = WIDTH.get(family, lambda config: getattr(model, "inner_dim", 0))(model.config)
        self.placed = {name: place for name, place in places(family, model).items() if name in mine}
        self.weights = original_weights(self.placed, model, unit)
        self.host = comfyui_names(family, self.weights, self.placed, unit)
        self.modules = {name: model.get_submodule(name).weight.detach().clone() for name in mine}
        write_subjects(folder, model, "ann", target_modules=mine, lora_alpha=5, use_rslora=True)
        self.source, self.unit = load_subject(folder / "ann"), unit

    def wanted(self):
        """The host's weights with the subject in them, put there module by module, by the host's own map."""
        shown = {key: weight.clone() for key, weight in self.weights.items()}
        source = self.source
        for module, pair in fold_subject(source.config, source.down.tensors, source.tensors).items():
            place = self.placed[module]
            delta = (pair.b.flatten(1) @ pair.a.flatten(1)).reshape(self.modules[module].shape)
            first = place.first * self.unit
            shown[f"diffusion_model.{place.layer}.weight"][first : first + len(delta)] += delta
        return shown


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = Exported(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_is_called_what_comfyui_calls_it(exported, family):
    """Bug: a layer whose original name no other tool knows, or rows of a shared matrix in another order."""
    found = exported(family)
    named = {name for name, original in found.names.items() if original}
    # FLUX.2's time embedding has its original name in ComfyUI, and none of diffusers'.
    alone = {name for name in named if name.startswith("time_guidance_embed.")}
    assert named - alone == set(found.placed) and len(named) > 8
    for module, place in found.placed.items():
        ours = found.names[module]
        first = sum(ours.parts[: ours.part]) if ours.parts else 0
        rows = ours.parts[ours.part] if ours.parts else None
        assert (ours.name, first, rows) == place, module


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_takes_every_tensor_to_where_it_belongs(exported, family, format, tmp_path):
    """Bug: "lora key not loaded", a product of another shape, a scale that is read twice."""
    found = exported(family)
    file = load_file(export_subject(found.source, tmp_path / "ann.safetensors", format)) if format != "peft" else None
    file = file or lora_tensors(found.source, format)
    if format == "peft" or (format == "diffusers" and family not in READS_DIFFUSERS):
        with pytest.raises(KeyError, match="lora key not loaded"):  # what the docs send people elsewhere for
            load_by_comfyui(file, found.host)
        return
    shown = patched(found.weights, load_by_comfyui(file, found.host))
    wanted = found.wanted()
    for key, weight in wanted.items():
        torch.testing.assert_close(shown[key], weight, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
        assert not torch.equal(weight, found.weights[key])


@pytest.mark.parametrize(
    "family", sorted({"sd15", "sdxl", "sd3", "flux", "flux2", "qwen_image", "krea2", "wan"} & {*FAMILIES})
)
def test_kohyas_scripts_have_a_layer_of_that_shape_for_every_tensor(exported, family):
    """Bug: a file that sd-scripts reads without a word and without effect."""
    found = exported(family)
    if family == "sd15":  # trained on diffusers' UNet, under its names
        weights = {f"lora_unet_{name.replace('.', '_')}": weight for name, weight in found.modules.items()}
    else:
        layers = {key.split(".", 1)[1].removesuffix(".weight"): weight for key, weight in found.weights.items()}
        weights = {f"lora_unet_{name.replace('.', '_')}": weight for name, weight in layers.items()}
    refused = refused_by_kohya(family, lora_tensors(found.source, "kohya"), weights)
    outside = {key.split(".")[0].removeprefix("lora_unet_") for key in refused}
    # Layers outside of blocks, which nobody adapts unasked.
    known = {
        *("conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2", "img_in", "txt_in", "proj_out"),
        *("input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"),
        *("time_in_in_layer", "time_in_out_layer", "vector_in_in_layer", "vector_in_out_layer", "context_embedder"),
        *("guidance_in_in_layer", "guidance_in_out_layer", "final_layer_linear"),
        *("text_embedding_0", "text_embedding_2", "time_embedding_0", "time_embedding_2"),
        *("time_projection_1", "head_head"),
    }
    assert outside <= known


SD15 = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(("family", "config"), [("sd15", SD15), ("sdxl", SDXL)])
def test_the_blocks_of_real_unets_are_counted_as_comfyui_counts_them(family, config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    placed = places(family, unet)
    ours = original_names("UNet2DConditionModel", placed)
    assert {name: original and original.name for name, original in ours.items()} == {
        name: place.layer for name, place in placed.items()
    }
    assert len(placed) > 200
