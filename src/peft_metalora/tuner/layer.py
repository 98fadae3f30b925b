# SPDX-License-Identifier: Apache-2.0
"""The adapted layer: `y = base(x) + scaling * Up @ Mid @ Down @ x`, one Down for all subjects, slots of Mid and Up.

`MetaLoraLayer` holds what is the same for every base layer: factors, stages, slots. The subclasses give the forward
pass. Factors and shapes (method: arXiv 2503.22352):

    metalora_down      {down key: (meta_r, d_in)}          U(-1/sqrt(d_in), 1/sqrt(d_in)); trains in stage 'meta' only
    metalora_mid_init  {down key: (r, meta_r)}             the Mid every subject of that Down starts from
    metalora_mid       {adapter:  (slots, r, meta_r)}      = mid_init
    metalora_up        {adapter:  (slots, d_out, r)}       = 0

The key of a Down is the name of the adapter that trains it, or its fingerprint where a subject brought it along."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ..errors import AdapterStateError
from .base_layers import factor_shape, is_packed, unpack
from .config import MetaLoraConfig
from .down import DOWN, MAGNITUDE, MID, MID_INIT, UP, Downs
from .folding import Shown, dtype_of_sums
from .merging import Mergeable, decomposed_norms
from .ranks import Ranks
from .starts import start_down
from .subject_index import Chosen, Positions, SubjectIndex, TokenSlots, layers_changed


class MetaLoraLayer(Mergeable):
    """Factors, stages, slots and merging of one adapted layer; the subclass gives the forward pass."""

    adapter_layer_names: tuple[str, ...] = (MID, UP, MAGNITUDE)
    other_param_names: tuple[str, ...] = (
        DOWN,
        MID_INIT,
        "metalora_dropout",
        "metalora_folded",
        "fold_scale",
        "fold_mark",
        "r",
        "meta_r",
        "lora_alpha",
        "scaling",
        "use_rslora",
        "stage",
        "warmup",
        "down_key",
        "down_fingerprint",
    )
    # diffusers' pipe.set_lora_device looks into it, whatever the method of a layer is.
    lora_A: Mapping[str, Any] = MappingProxyType({})  # noqa: N815
    # PEFT's helpers and diffusers' hooks switch it; x follows the base's output here, never the dtype of a factor.
    cast_input_dtype_enabled: bool = True

    def __init__(self, base_layer: nn.Module, subject_index: SubjectIndex, quantization_backend: Any = None) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.subject_index = subject_index
        self.token_table = TokenSlots()
        self.down_row, self.d_out = factor_shape(self.get_base_layer())
        self.in_features, self.out_features = self.down_row[0], self.d_out
        self.metalora_down = Downs()
        self.metalora_mid_init = BufferDict(persistent=True)
        self.metalora_mid = nn.ParameterDict()
        self.metalora_up = nn.ParameterDict()
        self.metalora_magnitude = nn.ParameterDict()
        self.metalora_mean_mid = BufferDict()
        self.metalora_mean_up = BufferDict()
        self.metalora_folded = BufferDict()
        self.metalora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.meta_r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.fold_scale: dict[str, float] = {}
        self.fold_mark: dict[str, tuple[Any, ...]] = {}
        self.shown_subject: Shown | None = None
        self.stage: dict[str, str] = {}
        self.warmup: dict[str, bool] = {}
        self.down_key: dict[str, str] = {}
        self.down_fingerprint: dict[str, tuple[str, int]] = {}
        self._may_train: set[str] = set()  # all others are known to be frozen
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.metalora_kept = BufferDict()
        self.merge_backup = "device"
        self._kept_quantised: Any = None
        self._merged_as: dict[str, tuple[int | None, float]] = {}
        self.register_load_state_dict_post_hook(_fold_again)
        layers_changed()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "shown_subject": None}  # what launches kernels is of this process and these factors

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        layers_changed()

    # ---- what shows ----------------------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | list[str]:
        """As PEFT's; for the length of a call that shows another adapter, that one."""
        shown = self.subject_index.shown
        return self._active_adapter if shown is None else [*shown]

    @property
    def token_slots(self) -> TokenSlots | None:
        """The slot of each token, None while the samples' index counts."""
        return self.token_table if self.subject_index.by_tokens else None

    # ---- factors -------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: MetaLoraConfig, ranks: Ranks, down_key: str) -> None:
        """Create the factors of a new adapter; a subject's Down is bound afterwards with `bind_down`."""
        r, meta_r, self.lora_alpha[adapter_name], self.use_rslora[adapter_name] = ranks
        self.r[adapter_name], self.meta_r[adapter_name] = r, meta_r
        self.scaling[adapter_name] = ranks.scaling
        self.stage[adapter_name] = config.stage
        self.warmup[adapter_name] = False
        self.down_key[adapter_name] = down_key
        if config.lora_dropout:
            self.metalora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        self.metalora_mid[adapter_name] = nn.Parameter(torch.empty(config.num_slots, r, meta_r))
        self.metalora_up[adapter_name] = nn.Parameter(torch.zeros(config.num_slots, self.d_out, r))
        if config.stage == "meta":
            self.metalora_down[adapter_name] = nn.Parameter(torch.empty(meta_r, *self.down_row))
            self.metalora_mid_init[adapter_name] = torch.empty(r, meta_r)
            start_down(self.metalora_down[adapter_name].data, config.down_init, self._rows_of_weight)
            nn.init.kaiming_uniform_(self.metalora_mid_init[adapter_name], a=math.sqrt(5))
        if config.use_dora:
            self.metalora_magnitude[adapter_name] = nn.Parameter(torch.empty(config.num_slots, self.d_out))
        self._may_train.add(adapter_name)
        self.start_slots(adapter_name, "stored" if config.stage == "meta" else "fresh")
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.metalora_up[adapter_name].data.flatten(0, 1), a=math.sqrt(5))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def bind_down(
        self, key: str, down: Tensor, mid_init: Tensor, mean_mid: Tensor, mean_up: Tensor, fingerprint: str
    ) -> None:
        """Put a given Down under `key`, with the Mid that belongs to it and the mean subject of its stage 1.

        Args:
            down: (meta_r, d_in). mid_init: (r, meta_r). mean_mid: (r, meta_r). mean_up: (d_out, r).
        """
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            dtype = down.dtype
        self.metalora_down.give(key, _own_copy(down, device, dtype))
        self.metalora_mid_init[key] = _own_copy(mid_init, device, torch.float32)
        self.metalora_mean_mid[key] = _own_copy(mean_mid, device, torch.float32)
        self.metalora_mean_up[key] = _own_copy(mean_up, device, torch.float32)
        self.know_down(key, fingerprint)

    def know_down(self, key: str, fingerprint: str) -> None:
        """Remember the fingerprint of a Down that was put here checked."""
        self.down_fingerprint[key] = fingerprint, _version(self.metalora_down[key])

    def known_fingerprint(self, key: str) -> str | None:
        """The fingerprint a Down was put here with; None if there is none, or the Down was written since."""
        mark, version = self.down_fingerprint.get(key, (None, 0))
        return mark if mark is not None and _version(self.metalora_down[key]) == version else None

    @torch.no_grad()
    def start_slots(self, adapter_name: str, start: str, slots: list[int] | None = None) -> None:
        """Set slots (all by default) to where a subject starts: 'stored', 'mean' or 'fresh'."""
        mid, up, key = self.metalora_mid[adapter_name], self.metalora_up[adapter_name], self.down_key[adapter_name]
        chosen = slice(None) if slots is None else slots
        if start == "stored":
            mid[chosen] = self.metalora_mid_init[key].to(mid)
            up[chosen] = 0
        elif start == "mean":
            mean_mid, mean_up = self.mean_subject(key)
            mid[chosen] = mean_mid.to(mid)
            up[chosen] = mean_up.to(up)
        else:
            bound = 1 / math.sqrt(mid.shape[-1])
            mid[chosen] = torch.empty_like(mid[chosen]).uniform_(-bound, bound)
            up[chosen] = 0
        if adapter_name in self.metalora_magnitude and not mid.is_meta:
            magnitude = self.metalora_magnitude[adapter_name]
            magnitude[chosen] = self.row_norms(adapter_name)[chosen].to(magnitude)

    def mean_subject(self, key: str) -> tuple[Tensor, Tensor]:
        """Mean Mid (r, meta_r) and mean Up (d_out, r) of the stage 1 that made this Down."""
        if key in self.metalora_mean_mid:
            return self.metalora_mean_mid[key], self.metalora_mean_up[key]
        return self.metalora_mid[key].detach().mean(0), self.metalora_up[key].detach().mean(0)

    def _rows_of_weight(self) -> Tensor:
        """The base weight as (d_out, ...), dequantised, without what is merged into it."""
        return self._shaped_like_weight(self.unmerged_weight().detach())

    def row_norms(self, adapter_name: str) -> Tensor:
        """Norm of each row of the adapted weight for every slot, (slots, d_out), for DoRA."""
        weight, up = self._rows_of_weight(), self.metalora_up[adapter_name].detach()
        if self.down_key[adapter_name] not in self.metalora_down:  # not bound yet; Up is 0
            return weight.to(dtype_of_sums(weight)).norm(dim=-1).expand(up.shape[0], -1)
        folded = self.folded_factor(adapter_name)
        return decomposed_norms(weight.to(folded.device), folded, up, self.scaling[adapter_name])

    def adapter_device(self) -> torch.device:
        """Device of the factors."""
        return next(iter(self.metalora_up.values())).device if self.metalora_up else torch.device("cpu")

    def active_slots(self) -> int:
        """Smallest number of slots among the active adapters of this layer, a large number if there is none."""
        names = [name for name in self.active_adapters if name in self.metalora_mid]
        return min((self.metalora_mid[name].shape[0] for name in names), default=2**31)

    # ---- what trains ---------------------------------------------------------------------------------------------

    def down_trains(self, key: str) -> bool:
        """Whether the Down may have a gradient: its own adapter trains it, out of warm-up, and no subject uses it."""
        return (
            self.stage.get(key) == "meta"
            and not self.warmup[key]
            and not any(used == key for name, used in self.down_key.items() if name != key)
        )

    def sync_down(self) -> None:
        """Set `requires_grad` of every Down to what stage, warm-up and activity allow."""
        for key, down in self.metalora_down.items():
            if down.is_leaf:
                down.requires_grad_(self.down_trains(key) and self.metalora_mid[key].requires_grad)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's, without a look at those that stay inactive and frozen: a service has thousands of them."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in {*names, *self.active_adapters, *self._may_train}:
            self._require_gradient(name, name in names and not inference_mode)
        self._active_adapter = names
        self.sync_down()
        layers_changed()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.sync_down()
        layers_changed()

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze adapters, or let them train."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._require_gradient(name, requires_grad)
            if not requires_grad:
                self._may_train.discard(name)
        self.sync_down()

    def _require_gradient(self, adapter_name: str, required: bool) -> None:
        if required:
            self._may_train.add(adapter_name)
        for part in self.adapter_layer_names:
            factors = getattr(self, part)
            if adapter_name in factors and factors[adapter_name].is_leaf:
                factors[adapter_name].requires_grad_(required)

    def train(self, mode: bool = True) -> MetaLoraLayer:
        super().train(mode)
        if mode:  # what trains would leave a fold behind
            self.unfold()
        for key, down in self.metalora_down.items():
            if down.requires_grad and down.is_leaf and not self.down_trains(key):
                down.requires_grad_(False)
            elif mode and down.requires_grad:  # a compiled pass would not say so
                self.down_fingerprint.pop(key, None)
        return self

    def _down(self, key: str) -> Tensor:
        """The Down for a forward pass: cut off from autograd wherever it must not train, whatever its flag says."""
        down = self.metalora_down[key]
        if down.requires_grad and not self.down_trains(key):
            if not torch.compiler.is_compiling() and down.is_leaf:  # FSDP hands out views of its flat parameter
                down.requires_grad_(False)
            return down.detach()
        if down.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.down_fingerprint.pop(key, None)  # fused optimisers move it without torch's count of writes
        return down

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """As PEFT's, without a dtype where the base's is for storage only: factors keep one that is computed in."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        return device, None if dtype is not None and dtype.itemsize == 1 else dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MetaLoraLayer:
        """As nn.Module's, except that no cast stores factors in eight bits."""

        def computable(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            stored = moved.is_floating_point() and moved.element_size() == 1 < tensor.element_size()
            return tensor.to(moved.device) if stored else moved

        folded = [name for name in self.metalora_folded if self.is_folded(name)]
        for name, child in self.named_children() if recurse else ():
            if name == "base_layer":
                child._apply(fn)
                continue
            with torch.inference_mode(False):  # a move in inference mode would end torch's count of writes
                child._apply(computable)
        super()._apply(fn, recurse=False)  # FSDP keeps what it flattens on the layer itself
        for name in folded:
            self.fold_mark[name] = self._mark(name)
        return self

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        trained = self.trains(adapter_name)
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        self.set_trains(adapter_name, trained)

    def move_adapters(self, names: Collection[str], device: torch.device) -> None:
        """Move the factors of these adapters to a device, and the Downs that no other adapter uses."""
        keys = set(self.down_key.values()) - {key for name, key in self.down_key.items() if name not in names}
        own = self.metalora_mid, self.metalora_up, self.metalora_magnitude, self.metalora_folded
        downs = self.metalora_down, self.metalora_mid_init, self.metalora_mean_mid, self.metalora_mean_up
        for containers, chosen in ((own, names), (downs, keys)):
            for container in containers:
                for key in chosen:
                    if key in container:
                        container[key].data = container[key].data.to(device)

    def trains(self, adapter_name: str) -> bool:
        """Whether Mid and Up of an adapter require a gradient."""
        return self.metalora_mid[adapter_name].requires_grad if adapter_name in self.metalora_mid else False

    def set_trains(self, adapter_name: str, trains: bool) -> None:
        """Give the flag back after a cast, which makes new parameters, and new parameters require a gradient."""
        self._require_gradient(adapter_name, trains)
        self.sync_down()

    # ---- adapters come and go ------------------------------------------------------------------------------------

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.metalora_mid)

    def subjects_of(self, key: str) -> list[str]:
        """Names of the adapters that use the Down of adapter `key`, itself left out."""
        return sorted(name for name, used in self.down_key.items() if used == key and name != key)

    def require_deletable(self, adapter_name: str) -> None:
        """Raise AdapterStateError if other adapters use this adapter's Down."""
        if users := self.subjects_of(adapter_name):
            raise AdapterStateError(
                f"Adapter {adapter_name!r} holds the Down that {', '.join(map(repr, users))} use(s). Delete them first."
            )

    def rename_adapter(self, old: str, new: str) -> None:
        """Keep an unmerged adapter, and the Down that it trains, under another name; what is active is so by name."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, name)
            if old in container:
                container[new] = container.pop(old)
        if self.down_key[new] == old:
            self.down_key[new] = new
        if old in self._may_train:
            self._may_train = self._may_train - {old} | {new}
        layers_changed()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; a Down that a subject brought goes with its last user. Raises as `require_deletable`."""
        self.require_deletable(adapter_name)
        alone = self.active_adapters == [adapter_name]
        super().delete_adapter(adapter_name)
        if alone and [self.stage[name] for name in self.active_adapters] == ["subject"]:  # PEFT chose one
            self.set_adapter([])
        self._forget_unused_downs()

    def forget_adapter(self, adapter_name: str) -> None:
        """Drop whatever there is of an adapter that did not come about; what is active stays."""
        for name in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, name)
            if adapter_name in container:
                del container[adapter_name]
        self._forget_unused_downs()

    def _forget_unused_downs(self) -> None:
        downs = self.metalora_down, self.metalora_mid_init, self.metalora_mean_mid, self.metalora_mean_up
        for container in (*downs, self.down_fingerprint):
            for key in set(container) - set(self.down_key.values()):
                del container[key]
        self._may_train &= set(self.metalora_mid)
        self.shown_subject = None
        self.sync_down()
        layers_changed()

    # ---- forward -------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return base(x) plus the active adapters, each for the subject its sample or token was given."""
        adapter_names = kwargs.pop("adapter_names", None)
        if self.quantization_backend is not None and x.requires_grad and is_packed(self.get_base_layer()):
            unpack(self.get_base_layer())
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_by_names(x, adapter_names, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        base = result
        for name in self.active_adapters:
            if name not in self.metalora_mid:
                continue
            self._unfold_what_trains(name)
            if (table := self.token_slots) is None:
                result = self._add(result, base, x, name, self._chosen(x))
            elif places := table.positions(self._tokens(x, base), x.device):
                result = self._add_at(result, base, x, name, places)
        return result

    def _forward_by_names(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """A batch whose samples use different adapters, `__base__` for none (PEFT's mixed batches)."""
        if self.merged:
            raise AdapterStateError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(adapter_names) != x.shape[0]:
            raise AdapterStateError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {x.shape[0]}."
            )
        result = self.base_layer(x, *args, **kwargs)
        chosen = self._chosen(x)
        for name in dict.fromkeys(adapter_names):
            if name not in self.metalora_mid:
                continue
            rows = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
            part = None if chosen is None else Chosen(chosen.slot[rows], chosen.present[rows])
            base = result[rows]
            result = result.index_copy(0, rows, self._add(base, base, x[rows], name, part))
        return result

    def _unfold_what_trains(self, name: str) -> None:
        """Before a pass with a gradient: fused optimisers move factors without torch's count of writes."""
        has_fold = self.shown_subject is not None or len(self.metalora_folded) > 0
        if has_fold and torch.is_grad_enabled() and not torch.compiler.is_compiling() and self.trains(name):
            self.unfold()

    def _batch(self, x: Tensor) -> int:
        """Number of samples in x."""
        return x.shape[0] if x.dim() > 1 else 1

    def _chosen(self, x: Tensor) -> Chosen | None:
        return self.subject_index.select(self._batch(x), x.device)

    def _dropped(self, x: Tensor, name: str) -> Tensor:
        return self.metalora_dropout[name](x) if name in self.metalora_dropout else x

    def _add(self, result: Tensor, base: Tensor, x: Tensor, name: str, chosen: Chosen | None) -> Tensor:
        """Return result + the adapter's contribution for x.

        Args:
            result: the base and the adapters added so far. base: the base alone. chosen: each sample's slot, None is 0.
        """
        raise NotImplementedError

    def _tokens(self, x: Tensor, base: Tensor) -> tuple[int, ...]:
        """Shape of the tokens of one sample, for the layer's input and the base's output."""
        raise NotImplementedError

    def _add_at(self, result: Tensor, base: Tensor, x: Tensor, name: str, places: Positions) -> Tensor:
        """As `_add`, with a subject for each token: one Down for all tokens, then each subject's Mid and Up on its own.

        Tokens without a subject keep the base's output bit for bit.
        """
        raise NotImplementedError


@contextmanager
def subjects_aside(layers: Iterable[MetaLoraLayer]) -> Iterator[None]:
    """Hide the factors of all subjects for the length of a `with` block; those that come in it join them.

    PEFT walks over every parameter of a model several times for each adapter that comes, so that each person would
    take longer to load than the one before.
    """
    kept = []
    for layer in layers:
        for part in layer.adapter_layer_names:
            factors = getattr(layer, part)
            kept.append((factors, factors._parameters, factors._keys))
            own = {key: factors._parameters[key] for key in layer.metalora_down if key in factors._parameters}
            vars(factors).update(_parameters=own, _keys=dict.fromkeys(own))
    try:
        yield
    finally:
        for factors, parameters, keys in kept:
            parameters.update(factors._parameters)
            keys.update(factors._keys)
            vars(factors).update(_parameters=parameters, _keys=keys)


def _fold_again(layer: MetaLoraLayer, _: Any) -> None:
    """After `load_state_dict`: a fold of what was there before would show the old subject."""
    layer.shown_subject = None
    for name in layer.metalora_folded:
        layer.fold(name)


def _version(down: Tensor) -> int:
    """How often a Down that can train was written in place; a buffer never trains."""
    return down._version if isinstance(down, nn.Parameter) and not down.is_inference() else 0


def _own_copy(tensor: Tensor, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """A copy that shares no storage with the source, so that a loaded file can be freed."""
    return tensor.detach().to(device=device, dtype=dtype, copy=True)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype, itself if it has it."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
