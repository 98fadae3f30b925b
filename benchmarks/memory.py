# SPDX-License-Identifier: Apache-2.0
"""What the recipes of `examples/recipes` take, run as they are printed, on whole pipelines of the real shapes.

FLUX.1-dev (T5-XXL and the VAE included), SDXL, FLUX.2 klein 4B, Z-Image, Krea 2, Qwen-Image, Wan 2.2 TI2V-5B and
FLUX.3 (of the sizes that diffusers' classes have by default) with random weights in bf16, written to disk as a download
would lie there; each command in a process of its own whose memory is capped.

    python benchmarks/memory.py                       100 GB of disk (--work); writes results/memory.json
    python benchmarks/memory.py --only flux_read_gib sdxl_personalize_gib
    python benchmarks/memory.py --seconds 500 --matrix "flux .* 512" "sdxl"   then other ways to hold a base
    python benchmarks/memory.py --small               tiny pipelines on a CPU, to check the script

All GPUs that are there work, each at a command of its own, and share the bases on disk. Each figure is in the file as
soon as it is known, with its machine; what a file of the same versions holds already stays there.

A figure is the most that the process had from the driver at any time, loading included, with the context that CUDA
itself keeps: what a card has to have free. The cap is the size of the card that a recipe is made for, by
`torch.cuda.set_per_process_memory_fraction`, the context taken off; what does not fit ends in an error, the figure is
none, and the command runs once more without a cap to say what it would take. Beside it lie the seconds of a step (from
the first step to the last of a few), what tensors alone took, the peak of host memory (the program's own, and the
page-locked part), and of each phase (from one loading of parts to the next) the peak. Runs are shortened by flags in
`QUICK`, nothing else is changed."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from flux_dev import SHAPES, SMALL
from origin import origin, write
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from peft_metalora import MetaLoraConfig, load_down, save_down
from peft_metalora.bases import open_base
from peft_metalora.bases.memory import MODULAR, OFFLOADS, QUANTIZERS, Whole, require_supported
from peft_metalora.bases.parts import Parts, is_hull
from peft_metalora.checkpoint.space import SubjectSpace
from peft_metalora.cli import COMMANDS, build_parser, make_config
from peft_metalora.cli import main as metalora
from peft_metalora.commands import estimate as estimating
from peft_metalora.commands.estimate import occasion
from peft_metalora.encoder import EncoderConfig, make_encoder, save_reader
from peft_metalora.errors import ConfigError
from peft_metalora.pipelines.calling import PerSampleMixin
from peft_metalora.training.watching.tracking import Trackers

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
QUICK = {
    "personalize": ["--max_train_steps", "6", "--views_per_image", "4"],
    "generate": ["--num_inference_steps", "6"],
    "read": [],
}
READ = "read --down faces --photos ann.jpg --output_dir ann"


@dataclass(frozen=True)
class Case:
    """A figure: a command, as it is printed in a recipe, and the card that it is made for, in GiB."""

    figure: str
    base: str
    card: float
    recipe: str

    def command(self) -> list[str]:
        """Its arguments."""
        (printed,) = re.findall(r"^#   metalora (.*)$", (RECIPES / self.recipe).read_text(), re.MULTILINE)
        return shlex.split(printed)


CASES = (
    Case("sdxl_personalize_gib", "sdxl", 6, "sdxl-1024-6gb.yaml"),
    Case("flux_read_gib", "flux", 2, "flux1-read-2gb.yaml"),
    Case("flux_personalize_512_gib", "flux", 8, "flux1-512-8gb.yaml"),
    Case("flux_personalize_1024_gib", "flux", 12, "flux1-1024-12gb.yaml"),
    Case("flux_generate_1024_gib", "flux", 8, "flux1-generate-8gb.yaml"),
    Case("klein_personalize_gib", "klein", 8, "klein-1024-8gb.yaml"),
)


# Pipelines of the real shapes


def tokenizer(vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Words to numbers below `vocabulary`; what they mean is of no matter here."""
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "a", "photo", "of", "person", "</s>"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", words["</s>"])])
    assert len(words) <= vocabulary
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **special)


