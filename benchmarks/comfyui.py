# SPDX-License-Identifier: Apache-2.0
"""The nodes of `examples/comfyui`, and every exported file, in ComfyUI's own model, patcher and loader.

    python benchmarks/comfyui.py ~/ComfyUI     # in an environment that has ComfyUI's requirements and this package

Builds ComfyUI's FLUX with the embedded base's weights, reads a person by the nodes, and compares every weight that
ComfyUI computes with those of `pipe.read_subject` and `fuse_meta_lora`. Nothing is drawn. On the CPU, half a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from peft_metalora import enable_meta_lora
from peft_metalora.demo.embedded import DOWN, load_base
from peft_metalora.demo.faces import write_dataset
from peft_metalora.lora.export import lora_tensors

NODES = Path(__file__).parents[1] / "examples" / "comfyui" / "__init__.py"
FORMATS = "comfyui", "kohya", "diffusers"


def comfyui_model(transformer: Any) -> Any:
    """ComfyUI's FLUX of the sizes of a transformer of diffusers, on the CPU."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    own, heads = transformer.config, transformer.config.num_attention_heads
    sizes = {"in_channels": own.in_channels // 4, "out_channels": own.in_channels // 4, "patch_size": 2}
    sizes |= {"vec_in_dim": own.pooled_projection_dim, "context_in_dim": own.joint_attention_dim, "num_heads": heads}
    sizes |= {"hidden_size": heads * own.attention_head_dim, "mlp_ratio": 4.0, "axes_dim": list(own.axes_dims_rope)}
    sizes |= {"depth": own.num_layers, "depth_single_blocks": own.num_single_layers, "theta": 10000}
    config = comfy.supported_models.Flux({"image_model": "flux", "qkv_bias": True, "guidance_embed": False, **sizes})
    config.set_inference_dtype(torch.float32, None)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(comfy.model_base.Flux(config, device=device), device, device)


def in_comfyui(transformer: Any, patcher: Any) -> dict[str, Tensor]:
    """Weights of a transformer of diffusers in the layers of ComfyUI's, by ComfyUI's own map."""
    import comfy.utils

    weights = {key: torch.zeros_like(value) for key, value in patcher.model.state_dict().items()}
    places = comfy.utils.flux_to_diffusers(patcher.model.model_config.unet_config, output_prefix="diffusion_model.")
    for name, value in transformer.state_dict().items():
        place = places[name]
        key, rows, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
        target = weights[key] if rows is None else weights[key].narrow(*rows)
        target.copy_(value if change is None else change(value))
    return weights


def patched(patcher: Any) -> dict[str, Tensor]:
    """The weights that ComfyUI computes with."""
    import comfy.lora

    weights = {key: value.clone() for key, value in patcher.model.state_dict().items()}
    for key, patches in patcher.patches.items():
        weights[key] = comfy.lora.calculate_weight(patches, weights[key], key)
    return weights


def differ(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comfyui", type=Path, help="checkout of ComfyUI")
    given = parser.parse_args()
    pipe = enable_meta_lora(load_base())
    sys.path.insert(0, str(given.comfyui))
    sys.argv = [sys.argv[0], "--cpu"]  # ComfyUI reads it when it is imported
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.sd

    patcher = comfyui_model(pipe.transformer)
    patcher.model.load_state_dict(in_comfyui(pipe.transformer, patcher))
    base = patched(patcher)
    spec: Any = importlib.util.spec_from_file_location("comfyui_metalora", NODES)
    nodes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nodes)
    scale, latent_format = pipe.vae.config, patcher.model.latent_format

    def encode(image: Tensor) -> Tensor:
        """ComfyUI's VAE: raw latents, which the embedded base and ComfyUI's FLUX scale differently."""
        raw: Tensor = pipe.vae.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()
        return latent_format.process_out((raw - (scale.shift_factor or 0)) * scale.scaling_factor)

    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, "held-out", 1, 1)
        photo = next(Path(folder).rglob("*.png"))
        pixels = torch.from_numpy(np.array(Image.open(photo).convert("RGB"))).float()[None] / 255
        with torch.inference_mode():  # as ComfyUI runs nodes
            person = nodes.ReadPerson().read(nodes.Down(DOWN), patcher, SimpleNamespace(encode=encode), pixels)[0]
            shown = nodes.ApplyPeople().apply(patcher, ((person, 1.0),), 1.0)[0]
        pipe.read_subject(photo, "ann", down=DOWN)
    pipe.fuse_meta_lora()
    pipe.unload_meta_lora(keep_fused=True)
    wanted = in_comfyui(pipe.transformer, patcher)
    print(f"the person changes a weight by {differ(wanted, base):.3g} at the most")
    print(f"nodes: {len(shown.patches)} weights patched, largest difference {differ(patched(shown), wanted):.3g}")
    for format in FORMATS:
        loaded, _ = comfy.sd.load_lora_for_models(patcher, None, lora_tensors(person, format), 1.0, 0.0)
        print(
            f"{format}: {len(loaded.patches)} weights patched, largest difference {differ(patched(loaded), wanted):.3g}"
        )


if __name__ == "__main__":
    main()
