# SPDX-License-Identifier: Apache-2.0
"""Tiny random pipelines for tests: the real classes and file formats, weights of a few thousand numbers, no network."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

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


def tiny_clip(vocabulary: int, eos_token_id: int, width: int = 16) -> CLIPTextModel:
    """A one-layer CLIP text encoder."""
    return CLIPTextModel(
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


def tiny_vae(latent_channels: int = 4, scale: int = 4) -> AutoencoderKL:
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
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def tiny_flux_pipeline(seed: int = 0, *, guidance_embeds: bool = False) -> FluxPipeline:
    """A FLUX.1-format pipeline: one double and one single block, width 16, images divided by 4 and packed 2 x 2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = word_tokenizer()
        vocabulary, eos = len(tokenizer), tokenizer.eos_token_id
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        )
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=tiny_vae(),
            text_encoder=tiny_clip(vocabulary, eos),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5(vocabulary, eos),
            tokenizer_2=word_tokenizer(),
            transformer=transformer,
        )
    pipeline.set_progress_bar_config(disable=True)
    for component in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        component.eval().requires_grad_(False)
    return pipeline


def save_tiny_flux(path: str | Path, seed: int = 0, **options) -> Path:
    """Write `tiny_flux_pipeline(seed)` as a folder that `FluxPipeline.from_pretrained` reads; return its path."""
    tiny_flux_pipeline(seed, **options).save_pretrained(path)
    return Path(path)
