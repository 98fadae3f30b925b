# SPDX-License-Identifier: Apache-2.0
"""A base in a file of one's own: Z-Image, written as if no family of the package knew it.

metalora meta-train --generic examples/z_image_base.py:ZImage --pretrained_model_name_or_path Tongyi-MAI/Z-Image \
    --train_data_dir people --instance_prompt "a photo of a person" --output_dir faces
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from peft_metalora.bases import FlowBase, Text


class ZImage(FlowBase):
    """Rectified flow on FLUX.1's latents, which `FlowBase` knows; here stands what is Z-Image's own."""

    pipeline_class = "ZImagePipeline"
    large_encoders = ("text_encoder",)
    # Attention and feed-forward of the blocks that see the image.
    target_modules = r"(noise_refiner|layers)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
    # Here the tokens of all prompts of a batch, each as long as it is, stand one behind the other.
    ragged_layers = r"cap_embedder\..*"
    host_looks = "how long each prompt is"

    def text_of(self, prompts: Sequence[str]) -> Text:
        rows, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.encoders_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        return {"embeddings": pad_sequence(rows, batch_first=True), "lengths": lengths}

    @property
    def pixel_multiple(self) -> int:
        return 2 * self.vae_scale_factor  # the transformer takes 2 x 2 latents as a token

    def predict(self, noisy: Tensor, text: Text, times: Tensor) -> Tensor:
        embeddings = text["embeddings"].to(self.dtype)
        rows = [row[:length] for row, length in zip(embeddings, text["lengths"].tolist(), strict=True)]
        # It is told 1 - t, and predicts the way from the noise to the image.
        (way, *_) = self.denoiser([*noisy.to(self.dtype).unsqueeze(2)], 1 - times, rows, return_dict=False)
        return -torch.stack([*way]).squeeze(2)
