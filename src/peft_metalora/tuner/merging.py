# SPDX-License-Identifier: Apache-2.0
"""The part of an adapted layer that scales and merges: everything about weights, nothing about activations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..errors import AdapterStateError, NonFiniteError, UnsupportedModuleError
from .folding import Foldable, dtype_of_sums, without_autocast
from .subject_index import layers_changed

MERGE_BACKUPS = ("device", "host", "none")


class Mergeable(Foldable):
    """Scaling and merging of the factors that `MetaLoraLayer` holds."""

    d_out: int
    metalora_magnitude: nn.ParameterDict
    _rows_of_weight: Any
    row_norms: Any
    merged_adapters: list[str]
    metalora_kept: BufferDict
    merge_backup: str
    _kept_quantised: Any
    _merged_as: dict[str, tuple[int | None, float]]
    quantization_backend: Any

    # BaseTunerLayer's, for the type checker.
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool
    _disable_adapters: bool
    get_base_layer: Any
    get_base_weight: Any
    set_base_weight: Any
    _get_base_layer_device_and_dtype: Any

    # ---- scale ---------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Weight the adapter: its output is multiplied by `scale` times its own scaling."""
        if adapter in self.scaling and (scaling := scale * self._full_scale(adapter)) != self.scaling[adapter]:
            self.scaling[adapter] = scaling
            layers_changed()

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        if scale != 1:
            for name in self.active_adapters:
                if name in self.scaling:
                    self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; without a scale, return to the adapter's own scaling."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = self._full_scale(name) if scale is None else self.scaling[name] / scale

    # ---- merge ---------------------------------------------------------------------------------------------------

    def merge_slot(self) -> int | None:
        """The one slot that all samples use, None for no subject.

        Raises:
            AdapterStateError: the samples use different slots, which one weight cannot hold.
        """
        values = set(self.subject_index.values or (0,))
        if len(values) > 1:
            raise AdapterStateError(
                f"Merging needs one subject for the whole batch, but {sorted(values)} are set. "
                "Choose one, for example set_slots(model, [0]), or None for slot 0."
            )
        slot = values.pop()
        return None if slot < 0 else slot

    @torch.no_grad()
    def get_delta_weight(self, adapter: str, slot: int = 0) -> Tensor:
        """Return what merging adds to the base weight, shaped like it: scaling * Up @ Mid @ Down, for DoRA rescaled.

        Computed at least in float32 and returned in the dtype of Up.
        """
        weight = self._rows_of_weight() if adapter in self.metalora_magnitude else None
        folded, up = self.folded_factor(adapter, slot), self.metalora_up[adapter][slot].detach()
        with without_autocast(up.device):
            delta = (up.to(folded.dtype) * self.scaling[adapter]) @ folded.flatten(1)
        if weight is not None:
            scale = self.metalora_magnitude[adapter][slot].detach() / self.row_norms(adapter)[slot]
            delta = scale.to(delta).unsqueeze(-1) * (weight.to(delta) + delta) - weight.to(delta)
        return self._shaped_like_weight(delta.view(self.d_out, *folded.shape[1:])).to(up.dtype)

    def _shaped_like_weight(self, delta: Tensor) -> Tensor:
        return delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weight; the weight before is kept, so that `unmerge` is exact to the bit.

        Args:
            safe_merge: refuse a merge whose result holds NaN or infinity, and leave the weight as it was.
            adapter_names: which adapters, the active ones by default.

        Raises:
            NonFiniteError: `safe_merge` found NaN or infinity.
            AdapterStateError: the samples use different slots.
            UnsupportedModuleError: the quantised weight cannot be read or written.
        """
        wanted = dict.fromkeys(check_adapters_to_merge(self, adapter_names))
        names = [name for name in wanted if name in self.metalora_mid]
        if not names:
            return
        merged = self.merged_weight(names, finite=safe_merge)
        if not self.merged and self.merge_backup != "none":
            self._keep_weight()
        self.set_base_weight(merged)
        slot = self.merge_slot()
        self._merged_as.update((name, (slot, self.scaling[name])) for name in names)
        self.know_merged([*self.merged_adapters, *names])

    def know_merged(self, names: list[str]) -> None:
        """Say that the weight as it is now is the base's with these adapters merged into it."""
        self.merged_adapters[:] = names
        if "weight" in self.metalora_kept:
            self.metalora_kept["left"] = self._sampled()
        layers_changed()

    def _sampled(self) -> Tensor:
        """A thousand numbers of the weight, all over it: what any other adapter adds is seen there."""
        flat = self.get_base_layer().weight.detach().flatten()
        return flat[:: max(1, len(flat) // 1024) | 1].clone()  # an odd step meets all columns

    def unmerged_weight(self) -> Tensor:
        """The base weight without what is merged into it.

        Raises:
            AdapterStateError: it was not kept.
        """
        if not self.merged:
            return self.get_base_weight()
        self._require_kept()
        if "weight" in self.metalora_kept:
            return self.metalora_kept["weight"]
        now = self.weight_now()
        self.put_weight(self._kept_quantised)
        try:
            return self.get_base_weight()
        finally:
            self.put_weight(now)

    def _require_kept(self) -> None:
        if self._kept_quantised is None and "weight" not in self.metalora_kept:
            raise AdapterStateError(
                "The weight before the merge was not kept (merge backup 'none'), so it cannot be restored. "
                "Load the base model again."
            )

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise what `merge` would raise, and touch nothing."""
        names = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in names if name in self.metalora_mid and name not in self.merged_adapters]
        if names and safe_merge:
            self.merged_weight(names, finite=True)
        elif names:
            self._slot_to_merge()
            if self.merged and any(name in self.metalora_magnitude for name in names):
                self._require_kept()

    @torch.no_grad()
    def merged_weight(self, names: list[str], finite: bool = False) -> Tensor:
        """The base weight with these adapters added, summed at least in float32; the base is not touched."""
        slot, before = self._slot_to_merge(), self.get_base_weight()
        if slot is None:
            return before.clone()
        if self._is_plain(names):
            with without_autocast(before.device):
                merged = self._merged_at_once(before, names, slot)
        else:
            total = before.to(dtype_of_sums(before), copy=True)
            for name in names:
                total += self.get_delta_weight(name, slot).to(total)
            merged = total.to(before.dtype)
        if finite and not torch.isfinite(merged.to(dtype_of_sums(merged))).all():
            raise NonFiniteError(
                f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken; the base is kept."
            )
        return merged

    def _slot_to_merge(self) -> int | None:
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise UnsupportedModuleError(
                f"A weight quantised by {self.quantization_backend.backend_name} cannot be merged into here: the model "
                "does not say how it was quantised. Serve the adapter unmerged or folded (docs/quantisation.md)."
            )
        return self.merge_slot()

    def _is_plain(self, names: list[str]) -> bool:
        """Whether the adapters only add a product to a weight (d_out, d_in)."""
        base = self.get_base_layer()
        plain = type(base) is nn.Linear and self.quantization_backend is None
        plain = plain and base.weight.element_size() > 1  # eight bits are for storage: no product is formed in them
        return plain and not any(name in self.metalora_magnitude for name in names)

    def _merged_at_once(self, before: Tensor, names: list[str], slot: int) -> Tensor:
        """All adapters as one product that is summed onto the weight inside the product's own accumulator."""
        if len(names) == 1:  # a service merges one subject after another: two launches a layer
            name = names[0]
            mid, up, down = self.metalora_mid[name], self.metalora_up[name], self.metalora_down[self.down_key[name]]
            if mid.dtype == up.dtype == down.dtype == before.dtype:
                return torch.addmm(before, up[slot], mid[slot] @ down, alpha=self.scaling[name])
        folded = [self.folded_factor(name, slot).mul_(self.scaling[name]).to(before) for name in names]
        ups = [self.metalora_up[name][slot].detach().to(before) for name in names]
        return torch.addmm(before, torch.cat(ups, dim=1), torch.cat(folded))

    def _keep_weight(self) -> None:
        """Keep what `unmerge` needs. `set_base_weight` replaces the storage, so that keeping the old one is no copy."""
        weight = self.weight_now()
        if isinstance(weight, Tensor):
            self.metalora_kept["weight"] = weight.to("cpu", copy=True) if self.merge_backup == "host" else weight
        else:
            self._kept_quantised = weight

    def weight_now(self) -> Any:
        """The base weight as `put_weight` takes it; for a quantised one with all that belongs to it."""
        base: Any = self.get_base_layer()
        if self.quantization_backend is None:
            return base.weight.data
        # PEFT's handlers change the old weight's attributes while they make the new one.
        return base.weight, dict(base.weight.__dict__), copy.copy(getattr(base, "state", None))

    def put_weight(self, kept: Any) -> None:
        """Bring a weight of `weight_now` back, bit for bit."""
        base: Any = self.get_base_layer()
        if isinstance(kept, Tensor):
            base.weight.data = kept.to(base.weight)
            return
        weight, attributes, state = kept
        weight.__dict__.update(attributes)
        base.weight = weight
        if state is not None:
            base.state = state
        if "quant_state" in attributes:  # bitsandbytes keeps a second reference on the 4-bit layer
            base.quant_state = weight.quant_state

    def unmerge(self) -> None:
        """Restore the base weight bit for bit to what it was before the first merge.

        Where an adapter of another method was merged into it since, or taken out, that stays so: ours are subtracted
        then, to the rounding of a sum.

        Raises:
            AdapterStateError: `set_merge_backup(model, "none")` was chosen before the merge, or the weight is parked by
                sequential offloading.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._require_kept()
        if self.get_base_layer().weight.is_meta:
            raise AdapterStateError(
                "The base weights are parked by offloading, so that nothing can be taken out of them. Use "
                "unfuse_meta_lora on the pipeline first, or take the offloading off."
            )
        if self._kept_quantised is not None:
            self.put_weight(self._kept_quantised)
        elif torch.equal(self._sampled(), self.metalora_kept["left"].to(self.get_base_layer().weight)):
            self.put_weight(self.metalora_kept["weight"])
        else:
            self.put_weight(self._without_ours())
        self.keep_merged()

    @torch.no_grad()
    def _without_ours(self) -> Tensor:
        weight, scaling = self.get_base_weight(), {**self.scaling}
        total = weight.to(dtype_of_sums(weight), copy=True)
        for name in self.merged_adapters:
            slot, self.scaling[name] = self._merged_as[name]
            if slot is not None:
                total -= self.get_delta_weight(name, slot).to(total)
        self.scaling.update(scaling)
        return total.to(weight.dtype)

    def keep_merged(self) -> None:
        """Take the weight as it is now for the base's; what `unmerge` would need is freed."""
        self.metalora_kept.clear()
        self._kept_quantised = None
        self._merged_as.clear()
        self.merged_adapters.clear()
        layers_changed()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.metalora_magnitude


@contextmanager
def merged_or_as_before(
    layers: Sequence[Mergeable], safe_merge: bool = False, adapter_names: list[str] | None = None
) -> Iterator[None]:
    """Let a block merge layers: all of them, or they are what they were, with what was merged into them before.

    Raises:
        As `Mergeable.merge`. What can be known beforehand is raised before the block.
    """
    for layer in layers:
        if layer.merge_backup == "none":  # such a merge could not be undone
            layer.check_merge(safe_merge, adapter_names)
    before = [(layer, [*layer.merged_adapters], layer.weight_now() if layer.merged else None) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, names, weight in before:
            if len(layer.merged_adapters) == len(names):
                continue
            if names:
                layer.put_weight(weight)
                layer.know_merged(names)
            elif layer.merge_backup != "none":
                layer.unmerge()
        raise


@torch.no_grad()
def decomposed_norms(weight: Tensor, folded: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Row norms of weight + scaling * up @ folded for every slot, (slots, d_out), at least in float32, for DoRA
    (arXiv 2402.09353), without forming the sum.

    Args:
        weight: (d_out, d_in). folded: Mid @ Down, (slots, r, d_in). up: (slots, d_out, r).
    """
    dtype = dtype_of_sums(weight, folded, up)
    weight, folded, up = weight.to(dtype), folded.to(dtype), up.to(dtype) * scaling
    with without_autocast(weight.device):
        cross = (up * (weight @ folded.mT)).sum(-1)
        own = (up * (up @ (folded @ folded.mT))).sum(-1)
    return (weight.square().sum(-1) + 2 * cross + own).clamp(min=1e-12).sqrt()
