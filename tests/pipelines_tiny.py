# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines for tests: the real classes and file formats, weights of a few thousand numbers, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
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

WORDS = (
    "a an the photo of person someone facing left right smiling sad laughing neutral in on and with at red green blue "
    "yellow white black grey pink shirt coat wall plain checkered striped warm cold light sks zwx man woman face "
    "portrait drawing forest beach city , ."
)
MAX_LENGTH = 16


def word_tokenizer(max_length: int = MAX_LENGTH) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`; `</s>` closes a text, as CLIP's pooled output needs."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<unk>", *sorted(set(WORDS.split())), "</s>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def tiny_clip(vocabulary: int, eos_token_id: int, width: int = 16, cls: type = CLIPTextModel):
    """A one-layer CLIP text encoder."""
    return cls(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=width,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=eos_token_id,
        )
    )


def tiny_t5(vocabulary: int, eos_token_id: int, width: int = 16) -> T5EncoderModel:
    """A one-layer T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary,
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=eos_token_id,
            decoder_start_token_id=0,
        )
    )


def tiny_vae(latent_channels: int = 4, scale: int = 4, shift_factor: float | None = 0.1) -> AutoencoderKL:
    """An autoencoder that divides both sides by `scale` (2 or 4)."""
    levels = 2 if scale == 2 else 3
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


tiny_clip_projected = partial(tiny_clip, cls=CLIPTextModelWithProjection)


def texts(*encoders: Callable[[int, int], torch.nn.Module]) -> dict[str, Any]:
    """The tokenizers and text encoders of a pipeline, under diffusers' names."""
    parts = {}
    for number, encoder in enumerate(encoders, 1):
        tokenizer, suffix = word_tokenizer(), f"_{number}" if number > 1 else ""
        parts[f"tokenizer{suffix}"] = tokenizer
        parts[f"text_encoder{suffix}"] = encoder(len(tokenizer), tokenizer.eos_token_id)
    return parts


def seeded(make: Callable[..., Any]) -> Callable[..., Any]:
    """A builder whose weights are those of its `seed`, in evaluation and without gradients."""

    @wraps(make)
    def made(seed: int = 0, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = make(**options)
        if isinstance(built, DiffusionPipeline):
            built.set_progress_bar_config(disable=True)
        for module in getattr(built, "components", {"": built}).values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
        return built

    return made


@seeded
def tiny_flux_pipeline(*, guidance_embeds: bool = False, attention_head_dim: int = 8) -> FluxPipeline:
    """A FLUX.1-format pipeline: one double and one single block, two heads, images divided by 4 and packed 2 x 2."""
    quarter = attention_head_dim // 4
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=attention_head_dim,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(quarter, quarter, 2 * quarter),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=tiny_vae(),
        transformer=transformer,
        **texts(tiny_clip, tiny_t5),
    )


def save_tiny_flux(path: str | Path, seed: int = 0, **options) -> Path:
    """Write `tiny_flux_pipeline(seed)` as a folder that `FluxPipeline.from_pretrained` reads; return its path."""
    tiny_flux_pipeline(seed, **options).save_pretrained(path)
    return Path(path)


def tiny_unet(attention: tuple[bool, bool], **options) -> UNet2DConditionModel:
    """Two levels, of width 8 and 16, and a middle with attention; `attention` says which levels have it too."""
    down = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    up = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)]
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    )


def ddim(**options) -> DDIMScheduler:
    """The noise levels of Stable Diffusion, of which a new scheduler would take others."""
    return DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False, **options)


@seeded
def tiny_sd15_pipeline(*, prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's format: cross-attention in the first level and the middle."""
    return StableDiffusionPipeline(
        vae=tiny_vae(shift_factor=None),
        unet=tiny_unet((True, False), cross_attention_dim=16, attention_head_dim=2),
        scheduler=ddim(prediction_type=prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **texts(tiny_clip),
    )


@seeded
def tiny_sdxl_pipeline() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's format: cross-attention in the second level, two layers deep, and pooled text."""
    unet = tiny_unet(
        (False, True),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(shift_factor=None),
        unet=unet,
        scheduler=ddim(),
        add_watermarker=False,
        **texts(tiny_clip, tiny_clip_projected),
    )


@seeded
def tiny_sd3_pipeline() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5's format: two blocks, the first with a second attention, the last without output of text."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        **texts(tiny_clip_projected, tiny_clip_projected, partial(tiny_t5, width=32)),
    )


def tiny_qwen(vocabulary: int, eos_token_id: int) -> Qwen3ForCausalLM:
    """A Qwen3 of the 28 layers that FLUX.2 klein reads from, each of width 8."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=28,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=64,
            eos_token_id=eos_token_id,
        )
    )


def _flux2_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


@seeded
def tiny_flux2_pipeline() -> Flux2KleinPipeline:
    """FLUX.2 klein's format, whose single block is one fused projection."""
    vae = _flux2_vae()
    parts = texts(tiny_qwen)
    parts["tokenizer"].chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ),
        is_distilled=True,
        **parts,
    )


# The marks of a turn and of its lines are tokens, as the templates of Qwen's pipelines count them.
_CHAT = r"<\|[^|]+\|>|\n|[A-Za-z]+|[^\sA-Za-z]"


def chat_tokenizer(max_length: int = 64) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS` for pipelines that put a prompt into a template; it adds nothing."""
    known = ["<pad>", "<unk>", *sorted(set(WORDS.split())), "<|im_start|>", "<|im_end|>", "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_CHAT), behavior="removed", invert=True)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>", padding_side="right"
    )
    made.model_max_length = max_length
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


@seeded
def tiny_flux2_dev_pipeline() -> Flux2Pipeline:
    """FLUX.2 dev's format: the transformer of klein's with guidance, and text from three layers of a Mistral 3."""
    tokenizer = chat_tokenizer()
    part = "{% if c['type'] == 'text' and m['role'] == 'user' %}{{ c['text'] }}{% endif %}"
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{% for c in m['content'] %}}{part}{{% endfor %}}{{% endfor %}}"
    )
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "head_dim": 8}
    text = MistralConfig(vocab_size=len(tokenizer), num_hidden_layers=31, num_key_value_heads=1, **small)
    eye = PixtralVisionConfig(num_hidden_layers=1, image_size=8, patch_size=4, **small)
    parts = tiny_flux2_pipeline().components
    return Flux2Pipeline(
        scheduler=parts["scheduler"],
        vae=parts["vae"],
        text_encoder=Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=eye)),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(**{**parts["transformer"].config, "guidance_embeds": True}),
    )


def tiny_qwen_vae() -> AutoencoderKLQwenImage:
    """Qwen-Image's video autoencoder, which divides both sides of a frame by 4."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.5, 0.8, 1.0, 1.2],
    )


