# SPDX-License-Identifier: Apache-2.0
"""How a base is held in few gigabytes: quantised weights, and where they wait; one table says what goes together.

The quantisers and, to draw with, the hooks are diffusers' and transformers' own. Training streams the blocks of the
denoiser by `streaming`, because those hooks let go of weights before the backward pass.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import ModelMixin
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationMethod
from torch import nn

from ..errors import ConfigError
from ..settings import OFFLOAD, QUANTIZE
from .streaming import HostMemory, blocks_of

USES = "train", "draw", "read", "evaluate"
"""What a base is loaded for."""
CPU, COMPILED, DIVIDED = "on a CPU", "with compiled blocks", "with a base divided over processes"
DRAWING, UNCHECKPOINTED = "with pictures of validation", "without gradient checkpointing"
OTHER_METHODS = "with other methods than base, meta-lora, random-down and lora"
MODULAR = "with a modular pipeline"
CIRCUMSTANCES = CPU, COMPILED, DIVIDED, DRAWING, UNCHECKPOINTED, OTHER_METHODS, MODULAR
"""What else may hold, and then matters."""

QUANTIZERS, OFFLOADS = QUANTIZE[2], OFFLOAD[2]
_QUANTIZED, _WAITING = QUANTIZERS[1:], OFFLOADS[1:]
_LOADED = "train", "draw", "evaluate"  # reading loads nothing that is quantised, or waits
_PACKAGES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


class Memory(Protocol):
    """Settings that say how a base is held."""

    quantize: str
    offload: str


@dataclass
class Whole:
    """All weights as they are, all on the device."""

    quantize: str = "none"
    offload: str = "none"


@dataclass(frozen=True)
class _Refused:
    """Cells of the table that are refused, and why; of an axis that is left out, all."""

    why: str
    quantize: tuple[str, ...] = QUANTIZERS
    offload: tuple[str, ...] = OFFLOADS
    use: tuple[str, ...] = USES
    where: str | None = None


# All families have linear layers in blocks that repeat and are checkpointed, so that the table holds for each alike.
_TABLE = (
    _Refused("bitsandbytes' quantiser in diffusers needs a GPU", quantize=("nf4",), use=_LOADED, where=CPU),
    _Refused("accelerate brings layers to a GPU only", offload=("sequential",), use=_LOADED, where=CPU),
    _Refused("layers have left again when the backward pass needs them", offload=("sequential",), use=("train",)),
    _Refused("accelerate takes quantised weights apart", quantize=_QUANTIZED, offload=("sequential",), use=("draw",)),
    _Refused("diffusers parks 4-bit weights without their scales", ("nf4",), ("group",), ("draw",)),
    _Refused("training and drawing take turns, for which all has to be there", offload=_WAITING, use=("evaluate",)),
    _Refused("a compiled block keeps the weights that it saw first", offload=("group",), where=COMPILED),
    _Refused("this was never tried", quantize=("nf4",), where=COMPILED),
    _Refused("only whole weights can be divided", quantize=_QUANTIZED, where=DIVIDED),
    _Refused("a divided base is on the devices already", offload=_WAITING, where=DIVIDED),
    _Refused("text encoders have left when pictures are drawn", offload=_WAITING, use=("train",), where=DRAWING),
    _Refused("blocks come back for the backward pass by it", offload=("group",), use=("train",), where=UNCHECKPOINTED),
    _Refused("diffusers offloads those by a manager of its own", offload=_WAITING, use=("draw",), where=MODULAR),
    _Refused("they change or decompose whole weights", quantize=_QUANTIZED, use=("evaluate",), where=OTHER_METHODS),
)


def require_supported(asked: Memory, use: str, *circumstances: str) -> None:
    """Check a cell of the table.

    Args:
        use: one of `USES`. circumstances: of `CIRCUMSTANCES` those that hold.

    Raises:
        ConfigError: it is refused, in a sentence that says what is possible. Or the package of a quantiser is missing.
    """
    quantize, offload = asked.quantize, asked.offload
    for name, known in (("quantize", QUANTIZERS), ("offload", OFFLOADS)):
        if getattr(asked, name) not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}, found {getattr(asked, name)!r}")
    row = _refusal(quantize, offload, use, circumstances)
    if row is not None:
        offloads = [one for one in OFFLOADS if _refusal(quantize, one, use, circumstances) is None]
        quantizers = [one for one in QUANTIZERS if _refusal(one, offload, use, circumstances) is None]
        possible = [
            *([f"offload {' or '.join(offloads)} with quantize {quantize}"] if offloads else []),
            *([f"quantize {' or '.join(quantizers)} with offload {offload}"] if quantizers else []),
        ]
        raise ConfigError(
            f"expected quantize and offload that go together, found {quantize!r} and {offload!r} to {use}"
            f"{f' {row.where}' if row.where else ''}: {row.why}; possible there: "
            f"{', '.join(possible) or 'none with none'}"
        )
    package = _PACKAGES.get(quantize)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"quantize {quantize!r} needs {package}, found none: pip install {package}")


def _refusal(quantize: str, offload: str, use: str, circumstances: Iterable[str]) -> _Refused | None:
    for row in _TABLE:
        here = row.where is None or row.where in circumstances
        if here and quantize in row.quantize and offload in row.offload and use in row.use:
            return row
    return None


def lighter(config: Any) -> list[str]:
    """Changes of a command's settings that take less memory, as flags, in the order in which they are worth a try."""
    told_by = {"gradient_checkpointing": "train", "photos": "read", "method": "evaluate"}
    use = next((use for name, use in told_by.items() if hasattr(config, name)), "draw")
    on_cpu = getattr(config, "device", None) == "cpu" or not torch.cuda.is_available()
    compiled = getattr(config, "dynamo_backend", None) not in (None, "no")
    here = [*([CPU] if on_cpu else []), *([COMPILED] if compiled else [])]
    changes = []
    if use == "train" and not config.gradient_checkpointing:
        changes.append("--gradient_checkpointing")
    if getattr(config, "mixed_precision", None) == "no":
        changes.append("--mixed_precision bf16")
    quantize, offload = (getattr(config, name, None) if use != "read" else None for name in ("quantize", "offload"))
    if quantize == "none":
        fits = [one for one in ("nf4", "int8") if _refusal(one, str(offload), use, here) is None]
        changes += [f"--quantize {one}" for one in fits[:1]]
    if offload is not None:
        order = ("model", "group") if use == "train" else ("model", "group", "sequential")
        later = order[order.index(offload) + 1 :] if offload in order else order if offload == "none" else ()
        fits = [one for one in later if _refusal(str(quantize), one, use, here) is None]
        changes += [f"--offload {one}" for one in (fits[-1:] if use == "train" else fits[:1])]
    for name in ("train_batch_size", "subjects_per_batch", "num_images_per_prompt", "num_frames"):
        if (getattr(config, name, 1) or 1) > 1:
            changes.append(f"a smaller --{name}")
    if hasattr(config, "resolution"):
        changes.append("a smaller --resolution")
    return changes