def clip(small: bool, wide: bool = False) -> CLIPTextConfig:
    """CLIP-L, or the bigG of SDXL."""
    sizes = (1280, 5120, 32, 20) if wide else (768, 3072, 12, 12)
    width, inner, layers, heads = (16, 32, 1, 2) if small else sizes
    return CLIPTextConfig(
        vocab_size=100 if small else 49408,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        projection_dim=width,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=6,
    )


def autoencoder(small: bool, channels: int, **more: Any) -> AutoencoderKL:
    """The autoencoder of SDXL and FLUX.1, which divides both sides by 8."""
    widths = (8, 8, 8, 8) if small else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=1 if small else 2,
        latent_channels=channels,
        norm_num_groups=8 if small else 32,
        **more,
    )


def flux(small: bool) -> Any:
    """FLUX.1-dev."""
    t5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    if not small:
        t5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    config = T5Config(
        vocab_size=100 if small else 32128, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **t5
    )
    no_quant = {"use_quant_conv": False, "use_post_quant_conv": False}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(small, 16, scaling_factor=0.3611, shift_factor=0.1159, **no_quant),
        text_encoder=CLIPTextModel(clip(small)),
        tokenizer=tokenizer(100, 77),
        text_encoder_2=T5EncoderModel(config),
        tokenizer_2=tokenizer(100, 512),
        transformer=FluxTransformer2DModel(**({**SMALL, "pooled_projection_dim": 16} if small else SHAPES)),
    )


