# SPDX-License-Identifier: Apache-2.0
"""What ComfyUI and kohya's scripts accept of a LoRA file, as rules: names of layers, of tensors, and shapes.

Written from their public code, as it stood at ComfyUI a125cd84 (v0.26.1 for Z-Image, Krea 2 and FLUX.2's layers) and
sd-scripts 48d368fa, musubi-tuner 30c658c4:

- comfy/utils.py, `flux_to_diffusers`, `mmdit_to_diffusers`, `unet_to_diffusers`, `z_image_to_diffusers`,
  `krea2_to_diffusers`: which rows of which original layer a layer of diffusers is.
- comfy/lora.py, `model_lora_keys_unet`: the names under which a LoRA may speak of a weight; `load_lora`: what is left
  over is "lora key not loaded".
- comfy/weight_adapter/lora.py, `LoRAAdapter.load` and `calculate_weight`: the names of the two factors, alpha, and
  that their product must have as many numbers as the weight.
- networks/lora.py, `create_network_from_weights` and `LoRANetwork` (also in lora_flux.py, lora_sd3.py; musubi-tuner's
  lora_flux_2.py, lora_qwen_image.py, lora_krea2.py, lora_wan.py): inside which blocks layers are taken, and the
  factors' shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn


class Place(NamedTuple):
    """An original layer; of one that is shared, the first row and the number of rows, in units of the width."""

    layer: str
    first: int = 0
    rows: int | None = None


# A layer of diffusers, the original one, and which rows of it; N is a block's number.
_QKV = "to_q {0} 0 1; to_k {0} 1 1; to_v {0} 2 1"
_ADDED = "add_q_proj {0} 0 1; add_k_proj {0} 1 1; add_v_proj {0} 2 1"
_FLUX_BOTH = (
    ("transformer_blocks.N.attn", _QKV.format("double_blocks.N.img_attn.qkv")),
    ("transformer_blocks.N.attn", _ADDED.format("double_blocks.N.txt_attn.qkv")),
    (
        "transformer_blocks.N",
        "attn.to_out.0 double_blocks.N.img_attn.proj; attn.to_add_out double_blocks.N.txt_attn.proj;"
        "norm1.linear double_blocks.N.img_mod.lin; norm1_context.linear double_blocks.N.txt_mod.lin;"
        "ff.net.0.proj double_blocks.N.img_mlp.0; ff.net.2 double_blocks.N.img_mlp.2;"
        "ff_context.net.0.proj double_blocks.N.txt_mlp.0; ff_context.net.2 double_blocks.N.txt_mlp.2;"
        "ff.linear_in double_blocks.N.img_mlp.0; ff.linear_out double_blocks.N.img_mlp.2;"
        "ff_context.linear_in double_blocks.N.txt_mlp.0; ff_context.linear_out double_blocks.N.txt_mlp.2",
    ),
    ("single_transformer_blocks.N.attn", _QKV.format("single_blocks.N.linear1")),
    (
        "single_transformer_blocks.N",
        "proj_mlp single_blocks.N.linear1 3 4; norm.linear single_blocks.N.modulation.lin;"
        "proj_out single_blocks.N.linear2; attn.to_qkv_mlp_proj single_blocks.N.linear1;"
        "attn.to_out single_blocks.N.linear2",
    ),
    (
        "",
        "x_embedder img_in; context_embedder txt_in; proj_out final_layer.linear;"
        "time_text_embed.timestep_embedder.linear_1 time_in.in_layer;"
        "time_text_embed.timestep_embedder.linear_2 time_in.out_layer;"
        "time_text_embed.text_embedder.linear_1 vector_in.in_layer;"
        "time_text_embed.text_embedder.linear_2 vector_in.out_layer;"
        "time_text_embed.guidance_embedder.linear_1 guidance_in.in_layer;"
        "time_text_embed.guidance_embedder.linear_2 guidance_in.out_layer",
    ),
)
_KREA2_BLOCK = (
    "attn.to_q {0}.attn.wq; attn.to_k {0}.attn.wk; attn.to_v {0}.attn.wv; attn.to_gate {0}.attn.gate;"
    "attn.to_out.0 {0}.attn.wo; ff.gate {0}.mlp.gate; ff.up {0}.mlp.up; ff.down {0}.mlp.down"
)
_WAN_ATTENTION = "to_q {0}.q; to_k {0}.k; to_v {0}.v; to_out.0 {0}.o"
_TABLES = {
    "flux": _FLUX_BOTH,
    "flux2": _FLUX_BOTH,
    "sd3": (
        ("transformer_blocks.N.attn", _QKV.format("joint_blocks.N.x_block.attn.qkv")),
        ("transformer_blocks.N.attn", _ADDED.format("joint_blocks.N.context_block.attn.qkv")),
        ("transformer_blocks.N.attn2", _QKV.format("joint_blocks.N.x_block.attn2.qkv")),
        (
            "transformer_blocks.N",
            "attn.to_out.0 joint_blocks.N.x_block.attn.proj; attn.to_add_out joint_blocks.N.context_block.attn.proj;"
            "attn2.to_out.0 joint_blocks.N.x_block.attn2.proj; norm1.linear joint_blocks.N.x_block.adaLN_modulation.1;"
            "ff.net.0.proj joint_blocks.N.x_block.mlp.fc1; ff.net.2 joint_blocks.N.x_block.mlp.fc2;"
            "ff_context.net.0.proj joint_blocks.N.context_block.mlp.fc1;"
            "ff_context.net.2 joint_blocks.N.context_block.mlp.fc2",
        ),
        ("", "context_embedder context_embedder"),
    ),
    "z_image": tuple(
        (f"{blocks}.N", rows)
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for rows in (
            _QKV.format(f"{blocks}.N.attention.qkv").replace("to_", "attention.to_"),
            f"attention.to_out.0 {blocks}.N.attention.out; feed_forward.w1 {blocks}.N.feed_forward.w1;"
            f"feed_forward.w2 {blocks}.N.feed_forward.w2; feed_forward.w3 {blocks}.N.feed_forward.w3",
        )
    ),
    "krea2": (
        ("transformer_blocks.N", _KREA2_BLOCK.format("blocks.N")),
        ("text_fusion.layerwise_blocks.N", _KREA2_BLOCK.format("txtfusion.layerwise_blocks.N")),
        ("text_fusion.refiner_blocks.N", _KREA2_BLOCK.format("txtfusion.refiner_blocks.N")),
        ("", "img_in first; final_layer.linear last.linear"),
    ),
    "wan": (
        ("blocks.N.attn1", _WAN_ATTENTION.format("blocks.N.self_attn")),
        ("blocks.N.attn2", _WAN_ATTENTION.format("blocks.N.cross_attn")),
        ("blocks.N", "ffn.net.0.proj blocks.N.ffn.0; ffn.net.2 blocks.N.ffn.2"),
        (
            "condition_embedder",
            "text_embedder.linear_1 text_embedding.0; text_embedder.linear_2 text_embedding.2;"
            "time_embedder.linear_1 time_embedding.0; time_embedder.linear_2 time_embedding.2;"
            "time_proj time_projection.1",
        ),
        ("", "proj_out head.head"),
    ),
}
_RESNET = "conv1 in_layers.2; conv2 out_layers.3; time_emb_proj emb_layers.1; conv_shortcut skip_connection"
_UNET = (
    "conv_in input_blocks.0.0; conv_out out.2; time_embedding.linear_1 time_embed.0;"
    "time_embedding.linear_2 time_embed.2; add_embedding.linear_1 label_emb.0.0; add_embedding.linear_2 label_emb.0.2"
)
# Families whose LoRA in diffusers' names (`transformer.`) ComfyUI reads as well, each row range by itself.
READS_DIFFUSERS = ("flux", "flux2", "sd3", "z_image", "qwen_image", "krea2")
# Inside which blocks a kohya script takes layers; it passes over what it does not know without a word. Z-Image's are
# missing: musubi-tuner has q, k and v apart there, and a converter of its own.
_KOHYA_BLOCKS = {
    "sd15": r"(down_blocks|up_blocks)_\d+_(attentions|resnets|downsamplers)_.*|mid_block_(attentions|resnets)_.*",
    "sdxl": r"(input_blocks|output_blocks)_\d+_\d_.*|middle_block_\d_.*",
    "flux": r"(double|single)_blocks_\d+_.*",
    "sd3": r"joint_blocks_\d+_(x|context)_block_.*",
    "flux2": r"(double|single)_blocks_\d+_.*",
    "qwen_image": r"transformer_blocks_\d+_.*",
    "krea2": r".*",
    "wan": r"blocks_\d+_(self_attn|cross_attn|ffn)_.*",
}


def places(family: str, model: nn.Module) -> dict[str, Place]:
    """Where each layer of a denoiser of diffusers stands in the original model; layers without a place are left out."""
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    if family == "qwen_image":  # published in diffusers' names
        return {name: Place(name) for name in names}
    if family in ("sd15", "sdxl"):
        blocks = _unet_blocks(model.config)
        found = {name: _unet_layer(name, blocks) for name in names}
        return {name: Place(layer) for name, layer in found.items() if layer}
    rules = [(f"{block}.{row[0]}".strip("."), row[1:]) for block, rows in _TABLES[family] for row in _pairs(rows)]
    placed = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        for ours, (theirs, *rows) in rules:
            if name == ours.replace("N", number[1] if number else "N", 1):
                placed[name] = Place(theirs.replace("N", number[1] if number else "N", 1), *map(int, rows))
    return placed


def _pairs(text: str) -> list[list[str]]:
    return [row.split() for row in text.split(";") if row.strip()]


def _unet_blocks(config: Mapping) -> dict[str, str]:
    """Blocks of a UNet, counted through: an original number for each resnet, and one for what halves the plane."""
    layers, count, found = config["layers_per_block"], 1, {}
    for block in range(len(config["down_block_types"])):
        for index in range(layers):
            found |= {f"down_blocks.{block}.{kind}.{index}": f"input_blocks.{count}.{place}" for place, kind in _KINDS}
            count += 1
        found[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
        count += 1
    found |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    found["mid_block.resnets.1"] = "middle_block.2"
    count = 0
    for block in range(len(config["up_block_types"])):
        for index in range(layers + 1):
            found |= {f"up_blocks.{block}.{kind}.{index}": f"output_blocks.{count}.{place}" for place, kind in _KINDS}
            count += 1
    return found


_KINDS = (0, "resnets"), (1, "attentions")


def _unet_layer(name: str, blocks: Mapping[str, str]) -> str | None:
    for ours, theirs in blocks.items():
        if name == ours:
            return theirs
        if name.startswith(f"{ours}."):
            rest = name.removeprefix(f"{ours}.")
            return f"{theirs}.{rest if '.attentions.' in name else dict(_pairs(_RESNET))[rest]}"
    return dict(_pairs(_UNET)).get(name)


def original_weights(placed: Mapping[str, Place], model: nn.Module, unit: int) -> dict[str, Tensor]:
    """The weights of the original model, those of one layer put together; `unit` is the model's width."""
    weights: dict[str, Tensor] = {}
    for name, place in placed.items():
        weight = model.get_submodule(name).weight.detach()
        if place.rows is None:
            weights[place.layer] = weight.clone()
            continue
        rows = sum(other.rows * unit for other in set(placed.values()) if other.layer == place.layer)
        whole = weights.setdefault(place.layer, weight.new_zeros(rows, weight.shape[1]))
        assert len(weight) == place.rows * unit, f"{name} has {len(weight)} rows"
        whole[place.first * unit : place.first * unit + len(weight)] = weight
    return {f"diffusion_model.{layer}.weight": weight for layer, weight in weights.items()}


