# SPDX-License-Identifier: Apache-2.0
"""`MetaLoraModel`: puts the layers on a model, binds subjects to their Down, and says what a saved adapter holds.

Everything that can go wrong with a config is found by `plan_injection` before the model is touched."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import AdapterNotFoundError, AdapterStateError, NoTargetModulesError
from .adding import inject_all_or_nothing, predecessor_aside, replace_target
from .combine import add_weighted_subject
from .down import DOWN, MID_INIT
from .functional import set_merge_backup
from .layer import MetaLoraLayer
from .merging import merged_or_as_before
from .on_model import meta_lora_layers
from .registration import PREFIX


class MetaLoraModel(BaseTuner):
    """A model with Meta-LoRA adapters; made by `peft.get_peft_model(model, MetaLoraConfig(...))`.

    Raises, before the model is changed: NoTargetModulesError, UnsupportedModuleError,
    ConfigError (ranks that cannot be), MissingDownError, FingerprintMismatchError, ShapeMismatchError and
    RankMismatchError (a Down that is absent or does not fit).
    """

    prefix: str = PREFIX
    tuner_layer_cls = MetaLoraLayer
    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        with predecessor_aside(model, adapter_name):
            super().__init__(model, peft_config, adapter_name, **kwargs)

    # ---- injection -----------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter: all or nothing."""
        proceed = partial(
            super().inject_adapter,
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )
        inject_all_or_nothing(self, model, adapter_name, state_dict, proceed)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        replace_target(self, peft_config, adapter_name, target, target_name, parent, current_key)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            found = self.target_module_mapping.get(model_config.get("model_type", ""))
            if found is None:
                raise NoTargetModulesError(
                    "target_modules is not set and this model has no default. Please specify `target_modules`, "
                    'for example ["to_q", "to_k", "to_v", "to_out.0"] or "all-linear".'
                )
            peft_config.target_modules = found if isinstance(found, str) else set(found)
        return peft_config

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        flags = [(layer, layer.trains(adapter_name)) for _, layer in meta_lora_layers(self)]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer, trains in flags:
            layer.set_trains(adapter_name, trains)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and a Down that only it used.

        Raises:
            AdapterNotFoundError: there is no such adapter.
            AdapterStateError: other adapters use its Down.
        """
        if adapter_name not in self.peft_config:
            raise AdapterNotFoundError(
                f"Adapter {adapter_name} does not exist. The model has: {', '.join(self.peft_config) or 'none'}."
            )
        for _, layer in meta_lora_layers(self):
            layer.require_deletable(adapter_name)
        super().delete_adapter(adapter_name)

    add_weighted_adapter = add_weighted_subject

    # ---- merging -------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge every layer, or none: if one layer refuses, all are what they were before the call."""
        layers = [layer for _, layer in meta_lora_layers(self.model)]
        with merged_or_as_before(layers, safe_merge, adapter_names):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: the base layer is whole, and PEFT would assign it weights that trained tokens compute
            setattr(parent, child_name, new_module)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = True,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        # The layers are thrown away, so that nothing could ever be unmerged: no weight needs keeping.
        backups = [(layer, layer.merge_backup) for _, layer in meta_lora_layers(self.model)]
        if merge:
            for layer, _ in backups:
                layer.check_merge(safe_merge, adapter_names)
            set_merge_backup(self.model, "none")
        try:
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        finally:
            for layer, backup in backups:
                layer.merge_backup = backup

    # ---- state dict ----------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Down, its Mid start, Mid and Up of a meta adapter; Mid and Up alone of a subject."""
        state = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return {key: value for key, value in state.items() if not _belongs_to_other_down(key, adapter_name)}

    # ---- mixed batches by adapter name ---------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Hand PEFT's `adapter_names` argument of a model call to the layers."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise AdapterStateError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        unknown = sorted(set(adapter_names) - {"__base__"} - set(self.peft_config))
        if unknown:
            raise AdapterNotFoundError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. The model has: "
                f"{', '.join(self.peft_config)}; '__base__' stands for no adapter."
            )
        num_beams = kwargs.get("num_beams")
        by_beam = [name for name in adapter_names for _ in range(num_beams if isinstance(num_beams, int) else 1)]
        encoder = _encoder_modules(self.model)
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, list(adapter_names) if module in encoder else by_beam), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (MetaLoraLayer, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _encoder_modules(model: nn.Module) -> set[nn.Module]:
    """What sees each sample once where a decoder sees it once for each beam."""
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = get_encoder() if callable(get_encoder) else None
    # transformers' models without an encoder name themselves
    return set(encoder.modules()) if isinstance(encoder, nn.Module) and encoder is not model else set()


def _pass_adapter_names(names: list[str], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    kwargs["adapter_names"] = names
    return args, kwargs


def _belongs_to_other_down(key: str, adapter_name: str) -> bool:
    head, _, last = key.rpartition(".")
    return head.rpartition(".")[2] in (DOWN, MID_INIT) and last != adapter_name
