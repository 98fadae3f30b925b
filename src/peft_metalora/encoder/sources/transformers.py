# SPDX-License-Identifier: Apache-2.0
"""The source `transformers:<id>`: a frozen vision model of the transformers library, such as DINOv2 or SigLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ...errors import ConfigError, EmbedderUnavailableError
from .source import EncodeImages, Still, to_pixels

# Mean and deviation of the images that DINOv2 (and most vision models) were trained on.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TransformersSource(Still):
    """The pooled output of a vision model, or the mean of its tokens where it has none.

    Args:
        detail: folder or repository of the model.
        resolution: side of the square that is shown to it in pixels, where its configuration names none.
        encode_images: not needed.

    Raises:
        ConfigError: no model is named. EmbedderUnavailableError: it cannot be loaded.
    """

    def __init__(self, detail: str, *, resolution: int, encode_images: EncodeImages | None = None) -> None:
        if not detail:
            raise ConfigError("encoder 'transformers' needs a model, for example 'transformers:facebook/dinov2-base'")
        # Not on import of the room: transformers is heavy.
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(detail)
        except (OSError, ValueError) as error:
            raise EmbedderUnavailableError(
                f"expected a vision model of transformers, found {detail!r}: {error}"
            ) from error
        self.name = f"transformers:{detail}"
        self._model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        config = self._model.config
        self._side = int(getattr(config, "image_size", resolution))
        self.feature_shape: tuple[int, ...] = (int(config.hidden_size),)

    def features(self, photos: Sequence[Image.Image]) -> Tensor:
        """(n, d) float32; see `Source`."""
        pixels = to_pixels(photos, self._side)
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
        parameter = next(self._model.parameters())
        with torch.no_grad():
            output = self._model(pixel_values=((pixels - mean) / std).to(parameter.device, parameter.dtype))
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(1) if pooled is None else pooled).float()
