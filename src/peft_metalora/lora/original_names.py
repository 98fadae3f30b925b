# SPDX-License-Identifier: Apache-2.0
"""What other tools call a layer: diffusers' module paths in the names of the original checkpoints.

ComfyUI and kohya's scripts speak of the models as their authors published them. Their transformers keep q, k and v
(in FLUX.1's single blocks the MLP's input too) in one matrix, so several of diffusers' layers may be parts of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_Layers = dict[str, tuple[str, int, "tuple[int, ...] | None"]]

# A layer of a transformer block -> (original layer, which part of it, the sizes of its parts in units of the width).
_THIRDS = (1, 1, 1)
_FLUX_DOUBLE: _Layers = {
    **{f"attn.to_{part}": ("img_attn.qkv", index, _THIRDS) for index, part in enumerate("qkv")},
    **{f"attn.add_{part}_proj": ("txt_attn.qkv", index, _THIRDS) for index, part in enumerate("qkv")},
    "attn.to_out.0": ("img_attn.proj", 0, None),
    "attn.to_add_out": ("txt_attn.proj", 0, None),
}
_FLUX1_DOUBLE: _Layers = {
    **_FLUX_DOUBLE,
    "ff.net.0.proj": ("img_mlp.0", 0, None),
    "ff.net.2": ("img_mlp.2", 0, None),
    "ff_context.net.0.proj": ("txt_mlp.0", 0, None),
    "ff_context.net.2": ("txt_mlp.2", 0, None),
    "norm1.linear": ("img_mod.lin", 0, None),
    "norm1_context.linear": ("txt_mod.lin", 0, None),
}
_FLUX1_SINGLE: _Layers = {
    **{f"attn.to_{part}": ("linear1", index, (1, 1, 1, 4)) for index, part in enumerate("qkv")},
    "proj_mlp": ("linear1", 3, (1, 1, 1, 4)),
    "proj_out": ("linear2", 0, None),
    "norm.linear": ("modulation.lin", 0, None),
}
_FLUX2_DOUBLE: _Layers = {
    **_FLUX_DOUBLE,
    "ff.linear_in": ("img_mlp.0", 0, None),
    "ff.linear_out": ("img_mlp.2", 0, None),
    "ff_context.linear_in": ("txt_mlp.0", 0, None),
    "ff_context.linear_out": ("txt_mlp.2", 0, None),
}
_FLUX2_SINGLE: _Layers = {"attn.to_qkv_mlp_proj": ("linear1", 0, None), "attn.to_out": ("linear2", 0, None)}
_SD3_JOINT: _Layers = {
    **{f"attn.to_{part}": ("x_block.attn.qkv", index, _THIRDS) for index, part in enumerate("qkv")},
    **{f"attn.add_{part}_proj": ("context_block.attn.qkv", index, _THIRDS) for index, part in enumerate("qkv")},
    **{f"attn2.to_{part}": ("x_block.attn2.qkv", index, _THIRDS) for index, part in enumerate("qkv")},
    "attn.to_out.0": ("x_block.attn.proj", 0, None),
    "attn.to_add_out": ("context_block.attn.proj", 0, None),
    "attn2.to_out.0": ("x_block.attn2.proj", 0, None),
    "ff.net.0.proj": ("x_block.mlp.fc1", 0, None),
    "ff.net.2": ("x_block.mlp.fc2", 0, None),
    "ff_context.net.0.proj": ("context_block.mlp.fc1", 0, None),
    "ff_context.net.2": ("context_block.mlp.fc2", 0, None),
    "norm1.linear": ("x_block.adaLN_modulation.1", 0, None),
}
_Z_IMAGE_BLOCK: _Layers = {
    **{f"attention.to_{part}": ("attention.qkv", index, _THIRDS) for index, part in enumerate("qkv")},
    "attention.to_out.0": ("attention.out", 0, None),
    **{f"feed_forward.w{part}": (f"feed_forward.w{part}", 0, None) for part in (1, 2, 3)},
}
_QWEN_IMAGE_BLOCK: _Layers = {  # published in diffusers' names
    layer: (layer, 0, None)
    for layer in (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "img_mod.1", "img_mlp.net.0.proj", "img_mlp.net.2"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("txt_mod.1", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
}
_KREA2_BLOCK: _Layers = {
    **{f"attn.to_{part}": (f"attn.w{part}", 0, None) for part in "qkv"},
    "attn.to_out.0": ("attn.wo", 0, None),
    "attn.to_gate": ("attn.gate", 0, None),
    **{f"ff.{part}": (f"mlp.{part}", 0, None) for part in ("gate", "up", "down")},
}
_FLUX3_BLOCK: _Layers = {
    **{f"attn.to_{part}": (f"{part}_proj", 0, None) for part in "qkv"},
    "attn.to_out.0": ("attn_out", 0, None),
    "ff.linear_in": ("mlp_in", 0, None),
    "ff.linear_out": ("mlp_out", 0, None),
}
_WAN_BLOCK: _Layers = {
    **{
        f"{ours}.{layer}": (f"{theirs}.{name}", 0, None)
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for layer, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    },
    "ffn.net.0.proj": ("ffn.0", 0, None),
    "ffn.net.2": ("ffn.2", 0, None),
}
_FLUX1_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}
_FLUX2_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "proj_out": "final_layer.linear",
}
_FLUX3_OUTSIDE = {
    "x_embedders.image": "emb_in.image",
    "context_embedder": "txt_in",
    "timestep_embedder.linear_1": "time_in.in_layer",
    "timestep_embedder.linear_2": "time_in.out_layer",
    "target_timestep_embedder.linear_1": "ref_time_in.in_layer",
    "target_timestep_embedder.linear_2": "ref_time_in.out_layer",
    "proj_out": "final_layer.image.linear",
}
# Class of the denoiser -> (diffusers' block, original block, its layers) ..., and the layers outside of blocks.
_TRANSFORMERS: dict[str, tuple[tuple[tuple[str, str, _Layers], ...], dict[str, str]]] = {
    "FluxTransformer2DModel": (
        (
            ("transformer_blocks", "double_blocks", _FLUX1_DOUBLE),
            ("single_transformer_blocks", "single_blocks", _FLUX1_SINGLE),
        ),
        _FLUX1_OUTSIDE,
    ),
    "Flux2Transformer2DModel": (
        (
            ("transformer_blocks", "double_blocks", _FLUX2_DOUBLE),
            ("single_transformer_blocks", "single_blocks", _FLUX2_SINGLE),
        ),
        _FLUX2_OUTSIDE,
    ),
    "Flux3Transformer2DModel": (
        (
            ("mode_blocks.image", "content_mode_blocks.image", _FLUX3_BLOCK),
            ("mode_blocks.image_cond", "content_mode_blocks.image_cond", _FLUX3_BLOCK),
            ("single_transformer_blocks", "single_blocks", _FLUX3_BLOCK),
            ("txt_mode_blocks", "txt_mode_blocks", _FLUX3_BLOCK),
        ),
        _FLUX3_OUTSIDE,
    ),
    "SD3Transformer2DModel": (
        (("transformer_blocks", "joint_blocks", _SD3_JOINT),),
        {"context_embedder": "context_embedder"},
    ),
    "ZImageTransformer2DModel": (
        tuple((blocks, blocks, _Z_IMAGE_BLOCK) for blocks in ("layers", "noise_refiner", "context_refiner")),
        {},
    ),
    "QwenImageTransformer2DModel": (
        (("transformer_blocks", "transformer_blocks", _QWEN_IMAGE_BLOCK),),
        {"img_in": "img_in", "txt_in": "txt_in", "proj_out": "proj_out"},
    ),
    "Krea2Transformer2DModel": (
        (
            ("transformer_blocks", "blocks", _KREA2_BLOCK),
            ("text_fusion.layerwise_blocks", "txtfusion.layerwise_blocks", _KREA2_BLOCK),
            ("text_fusion.refiner_blocks", "txtfusion.refiner_blocks", _KREA2_BLOCK),
        ),
        {"img_in": "first", "final_layer.linear": "last.linear"},
    ),
    "WanTransformer3DModel": (
        (("blocks", "blocks", _WAN_BLOCK),),
        {
            "condition_embedder.text_embedder.linear_1": "text_embedding.0",
            "condition_embedder.text_embedder.linear_2": "text_embedding.2",
            "condition_embedder.time_embedder.linear_1": "time_embedding.0",
            "condition_embedder.time_embedder.linear_2": "time_embedding.2",
            "condition_embedder.time_proj": "time_projection.1",
            "proj_out": "head.head",
        },
    ),
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


@dataclass(frozen=True)
class OriginalName:
    """Where a layer stands in the original checkpoint.

    Attributes:
        name: the original layer.
        part: which rows of it this layer is: an index into `parts`.
        parts: the heights of all parts in units of the width, None where the layer is all of it.
    """

    name: str
    part: int = 0
    parts: tuple[int, ...] | None = None


def original_names(model_class: str, modules: Iterable[str]) -> dict[str, OriginalName | None]:
    """The original names of a denoiser's modules; None for one that has none known here.

    Args:
        model_class: diffusers' class of the denoiser, such as "FluxTransformer2DModel".
        modules: its module paths.
    """
    modules = list(modules)
    if model_class == "UNet2DConditionModel":
        layers = _layers_per_block(modules)
        return {module: _unet_name(module, layers) for module in modules}
    return {module: _transformer_name(model_class, module) for module in modules}


def is_elsewhere(model_class: str) -> bool:
    """Whether other tools know a denoiser of this class, by the names that its layers have here.

    None knows FLUX.3 yet: its names are those from which diffusers converts its checkpoint.
    """
    known = model_class == "UNet2DConditionModel" or model_class in _TRANSFORMERS
    return known and model_class != "Flux3Transformer2DModel"


def has_depth(modules: Iterable[str]) -> bool:
    """Whether a UNet's transformers are deeper than one layer, as SDXL's are and SD 1.5's are not."""
    return any(re.search(r"transformer_blocks\.[1-9]", module) for module in modules)


