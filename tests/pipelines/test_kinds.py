# SPDX-License-Identifier: Apache-2.0
"""Subjects in pipelines that do more than text to image, and in one of a family that this package does not know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    ControlNetModel,
    DDPMWuerstchenScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableCascadePriorPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.models import StableCascadeUNet
from PIL import Image

from artefacts_tiny import write_subjects
from peft_metalora import enable_meta_lora
from peft_metalora.errors import PipelineError
from peft_metalora.pipelines.denoiser import denoiser
from pipelines_tiny import (
    ddim,
    seeded,
    texts,
    tiny_clip_projected,
    tiny_flux_pipeline,
    tiny_sd15_pipeline,
    tiny_sdxl_pipeline,
    tiny_t5,
    tiny_vae,
)

SIZE = 32
PROMPTS = ("a photo of a person", "a portrait of a woman in a red coat", "a person facing left")
SUBJECTS = ("ann", None, "bob")
# Rounding of another batch size, at a pixel of 0 to 1.
TOLERANCE = 1e-4
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def controlled(pipe, cls, model, **options):
    """A ControlNet as large as the denoiser whose residuals are not zero, as they would be before training."""
    control = seeded(model)(denoiser=denoiser(pipe))
    with torch.no_grad():
        for name, parameter in control.named_parameters():
            if "controlnet" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return cls(**pipe.components, controlnet=control, **options)


def unet_controlnet(denoiser):
    return ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=(4, 8, 8))


def flux_controlnet(denoiser):
    return FluxControlNetModel.from_transformer(
        denoiser,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
    )


@seeded
def auraflow():
    return AuraFlowPipeline(
        **texts(tiny_t5),
        vae=tiny_vae(shift_factor=None),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


@seeded
def pixart():
    return PixArtSigmaPipeline(
        **texts(tiny_t5),
        vae=tiny_vae(shift_factor=None),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            attention_bias=True,
            sample_size=8,
            caption_channels=16,
            use_additional_conditions=False,
        ),
        scheduler=ddim(),
    )


def scene(mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def hole():
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[8:24, 8:24] = 255
    return Image.fromarray(mask)


@seeded
def cascade_prior():
    """A pipeline whose denoiser is called neither transformer nor unet, and which gives embeddings, not images."""
    return StableCascadePriorPipeline(
        **texts(tiny_clip_projected),
        prior=StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            conditioning_dim=16,
            block_out_channels=(16, 16),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            down_blocks_repeat_mappers=(1, 1),
            up_blocks_repeat_mappers=(1, 1),
            block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
            clip_text_in_channels=16,
            clip_text_pooled_in_channels=16,
            clip_image_in_channels=16,
            dropout=(0.0, 0.0),
            switch_level=(False,),
        ),
        scheduler=DDPMWuerstchenScheduler(),
    )


def pictures(count):
    return {"image": [scene(seed=row) for row in range(count)], "strength": 0.8, "num_inference_steps": 4}


def holes(count):
    return {**pictures(count), "mask_image": [hole()] * count, "height": SIZE, "width": SIZE}


def sized(count):
    return {"height": SIZE, "width": SIZE}


def guided(key):
    return lambda count: {**sized(count), key: [scene(seed=row) for row in range(count)]}


PLAIN = {"use_resolution_binning": False, "clean_caption": False, "max_sequence_length": 16}
KINDS = {
    "SD 1.5 image to image": (lambda: StableDiffusionImg2ImgPipeline(**tiny_sd15_pipeline().components), pictures),
    "SD 1.5 inpainting": (lambda: StableDiffusionInpaintPipeline(**tiny_sd15_pipeline().components), holes),
    "SD 1.5 ControlNet": (
        lambda: controlled(tiny_sd15_pipeline(), StableDiffusionControlNetPipeline, unet_controlnet),
        guided("image"),
    ),
    "SDXL ControlNet": (
        lambda: controlled(tiny_sdxl_pipeline(), StableDiffusionXLControlNetPipeline, unet_controlnet),
        guided("image"),
    ),
    "FLUX.1 image to image": (
        lambda: FluxImg2ImgPipeline(**tiny_flux_pipeline().components),
        lambda count: {**pictures(count), **sized(count)},
    ),
    "FLUX.1 inpainting": (lambda: FluxInpaintPipeline(**tiny_flux_pipeline().components), holes),
    "FLUX.1 ControlNet": (
        lambda: controlled(tiny_flux_pipeline(), FluxControlNetPipeline, flux_controlnet),
        guided("control_image"),
    ),
    "PixArt": (pixart, lambda count: {**sized(count), **PLAIN}),
    # Attention changes little in it; of this seed's weights enough to be seen.
    "AuraFlow": (lambda: auraflow(seed=1), lambda count: {**sized(count), "max_sequence_length": 16}),
    "Stable Cascade's prior": (cascade_prior, lambda count: {"height": 128, "width": 128, "guidance_scale": 2.0}),
}


def images(pipe, extras, rows, subjects=None):
    """Images (n, h, w, 3) of rows of `PROMPTS`; row k has its own noise wherever it stands."""
    options = {key: value for key, value in extras(3).items() if not isinstance(value, list)}
    options |= {key: [value[row] for row in rows] for key, value in extras(3).items() if isinstance(value, list)}
    noise = [torch.Generator().manual_seed(row) for row in rows]
    options = {"num_inference_steps": 2, "output_type": "np", "generator": noise, **options}
    named = {} if subjects is None else {"subjects": subjects}
    output = pipe(prompt=[PROMPTS[row] for row in rows], **options, **named)
    if hasattr(output, "images"):
        return output.images
    return output.image_embeddings / 100  # of the size of a pixel, as the tolerances are


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_shows_its_subject_as_if_alone(tmp_path, kind):
    make, extras = KINDS[kind]
    pipe = enable_meta_lora(make())
    pipe.set_progress_bar_config(disable=True)
    write_subjects(tmp_path, denoiser(make()), "ann", "bob", lora_alpha=32, target_modules=TARGETS)
    base = images(pipe, extras, (0, 1, 2))
    base_alone = images(pipe, extras, (1,))
    assert base.std() > 0.01 and np.isfinite(base).all()
    for name in ("ann", "bob"):
        pipe.load_meta_lora(tmp_path / name)
    mixed = images(pipe, extras, (0, 1, 2), list(SUBJECTS))
    for row, name in enumerate(SUBJECTS):
        if name is None:
            assert np.abs(mixed[row] - base[row]).max() < TOLERANCE
            continue
        pipe.set_adapters(name)
        alone = images(pipe, extras, (row,))
        assert np.abs(mixed[row] - alone[0]).max() < TOLERANCE
        assert np.abs(alone[0] - base[row]).max() > 10 * TOLERANCE
    assert np.array_equal(images(pipe, extras, (0, 1, 2), [None] * 3), base)
    assert np.array_equal(images(pipe, extras, (1,), [None]), base_alone)
    pipe.unload_meta_lora()
    assert np.array_equal(images(pipe, extras, (0, 1, 2)), base)


def test_a_pipeline_without_a_denoiser_or_with_several_is_refused():
    class Other:
        def __init__(self, **components):
            self.components = components

    pipe = cascade_prior()
    for components, found in (
        ({"vae": tiny_vae()}, "none"),
        ({"prior": pipe.prior, "decoder": pipe.prior, "vae": tiny_vae()}, "prior, decoder"),
    ):
        with pytest.raises(PipelineError, match=f"a Other with {found}"):
            enable_meta_lora(Other(**components))
