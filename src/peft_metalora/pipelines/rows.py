# SPDX-License-Identifier: Apache-2.0
"""A subject as a row of numbers, the factors of all layers one behind the other; all slots as one tensor of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.factors import check_subject_on_down
from ..checkpoint.space import SubjectSpace
from ..errors import AdapterStateError, NonFiniteError
from ..tuner import DownSource, MetaLoraConfig, MetaLoraLayer
from ..tuner.down import MAGNITUDE, MID, UP
from ..tuner.ranks import ranks_of

_PARTS = (MID, UP, MAGNITUDE)
Layers = Sequence[tuple[str, MetaLoraLayer]]
"""Adapted layers with their paths."""


class Rows:
    """All slots of an adapter as one tensor `flat` (slots, size of a subject) that its layers look into.

    Attributes:
        pieces: path, part and shape of each factor, in the order of a row; for threads that do not wait: while another
            adapter comes, the layers do not show theirs.
    """

    def __init__(self, layers: Layers, adapter_name: str) -> None:
        self._layers, self._adapter = layers, adapter_name
        self.pack()

    def pack(self) -> None:
        """Move the slots of all layers into one tensor."""
        places = _pieces(self._layers, self._adapter)
        parameters = [getattr(layer, part)[self._adapter] for _, layer, part in places]
        self.pieces = [(path, part, one.shape[1:]) for (path, _, part), one in zip(places, parameters, strict=True)]
        with torch.inference_mode(False):  # or nobody could come in outside of it
            self.flat = torch.cat([parameter.detach().flatten(1) for parameter in parameters], dim=1)
        start = 0
        for parameter in parameters:
            stop = start + parameter[0].numel()
            parameter.data = self.flat[:, start:stop].view(parameter.shape)
            start = stop

    def moved(self) -> bool:
        """Whether the layers look elsewhere by now: the model has gone to another device or dtype."""
        place = self.flat.untyped_storage().data_ptr()
        ends = self._layers[0][1], self._layers[-1][1]
        return any(layer.metalora_mid[self._adapter].untyped_storage().data_ptr() != place for layer in ends)


class SubjectRows(Rows):
    """The slots of a table, and what makes a row of a subject: the ranks and scales of all rows are the table's.

    Args:
        layers, adapter_name, config: of the table's adapter.
        down: of all its subjects.
    """

    def __init__(self, layers: Layers, adapter_name: str, config: MetaLoraConfig, down: DownSource) -> None:
        super().__init__(layers, adapter_name)
        self._config, self._down = config, down
        self._alike: tuple[Any, bool] | None = None  # the last scales that were compared

    def row(
        self,
        name: str,
        config: MetaLoraConfig,
        tensors: Mapping[str, torch.Tensor],
        scales: Mapping[str, float] | None = None,
    ) -> torch.Tensor:
        """A subject's factors as one row, where they are, their own scale taken into Up.

        Args:
            name: what errors call the subject.
            scales: by layer; by default those of its configuration.

        Raises:
            AdapterStateError: another rank, or DoRA in one and not in the other.
            MissingKeysError, ForeignKeysError, RankMismatchError: tensors of another Down.
        """
        factors = {key: tensor for key, tensor in tensors.items() if not key.endswith(MAGNITUDE)}
        check_subject_on_down(factors, self._down.tensors, name)
        if config.use_dora != self._config.use_dora:
            raise AdapterStateError(
                f"{name}: expected use_dora={self._config.use_dora}, as its Down has, found {config.use_dora}. Load it "
                "with load_meta_lora instead."
            )
        if scales is None:
            scales = {path: ranks_of(config, path).scaling for path, _ in self._layers}
        return self._flatten(name, self._scaled(scales, tensors))

    def _scaled(self, scales: Mapping[str, float], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scaled = dict(tensors)
        for path, scale in scales.items():
            ratio = scale / ranks_of(self._config, path).scaling
            if ratio != 1 and f"{path}.{UP}" in scaled:
                scaled[f"{path}.{UP}"] = scaled[f"{path}.{UP}"] * ratio
        return scaled

    def _flatten(self, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        pieces = []
        for path, part, shape in self.pieces:
            tensor = tensors[f"{path}.{part}"]
            if tensor.shape[1:] != shape:
                raise AdapterStateError(
                    f"{name}: expected {path}.{part} of shape {tuple(shape)}, as all of the table have, found "
                    f"{tuple(tensor.shape[1:])}. Show it alone, with load_meta_lora and set_adapters."
                )
            pieces.append(tensor[0].flatten().to(self.flat.dtype))
        return torch.cat(pieces)

    def host_copy(self, name: str, row: torch.Tensor) -> torch.Tensor:
        """A row in host memory, pinned if the slots are on a GPU; raises as `require_finite`."""
        self.require_finite(name, row := row.cpu())
        return row.pin_memory() if self.flat.is_cuda else row

    def require_finite(self, name: str, row: torch.Tensor) -> None:
        """Raise NonFiniteError for a row with numbers that the dtype of the slots cannot hold."""
        if not torch.isfinite(row).all():
            raise NonFiniteError(
                f"{name}: expected numbers that {row.dtype} can hold, found more than that. Load the base model in "
                "bfloat16 or float32."
            )

    def of_adapter(self, name: str) -> Rows | None:
        """The rows of a loaded adapter, if its factors are a row as they are, and frozen."""
        factors = [getattr(layer, part)[name] for _, layer, part in _pieces(self._layers, name)]
        alike = all(one.dtype == self.flat.dtype and one.device == self.flat.device for one in factors)
        own = ((layer.scaling[name], ranks_of(self._config, path).scaling) for path, layer in self._layers)
        # Scaled for a call and back (a pipeline's `scale`) it is the same but for the last bit.
        scales_alike = all(math.isclose(one, other, rel_tol=1e-9) for one, other in own)
        if alike and scales_alike and not any(one.requires_grad for one in factors):
            return Rows(self._layers, name)
        return None

    def scales_alike(self, config: MetaLoraConfig) -> bool:
        """Whether a subject's own scale is the table's on every layer, so that nothing has to be taken into Up."""
        marks = config.r, config.lora_alpha, config.use_rslora, config.rank_pattern, config.alpha_pattern
        if self._alike is None or self._alike[0] != marks:
            scales = ((ranks_of(config, path), ranks_of(self._config, path)) for path, _ in self._layers)
            self._alike = marks, all(own.scaling == its.scaling for own, its in scales)
        return self._alike[1]

    def ordered(self, space: SubjectSpace) -> SubjectSpace:
        """A space with its numbers in the order of a row, where the slots are; raises as `SubjectSpace.ordered`."""
        return space.ordered([f"{path}.{part}" for path, part, _ in self.pieces]).to(self.flat.device)


def _pieces(layers: Layers, adapter_name: str) -> list[tuple[str, MetaLoraLayer, str]]:
    return [(path, layer, part) for path, layer in layers for part in _PARTS if adapter_name in getattr(layer, part)]