_TINY_VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 16}
_TINY_ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 10000.0}
_TINY_LANGUAGE = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_parameters": _TINY_ROPE,
}


@seeded
def tiny_z_image_pipeline() -> ZImagePipeline:
    """Z-Image's format: one block of each kind, two heads, images divided by 4 and patched 2 x 2."""
    tokenizer = chat_tokenizer()
    text = Qwen3Config(**{**_TINY_LANGUAGE, "rope_parameters": None}, vocab_size=len(tokenizer))
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[2, 2, 4],
            axes_lens=[256, 64, 64],
        ),
    )


@seeded
def tiny_qwen_image_pipeline() -> QwenImagePipeline:
    """Qwen-Image's format: two blocks, two heads."""
    tokenizer = chat_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={**_TINY_LANGUAGE, "vocab_size": len(tokenizer)},
        vision_config={**_TINY_VISION, "window_size": 14, "fullatt_block_indexes": [0]},
    )
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
    )


class TextProcessor(ProcessorMixin):
    """A processor of text and images, as transformers has them, without its part for images (that is torchvision's)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **options: Any) -> Any:
        return self.tokenizer(text, **options)

    def apply_chat_template(self, conversation: list[Any], **options: Any) -> Any:
        return self.tokenizer.apply_chat_template([conversation], **options)

    def save_pretrained(self, folder: str, **options: Any) -> None:
        """As of Qwen3-VL."""
        self.tokenizer.save_pretrained(folder)
        of_images = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}
        of_clips = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(of_images))
        (Path(folder) / "video_preprocessor_config.json").write_text(json.dumps(of_clips))


@seeded
def tiny_qwen_image21_pipeline() -> DiffusionPipeline:
    """Qwen-Image 2.1's format: two blocks, two heads; an autoencoder with four channels in, which divides by 16."""
    from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel

    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    text = "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    tokenizer.chat_template = (
        f"{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n{text}<|im_end|>\n{{% endfor %}}"
    )
    config = Qwen3VLConfig(
        text_config={**_TINY_LANGUAGE, "vocab_size": len(tokenizer)},
        vision_config={**_TINY_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    )
    return QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.1, 0.2, 0.0],
            latents_std=[1.5, 0.8, 1.0, 1.2],
        ),
        text_encoder=Qwen3VLForConditionalGeneration(config),
        processor=TextProcessor(tokenizer),
        transformer=QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
    )


