# SPDX-License-Identifier: Apache-2.0
"""A frozen base that is divided over the processes of a run, as `accelerate launch` was told to.

`--use_fsdp --fsdp_version 2` divides it by PyTorch's `fully_shard`, `--use_deepspeed --zero_stage 3` by DeepSpeed's
ZeRO-3; both gather a block's weights when it computes, forward and backward. It is the base alone that is divided,
before an adapter stands on it: Down, Mid and Up are whole on every process, and the stages sum their gradients
themselves. The lower stages of ZeRO divide what belongs to trained weights only; with them the base is whole too.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import is_deepspeed_available
from torch import nn

from ...bases import Base
from ...errors import ConfigError
from ..stage_settings import TrainingConfig
from .compiling import backend_of
from .processes import Processes


def wants_shards(processes: Processes, config: TrainingConfig) -> bool:
    """Whether the launcher's environment asks for a divided base, and there are processes to divide it over.

    Raises:
        ConfigError: it asks for what cannot be: FSDP 1, offloaded weights with FSDP, DeepSpeed without the package, or
            its stage 3 with torch.compile.
    """
    if processes.count == 1:
        return False
    if _asks("FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ConfigError("expected FSDP version 2, found 1: give accelerate launch --fsdp_version 2")
        if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
            raise ConfigError("expected FSDP without offloading, found fsdp_offload_params: leave it out")
        return True
    if not _asks("DEEPSPEED") or _zero().zero_stage != 3:
        return False
    if backend_of(config) is not None:
        raise ConfigError(
            "expected no dynamo_backend beside DeepSpeed's stage 3, which gathers weights where no graph can go: use "
            "'no', or FSDP"
        )
    return True


def shard(base: Base, device: torch.device, processes: Processes, config: TrainingConfig) -> None:
    """Divide the denoiser, which should still be on the CPU, over the processes; each keeps its part on `device`.

    Does nothing unless `wants_shards`. Block by block, so that no device ever holds the whole.

    Raises:
        ConfigError: as `wants_shards`, or FSDP is to divide classes that the denoiser has not.
    """
    if not wants_shards(processes, config):
        return
    if _asks("FSDP"):
        _shard_fsdp(base.denoiser, device, processes)
    else:
        _shard_zero(base.denoiser, base.dtype, device)


def _asks(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def _shard_fsdp(denoiser: nn.Module, device: torch.device, processes: Processes) -> None:
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    by_block = os.environ.get("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy=by_block)
    try:
        plugin.set_auto_wrap_policy(denoiser)
    except ValueError as error:
        raise ConfigError(
            f"expected classes of {type(denoiser).__name__} in fsdp_transformer_layer_cls_to_wrap, found others: "
            f"{error}. Leave it out to divide by the model's own blocks"
        ) from error
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, denoiser)
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (processes.count,))}
    for module in reversed(list(denoiser.modules())[1:]):  # a module comes after those inside it
        if is_unit is not None and is_unit(module):
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(denoiser, **options)
    if plugin.activation_checkpointing:
        denoiser.enable_gradient_checkpointing()  # type: ignore[operator]


def _zero() -> DeepSpeedPlugin:
    if not is_deepspeed_available():
        raise ConfigError("expected deepspeed, which the launcher asks for, found none: pip install deepspeed")
    return DeepSpeedPlugin()


def _shard_zero(denoiser: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    import deepspeed

    # Batch sizes, optimiser, clipping and precision of the plugin's configuration are this package's own settings.
    zero = _without_auto(_zero().deepspeed_config["zero_optimization"])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": float("inf"),
    }
    deepspeed.init_distributed(auto_mpi_discovery=False)
    deepspeed.zero.Init(module=denoiser, config_dict_or_path=config, dtype=dtype)
    for buffer in denoiser.buffers():
        buffer.data = buffer.data.to(device)
    # Without an optimiser this puts the hooks on the modules that gather their weights; they outlive the engine.
    deepspeed.initialize(model=denoiser, config=config)


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own defaults for what accelerate would fill in from the optimiser or the model."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value != "auto"
    }
