# SPDX-License-Identifier: Apache-2.0
"""A Hub cache of tiny random models under the names that PEFT's tests ask for, so that they run without a network.

`fill(HF_HOME/hub)` writes each model as the Hub's client would have stored it, with a tokenizer made here; with
`HF_HUB_OFFLINE=1` every `from_pretrained` then finds them as if they had been downloaded before. Weights are random
from a fixed seed, widths are 16 or 32 and vocabularies 1,024 tokens, whatever the model of that name has on the Hub.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

COMMIT = "0" * 40
VOCABULARY = 1024
SHAPE = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**WIDE, "num_key_value_heads": 2}
OPT = {"word_embed_proj_dim": 16, "max_position_embeddings": 256}
GPT = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 256}

# The model's class without "Config", the arguments of its config, and the head; then the names that PEFT's tests use.
MODELS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    *[
        (
            "OPT",
            {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4, "ffn_dim": 4, **OPT},
            "ForCausalLM",
            [f"peft-internal-testing/{name}"],
        )
        for name, layers in [("tiny-random-OPTForCausalLM", 5), ("opt-125m", 12)]
    ],
    (
        "GPT2",
        GPT,
        "LMHeadModel",
        [
            "peft-internal-testing/tiny-random-GPT2LMHeadModel",
            "hf-internal-testing/tiny-random-gpt2",
            "peft-internal-testing/tiny-random-gpt2",
        ],
    ),
    ("GPTJ", {**GPT, "rotary_dim": 4}, "ForCausalLM", ["peft-internal-testing/tiny-random-GPTJForCausalLM"]),
    (
        "Llama",
        WIDE,
        "ForCausalLM",
        [f"{owner}-internal-testing/tiny-random-LlamaForCausalLM" for owner in ("trl", "peft", "hf")],
    ),
    ("Llama", GROUPED, "ForSequenceClassification", ["trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"]),
    ("Qwen2", GROUPED, "ForCausalLM", ["peft-internal-testing/tiny-dummy-qwen2"]),
    ("Qwen3", {**GROUPED, "head_dim": 8}, "ForCausalLM", ["trl-internal-testing/tiny-Qwen3ForCausalLM"]),
    ("Mistral", GROUPED, "ForCausalLM", ["hf-internal-testing/tiny-random-MistralForCausalLM"]),
    (
        "Gemma3Text",
        {**GROUPED, "head_dim": 8},
        "Gemma3ForCausalLM",
        ["hf-internal-testing/tiny-random-Gemma3ForCausalLM"],
    ),
    (
        "Bloom",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        "ForCausalLM",
        ["peft-internal-testing/tiny-random-BloomForCausalLM"],
    ),
    ("GPTNeoX", WIDE, "ForCausalLM", ["peft-internal-testing/tiny-random-GPTNeoXForCausalLM"]),
    *[
        (kind, WIDE, head, [f"{owner}-internal-testing/tiny-random-{kind}{head}"])
        for kind, head, owner in [
            ("Bert", "Model", "peft"),
            ("Bert", "Model", "hf"),
            ("Bert", "ForSequenceClassification", "peft"),
            ("Roberta", "Model", "peft"),
            ("Roberta", "ForSequenceClassification", "peft"),
            ("Deberta", "Model", "peft"),
            ("DebertaV2", "Model", "peft"),
        ]
    ],
    (
        "T5",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        "ForConditionalGeneration",
        [
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
            "peft-internal-testing/tiny-random-t5",
        ],
    ),
    (
        "Bart",
        {
            "d_model": 32,
            "max_position_embeddings": 256,
            **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
        },
        "ForConditionalGeneration",
        ["peft-internal-testing/tiny-random-BartForConditionalGeneration"],
    ),
    ("CLIPText", WIDE, "CLIPTextModelWithProjection", ["peft-internal-testing/tiny-clip-text-2"]),
]
PIPELINES = ["hf-internal-testing/tiny-sd-pipe"]


def byte_tokenizer(longest: int = 256) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of single bytes that closes each text with `</s>`."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=longest, **special)


def language_model(kind: str, settings: dict[str, Any], head: str) -> torch.nn.Module:
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **settings)
    name = head if hasattr(transformers, head) else kind + head
    return getattr(transformers, name)(config)


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion's format; images of 16 x 16 pixels."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=32,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        latent_channels=4,
    )
    text = {**SHAPE, **WIDE, "max_position_embeddings": 77}
    return StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        tokenizer=byte_tokenizer(77),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def quotes() -> Any:
    """A data set in the form of the one that PEFT's tests download."""
    texts = [f"Sentence {number} of a few that a model learns." for number in range(32)]
    columns = {"quote": texts, "author": ["nobody"] * len(texts), "tags": [["one"]] * len(texts)}
    return datasets.DatasetDict(train=datasets.Dataset.from_dict(columns))


def fill(cache: Path) -> None:
    """Write all models and pipelines into a folder as `HF_HUB_CACHE`."""
    for kind, settings, head, names in MODELS:
        for name in names:
            stored(cache, name, lambda kind=kind, settings=settings, head=head: language_model(kind, settings, head))
            byte_tokenizer().save_pretrained(snapshot(cache, name))
    for name in PIPELINES:
        stored(cache, name, stable_diffusion)


def stored(cache: Path, name: str, make: Callable[[], Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make().save_pretrained(snapshot(cache, name))
    reference = cache / f"models--{name.replace('/', '--')}" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)


def snapshot(cache: Path, name: str) -> Path:
    return cache / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT
