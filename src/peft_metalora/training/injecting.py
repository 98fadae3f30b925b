# SPDX-License-Identifier: Apache-2.0
"""An adapter to train on a denoiser: put on and taken off, what ends its run, and what is said where a run ends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..bases import Base
from ..errors import AdapterStateError, ConfigError, MetaLoraError, TrainingError, WriteFailedError
from ..tuner.on_model import meta_lora_layers
from ..tuner.placing import remember, restore
from .engine.compiling import compile_blocks, uncompile
from .engine.loop import Sanity
from .engine.state import last_checkpoint
from .examples.batches import Examples
from .stage_settings import TrainingConfig

_DROPOUTS = nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout


def inject(base: Base, adapter: PeftConfig, name: str, config: TrainingConfig) -> list[nn.Parameter]:
    """Put an adapter on the denoiser and compile its blocks, if the settings say so.

    The denoiser's own weights are frozen; the adapter's are float32.

    Returns:
        The parameters that train.

    Raises:
        AdapterStateError: the denoiser has adapters already.
        NoTargetModulesError, ConfigError and what else the tuner raises; the denoiser is then as it was.
    """
    denoiser = base.denoiser
    if getattr(denoiser, "peft_config", None):
        raise AdapterStateError(
            f"expected a denoiser without adapters, found {', '.join(denoiser.peft_config)}: unload them first"
        )
    compile_blocks(denoiser, config)
    remember(denoiser)
    denoiser.requires_grad_(False)
    before = set(denoiser.parameters())
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                denoiser.add_adapter(adapter, adapter_name=name)
            except ValueError as error:
                if isinstance(error, MetaLoraError):
                    raise
                raise ConfigError(f"expected target_modules that can be adapted, found: {error}") from error
        for path, _ in meta_lora_layers(denoiser):
            if re.fullmatch(base.ragged_layers, path):
                raise ConfigError(
                    f"expected target_modules that tell the prompts of a batch apart, found {path}, which sees them "
                    "one behind the other. Leave it out."
                )
    except BaseException:
        take_off(base, config)
        raise
    own = [parameter for parameter in denoiser.parameters() if parameter not in before]
    for parameter in own:
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if base.stream is not None:
        base.stream.settle()
        denoiser.enable_gradient_checkpointing(base.stream.checkpointed)
    elif config.gradient_checkpointing:
        random = any(isinstance(module, _DROPOUTS) and module.p for module in denoiser.modules())
        # Random numbers that nobody draws need not be kept, and where they are, nothing can be recorded.
        denoiser.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=random))
    denoiser.train()
    return [parameter for parameter in own if parameter.requires_grad]


def take_off(base: Base, config: TrainingConfig) -> None:
    """Undo `inject`: the denoiser is what it was before, with all that it was set to."""
    restore(base.denoiser, every=True)
    uncompile(base.denoiser, config)


def sanity_of(
    base: Base, examples: Examples, *, losses: Sequence[float] = (), done: int = 0, prior_loss_weight: float = 0.0
) -> Sanity:
    """What stops a run that destroys what it learns; `losses` and `done` as `Sanity` takes them."""
    generator = torch.Generator().manual_seed(0)
    squares = []
    for position in range(0, len(examples), -(-len(examples) // 16)):
        shape = examples.like(position, 1).shape
        # Fresh views are not cut yet; latents are scaled to a deviation of 1.
        latents = torch.randn(shape, generator=generator) if examples.fresh else examples.latents[position][None].cpu()
        noise = torch.randn(shape, generator=generator)
        squares.append(base.target(latents.float(), noise, base.sample_times(latents, generator)).square().mean())
    return Sanity(float(torch.stack(squares).mean()) * (1 + prior_loss_weight), losses, done)


@contextmanager
def saying_what_is_left(config: TrainingConfig, result: str | None = None) -> Iterator[None]:
    """Context of a run that writes: an error that ends it also says what there is of the run, and where.

    Args:
        result: what there is already, in a sentence without its full stop; None: nothing.
    """
    try:
        yield
    except TrainingError as error:
        good = error.good_step
        checkpoint = None if good is None else last_checkpoint(config.output_dir, good)
        left = "no checkpoint is from before" if checkpoint is None else f"the last good checkpoint is {checkpoint}"
        result = result or f"No result was written to {config.output_dir}"
        raise TrainingError(f"{error} {result}; {left}.", good) from error
    except WriteFailedError as error:
        if config.checkpointing_steps is None or last_checkpoint(config.output_dir) is None:
            raise
        raise WriteFailedError(f"{error} Then go on with resume_from_checkpoint 'latest'.") from error
