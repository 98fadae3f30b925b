# SPDX-License-Identifier: Apache-2.0
"""The embedded base model: a whole FLUX.1-format pipeline, small enough to be committed and to run on a laptop.

Every part is the class that FLUX.1 uses (`FluxTransformer2DModel`, `AutoencoderKL`, CLIP and T5 text encoders with
their tokenizers), only tiny, so that whatever works here works on FLUX.1. `build_pipeline` makes it with random
weights; `make_base.py` trains it; `load_base` loads the committed one. Images are 64 x 64 px, latents 16 x 16, and
2 x 2 of them are packed into a token: 64 image tokens beside 24 text tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .scene import VOCABULARY

ASSETS = Path(__file__).parent / "assets"
BASE = ASSETS / "base"
DOWN = ASSETS / "down"
BASE_NAME = "peft_metalora/demo-base"
RESOLUTION = 64
MAX_SEQUENCE_LENGTH = 24

_LATENT_CHANNELS = 8
_TEXT_WIDTH = 96
_HEADS, _HEAD_DIM = 6, 32
_SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]


def build_tokenizer(vocabulary: Sequence[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over a caption grammar; words it does not know become `<unk>`.

    Args:
        vocabulary: words of the captions.

    Returns:
        A tokenizer whose `model_max_length` is `MAX_SEQUENCE_LENGTH`; punctuation is dropped, `</s>` ends each text.
    """
    words = _SPECIAL + sorted({word.lower() for word in vocabulary} - set(_SPECIAL))
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w<>/\-]+"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", _SPECIAL.index("<s>")), ("</s>", _SPECIAL.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
        padding_side="right",
    )


def build_vae() -> AutoencoderKL:
    """The autoencoder with random weights: (n, 3, 64, 64) in [-1, 1] to (n, 8, 16, 16) and back."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_pipeline(seed: int = 0, vocabulary: Sequence[str] = VOCABULARY) -> FluxPipeline:
    """The whole pipeline with random weights, float32, on the CPU.

    Args:
        seed: of the weights; the global random state is left as it was.
        vocabulary: words of the captions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(vocabulary)
        vocab_size = len(tokenizer)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=_TEXT_WIDTH,
                intermediate_size=2 * _TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_SEQUENCE_LENGTH,
                projection_dim=_TEXT_WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=vocab_size,
                d_model=_TEXT_WIDTH,
                d_kv=_TEXT_WIDTH // 4,
                d_ff=2 * _TEXT_WIDTH,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        transformer = FluxTransformer2DModel(
            in_channels=4 * _LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=6,
            attention_head_dim=_HEAD_DIM,
            num_attention_heads=_HEADS,
            joint_attention_dim=_TEXT_WIDTH,
            pooled_projection_dim=_TEXT_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(8, 12, 12),
        )
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            vae=build_vae(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=build_tokenizer(vocabulary),
            transformer=transformer,
        )


def load_base(folder: str | Path = BASE) -> FluxPipeline:
    """Load the committed pipeline in float32 (its files are float16, to be half as large).

    Args:
        folder: a folder that `FluxPipeline.save_pretrained` wrote.

    Raises:
        OSError: from diffusers, when the folder holds no pipeline.
    """
    pipe = FluxPipeline.from_pretrained(str(folder), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_the_demo(config: Any) -> Any:
    """Settings of a command with what the embedded base is: where it lies, its Down if none is named, its sizes."""
    return replace(
        config,
        pretrained_model_name_or_path=str(BASE),
        down=config.down or str(DOWN),
        resolution=config.resolution or RESOLUTION,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        device="cpu",
    )