def language(small: bool, width: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    """A language model of the Qwen kind."""
    if small:
        width, inner, layers, heads, more = 8, 8, 28, 1, {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": 100}
    sizes = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return {**sizes, "max_position_embeddings": 40960, **more}


QWEN3_4B = 2560, 9728, 36, 32
QWEN3_REST = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a template."""
    made = tokenizer(100, 512)
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def klein(small: bool) -> Any:
    """FLUX.2 klein, 4B."""
    shapes = {"num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128, "num_attention_heads": 24}
    shapes |= {"joint_attention_dim": 3 * 2560, "in_channels": 128}
    if small:
        shapes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
        shapes |= {"joint_attention_dim": 24, "in_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    vae = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4} if small else {}
    text = Qwen3Config(tie_word_embeddings=True, **language(small, *QWEN3_4B, **QWEN3_REST))
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLFlux2(**vae),
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=chat_tokenizer(),
        transformer=Flux2Transformer2DModel(guidance_embeds=False, **shapes),
        is_distilled=False,
    )


def sdxl(small: bool) -> Any:
    """Stable Diffusion XL."""
    widths, heads, depths, width = (320, 640, 1280), (5, 10, 20), (1, 2, 10), 2048
    more = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
    if small:
        widths, heads, depths, width = (8, 8, 16), (1, 1, 2), (1, 1, 1), 32
        more = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8, "norm_num_groups": 4}
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=width,
        attention_head_dim=heads,
        transformer_layers_per_block=depths,
        use_linear_projection=True,
        addition_embed_type="text_time",
        **more,
    )
    with torch.device("cpu"):  # it computes when it is made
        scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return StableDiffusionXLPipeline(
        vae=autoencoder(small, 4, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(clip(small)),
        text_encoder_2=CLIPTextModelWithProjection(clip(small, wide=True)),
        tokenizer=tokenizer(100, 77),
        tokenizer_2=tokenizer(100, 77),
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


def vision(small: bool, width: int, inner: int, depth: int, out: int, **more: Any) -> dict[str, Any]:
    """The eye of such a model, which no prompt opens."""
    if small:
        width, inner, depth, out = 8, 8, 2, 8
    sizes = {"hidden_size": width, "intermediate_size": inner, "depth": depth, "out_hidden_size": out}
    return {**sizes, "num_heads": 1 if small else 16, **more}


def z_image(small: bool) -> Any:
    """Z-Image."""
    shapes = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8}
    shapes |= {"axes_dims": [4, 6, 6]}
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(small, 16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(Qwen3Config(**language(small, *QWEN3_4B, **QWEN3_REST))),
        tokenizer=chat_tokenizer(),
        transformer=ZImageTransformer2DModel(**(shapes if small else {})),
    )


def rope(small: bool, *sections: int) -> dict[str, Any]:
    """Places of tokens in an image and in time."""
    return {"mrope_section": [1, 1, 2] if small else list(sections), "rope_type": "default", "rope_theta": 1e6}


def qwen_image(small: bool) -> Any:
    """Qwen-Image, with the 7 billion numbers of Qwen2.5-VL."""
    shapes = {"in_channels": 64, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    shapes |= {"joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4)}
    more = {"num_key_value_heads": 4, "vocab_size": 152064}
    text = language(small, 3584, 18944, 28, 28, **more) | {"rope_parameters": rope(small, 16, 24, 24)}
    eye = vision(small, 1280, 3420, 32, 3584, fullatt_block_indexes=[1] if small else [7, 15, 23, 31])
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(**({"base_dim": 8} if small else {})),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=eye)),
        tokenizer=chat_tokenizer(),
        transformer=QwenImageTransformer2DModel(**(shapes if small else {})),
    )


def krea2(small: bool) -> Any:
    """Krea 2, with the 4 billion numbers of Qwen3-VL."""
    shapes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    shapes |= {"intermediate_size": 16, "timestep_embed_dim": 8, "text_hidden_dim": 8, "axes_dims_rope": (2, 2, 4)}
    shapes |= {"text_num_attention_heads": 1, "text_num_key_value_heads": 1, "text_intermediate_size": 8}
    text = language(small, *QWEN3_4B, **QWEN3_REST) | {"rope_parameters": rope(small, 24, 20, 20)}
    more = {"deepstack_visual_indexes": [0, 1] if small else [5, 11, 17], "num_position_embeddings": 2304}
    eye = vision(small, 1024, 4096, 24, 2560, **more)
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=AutoencoderKLQwenImage(**({"base_dim": 8} if small else {})),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=eye)),
        tokenizer=chat_tokenizer(),
        transformer=Krea2Transformer2DModel(**(shapes if small else {})),
        text_encoder_select_layers=tuple(range(2, 26, 2)) if small else (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35),
    )


def wan(small: bool) -> Any:
    """Wan 2.2 TI2V-5B, with the 6 billion numbers of UMT5-XXL."""
    umt5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 256384}
    shapes = {"num_attention_heads": 24, "attention_head_dim": 128, "ffn_dim": 14336, "num_layers": 30}
    vae = {"base_dim": 160, "decoder_base_dim": 256}
    if small:
        umt5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 100}
        shapes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32, "num_layers": 1, "text_dim": 32}
        vae = {"base_dim": 8, "decoder_base_dim": 8}
    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=AutoencoderKLWan(
            **vae,
            z_dim=48,
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
        ),
        text_encoder=UMT5EncoderModel(UMT5Config(feed_forward_proj="gated-gelu", decoder_start_token_id=0, **umt5)),
        tokenizer=tokenizer(100, 512),
        transformer=WanTransformer3DModel(in_channels=48, out_channels=48, **shapes),
        expand_timesteps=True,
    )


class Modular:
    """The parts of FLUX.3, which diffusers has as a modular pipeline, and how its repository lies on a disk."""

    def __init__(self, name: str, **components: Any) -> None:
        self.name, self.components = name, components

    @property
    def transformer(self) -> Any:
        """The denoiser."""
        return self.components["transformer"]

    def save_config(self, folder: Path) -> None:
        """The index; and what makes a whole processor of the tokenizer."""
        kinds = {name: _library_and_class(part) for name, part in self.components.items()}
        kinds["tokenizer"] = ["transformers", "Qwen3VLProcessor"]
        processor = {
            "processor_config": {"processor_class": "Qwen3VLProcessor"},
            "preprocessor_config": {"image_processor_type": "Qwen2VLImageProcessor"},
            "video_preprocessor_config": {"video_processor_type": "Qwen3VLVideoProcessor"},
        }
        for file, text in processor.items():
            (folder / "tokenizer" / f"{file}.json").write_text(json.dumps(text))
        places = {
            name: [*kind, {"pretrained_model_name_or_path": self.name, "subfolder": name, "type_hint": kind}]
            for name, kind in kinds.items()
        }
        index = {"_class_name": "Flux3ModularPipeline", "_blocks_class_name": "Flux3AutoBlocks", **places}
        (folder / "modular_model_index.json").write_text(json.dumps(index))


def _library_and_class(part: Any) -> list[str]:
    return [type(part).__module__.partition(".")[0], type(part).__name__]


def flux3(small: bool) -> Any:
    """FLUX.3 as diffusers' classes have it by default, with the 4 billion numbers of Qwen3-VL; without its writer."""
    from diffusers import Flux3Transformer2DModel  # diffusers 0.41, the last for Python 3.10, has none

    shapes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    shapes |= {"joint_attention_dim": 8 * 8, "in_channels": 16, "cond_in_channels": 16, "axes_dims_rope": (4, 4, 4, 4)}
    vae = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4} if small else {}
    text = language(small, *QWEN3_4B, **QWEN3_REST) | {"rope_parameters": rope(small, 24, 20, 20)}
    if small:
        text |= {"num_hidden_layers": 32}
    more = {"deepstack_visual_indexes": [0, 1] if small else [5, 11, 17], "num_position_embeddings": 2304}
    eye = vision(small, 1024, 4096, 24, 2560, **more)
    return Modular(
        FLUX3,
        vae=AutoencoderKLFlux2(**vae),
        text_encoder=Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=eye)),
        tokenizer=chat_tokenizer(),
        transformer=Flux3Transformer2DModel(**(shapes if small else {})),
    )