def _transformer_name(model_class: str, module: str) -> OriginalName | None:
    blocks, outside = _TRANSFORMERS.get(model_class, ((), {}))
    for ours, theirs, layers in blocks:
        found = re.fullmatch(rf"{re.escape(ours)}\.(\d+)\.(.+)", module)
        if found and found[2] in layers:
            name, part, parts = layers[found[2]]
            return OriginalName(f"{theirs}.{found[1]}.{name}", part, parts)
    return OriginalName(outside[module]) if module in outside else None


def _layers_per_block(modules: Iterable[str]) -> int:
    found = [re.match(r"(down|up)_blocks\.\d+\.(?:resnets|attentions)\.(\d+)\.", module) for module in modules]
    # An up block has one layer more than a down block.
    return max((int(match[2]) + (match[1] == "down") for match in found if match), default=2) or 1


def _unet_name(module: str, layers: int) -> OriginalName | None:
    if module in _UNET_OUTSIDE:
        return OriginalName(_UNET_OUTSIDE[module])
    found = re.fullmatch(r"(down_blocks|up_blocks|mid_block)(?:\.(\d+))?\.(resnets|attentions)\.(\d+)\.(.+)", module)
    if not found:
        found = re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", module)
        return OriginalName(f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op") if found else None
    side, block, kind, index, rest = found.groups()
    inner = rest if kind == "attentions" else _RESNET.get(rest)
    if inner is None:
        return None
    if side == "mid_block":
        return OriginalName(f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}.{inner}")
    position = int(block) * (layers + 1) + int(index) + (side == "down_blocks")
    blocks = "input_blocks" if side == "down_blocks" else "output_blocks"
    return OriginalName(f"{blocks}.{position}.{int(kind == 'attentions')}.{inner}")
