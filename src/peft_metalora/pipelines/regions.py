# SPDX-License-Identifier: Apache-2.0
"""Several people in one image: boxes and masks in pixels become the slot of each token that the denoiser's layers see.

An image reaches the layers as tokens in several shapes: packed 2 x 2 latents, alone or beside the text, in a
transformer; a grid for each resolution, flat or as a map, in a UNet. Text tokens show nobody.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import PipelineError, RegionError
from ..tuner import TokenSlots, set_token_slots
from ..tuner.on_model import Seen, meta_lora_layers, seen
from ..tuner.subject_index import NO_SUBJECT
from .calls import each_pass

# Modules of diffusers' transformers and UNets that see text tokens only.
_TEXT = {
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "norm1_context", "context_embedder"),
    *("txt_in", "txt_mlp", "context_refiner", "cap_embedder", "text_fusion", "encoder_hid_proj"),
    *("txt_mode_blocks", "image_cond"),  # of FLUX.3, the second for reference images
    "condition_embedder",  # of Wan, the time's too
}
_TRANSFORMERS = {
    *("FluxTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel"),
    *("QwenImageTransformer2DModel", "QwenImage21Transformer2DModel"),
    *("Krea2Transformer2DModel", "ZImageTransformer2DModel", "WanTransformer3DModel"),
}
_Z_IMAGE_MULTIPLE = 32  # image and text are filled up to this many tokens each


@dataclass(frozen=True)
class Region:
    """A subject (None: nobody) and where it is: a box (x0, y0, x1, y1), or a mask (h, w) of bool, in pixels."""

    subject: str | None
    place: tuple[int, int, int, int] | Tensor


def read_regions(given: Sequence[Any]) -> list[Region]:
    """Check regions as far as that goes without the size of the image.

    Args:
        given: pairs of a subject and a box or a mask: a PIL image or a tensor (h, w), inside where it is above half.

    Raises:
        RegionError: something else, or a region without a pixel.
    """
    regions = []
    for entry in given:
        if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not isinstance(entry[0], (str, type(None))):
            raise RegionError(f"expected pairs of a subject and a box or mask as regions, found {entry!r}.")
        subject, place = entry
        if isinstance(place, Image.Image):
            place = torch.from_numpy(np.array(place.convert("L"))) > 127
        if isinstance(place, Tensor):
            if place.dim() != 2:
                raise RegionError(f"{subject}: expected a mask (h, w), found {tuple(place.shape)}.")
            place = (place if place.dtype == torch.bool else place > 0.5).cpu()
            empty = not bool(place.any())
        elif len(place) == 4 and all(isinstance(edge, int) and not isinstance(edge, bool) for edge in place):
            place = tuple(place)
            empty = place[0] >= place[2] or place[1] >= place[3]
        else:
            raise RegionError(f"{subject}: expected a box of four whole numbers (x0, y0, x1, y1), found {place!r}.")
        if empty:
            raise RegionError(f"{subject}: expected a region of at least one pixel, found none. Widen it or leave it.")
        regions.append(Region(subject, place))
    return regions


@contextmanager
def shown_in_regions(
    pipe: Any, model: nn.Module, regions: Sequence[Region], slots: Mapping[str, int]
) -> Iterator[None]:
    """While it lasts, image tokens of the active adapter show the subject of their region, all others nobody.

    Args:
        slots: where each subject lies.

    Raises:
        PipelineError: a denoiser whose tokens are not known. In the call: RegionError, for the size of the image.
    """
    layout = _Layout(pipe, model, regions, slots)
    set_token_slots(model, layout.tables())
    try:
        with each_pass(pipe, model, layout.look):
            yield
    finally:
        set_token_slots(model, None)


_tables: weakref.WeakKeyDictionary[Seen, dict[str, TokenSlots]] = weakref.WeakKeyDictionary()


def _grid_ids(number: int, rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(
        torch.tensor([number], device="cpu"), torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")
    )


class _Layout:
    """Follows the shapes of a denoiser's calls and keeps the tables of its layers true to them."""

    def __init__(self, pipe: Any, model: nn.Module, regions: Sequence[Region], slots: Mapping[str, int]) -> None:
        self._forward = inspect.signature(type(model).forward)
        names = self._forward.parameters
        self._class = type(model).__name__
        if not {"img_ids", "sample"} & set(names) and self._class not in _TRANSFORMERS:
            raise PipelineError(
                "expected a transformer of FLUX, Qwen-Image, Z-Image, Krea 2 or Wan, or a UNet, for regions, found a "
                f"{self._class}. Use subjects= instead."
            )
        self._model, self._regions, self._slots = model, regions, slots
        self._factor: int = getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial
        # Latents of a side for one of its tokens.
        self._packing = 1 if self._class == "QwenImage21Transformer2DModel" else 2
        self._image = TokenSlots()
        self._seen: tuple[int, ...] | None = None

    def tables(self) -> dict[str, TokenSlots]:
        """The image's table for each layer that sees image tokens; the same for every call until layers change."""
        known = seen(self._model)
        tables = _tables.get(known)
        if tables is None:
            paths = [path for path, _ in meta_lora_layers(self._model) if not self._sees_text(path)]
            tables = _tables[known] = dict.fromkeys(paths, self._image)
        self._image = next(iter(tables.values()), self._image)
        return tables

    def _sees_text(self, path: str) -> bool:
        parent, _, leaf = path.rpartition(".")
        if _TEXT & set(path.split(".")):
            return True
        attention = self._model.get_submodule(parent) if parent else self._model
        return leaf in ("to_k", "to_v") and getattr(attention, "is_cross_attention", False)

    def look(self, args: tuple[Any, ...], kwargs: dict[str, Any], anew: bool) -> None:
        """Before a pass of the denoiser: write the tables if the shapes are new, or another call had them meanwhile."""
        if anew:
            set_token_slots(self._model, self.tables())
        given = self._forward.bind_partial(self._model, *args, **kwargs).arguments
        if "sample" in given:
            size = tuple(given["sample"].shape[-2:])
            shape, write = size, partial(self._levels, *size)
        else:
            ids, before, behind = self._tokens(given)
            shape, write = (len(ids), before, behind), partial(self._packed, ids, before, behind)
        if shape == self._seen and not anew:
            return
        self._image.write(write(), seen(self._model).homes()[0][1])
        self._seen = shape

    def _tokens(self, given: dict[str, Any]) -> tuple[Tensor, int, int]:
        """What a call of a transformer says of its image tokens: number of the image, row and column (tokens, 3), 0
        being the image that is made; and how many tokens of text stand before and behind them."""
        if self._class == "ZImageTransformer2DModel":
            images, texts = given["x"], given["cap_feats"]
            if isinstance(images[0], list):
                raise PipelineError("expected Z-Image without images to start from for regions. Use subjects= instead.")
            rows, columns = (side // 2 for side in images[0].shape[-2:])
            filling = torch.ones(-rows * columns % _Z_IMAGE_MULTIPLE, 3, dtype=torch.int64, device="cpu")
            longest = max(len(text) for text in texts)
            return torch.cat([_grid_ids(0, rows, columns), filling]), 0, longest + -longest % _Z_IMAGE_MULTIPLE
        if self._class == "WanTransformer3DModel":
            patches: Any = self._model.config
            sides = zip(given["hidden_states"].shape[2:], patches.patch_size, strict=True)
            frames, rows, columns = (side // patch for side, patch in sides)
            return _grid_ids(0, rows, columns).repeat(frames, 1), 0, 0
        text = given["encoder_hidden_states"].shape[1]
        if self._class == "QwenImageTransformer2DModel":
            grids = given["img_shapes"][0]
            grids = grids if isinstance(grids, list) else [grids]
            return torch.cat([_grid_ids(number, *grid[1:]) for number, grid in enumerate(grids)]), text, 0
        if self._class == "QwenImage21Transformer2DModel":
            if len(given["img_shapes"][0]) > 1:
                raise PipelineError(
                    "expected Qwen-Image 2.1 without images to start from for regions. Use subjects= instead."
                )
            return _grid_ids(0, *given["img_shapes"][0][0][1:]), text, 0
        if self._class == "Krea2Transformer2DModel":
            return given["position_ids"][text:], text, 0
        ids = given["img_ids"]
        if self._class == "Flux3Transformer2DModel":
            # Rows and columns are scaled, and reference images stand behind in ids of their own.
            rows, columns = (torch.unique(ids[:, axis], return_inverse=True)[1] for axis in (1, 2))
            behind = given.get("image_cond_ids")
            return torch.stack([torch.zeros_like(rows), rows, columns], 1), text, 0 if behind is None else len(behind)
        return ids[0] if ids.dim() == 3 else ids, text, 0

    def _packed(self, ids: Tensor, before: int, behind: int) -> dict[tuple[int, ...], Tensor]:
        """Transformers: tokens of the image that is made know their row and column, all others show nobody."""
        ids = ids.long().cpu()
        own = ids[:, 0] == 0
        rows, columns = ids[own, 1], ids[own, 2]
        grid = int(rows.max()) + 1, int(columns.max()) + 1
        tokens = torch.full((len(ids),), NO_SUBJECT, device="cpu")
        tokens[own] = self._grid(self._labels(*(self._packing * self._factor * side for side in grid)), *grid)[
            rows, columns
        ]
        beside = F.pad(tokens, (before, behind), value=NO_SUBJECT)
        return {tokens.shape: tokens, beside.shape: beside}

    def _levels(self, height: int, width: int) -> dict[tuple[int, ...], Tensor]:
        """UNet: each level halves the sides, rounding up; flat for linear layers, a map for convolutions."""
        labels = self._labels(height * self._factor, width * self._factor)
        maps: dict[tuple[int, ...], Tensor] = {}
        while True:
            grid = self._grid(labels, height, width)
            maps[height, width] = maps[(height * width,)] = grid
            if height == width == 1:
                return maps
            height, width = (height + 1) // 2, (width + 1) // 2

    def _labels(self, height: int, width: int) -> Tensor:
        """The region of each pixel, counted from 1, the later one where several meet; 0 outside."""
        labels = torch.zeros(height, width, dtype=torch.int64, device="cpu")
        for number, region in enumerate(self._regions, 1):
            if isinstance(region.place, Tensor):
                if region.place.shape != labels.shape:
                    raise RegionError(
                        f"{region.subject}: expected a mask of the image's size {(height, width)}, found "
                        f"{tuple(region.place.shape)}. Resize the mask."
                    )
                labels[region.place] = number
                continue
            x0, y0, x1, y1 = region.place
            if x0 < 0 or y0 < 0 or x1 > width or y1 > height:
                raise RegionError(
                    f"{region.subject}: expected a box within the image of {width} x {height} pixels, found "
                    f"{region.place}. Cut it to the image."
                )
            labels[y0:y1, x0:x1] = number
        return labels

    def _grid(self, labels: Tensor, height: int, width: int) -> Tensor:
        """The slot of each token: that of the region which holds most of its pixels, the later of two equals."""
        numbers = range(len(self._regions), -1, -1)
        shares = torch.stack([(labels == number).float() for number in numbers]).unsqueeze(0)
        winner = F.adaptive_avg_pool2d(shares, (height, width))[0].argmax(0)
        names = [None, *(region.subject for region in self._regions)]
        slots = [NO_SUBJECT if (name := names[number]) is None else self._slots[name] for number in numbers]
        return torch.tensor(slots, device="cpu")[winner]