FLUX3 = "black-forest-labs/FLUX.3"


@dataclass(frozen=True)
class Base:
    """How a pipeline is made, what it is called in the recipes, and its Down."""

    make: Callable[[bool], Any]
    name: str
    down: str


BASES = {
    "flux": Base(flux, "black-forest-labs/FLUX.1-dev", "faces"),
    "sdxl": Base(sdxl, "stabilityai/stable-diffusion-xl-base-1.0", "sdxl-faces"),
    "klein": Base(klein, "black-forest-labs/FLUX.2-klein-base-4B", "klein-faces"),
    "z_image": Base(z_image, "Tongyi-MAI/Z-Image", "z-image-faces"),
    "krea2": Base(krea2, "krea/Krea-2-Raw", "krea2-faces"),
    "qwen_image": Base(qwen_image, "Qwen/Qwen-Image", "qwen-faces"),
    "wan": Base(wan, "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "wan-faces"),
    "flux3": Base(flux3, FLUX3, "flux3-faces"),
}


def numbers_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a file of weights holds: parameters once each, and the buffers that are saved."""
    yield from module.named_parameters()
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    yield from ((name, tensor) for name, tensor in module.state_dict().items() if name not in own)


def write_weights(path: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """A safetensors file of random numbers for a model on the meta device, never whole in memory."""
    name = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    random = torch.randn(2**24, generator=torch.Generator().manual_seed(0)) * 0.02
    drawn, ones = random.to(dtype), torch.ones(2**16, dtype=dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    content, place = [], 0
    for key, tensor in numbers_of(module):
        kind = name if tensor.is_floating_point() else "I64"
        size = tensor.numel() * (dtype.itemsize if kind == name else 8)
        header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        content.append((None if kind == "I64" else ones if "running_var" in key else drawn, size))
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source, size in content:
            data = b"\0" * 2**16 if source is None else source.view(torch.uint8).numpy().data
            for start in range(0, size, len(data)):
                file.write(data[: min(len(data), size - start)])


def write_base(base: Base, small: bool) -> None:
    """A pipeline as a folder of its repository's name in the working directory, and its Down beside it."""
    with torch.device("meta"):
        pipe = base.make(small)
    folder = Path(base.name)
    dtype = torch.float32 if small else torch.bfloat16
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            place = folder / name
            place.mkdir(parents=True)
            diffusers = hasattr(part, "save_config")
            part.save_config(place) if diffusers else part.config.save_pretrained(place)
            stem = "diffusion_pytorch_model" if diffusers else "model"
            write_weights(place / f"{stem}.safetensors", part, dtype)
        elif part is not None:
            part.save_pretrained(folder / name)
    pipe.save_config(folder)
    write_down(base, small)


DRAWN = torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0))