@seeded
def tiny_krea2_pipeline(*, is_distilled: bool = False) -> Krea2Pipeline:
    """Krea 2's format: two blocks with fewer keys than queries, text from two layers, one block of each fusion."""
    tokenizer = chat_tokenizer()
    config = Qwen3VLConfig(
        text_config={**_TINY_LANGUAGE, "vocab_size": len(tokenizer)},
        vision_config={**_TINY_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    )
    return Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=6400),
        vae=tiny_qwen_vae(),
        text_encoder=Qwen3VLModel(config),
        tokenizer=tokenizer,
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(2, 2, 4),
        ),
        text_encoder_select_layers=(1, 2),
        is_distilled=is_distilled,
    )


def tiny_umt5(vocabulary: int, eos_token_id: int) -> UMT5EncoderModel:
    """A one-layer UMT5 encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=eos_token_id,
            decoder_start_token_id=0,
        )
    )


def tiny_wan_transformer(in_channels: int = 4) -> WanTransformer3DModel:
    """Two blocks, two heads."""
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=in_channels,
        out_channels=in_channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
    )


@seeded
def tiny_wan_pipeline(*, ti2v: bool = False) -> WanPipeline:
    """Wan's format: frames divided by 4, four of them by one; `ti2v`: 2.2's, cut into 2 x 2 patches before, by 8."""
    numbers = {"latents_mean": [0.1, -0.1, 0.2, 0.0], "latents_std": [1.5, 0.8, 1.0, 1.2]}
    levels = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True] * 2}
    own = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12} if ti2v else {}
    return WanPipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=AutoencoderKLWan(**numbers, **levels, **own, scale_factor_spatial=8 if ti2v else 4),
        transformer=tiny_wan_transformer(),
        expand_timesteps=ti2v,
        **texts(tiny_umt5),
    )


class _Processor:
    """What FLUX.3 calls its tokenizer: one inside of a processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.apply_chat_template = tokenizer.apply_chat_template


@seeded
def tiny_flux3_pipeline(*, flow_map: bool = False, window: int = 8) -> Any:
    """FLUX.3's format: a block of each kind; prompts are filled up to a multiple of `window` tokens, at most 16."""
    # diffusers 0.41, the last for Python 3.10, has none
    from diffusers import Flux3DistilledModularPipeline, Flux3ModularPipeline, Flux3Transformer2DModel

    tokenizer = chat_tokenizer(16)
    tokenizer.chat_template = f"<|im_start|>{tokenizer.chat_template}"  # so that no prompt has no token
    language = {**_TINY_LANGUAGE, "hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = Qwen3VLConfig(
        text_config={**language, "num_hidden_layers": 32, "vocab_size": len(tokenizer)},
        vision_config={
            **_TINY_VISION,
            "out_hidden_size": 8,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    )
    vae = _flux2_vae()
    transformer = Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8 * 8,
        timestep_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        flow_map=flow_map,
    )
    cls = Flux3DistilledModularPipeline if flow_map else Flux3ModularPipeline
    blocks: Any = cls().blocks
    blocks.sub_blocks.pop("prompt_upsampler")  # a model of its own writes longer prompts
    blocks.sub_blocks["text_encoder"].pad_multiple = window
    pipe = cls(blocks)
    text_encoder = Qwen3VLForConditionalGeneration(config)
    pipe.update_components(vae=vae, transformer=transformer, text_encoder=text_encoder, tokenizer=_Processor(tokenizer))
    return pipe


def save_tiny_flux3(folder: Path) -> Path:
    """FLUX.3's format as its repository lies there, where `tokenizer` is a whole processor."""
    pipe = tiny_flux3_pipeline()
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    tokenizer: Any = pipe.tokenizer
    tokenizer.tokenizer.save_pretrained(folder / "tokenizer")
    kind = ["transformers", "Qwen3VLProcessor"]
    (folder / "tokenizer" / "processor_config.json").write_text(json.dumps({"processor_class": kind[1]}))
    path = folder / "modular_model_index.json"
    index = json.loads(path.read_text())
    place = {"pretrained_model_name_or_path": str(folder), "subfolder": "tokenizer", "type_hint": kind}
    path.write_text(json.dumps({**index, "tokenizer": [*kind, place]}))
    return folder


PIPELINES: dict[str, Callable[..., DiffusionPipeline]] = {
    "sd15": tiny_sd15_pipeline,
    "sdxl": tiny_sdxl_pipeline,
    "sd3": tiny_sd3_pipeline,
    "flux": tiny_flux_pipeline,
    "flux2": tiny_flux2_pipeline,
    "z_image": tiny_z_image_pipeline,
    "qwen_image": tiny_qwen_image_pipeline,
    "krea2": tiny_krea2_pipeline,
    "wan": tiny_wan_pipeline,
}
