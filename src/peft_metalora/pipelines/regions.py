# SPDX-License-Identifier: Apache-2.0
"""Several people in one image: boxes and masks in pixels become the slot of each token that the denoiser's layers see.

An image reaches the layers as tokens in several shapes: packed 2 x 2 latents, alone or behind the text, in FLUX-type
transformers; a grid for each resolution, flat or as a map, in a UNet. Text tokens show nobody.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from .denoiser import named_denoiser

# Modules of diffusers' transformers and UNets that see text tokens only.
_TEXT = {
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "norm1_context", "context_embedder"),
    "encoder_hid_proj",
}


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
    hook = getattr(pipe, named_denoiser(pipe)[0]).register_forward_pre_hook(layout.look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        set_token_slots(model, None)


_tables: weakref.WeakKeyDictionary[Seen, dict[str, TokenSlots]] = weakref.WeakKeyDictionary()


class _Layout:
    """Follows the shapes of a denoiser's calls and keeps the tables of its layers true to them."""

    def __init__(self, pipe: Any, model: nn.Module, regions: Sequence[Region], slots: Mapping[str, int]) -> None:
        self._forward = inspect.signature(type(model).forward)
        names = self._forward.parameters
        if not {"img_ids", "sample"} & set(names):
            raise PipelineError(
                f"expected a FLUX-type transformer or a UNet for regions, found a {type(model).__name__}. "
                "Use subjects= instead."
            )
        self._model, self._regions, self._slots = model, regions, slots
        self._factor: int = pipe.vae_scale_factor
        self._image, self._seen = TokenSlots(), None

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

    def look(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call of the denoiser: write the tables if the shapes are new."""
        given = self._forward.bind_partial(self._model, *args, **kwargs).arguments
        if "sample" in given:
            shape: Any = tuple(given["sample"].shape[-2:])
        else:
            shape = (given["img_ids"].shape[-2], given["encoder_hidden_states"].shape[1])
        if shape == self._seen:
            return
        maps = self._levels(*shape) if "sample" in given else self._packed(given["img_ids"], shape[1])
        device = seen(self._model).homes()[0][1]
        self._image.write(maps, device)
        self._seen = shape

    def _packed(self, ids: Tensor, text: int) -> dict[tuple[int, ...], Tensor]:
        """FLUX-type: image tokens know their row and column; those of a reference image (first number not 0) do not."""
        ids = (ids[0] if ids.dim() == 3 else ids).long().cpu()
        own = ids[:, 0] == 0
        rows, columns = ids[own, 1], ids[own, 2]
        grid = int(rows.max()) + 1, int(columns.max()) + 1
        tokens = torch.full((len(ids),), NO_SUBJECT)
        tokens[own] = self._grid(self._labels(*(2 * self._factor * side for side in grid)), *grid)[rows, columns]
        return {tokens.shape: tokens, (text + len(ids),): F.pad(tokens, (text, 0), value=NO_SUBJECT)}

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
        labels = torch.zeros(height, width, dtype=torch.int64)
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
        return torch.tensor(slots)[winner]