def quantization(asked: Memory, hull: nn.Module, dtype: torch.dtype) -> Any:
    """The configuration of diffusers or transformers that quantises this model while it loads.

    Args:
        dtype: in which it computes.
    """
    library: Any = importlib.import_module("diffusers" if isinstance(hull, ModelMixin) else "transformers")
    if asked.quantize == "nf4":
        found = library.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            llm_int8_skip_modules=list(outside_of_blocks(hull)) or None,
        )
        if asked.offload == "group" and isinstance(hull, ModelMixin):
            found.quant_method = _ToHost.method
        return found
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    recipe = Int8WeightOnlyConfig() if asked.quantize == "int8" else Float8WeightOnlyConfig()
    return library.TorchAoConfig(recipe, modules_to_not_convert=list(outside_of_blocks(hull)) or None)


class _ToHost(BnB4BitDiffusersQuantizer):
    """Quantises one weight after another on the device, and keeps what comes of it on the host.

    diffusers' own leaves it there, so that a model whose blocks are to wait would need its whole size once.
    """

    method = "bitsandbytes_4bit_to_host"
    supports_parallel_loading = False  # two files read side by side would be given one place on the host

    def __init__(self, config: Any, **options: Any) -> None:
        config.quant_method = QuantizationMethod.BITS_AND_BYTES  # as it was: from here on all is bitsandbytes' own
        super().__init__(config, **options)

    def update_device_map(self, device_map: Any) -> None:
        """Hold the device; no map, with which diffusers puts all that is not quantised on the host."""
        (self._device,) = map(torch.device, super().update_device_map(device_map).values())
        self._host = HostMemory(pinned=self._device.type == "cuda")

    def create_quantized_param(self, model: Any, value: Any, name: str, _: Any, *args: Any, **options: Any) -> None:
        super().create_quantized_param(model, value, name, self._device, *args, **options)
        parameter = model.get_parameter(name)
        parameter.data = self._host.keep(parameter.data)


# A name of its own beside diffusers': whoever else loads 4-bit weights, in another thread too, has them as ever.
AUTO_QUANTIZER_MAPPING[_ToHost.method] = _ToHost


def outside_of_blocks(hull: nn.Module) -> Iterator[str]:
    """Names of a denoiser's parts around its blocks, which are small and coarse rounding would show in every pixel.

    Only names that no module in a block ends in: quantisers compare parts of paths.
    """
    if not isinstance(hull, ModelMixin):
        return
    blocks = blocks_of(hull)
    inside = {f"{path}." for block in blocks for path, _ in block.named_modules() if path}
    for name, child in hull.named_children():
        if set(blocks).isdisjoint(child.modules()) and not any(path.endswith(f"{name}.") for path in inside):
            yield name


def ready_to_draw(pipe: Any, asked: Memory, device: torch.device) -> None:
    """Put a pipeline that is loaded where it draws from, or have diffusers bring what is in use."""
    if asked.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif asked.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif asked.offload == "group":
        streams = device.type == "cuda"
        pipe.enable_group_offload(
            onload_device=device, offload_type="leaf_level", use_stream=streams, low_cpu_mem_usage=streams
        )
    else:
        pipe.to(device)