def repeated(count: int) -> torch.Tensor:
    """Random numbers, the same ones over and over: to draw gigabytes takes minutes."""
    return DRAWN.repeat(-(-count // len(DRAWN)))[:count]


def write_down(base: Base, small: bool) -> None:
    """A Down of random numbers for a pipeline on disk, of the ranks that stage 1 has by default; with a reader."""
    opened = open_base(base.name)
    denoiser = opened.denoiser
    ranks = {"r": 2, "meta_r": 4} if small else {"r": 4, "meta_r": 64}
    targets = opened.target_modules
    denoiser.add_adapter(MetaLoraConfig(**ranks, lora_alpha=ranks["r"], target_modules=targets), adapter_name="faces")
    for module in denoiser.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "faces" and tensor.is_meta:
                drawn = 0.01 * repeated(math.prod(tensor.shape)).view(tensor.shape)
                setattr(module, name, nn.Parameter(drawn) if isinstance(tensor, nn.Parameter) else drawn)
    save_down(base.down, denoiser, "faces", base_model=base.name)
    source = load_down(base.down)
    if base.down != "faces":
        return
    side, channels = opened.pipeline.vae_scale_factor, opened.pipeline.vae.config.latent_channels
    space = SubjectSpace.around(source, 6 if small else 128)
    with torch.no_grad():
        space.basis.copy_(0.001 * repeated(space.basis.numel()).view(space.basis.shape))
    config = {"resolution": 64, "code_size": 6, "width": 8, "hidden": 16} if small else {}

    def blank(pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), channels, pixels.shape[-2] // side, pixels.shape[-1] // side)

    save_reader(base.down, space.rounded(), make_encoder(EncoderConfig(**config), blank), source)


# Commands, each in a process of its own


class Watch:
    """What this process takes, phase by phase, from the first moment on.

    Args:
        card: GiB that it may have; None: all that are there. report: file that is written at each turn.
    """

    def __init__(self, card: float | None, report: Path) -> None:
        self.gpu, self.report = torch.cuda.is_available(), report
        self.phases: list[dict[str, Any]] = []
        self.steps: list[float] = []
        self.own, self.context, self.start = 0, 0, time.perf_counter()
        if self.gpu:
            torch.zeros(1, device="cuda")
            self._see_context()
            if card is not None:
                total = torch.cuda.mem_get_info()[1]
                torch.cuda.set_per_process_memory_fraction(min(1.0, (card * 2**30 - self.context) / total))
        threading.Thread(target=self._see_host, daemon=True).start()

    def turn(self, name: str, code: int | None = None) -> None:
        """Close a phase, begin the next, and write what is known."""
        if self.gpu:
            torch.cuda.synchronize()
            self._see_context()
        now = time.perf_counter()
        if self.phases:
            self.phases[-1] |= {"seconds": now - self.phases[-1].pop("since")}
            self.phases[-1] |= {"reserved": torch.cuda.max_memory_reserved() if self.gpu else 0}
            self.phases[-1] |= {"allocated": torch.cuda.max_memory_allocated() if self.gpu else 0}
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
        found = {
            "code": code,
            "seconds": now - self.start,
            "seconds_a_step": (self.steps[-1] - self.steps[0]) / (len(self.steps) - 1) if self.steps[1:] else None,
            "context": self.context,
            "reserved": max((phase["reserved"] for phase in self.phases), default=0),
            "allocated": max((phase["allocated"] for phase in self.phases), default=0),
            "host": self.own,
            "pinned": torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) if self.gpu else 0,
            "phases": self.phases,
        }
        write(self.report, found)
        self.phases.append({"phase": name, "since": now})

    def stepped(self) -> None:
        """Note the end of a step."""
        if self.gpu:
            torch.cuda.synchronize()
        self.steps.append(time.perf_counter())

    def _see_context(self) -> None:
        # It grows with the kernels that are loaded.
        free, total = torch.cuda.mem_get_info()
        self.context = max(self.context, total - free - torch.cuda.memory_reserved())

    def _see_host(self) -> None:
        # Not `ru_maxrss`: it counts the files of weights that are mapped.
        status = Path("/proc/self/status")
        while status.exists():
            (kib,) = re.findall(r"^RssAnon:\s+(\d+) kB", status.read_text(), re.MULTILINE)
            self.own = max(self.own, 1024 * int(kib))
            time.sleep(0.1)


def run(arguments: list[str], card: float | None, report: Path) -> None:
    """Run a command of `metalora` under a cap, and write what it took."""
    watch = Watch(card, report)
    bring, step, call = Parts.bring, Trackers.step, PerSampleMixin.__call__

    def bringing(self: Parts, pipeline: Any, names: Any, *device: Any) -> None:
        wanted = [name for name in names if is_hull(getattr(pipeline, name, None))]
        if wanted:
            watch.turn("loading " + ", ".join(wanted))
            bring(self, pipeline, wanted, *device)
            watch.turn("after it")

    def stepping(self: Trackers, done: Any) -> None:
        watch.stepped()
        step(self, done)

    def calling(self: Any, *args: Any, **options: Any) -> Any:
        def each(pipe: Any, number: int, when: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            watch.stepped()
            return tensors

        return call(self, *args, callback_on_step_end=each, **options)

    Parts.bring, Trackers.step, PerSampleMixin.__call__ = bringing, stepping, calling  # type: ignore[method-assign]
    watch.turn("before the base")
    watch.turn("end", metalora(arguments))


def in_a_process(
    arguments: list[str], card: float | None, *, folder: str, gpu: int | None, until: float
) -> dict[str, Any]:
    """What a command takes in a process of its own, in GiB and seconds.

    Args:
        gpu: the one that it sees. until: it is ended then.
    """
    report, log = Path(folder, "report.json"), Path(folder, "log.txt")
    report.unlink(missing_ok=True)
    own = [sys.executable, __file__, "--run", str(report), "--card", str(card or 0), "--", *arguments]
    with log.open("w") as file:
        done = in_time(own, gpu, until, cwd=folder, stdout=file, stderr=subprocess.STDOUT)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line[:600] for line in lines if re.search(r"metalora:|\w+Error\b", line)][-2:] or lines[-2:]
    trouble: dict[str, Any] = {} if done else {"fits": False, "ended": "no time was left"}
    if not report.is_file():
        print(*lines[-80:], sep="\n", flush=True)
        return {"fits": False, "said": said, **trouble}
    found = json.loads(report.read_text())
    if found["code"] != 0:
        print(*lines[-80:], sep="\n", flush=True)
        trouble["said"] = said

    def gib(number: float, digits: int = 3) -> float:
        return round(number / 2**30, digits)

    return {
        "fits": found["code"] == 0,
        "gib": gib(found["reserved"] + found["context"]),
        "tensors_gib": gib(found["allocated"]),
        "context_gib": gib(found["context"]),
        "host_gib": gib(found["host"], 2),
        "pinned_gib": gib(found["pinned"], 2),
        "seconds_a_step": found["seconds_a_step"] and round(found["seconds_a_step"], 3),
        "seconds": round(found["seconds"], 1),
        "phases": [
            [one["phase"], round(one["seconds"], 1), gib(one["reserved"] + found["context"], 2)]
            for one in found["phases"]
            if "seconds" in one
        ],
        **trouble,
    }


def in_time(command: list[str], gpu: int | None, until: float, **options: Any) -> bool:
    """Whether a process ended before it was ended."""
    own = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, torch.cuda.device_count()))), **os.environ}
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        own["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    left = until - time.monotonic()
    try:
        subprocess.run(command, env=own, timeout=None if left == float("inf") else max(left, 0.0), **options)
    except subprocess.TimeoutExpired:
        return False
    return True


# What is to be run, and by which GPU


@dataclass(frozen=True)
class Job:
    """A command on a base: of a figure, or a cell of the matrix."""

    name: str
    base: str
    arguments: list[str]
    card: float | None = None


def jobs_of(cases: list[Case], wanted: list[str] | None, small: bool) -> Iterator[Job]:
    """What the figures need, and then, base by base in turns, the cells whose names are wanted.

    Args:
        wanted: regular expressions, in the order of their worth; an empty list: all; None: none.
    """
    for case in cases:
        arguments = case.command()
        arguments += QUICK[arguments[0]]
        yield Job(case.figure, case.base, arguments + (small_flags(arguments) if small else []), case.card)
    if wanted is None:
        return
    by_base = [[(f"{name} {cell}", name, own) for cell, own in cells(base)] for name, base in BASES.items()]
    left = [one for turn in zip_longest(*by_base) for one in turn if one is not None]
    for pattern in wanted or [""]:
        mine = [one for one in left if re.search(pattern, one[0])]
        left = [one for one in left if one not in mine]
        for cell, name, arguments in mine:
            flags = ["--device", "cpu", "--resolution", "64"] if small else []
            yield Job(cell, name, [*arguments, *QUICK[arguments[0]], *flags])


def small_flags(arguments: list[str]) -> list[str]:
    """What makes a command one of moments on a CPU, where there are no 4-bit weights."""
    given = (
        yaml.safe_load((RECIPES / Path(arguments[arguments.index("--config") + 1]).name).read_text())
        if "--config" in arguments
        else {}
    )
    flags = ["--device", "cpu"]
    if arguments[0] != "read":
        flags += ["--resolution", "64"]
    if given.get("quantize") == "nf4":
        flags += ["--quantize", "int8"]
    return flags


def cells(base: Base) -> Iterator[tuple[str, list[str]]]:
    """Other ways to hold a base: a name and the arguments of each."""
    shared = ["--pretrained_model_name_or_path", base.name, "--output_dir", "out"]
    person = ["--down", base.down, "--instance_data_dir", "ann.jpg", "--instance_prompt", "a photo of a person"]
    for side, quantize, offload in product((512, 1024), QUANTIZERS, OFFLOADS):
        held = ["--quantize", quantize, "--offload", offload, "--resolution", str(side)]
        for use, more in (("train", [["--train_batch_size", str(size)] for size in (1, 4)]), ("draw", [[]])):
            try:
                require_supported(Whole(quantize, offload), use, *([MODULAR] if base.make is flux3 else []))
            except ConfigError:
                continue
            for extra in more:
                train = ["personalize", *person, "--gradient_checkpointing", *extra]
                own = train if use == "train" else ["generate", "--prompt", "a photo of a person"]
                name = f"{own[0]} {side} {quantize} {offload}{f' batch {extra[-1]}' if extra else ''}"
                yield name, [*own, *shared, *held]


class Shop:
    """Runs jobs on all GPUs. Bases are written meanwhile, two at a time, and each goes with its last job.

    Args:
        folder: of the bases and, each in a folder of its own, the jobs. until: when all ends.
        told: called with a job and what it took, one call at a time.
    """

    def __init__(
        self, jobs: list[Job], folder: Path, *, small: bool, until: float, told: Callable[[Job, dict[str, Any]], None]
    ) -> None:
        self.folder, self.small, self.until, self.told = folder, small, until, told
        self._left, self._running = jobs, Counter[str]()
        self._lock, self._telling = threading.Lock(), threading.Lock()
        self._writers = ThreadPoolExecutor(2)
        order = dict.fromkeys(job.base for job in jobs)
        self._written = {name: self._writers.submit(self._write, name) for name in order}

    def work(self, gpu: int | None) -> None:
        """Take one job after another."""
        while (job := self._take()) is not None:
            if self._written[job.base].result():
                found = self._do(job, gpu)
                with self._telling:
                    self.told(job, found)
            with self._lock:
                self._running[job.base] -= 1
                if not self._running[job.base] and all(one.base != job.base for one in self._left):
                    shutil.rmtree(self.folder / BASES[job.base].name, ignore_errors=True)

    def _take(self) -> Job | None:
        """The first job whose base is there."""
        while self._left and time.monotonic() < self.until:
            with self._lock:
                for job in self._left:
                    if self._written[job.base].done():
                        self._left.remove(job)
                        self._running[job.base] += 1
                        return job
                missing = [self._written[job.base] for job in self._left]
            wait(missing, return_when=FIRST_COMPLETED)
        return None

    def _write(self, name: str) -> bool:
        own, start = [sys.executable, __file__, "--write", name], time.monotonic()
        done = in_time([*own, *(["--small"] if self.small else [])], None, self.until, cwd=self.folder)
        print(f"{BASES[name].name} written in {time.monotonic() - start:.0f} s", flush=True)
        return done and (self.folder / BASES[name].down).exists()

    def _do(self, job: Job, gpu: int | None) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self.folder / "jobs") as own:
            for thing in ("examples", "ann.jpg", BASES[job.base].down, Path(BASES[job.base].name).parts[0]):
                Path(own, thing).symlink_to(self.folder / thing)
            here: dict[str, Any] = {"folder": own, "gpu": gpu, "until": self.until}
            if "--subject" in job.arguments:  # Ann is there to be drawn
                in_a_process([*shlex.split(READ), *(["--device", "cpu"] if self.small else [])], None, **here)
            found = in_a_process(job.arguments, None if self.small else job.card, **here)
            if job.card is not None and not found["fits"] and not self.small:
                found["without_a_cap"] = in_a_process(job.arguments, None, **here)
        return found


