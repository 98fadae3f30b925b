# SPDX-License-Identifier: Apache-2.0
"""CLIP and DINO embedders on tiny random models, against transformers' own preprocessing and models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerFast, ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from peft_metalora.errors import EmbedderUnavailableError, MetricInputError
from peft_metalora.metrics import ClipEmbedder, DinoEmbedder, clip_i, clip_t

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, "a": 4, "photo": 5, "of": 6, "person": 7, "smiling": 8}


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def clip() -> ClipEmbedder:
    torch.manual_seed(0)
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {"image_size": 32, "patch_size": 8, "intermediate_size": 32}
    config = CLIPConfig(
        text_config={**SIZE, **text, "pad_token_id": 2, "intermediate_size": 32},
        vision_config={**SIZE, **vision},
        projection_dim=8,
    )
    return ClipEmbedder(CLIPModel(config), tokenizer())


def dino_v1() -> ViTModel:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**SIZE, intermediate_size=32, image_size=32, patch_size=8), add_pooling_layer=False)


def dino_v2() -> Dinov2Model:
    torch.manual_seed(0)
    return Dinov2Model(Dinov2Config(**SIZE, image_size=56, patch_size=14))


MIXED = ((40, 60), (64, 33), (32, 32), (20, 90), (50, 50))


class TestClip:
    def test_it_sees_what_transformers_sees(self, clip: ClipEmbedder) -> None:
        images = pictures(*MIXED)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        with torch.no_grad():
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            expected = normalize(clip.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        seen = clip.embed(images)
        assert seen.vectors.shape == (5, 8) and seen.found.all()
        assert torch.allclose(seen.vectors, expected, atol=2e-3)

    def test_the_batch_size_changes_nothing(self, clip: ClipEmbedder) -> None:
        images, prompts = pictures(*MIXED), ["a photo", "a photo of a person", "smiling"]
        small = ClipEmbedder(clip.model, clip.tokenizer, batch_size=2)
        assert torch.allclose(small.embed(images).vectors, clip.embed(images).vectors, atol=1e-6)
        assert torch.allclose(small.embed_text(prompts), clip.embed_text(prompts), atol=1e-6)

    def test_prompts_are_unit_vectors_and_long_ones_are_cut(self, clip: ClipEmbedder) -> None:
        vectors = clip.embed_text(["a photo of a person", "a photo of a person " * 9])
        assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-6)
        assert not torch.allclose(vectors[0], clip.embed_text(["smiling"])[0], atol=1e-3)

    def test_scores_take_its_vectors(self, clip: ClipEmbedder) -> None:
        seen = clip.embed(pictures((32, 32), (48, 40)))
        assert clip_t(seen, clip.embed_text(["a photo", "smiling"])).per_image.shape == (2,)
        assert float(clip_i(seen, clip.embed(pictures((32, 32)))).per_image[0]) == pytest.approx(1, abs=1e-5)

    def test_bad_input(self, clip: ClipEmbedder) -> None:
        with pytest.raises(MetricInputError, match="at least one prompt"):
            clip.embed_text([])
        with pytest.raises(MetricInputError, match="at least one image"):
            clip.embed([])

    def test_from_a_folder(self, clip: ClipEmbedder, tmp_path: Path) -> None:
        clip.model.save_pretrained(tmp_path)
        clip.tokenizer.save_pretrained(tmp_path)
        loaded, images = ClipEmbedder.from_pretrained(str(tmp_path)), pictures(*MIXED)
        assert torch.equal(loaded.embed(images).vectors, clip.embed(images).vectors)
        assert torch.allclose(loaded.embed_text(["a photo"]), clip.embed_text(["a photo"]), atol=1e-6)

    def test_weights_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(EmbedderUnavailableError, match="expected the weights of"):
            ClipEmbedder.from_pretrained(str(tmp_path / "none"))


class TestDino:
    @pytest.mark.parametrize(("make", "resize", "crop"), [(dino_v1, 36, 32), (dino_v2, 64, 56), (dino_v2, 32, 28)])
    def test_it_is_the_class_token_of_the_centre(self, make, resize: int, crop: int) -> None:
        model, (image,) = make().eval(), pictures((resize, resize))
        left = (resize - crop) // 2
        cut = np.asarray(image.crop((left, left, left + crop, left + crop)), dtype=np.float32) / 255
        pixels = torch.from_numpy((cut - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            expected = normalize(model(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
        seen = DinoEmbedder(model, resize=resize, crop=crop).embed([image])
        assert torch.allclose(seen.vectors, expected, atol=1e-5)

    @pytest.mark.parametrize(("make", "crop"), [(dino_v1, 32), (dino_v2, 56)])
    def test_the_batch_size_changes_nothing(self, make, crop: int) -> None:
        model, images = make(), pictures(*MIXED)
        one, all_at_once = (DinoEmbedder(model, resize=crop, crop=crop, batch_size=b).embed(images) for b in (1, 5))
        assert torch.allclose(one.vectors, all_at_once.vectors, atol=1e-6)

    def test_from_a_folder(self, tmp_path: Path) -> None:
        dino_v2().save_pretrained(tmp_path)
        assert DinoEmbedder.from_pretrained(str(tmp_path)).embed(pictures((300, 256))).vectors.shape == (1, 16)

    def test_weights_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(EmbedderUnavailableError, match="expected the weights of"):
            DinoEmbedder.from_pretrained(str(tmp_path / "none"))