Target = tuple[str, int, int] | str  # a weight, or one with its first row and number of rows


def comfyui_names(family: str, weights: Iterable[str], placed: Mapping[str, Place], unit: int) -> dict[str, Target]:
    """What a LoRA may call a weight."""
    names: dict[str, Target] = {}
    for key in weights:
        layer = key.removeprefix("diffusion_model.").removesuffix(".weight")
        names |= {f"lora_unet_{layer.replace('.', '_')}": key, f"diffusion_model.{layer}": key}
    for name, place in placed.items():
        key = f"diffusion_model.{place.layer}.weight"
        target = key if place.rows is None else (key, place.first * unit, place.rows * unit)
        if family in ("sd15", "sdxl"):
            names[f"lora_unet_{name.replace('.', '_')}"] = target
        elif family in READS_DIFFUSERS:
            names[f"transformer.{name}"] = target
    return names


class Patch(NamedTuple):
    up: Tensor
    down: Tensor
    scale: float

    def added_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The patched weight; an error where the product of the factors is not of its size."""
        product = (self.up.flatten(1).float() @ self.down.flatten(1).float()).reshape(weight.shape)
        return weight + strength * self.scale * product


def load_by_comfyui(file: Mapping[str, Tensor], names: Mapping[str, Target]) -> dict[Target, Patch]:
    """The patches of a LoRA; raises KeyError for tensors that nobody asked for."""
    left, patches = set(file), {}
    for name, target in names.items():
        alpha = file.get(f"{name}.alpha")
        for up, down in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
            if f"{name}.{up}" in file:
                factors = file[f"{name}.{up}"], file[f"{name}.{down}"]
                scale = 1.0 if alpha is None else float(alpha) / len(factors[1])
                patches[target] = Patch(*factors, scale)
                left -= {f"{name}.{up}", f"{name}.{down}", f"{name}.alpha"}
    if left:
        raise KeyError(f"lora key not loaded: {sorted(left)[0]} ({len(left)} of {len(file)})")
    return patches


def patched(weights: Mapping[str, Tensor], patches: Mapping[Target, Patch], strength: float = 1.0) -> dict[str, Tensor]:
    """The weights with patches on them."""
    shown = {key: weight.clone() for key, weight in weights.items()}
    for target, patch in patches.items():
        key, first, rows = (target, 0, len(shown[target])) if isinstance(target, str) else target
        shown[key][first : first + rows] = patch.added_to(shown[key][first : first + rows], strength)
    return shown


def refused_by_kohya(family: str, file: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that a kohya script would pass over, or could not put into its own layers.

    Args:
        weights: the layers that it has by the names it gives them: `lora_unet_...` to the weight.
    """
    refused = []
    for key, tensor in file.items():
        name, _, part = key.partition(".")
        weight = weights.get(name)
        known = weight is not None and re.fullmatch(_KOHYA_BLOCKS[family], name.removeprefix("lora_unet_"))
        rank = len(file[f"{name}.lora_down.weight"])
        shapes = {"alpha": ()}
        if weight is not None:
            ones = (1,) * (weight.ndim - 2)
            shapes |= {"lora_down.weight": (rank, *weight.shape[1:]), "lora_up.weight": (len(weight), rank, *ones)}
        if not known or tuple(tensor.shape) != shapes.get(part) or (part == "alpha" and float(tensor) != rank):
            refused.append(key)
    return refused