def report_of(output: Path, device: torch.device) -> dict[str, Any]:
    """What is to be written: what the file holds already, if it was measured with these versions."""
    own: dict[str, Any] = origin(device, "bitsandbytes", "torchao", "transformers")
    report = {**own, "figures": {case.figure: None for case in CASES}, "details": {}, "cells": {}}
    before = json.loads(output.read_text()) if output.is_file() else {}
    if before.get("versions") == own["versions"]:
        report |= {key: before[key] for key in ("figures", "details", "cells")}
    return report


def publish(report: dict[str, Any]) -> None:
    """Write into the package what was measured, for `metalora estimate`."""
    rows, denoisers = [], {}
    for name, found in [*report["details"].items(), *report["cells"].items()]:
        base = next((case.base for case in CASES if case.figure == name), name.partition(" ")[0])
        if base not in denoisers:
            with torch.device("meta"):
                pipe = BASES[base].make(False)
            denoisers[base] = getattr(pipe, "transformer", None) or pipe.unet
        took = found if found["fits"] else found.get("without_a_cap", found)
        if not took["fits"]:
            continue
        arguments = shlex.split(found["command"])[1:]
        given = vars(build_parser(arguments[:1]).parse_args(arguments))
        command, file = COMMANDS[given.pop("command")], given.pop("config", None)
        file = file and str(RECIPES / Path(file).name)
        settings = {key: value for key, value in given.items() if key not in ("parser", "verbose", "json")}
        rows.append({"occasion": occasion(make_config(command.config_class(), file, settings), denoisers[base])})
        rows[-1] |= {"gib": took["gib"], "seconds_a_step": took["seconds_a_step"], "machine": found["machine"]}
    table = {key: report[key] for key in ("date", "versions")}
    write(Path(estimating.__file__).with_name("measured.json"), {**table, "rows": rows})


