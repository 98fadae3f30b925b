# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image 2.1, which shares with Qwen-Image little but the name: loss, commands from disk, people of a call."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from artefacts_tiny import write_subjects
from from_photos import from_photos_to_pictures
from peft_metalora import enable_meta_lora
from peft_metalora.bases import base_for, open_base
from peft_metalora.bases.footprint import one_pass
from peft_metalora.cli import main
from peft_metalora.errors import PipelineError
from pipelines_tiny import tiny_qwen_image21_pipeline

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "QwenImage21Pipeline"), reason="diffusers 0.41 has no Qwen-Image 2.1"
)
PROMPTS = ["a photo of a person , smiling", "a red shirt"]


def test_the_loss_is_the_formula_and_latents_are_the_pipeline_s():
    base = base_for(tiny_qwen_image21_pipeline())
    pipe, times = base.pipeline, torch.tensor([0.1, 0.8])
    pixels = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, t = base.encode_images(pixels), times.view(-1, 1, 1, 1)
    opaque = torch.cat([pixels, torch.ones(2, 1, 32, 64)], 1).unsqueeze(2)
    with torch.no_grad():
        torch.testing.assert_close(latents, pipe._encode_vae_image(opaque, torch.Generator()).squeeze(2))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    sequence, mask, slots = pipe.encode_prompt(PROMPTS)
    assert not mask.all() and not slots.any()  # the shorter prompt is filled up
    noisy = (1 - t) * latents + t * noise
    with torch.no_grad():
        velocity = pipe.transformer(
            hidden_states=pipe._pack_latents(noisy, 2, 4, 2, 4),
            timestep=times,
            encoder_hidden_states=sequence,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, 2, 4)]] * 2,
            img_mask=torch.cat([slots, torch.ones(2, 2, dtype=torch.bool)], 1),
        ).sample[:, -8:]
    velocity = pipe._unpack_latents(velocity, 32, 64, 16).squeeze(2)
    expected = (velocity - (noise - latents)).square().mean((1, 2, 3))
    torch.testing.assert_close(base.loss(latents, base.encode_text(PROMPTS), noise, times), expected)
    assert base.pixel_multiple == 32 and base.default_side == 1024 and base.tokens(latents) == 8
    # 512 tokens at the most of text, and one for 16 x 16 px: without the text's 1024 and 4096.
    base.max_sequence_length = 0
    assert one_pass(base, 1024).kept == pytest.approx(4 * one_pass(base, 512).kept, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*people. an encoder learns so few by heart")
def test_from_photos_to_pictures(tmp_path):
    """Without torchvision, too: of its processor only what text needs is loaded, before the pipeline asks it."""
    pipe = tiny_qwen_image21_pipeline()
    pipe.save_pretrained(tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "processor": ["transformers", "Qwen3VLProcessor"]}))
    from_photos_to_pictures(tmp_path, "--resolution", "64", drawing=["--guidance_scale", "2"])
    assert {Image.open(file).mode for file in (tmp_path / "images").iterdir()} == {"RGB"}
    assert main(["export", "--subject", str(tmp_path / "ann"), "--output", str(tmp_path / "lora")]) == 0
    pipe.load_lora_weights(tmp_path / "lora")
    assert type(open_base(tmp_path / "base")).__name__ == "QwenImage21"


@pytest.fixture
def pipe(tmp_path):
    """With Ann and Bob."""
    targets = r".*\.(attn\.(to_q|to_v)|img_mlp\.out)|img_in|txt_in\.in_layer"
    folder = write_subjects(tmp_path, tiny_qwen_image21_pipeline().transformer, "ann", "bob", target_modules=targets)
    pipe = enable_meta_lora(tiny_qwen_image21_pipeline())
    for name in ("ann", "bob"):
        pipe.add_subject(folder / name)
    return pipe


def draw(pipe, prompts, seeds, **options):
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np"}
    return pipe(prompts, generator=noise, **size, **options).images


def test_people_of_a_call_are_kept_apart(pipe):
    """The text's keys and values, which later steps take from the first, are each person's own."""
    together = draw(pipe, ["a photo"] * 3, [0, 1, 2], subjects=["ann", None, "bob"])
    for row, name in enumerate(["ann", None, "bob"]):
        alone = draw(pipe, ["a photo"], [row], subjects=[name])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-5)
    assert np.abs(draw(pipe, ["a photo"], [0])[0] - together[0]).max() > 1e-3


def test_people_have_their_places(pipe):
    """Also in the steps after the first, in which layers see the image's tokens alone."""
    left, right = (0, 0, 32, 64), (32, 0, 64, 64)
    base, both = draw(pipe, ["a photo"], [0]), [("ann", left), ("bob", right)]
    assert np.array_equal(draw(pipe, ["a photo"], [0], regions=[(None, left)]), base)
    cached, anew = (draw(pipe, ["a photo"], [0], regions=both, use_kv_cache=use) for use in (True, False))
    np.testing.assert_allclose(cached, anew, atol=1e-4)
    turned = draw(pipe, ["a photo"], [0], regions=[("bob", left), ("ann", right)])
    assert min(np.abs(cached - other).max() for other in (base, turned)) > 1e-3
    with pytest.raises(PipelineError, match="without images to start from for regions"):
        layout_of_two(pipe)


def layout_of_two(pipe):
    from peft_metalora.pipelines.regions import _Layout

    shapes = [[(1, 2, 2), (1, 4, 4)]]
    _Layout(pipe, pipe.transformer, [], {})._tokens(
        {"encoder_hidden_states": torch.zeros(1, 3, 16), "img_shapes": shapes}
    )
