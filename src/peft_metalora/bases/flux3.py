# SPDX-License-Identifier: Apache-2.0
"""FLUX.3 (and its step-distilled twin), which diffusers has as a modular pipeline.

Text: hidden states of eight layers of Qwen3-VL, side by side, in a window that is as long as the prompt asks for; what
fills it up is seen. Images: FLUX.2's latents, whose 2 x 2 patches are channels already. Rectified flow; the distilled
twin also hears at which time a step ends, and says the velocity at a time when it is told that very time.

Image and text have blocks of their own and then one stream: adapted by default are attention and feed-forward layers of
the image's blocks and of the stream. Blocks of the text, and of reference images, see no image that is made, and are
left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.modular_pipelines.flux3.before_denoise import Flux3TextRoPEInputsStep, _prepare_image_ids
from diffusers.modular_pipelines.flux3.encoders import Flux3VaeEncoderStep
from torch import Tensor

from ..errors import ConfigError
from .base import FlowBase, Text

_EACH = frozenset({"generator", "subjects", "negative_prompt"})  # of a call with several prompts, one for each
_ROPE_SCALE = 0.5  # of rows and columns, as the pipeline's steps have it


class Flux3(FlowBase):
    """`Flux3ModularPipeline`."""

    pipeline_class = "Flux3ModularPipeline"
    large_encoders = ("text_encoder",)
    target_modules = (
        r"(single_transformer_blocks|mode_blocks\.image)\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.linear_(in|out))"
    )

    @property
    def call_arguments(self) -> frozenset[str]:
        steps = self.pipeline.blocks.inputs
        guided = {"guidance_scale"} if getattr(self.pipeline, "guider", None) is not None else set()
        return frozenset({one.name for one in steps if one.name is not None} | guided)

    def draw(self, **options: Any) -> Any:
        """One prompt after another, as this pipeline takes them.

        Raises:
            ConfigError: guidance, which the distilled twin has none of.
        """
        given = options.pop("prompt")
        prompts = [given] if isinstance(given, str) else [*given]
        guidance = options.pop("guidance_scale", None)
        guider = getattr(self.pipeline, "guider", None)
        if guidance is not None:
            if guider is None:
                raise ConfigError("expected no guidance_scale for a distilled FLUX.3, found one: leave it out")
            self.pipeline.update_components(guider=guider.new(guidance_scale=guidance))
        try:
            images: list[Any] = []
            for number in range(len(prompts)):
                own = {name: _of_prompt(options[name], number, len(prompts)) for name in _EACH & options.keys()}
                images += self.pipeline(**{**options, **own}, prompt=prompts[number], output="images")
        finally:
            if guidance is not None:
                self.pipeline.update_components(guider=guider)
        return images

    def _default_sequence_length(self) -> int:
        return min(512, self.pipeline.tokenizer.tokenizer.model_max_length)

    def text_of(self, prompts: Sequence[str]) -> Text:
        """`sequence` (n, longest window, d), filled up with zeros, and `window` (n,)."""
        step = self.pipeline.blocks.sub_blocks["text_encoder"]
        rows = [
            step._get_qwen3_vl_prompt_embeds(
                self.pipeline.text_encoder,
                self.pipeline.tokenizer,
                prompt,
                self.encoders_device,
                self.max_sequence_length,
                step.pad_multiple,
            )[0]
            for prompt in prompts
        ]
        sequence = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"sequence": sequence, "window": torch.tensor([len(row) for row in rows], device=sequence.device)}

    def latents_of(self, pixels: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = Flux3VaeEncoderStep._patchify_latents(vae.encode(pixels).latent_dist.mode())
        mean, variance = (one.view(1, -1, 1, 1).to(latents.dtype) for one in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.pipeline.vae_scale_factor

    def tokens(self, latents: Tensor) -> int:
        return latents.shape[-2] * latents.shape[-1]

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        dtype, device = self.dtype, noisy.device
        sequence, (height, width) = text["sequence"], noisy.shape[-2:]
        # In a window all that fills it up is alike, so that a shorter one is made longer by more of the same.
        places = self.once(("places", sequence.shape[1], device), lambda: torch.arange(sequence.shape[1]))
        within = torch.minimum(places[None], text["window"][:, None] - 1)
        sequence = sequence.gather(1, within[:, :, None].expand_as(sequence)).to(dtype)
        velocity = self.denoiser(
            hidden_states=noisy.flatten(2).transpose(1, 2).to(dtype),
            encoder_hidden_states=sequence,
            timestep=times.to(dtype),
            target_timestep=times.to(dtype) if self.denoiser.config.flow_map else None,
            img_ids=self.once(
                ("image ids", height, width, device), lambda: _prepare_image_ids(height, width, _ROPE_SCALE)
            ),
            txt_ids=self.once(
                ("text ids", sequence.shape[1], device), lambda: Flux3TextRoPEInputsStep._prepare_text_ids(sequence)
            ),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).reshape(noisy.shape)


def _of_prompt(values: Any, number: int, count: int) -> Any:
    """What of a list for all prompts, or all images, is for one."""
    if not isinstance(values, (list, tuple)):
        return values
    each = len(values) // count
    return list(values[number * each : (number + 1) * each])