def main() -> None:
    """Write the bases, run the commands and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.figure for case in CASES]
    parser.add_argument("--only", nargs="*", choices=names, default=names, help="figures; all by default")
    parser.add_argument("--matrix", nargs="*", metavar="REGEX", help="then other ways to hold a base; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after this time, with what is done")
    parser.add_argument("--small", action="store_true", help="tiny pipelines on a CPU")
    parser.add_argument("--work", type=Path, help="folder for the bases; default: a temporary one")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--card", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--write", choices=list(BASES), help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--publish", action="store_true", help="run nothing, write what is known into the package")
    args = parser.parse_args()
    if args.publish:
        publish(json.loads(args.output.read_text()))
        return
    if args.run is not None:
        run(args.arguments, args.card or None, args.run)
        return
    if args.write is not None:
        write_base(BASES[args.write], args.small)
        return
    until = time.monotonic() + args.seconds
    gpus = [] if args.small else list(range(torch.cuda.device_count()))
    report = report_of(args.output, torch.device("cuda" if gpus else "cpu"))

    def told(job: Job, found: dict[str, Any]) -> None:
        of_a_figure = job.name in report["figures"]
        if of_a_figure:
            report["figures"][job.name] = found["gib"] if found["fits"] and not args.small else None
        command = shlex.join(["metalora", *job.arguments])
        kind = "details" if of_a_figure else "cells"
        made_for = {"card": job.card} if job.card else {}
        report[kind][job.name] = {"command": command, "machine": report["machine"], **made_for, **found}
        print(job.name, json.dumps(found), flush=True)
        write(args.output, report)

    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name).absolute()
        (folder / "jobs").mkdir()
        shutil.copytree(RECIPES, folder / "examples" / "recipes")
        pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((1024, 1024), Image.Resampling.BICUBIC).save(folder / "ann.jpg", quality=95)
        jobs = list(jobs_of([case for case in CASES if case.figure in args.only], args.matrix, args.small))
        shop = Shop(jobs, folder, small=args.small, until=until, told=told)
        with ThreadPoolExecutor(max(1, len(gpus))) as workers:
            for work in [workers.submit(shop.work, gpu) for gpu in gpus or [None]]:
                work.result()


if __name__ == "__main__":
    main()
