# SPDX-License-Identifier: Apache-2.0
"""What of other libraries the package relies on beyond their public names: private, patched, overridden or copied.

A release of theirs may change any of it without a word. When one does, a test here says which and what to read:

    python tests/test_hosts.py      # prints the table for the versions that are installed
    make drift                      # the newest releases, in an environment of their own
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import peft_metalora

PACKAGE = Path(peft_metalora.__file__).parent
HOSTS = (
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "peft",
    "torch",
    "torchao",
    "transformers",
    "triton",
)
# Set by the package on objects of a host, and read by it alone.
OURS = {"_index", "_plan"}
COMPILED = "compiled"
GONE = "gone"

# Where a host defines it: (digest of its source, the files of ours to read when that changes, and why).
# fmt: off
TABLE: dict[str, tuple[str, str, str]] = {
    "accelerate.hooks.AlignDevicesHook":
        ("389db1d0fa3b", "pipelines/denoiser.py", "taken off containers of factors"),
    "accelerate.hooks.add_hook_to_module":
        ("1eaa07ffc77f", "pipelines/denoiser.py, bases/base.py, training/engine/replay.py", "keeps its hook: _hf_hook"),
    "accelerate.utils.fsdp_utils.fsdp2_prepare_auto_wrap_policy":
        ("78c147829813", "training/engine/sharding.py", "undocumented: which modules are divided alone"),
    "accelerate.utils.launch.prepare_multi_gpu_env":
        ("c6cbf8ad3e41", "training/engine/sharding.py, training/engine/compiling.py", "environment of the launcher"),
    "bitsandbytes.functional._convert_weight_packed_for_cpu":
        ("ae1e40bee120", "tuner/base_layers.py", "the layout that is unpacked"),
    "bitsandbytes.functional._convert_weight_packed_for_cpu_inverse":
        ("bf8245163abe", "tuner/base_layers.py", "called, its rounding undone"),
    "bitsandbytes.nn.modules.Linear4bit":
        ("75972034120e", "tuner/base_layers.py, tuner/merging.py", "when it packs; quant_state is kept twice"),
    "diffusers.configuration_utils.ConfigMixin.to_json_string":
        ("76499701dfad", "bases/parts.py", "says a pipeline's class: _class_name"),
    "diffusers.hooks.group_offloading.GroupOffloadingHook":
        ("791abfd6fb19", "pipelines/denoiser.py", "its group and config are read"),
    "diffusers.hooks.group_offloading.ModuleGroup":
        ("176aeaa0b23b", "pipelines/denoiser.py", "its onload_ and stream are used"),
    "diffusers.hooks.group_offloading._GROUP_OFFLOADING":
        ("963fb11e8cb3", "pipelines/denoiser.py", "name of the hook that is taken off"),
    "diffusers.hooks.group_offloading._get_top_level_group_offload_hook":
        ("3c02a20f3b58", "pipelines/denoiser.py", "called"),
    "diffusers.hooks.group_offloading._maybe_remove_and_reapply_group_offloading":
        ("e026422d36eb", "pipelines/denoiser.py", "called"),
    "diffusers.hooks.hooks.HookRegistry":
        ("f32bbaeb4920", "pipelines/denoiser.py, training/engine/replay.py", "keeps its hooks: _diffusers_hook"),
    "diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY":
        ("1eb29b3d2bf6", "lora/lora_file.py", "copied: where a LoRA file keeps its alpha"),
    "diffusers.loaders.lora_base.LoraBaseMixin._lora_loadable_modules":
        ("b09136e0b7be", "pipelines/denoiser.py, pipelines/loader.py", "read; shadowed in an unload"),
    "diffusers.loaders.lora_base.LoraBaseMixin.set_lora_device":
        ("d4171198ad59", "tuner/layer.py, pipelines/choosing.py", "looks for lora_A in layers of every method"),
    "diffusers.loaders.lora_base._func_optionally_disable_offloading":
        ("5a2d09aaf966", "pipelines/denoiser.py", "called"),
    "diffusers.loaders.lora_conversion_utils._convert_kohya_flux_lora_to_diffusers":
        ("0b1f78b08b3f", "lora/original_names.py", "the inverse is written there"),
    "diffusers.loaders.lora_conversion_utils._convert_non_diffusers_flux2_lora_to_diffusers":
        ("bf2e116cc8de", "lora/original_names.py", "the inverse is written there"),
    "diffusers.loaders.lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers":
        ("97fb43fb20dd", "lora/original_names.py", "the inverse is written there"),
    "diffusers.loaders.peft.PeftAdapterMixin.add_adapter":
        ("7b21a8a2b115", "tuner/adding.py, tuner/placing.py", "when _hf_peft_config_loaded is set"),
    "diffusers.loaders.peft.PeftAdapterMixin.delete_adapters":
        ("a99ac631ac32", "tuner/placing.py", "what goes with the last adapter"),
    "diffusers.loaders.peft.PeftAdapterMixin.load_lora_adapter":
        ("334fc45b14f8", "tuner/adding.py, tuner/placing.py", "when _hf_peft_config_loaded is set"),
    "diffusers.models.modeling_utils.ModelMixin._keep_in_fp32_modules":
        ("c4417c9a7b7c", "bases/base.py, bases/footprint.py", "read: which modules stay float32"),
    "diffusers.models.modeling_utils.ModelMixin._no_split_modules":
        ("fd7e00a83b2f", "bases/streaming.py", "read where there are no _repeated_blocks"),
    "diffusers.models.modeling_utils.ModelMixin._repeated_blocks":
        ("d4d61900a9e2", "training/engine/compiling.py, bases/streaming.py", "read: what is compiled and streamed"),
    "diffusers.models.modeling_utils.ModelMixin._supports_gradient_checkpointing":
        ("1c6a51aca98e", "training/preparing.py", "whether a denoiser can compute its blocks again"),
    "diffusers.models.modeling_utils.ModelMixin.dtype":
        ("4caecec98547", "bases/base.py", "copied for speed"),
    "diffusers.models.transformers.transformer_z_image.SEQ_MULTI_OF":
        ("224fbed21594", "pipelines/regions.py", "copied: what tokens are filled up to"),
    "diffusers.modular_pipelines.flux3.before_denoise.Flux3PrepareLatentsStep.__init__":
        ("219b71812221", "bases/flux3.py", "copied: the scale of rows and columns"),
    "diffusers.modular_pipelines.flux3.before_denoise.Flux3TextRoPEInputsStep._prepare_text_ids":
        ("554de64a3495", "bases/flux3.py", "called"),
    "diffusers.modular_pipelines.flux3.before_denoise._prepare_image_ids":
        ("7f5585543f0d", "bases/flux3.py", "called"),
    "diffusers.modular_pipelines.flux3.encoders.Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds":
        ("98e7fcc708bb", "bases/flux3.py", "called"),
    "diffusers.modular_pipelines.flux3.encoders.Flux3VaeEncoderStep._patchify_latents":
        ("025495d9b9e2", "bases/flux3.py", "called"),
    "diffusers.pipelines.flux.pipeline_flux.FluxPipeline._pack_latents":
        ("ce215d0f8a42", "bases/flux1.py, demo/make_base.py", "called"),
    "diffusers.pipelines.flux.pipeline_flux.FluxPipeline._prepare_latent_image_ids":
        ("49048833af05", "bases/flux1.py, demo/make_base.py", "called"),
    "diffusers.pipelines.flux.pipeline_flux.FluxPipeline._unpack_latents":
        ("848d522c6842", "bases/flux1.py", "called"),
    "diffusers.pipelines.flux.pipeline_flux.calculate_shift":
        ("4c10dc13eec1", "bases/base.py", "copied: the shift of noise levels"),
    "diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._encode_vae_image":
        ("a627499c3698", "bases/flux2.py", "called"),
    "diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._pack_latents":
        ("1f3f9f44c05d", "bases/flux2.py", "called"),
    "diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._prepare_latent_ids":
        ("767d2090a0b7", "bases/flux2.py", "called"),
    "diffusers.pipelines.flux2.pipeline_flux2.Flux2Pipeline._prepare_text_ids":
        ("45f85f0414ee", "bases/flux2.py", "called"),
    "diffusers.pipelines.flux2.pipeline_flux2_klein.Flux2KleinPipeline._encode_vae_image":
        ("a627499c3698", "bases/flux2.py", "called"),
    "diffusers.pipelines.flux2.pipeline_flux2_klein.Flux2KleinPipeline._pack_latents":
        ("1f3f9f44c05d", "bases/flux2.py", "called"),
    "diffusers.pipelines.flux2.pipeline_flux2_klein.Flux2KleinPipeline._prepare_latent_ids":
        ("767d2090a0b7", "bases/flux2.py", "called"),
    "diffusers.pipelines.flux2.pipeline_flux2_klein.Flux2KleinPipeline._prepare_text_ids":
        ("45f85f0414ee", "bases/flux2.py", "called"),
    "diffusers.pipelines.flux2.pipeline_flux2_klein.compute_empirical_mu":
        ("b5daab70292e", "bases/flux2.py", "undocumented: the shift of noise levels"),
    "diffusers.pipelines.krea2.pipeline_krea2.Krea2Pipeline._pack_latents":
        ("cd92478f9482", "bases/krea2.py", "called"),
    "diffusers.pipelines.krea2.pipeline_krea2.Krea2Pipeline._unpack_latents":
        ("c3fab6cf6bdc", "bases/krea2.py", "called"),
    "diffusers.pipelines.pipeline_utils.DiffusionPipeline.enable_model_cpu_offload":
        ("ea5922a3855d", "pipelines/denoiser.py", "keeps _offload_device, which is read"),
    "diffusers.pipelines.pipeline_utils.DiffusionPipeline.enable_sequential_cpu_offload":
        ("eaf2d37f8efe", "pipelines/denoiser.py", "keeps _offload_device, which is read"),
    "diffusers.pipelines.qwenimage.pipeline_qwenimage.QwenImagePipeline._pack_latents":
        ("ce215d0f8a42", "bases/qwen_image.py", "called"),
    "diffusers.pipelines.qwenimage.pipeline_qwenimage.QwenImagePipeline._unpack_latents":
        ("2be618337a51", "bases/qwen_image.py", "called"),
    "diffusers.quantizers.auto.DiffusersAutoQuantizer.from_config":
        ("5806ceb6fcef", "bases/memory.py", "undocumented: finds our quantiser by its name"),
    "diffusers.quantizers.bitsandbytes.bnb_quantizer.BnB4BitDiffusersQuantizer.create_quantized_param":
        ("161a9af12bdb", "bases/memory.py", "overridden, undocumented"),
    "diffusers.quantizers.bitsandbytes.bnb_quantizer.BnB4BitDiffusersQuantizer.update_device_map":
        ("acb11c056dac", "bases/memory.py", "overridden, undocumented"),
    "diffusers.schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler.time_shift":
        ("7badd165d753", "bases/base.py", "copied: the shift of noise levels"),
    "huggingface_hub.utils._validators.REPO_ID_REGEX":
        ("59205219d7a5", "checkpoint/base_model.py", "copied: what is an id of a repository"),
    "peft.config.PeftConfigMixin._get_peft_type":
        ("dd5ea0ee0bb2", "tuner/registration.py", "called, as load_adapter does: whose file it is"),
    "peft.config.PeftConfigMixin.from_peft_type":
        ("19a0d94ffb1b", "checkpoint/config_file.py", "unknown fields are left out as there"),
    "peft.config.PeftConfigMixin.from_pretrained":
        ("836fad0727a1", "tuner/config.py", "overridden"),
    "peft.peft_model.PeftModel._enable_peft_forward_hooks":
        ("7feae5519ccb", "tuner/model.py", "calls the tuner's method of that name"),
    "peft.peft_model.PeftModel._split_kwargs":
        ("7c5a55779a64", "tuner/registration.py", "called, as load_adapter does: the Hub's arguments"),
    "peft.peft_model.PeftModel.load_adapter":
        ("75fb87dc28d6", "tuner/registration.py", "patched: a file over one of our adapters is checked"),
    "peft.tuners._buffer_dict.BufferDict":
        ("4383c0bc8eaa", "tuner/layer.py, tuner/folding.py, tuner/merging.py, tuner/linear.py", "folds, kept weights"),
    "peft.tuners.loha.layer.make_weight":
        ("ae95a4b28d4a", "evaluation/rivals.py", "patched by a copy that vmap takes"),
    "peft.tuners.lora.conversion._convert_module_to_lora":
        ("08460755e0de", "tuner/convert.py", "patched: exact for our layers"),
    "peft.tuners.lora.model.LoraModel._enable_peft_forward_hooks":
        ("ed48b2828586", "tuner/model.py", "copied: batches by adapter name"),
    "peft.tuners.mixed.COMPATIBLE_TUNER_TYPES":
        ("b49972cfe49f", "tuner/registration.py", "patched: our type is added"),
    "peft.tuners.mixed.model.COMPATIBLE_TUNER_TYPES":
        ("5c79ac9f9430", "tuner/registration.py", "patched: our type is added"),
    "peft.tuners.mixed.model.Configs":
        ("aabb9d4c6397", "tuner/registration.py", "patched: our config is added"),
    "peft.tuners.mixed.model.Layers":
        ("13ce5ccc6d21", "tuner/registration.py", "patched: our layer is added"),
    "peft.tuners.mixed.model.MixedModel._create_and_replace":
        ("1f153f036725", "tuner/registration.py, tuner/adding.py", "patched: our adapters go through ours"),
    "peft.tuners.mixed.model.PREFIXES":
        ("3c4070121b5e", "tuner/registration.py", "patched: our prefix is added"),
    "peft.tuners.oft.layer.OFTRotationModule._cayley_batch":
        ("6240ca35addd", "evaluation/rivals.py", "patched by a copy that vmap takes"),
    "peft.tuners.oft.layer.OFTRotationModule._pytorch_skew_symmetric":
        ("c787db20dbbe", "evaluation/rivals.py", "patched by a copy that vmap takes"),
    "peft.tuners.tuners_utils.BaseTuner._cast_adapter_dtype":
        ("7336a7bd5ebe", "tuner/model.py", "overridden, keeps what trains"),
    "peft.tuners.tuners_utils.BaseTuner._check_target_module_exists":
        ("516c7b7eba02", "tuner/adding.py", "called"),
    "peft.tuners.tuners_utils.BaseTuner._create_and_replace":
        ("6e6ba9fd6973", "tuner/model.py, tuner/adding.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTuner._get_adapter_state_dict":
        ("64eefee65737", "tuner/model.py", "overridden, leaves out other Downs"),
    "peft.tuners.tuners_utils.BaseTuner._prepare_adapter_config":
        ("5ab2511178d3", "tuner/model.py, tuner/adding.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTuner._replace_module":
        ("64c28fe9adc2", "tuner/model.py, tuner/adding.py", "overridden, called"),
    "peft.tuners.tuners_utils.BaseTuner._unload_and_optionally_merge":
        ("ddc0bc26023e", "tuner/model.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTuner.delete_adapter":
        ("6f355735d3f5", "tuner/model.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTuner.inject_adapter":
        ("0253ea813228", "tuner/adding.py, tuner/model.py, tuner/registration.py", "its matching is copied"),
    "peft.tuners.tuners_utils.BaseTuner.merge_adapter":
        ("304dcd9c66b8", "tuner/model.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTunerLayer._active_adapter":
        ("4e7c0101b22a", "tuner/adding.py, tuner/linear.py, tuner/layer.py, tuner/placing.py", "read and written"),
    "peft.tuners.tuners_utils.BaseTunerLayer._all_available_adapter_names":
        ("f32662491150", "tuner/layer.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters":
        ("84f78ccef979", "tuner/linear.py, tuner/layer.py, tuner/merging.py", "read and written"),
    "peft.tuners.tuners_utils.BaseTunerLayer._get_available_adapters":
        ("61d26871eeee", "tuner/layer.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTunerLayer._get_base_layer_device_and_dtype":
        ("3b7ad7e5de1a", "tuner/layer.py, tuner/merging.py", "called"),
    "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer":
        ("84c4464319f0", "tuner/layer.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTunerLayer.delete_adapter":
        ("d796ef32882c", "tuner/layer.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTunerLayer.enable_adapters":
        ("91d71e046f16", "tuner/layer.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTunerLayer.set_adapter":
        ("e78c846c47ac", "tuner/layer.py", "overridden"),
    "peft.tuners.tuners_utils.BaseTunerLayer.set_requires_grad":
        ("e72d8fc6e6da", "tuner/layer.py", "overridden"),
    "peft.tuners.tuners_utils._ExcludedModule":
        ("c30b742a53ba", "tuner/adding.py", "what the matching answers"),
    "peft.tuners.tuners_utils._maybe_include_all_linear_layers":
        ("bf425e0708a8", "tuner/adding.py", "called"),
    "peft.utils.other.get_pattern_key":
        ("9bb4d7c2a1be", "tuner/ranks.py, lora/lora_file.py", "undocumented: which pattern a module takes"),
    "peft.utils.peft_types.register_peft_method":
        ("112c577f8b9f", "tuner/registration.py", "done by hand there"),
    "peft.utils.quantization_utils.Bnb4bitBackend":
        ("6220b1fdbf65", "tuner/base_layers.py, tuner/merging.py", "subclassed"),
    "peft.utils.quantization_utils.TorchaoBackend":
        ("31fe8c7e85c0", "tuner/base_layers.py, tuner/merging.py", "subclassed"),
    "peft.utils.quantization_utils.resolve_quantization_backend":
        ("3b1f38089bde", "tuner/base_layers.py", "undocumented, called"),
    "torch._C._are_functorch_transforms_active":
        ("compiled", "tuner/folding.py", "called"),
    "torch._C.TensorBase._version":
        ("compiled", "tuner/layer.py, tuner/folding.py, checkpoint/space.py", "counts writes in place"),
    "torch._C._autograd._top_saved_tensors_default_hooks":
        ("compiled", "tuner/subject_index.py", "called: is a block recomputed?"),
    "torch._C._current_graph_task_id":
        ("compiled", "tuner/subject_index.py", "called: is this backward?"),
    "torch._C._is_any_autocast_enabled":
        ("compiled", "tuner/folding.py", "called: need a tensor be asked for its device?"),
    "torch._C._functorch.get_unwrapped":
        ("compiled", "bases/base.py", "called"),
    "torch._C._functorch.is_functorch_wrapped_tensor":
        ("compiled", "bases/base.py", "called: was it made inside of vmap?"),
    "torch._dynamo.eval_frame.OptimizedModule":
        ("ccb635f1cbd0", "checkpoint/base_model.py, pipelines/denoiser.py", "the wrapper that _orig_mod leads out of"),
    "torch._amp_foreach_non_finite_check_and_unscale_":
        ("compiled", "training/engine/loop.py", "called: is every gradient finite?"),
    "torch._foreach_add_":
        ("compiled", "training/engine/replay.py", "called"),
    "torch._foreach_copy_":
        ("compiled", "training/engine/processes.py, training/engine/slot_optimizer.py, training/engine/replay.py", ""),
    "torch._foreach_lerp_":
        ("compiled", "demo/make_base.py", "called"),
    "torch._foreach_mul":
        ("compiled", "training/engine/replay.py", "called"),
    "torch._utils._flatten_dense_tensors":
        ("5def87817b07", "training/engine/processes.py", "called"),
    "torch._utils._unflatten_dense_tensors":
        ("ffe8d81e9303", "training/engine/processes.py", "called"),
    "torch.nn.modules.container.ParameterDict":
        ("e463706643bc", "tuner/layer.py, tuner/folding.py, tuner/down.py", "its dicts are read and hidden"),
    "torch.nn.modules.conv.Conv1d._conv_forward":
        ("cfb76f48e335", "tuner/conv.py", "called"),
    "torch.nn.modules.conv.Conv2d._conv_forward":
        ("0d0227393f6c", "tuner/conv.py", "called"),
    "torch.nn.modules.conv.Conv3d._conv_forward":
        ("d6a24b3c9cdc", "tuner/conv.py", "called"),
    "torch.nn.modules.linear.Linear.forward":
        ("601ba6d5a64d", "tuner/linear.py", "fused with the factors instead of called"),
    "torch.nn.modules.module.Module.__init__":
        ("c3dc5c2023fa", "tuner/linear.py, tuner/folding.py, tuner/layer.py, tuner/adding.py", "its dicts"),
    "torch.nn.modules.module.Module._apply":
        ("a3a585bca898", "tuner/layer.py", "overridden"),
    "torch.nn.modules.module.Module._call_impl":
        ("6dfda168c08a", "tuner/linear.py, tuner/base_layers.py", "left out where it would call no hook"),
    "torch.nn.modules.module.Module.compile":
        ("5bc1506b9a2f", "training/engine/compiling.py, pipelines/calls.py", "_compiled_call_impl is changed"),
    "torch.nn.modules.module._has_any_global_hook":
        ("492e28497ebb", "tuner/base_layers.py", "called"),
    "torch.utils.checkpoint._checkpoint_hook":
        ("83cd7895c6cb", "tuner/subject_index.py", "its closure holds the checkpoint as frame"),
    "torch.utils.checkpoint._recomputation_hook":
        ("50c5c7bc9c3d", "tuner/subject_index.py", "its closure holds the checkpoint as target_frame_ref"),
    "transformers.configuration_utils.PreTrainedConfig.__post_init__":
        ("48ea163feebd", "checkpoint/base_model.py", "where a model keeps its name: _name_or_path"),
    "transformers.pytorch_utils.Conv1D":
        ("80dd2f40f9a8", "tuner/linear.py, tuner/base_layers.py", "adapted, its weight transposed"),
    "triton.compiler.compiler.CompiledKernel.__getitem__":
        ("e1085523ab81", "tuner/kernels.py", "copied without its look-ups: the order of what `run` takes"),
}
# fmt: on
# fmt: on


def _module_file(parts: list[str]) -> Path | None:
    spec = importlib.util.find_spec(parts[0])
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]).joinpath(*parts[1:])
    file = folder.with_name(folder.name + ".py") if len(parts) > 1 else folder / "__init__.py"
    return next((one for one in (file, folder / "__init__.py") if one.is_file()), None)


def _named(body: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    """Statements that define a name, also under `if` and `try`."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name == name:
                yield node
        elif isinstance(node, ast.ImportFrom):
            if any((alias.asname or alias.name) == name for alias in node.names):
                yield node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                yield node
        else:
            for part in ("body", "orelse", "handlers", "finalbody"):
                for inner in getattr(node, part, []):
                    yield from _named(inner.body if isinstance(inner, ast.ExceptHandler) else [inner], name)


_parsed = functools.lru_cache(8)(ast.parse)


def source_of(dotted: str) -> str | None:
    """The source that stands in a host's file, whoever patched the object since; None if there is no such thing.

    Docstrings, comments and blank lines are left out.
    """
    parts = dotted.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if (file := _module_file(parts[:count])) is not None:
            break
    else:
        return None
    text = file.read_text(encoding="utf-8")
    nodes: list[ast.AST] = [_parsed(text)]
    for name in parts[count:]:
        nodes = [found for node in nodes for found in _named(getattr(node, "body", []), name)]
    lines = text.splitlines()
    return "\n".join(_bare(node, lines) for node in nodes) if nodes else _compiled(dotted)


def _bare(node: Any, lines: list[str]) -> str:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
    docstrings: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            head = inner.body[0]
            if (
                isinstance(head, ast.Expr)
                and isinstance(head.value, ast.Constant)
                and isinstance(head.value.value, str)
            ):
                docstrings.update(range(head.lineno, (head.end_lineno or head.lineno) + 1))
    kept = [lines[n - 1].rstrip() for n in range(first, (node.end_lineno or first) + 1) if n not in docstrings]
    kept = [line for line in kept if line and not line.lstrip().startswith("#")]
    return textwrap.dedent("\n".join(kept))


def _compiled(dotted: str) -> str | None:
    root, *rest = dotted.split(".")
    value: object = importlib.import_module(root)
    for name in rest:
        value = getattr(value, name, None)
    return COMPILED if inspect.isbuiltin(value) or inspect.isgetsetdescriptor(value) else None


def digest_of(source: str | None) -> str:
    if source is None or source == COMPILED:
        return source or GONE
    return hashlib.sha256(source.encode()).hexdigest()[:12]


# ---- private names in our own files ----------------------------------------------------------------------------------


def _is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


@functools.cache
def _nodes(tree: ast.AST) -> list[ast.AST]:
    return [*ast.walk(tree)]


def _strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """Text that may name an attribute: in a call of getattr and its kin, or anywhere in a file that makes names up."""
    calls = [
        node
        for node in _nodes(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("delattr", "getattr", "hasattr", "setattr")
    ]
    direct = {call.args[1] for call in calls}
    endings = "endswith", "removeprefix", "removesuffix", "startswith"
    parts_of_names = {
        part
        for node in _nodes(tree)
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in endings)
        for part in ast.iter_child_nodes(node)
    }
    made_up = not all(isinstance(name, ast.Constant) for name in direct)
    for node in _nodes(tree):
        if isinstance(node, ast.Constant) and (node in direct or (made_up and node not in parts_of_names)):
            yield node


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file of ours defines, by itself or on `self`; what it merely declares for mypy does not count."""
    for node in _nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign) or (isinstance(node, ast.AnnAssign) and node.value is not None):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for inner in ast.walk(target):
                    if isinstance(inner, ast.Name):
                        yield inner.id
                    elif isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "self":
                        yield inner.attr


def used(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """Private names that a file reads or writes, and whether on `self`."""
    for node in _nodes(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            yield node.attr, ast.unparse(node.value) == "self"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = (node.module or "").split(".")
            for alias in node.names:
                if _is_private(alias.name) or any(map(_is_private, modules)):
                    yield alias.name, False
    yield from ((node.value, False) for node in _strings(tree) if _is_private(node.value))


def patched(tree: ast.AST) -> Iterator[str]:
    """Names that a file assigns on modules and classes of a host."""
    theirs: set[str] = set()
    for node in _nodes(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] in HOSTS:
            theirs.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            theirs.update(
                alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in HOSTS
            )
    for node in _nodes(tree):
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or isinstance(node.value, ast.Constant):
            continue  # a constant is a setting
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(node.value, ast.Name) and node.value.id in theirs:
            theirs.update(target.id for target in targets if isinstance(target, ast.Name))
        for target in targets:
            for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                root = one
                while isinstance(root, ast.Attribute):
                    root = root.value
                if isinstance(one, ast.Attribute) and isinstance(root, ast.Name) and root.id in theirs:
                    yield one.attr


def our_classes() -> Iterator[type]:
    for info in pkgutil.walk_packages(peft_metalora.__path__, "peft_metalora."):
        for cls in vars(importlib.import_module(info.name)).values():
            if inspect.isclass(cls) and cls.__module__ == info.name:
                yield cls


def inherited(cls: type) -> set[str]:
    """Private names that a class of ours has from a host's."""
    theirs = [base for base in cls.__mro__ if base.__module__.split(".")[0] in HOSTS]
    names = {name for base in theirs for name in (*vars(base), *vars(base).get("__annotations__", ()))}
    return {name for name in names if _is_private(name)} - {"_abc_impl", "_backward_cls"}  # made by metaclasses


def overridden() -> Iterator[tuple[Path, str]]:
    """Private names of hosts' classes that classes of ours redefine."""
    for cls in our_classes():
        for name in inherited(cls) & set(vars(cls)):
            yield Path(inspect.getfile(cls)), name


def private_names(files: dict[Path, ast.AST], theirs: dict[Path, set[str]]) -> set[tuple[Path, str]]:
    """(file, name) for everything private of a host that these files use, patch or define for it to call.

    `theirs`: what the classes of a file inherit from a host's, whatever the files define.
    """
    uses = [(path, *use) for path, tree in files.items() for use in used(tree)]
    read = {node.id for tree in files.values() for node in _nodes(tree) if isinstance(node, ast.Name)}
    read |= {name for _, name, _ in uses}
    ours = ({name for tree in files.values() for name in defined(tree)} | OURS) & read
    anybodys = {name for names in theirs.values() for name in names}
    names = {
        (path, name)
        for path, name, on_self in uses
        if name not in ours or name in (theirs.get(path, ()) if on_self else anybodys)
    }
    names |= {(path, name) for path, tree in files.items() for name in patched(tree)}
    for path, tree in files.items():
        for node in _nodes(tree):
            if isinstance(node, ast.ClassDef):  # what nothing here calls, a host does
                methods = [part.name for part in node.body if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))]
                names |= {(path, name) for name in methods if _is_private(name) and name not in read}
    return {(path, name) for path, name in names if "meta_lora" not in name}


def files_of(files: str) -> set[str]:
    return set(files.split(", "))


def covers(dotted: str, source: str | None, name: str) -> bool:
    """Whether an entry is of that name, or of the code that knows it."""
    return name in dotted.split(".") or re.search(rf"\b{name}\b", source or "") is not None


@pytest.fixture(scope="module")
def sources() -> dict[str, str | None]:
    return {dotted: source_of(dotted) for dotted in TABLE}


@pytest.fixture(scope="module")
def files() -> dict[Path, ast.AST]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


class TestHosts:
    @pytest.mark.parametrize("host", sorted({dotted.split(".")[0] for dotted in TABLE}))
    def test_it_is_what_the_package_was_written_for(self, host: str, sources: dict[str, str | None]) -> None:
        """Bug: a release of PEFT or diffusers changes something private, and a save or an image is silently wrong."""
        moved = []
        for dotted, (before, files, why) in TABLE.items():
            now = digest_of(sources[dotted])
            if dotted.split(".")[0] == host and now != before:
                moved.append(f"{dotted}: {before} -> {now}\n    read {files} ({why})")
        assert not moved, (
            f"{host} {importlib.import_module(host).__version__} changed {len(moved)} thing(s) that src relies on:\n"
            + "\n".join(moved)
            + "\nWhen src is right again: python tests/test_hosts.py prints the new table."
        )

    def test_the_table_names_every_private_thing_in_use(
        self, files: dict[Path, ast.AST], sources: dict[str, str | None]
    ) -> None:
        """Bug: a private name comes into use and nobody is told when its owner changes it."""
        theirs: dict[Path, set[str]] = {}
        for cls in our_classes():
            theirs.setdefault(Path(inspect.getfile(cls)), set()).update(inherited(cls))
        missing = []
        for path, name in sorted(private_names(files, theirs) | set(overridden())):
            here = str(path.relative_to(PACKAGE))
            known = [dotted for dotted, (_, ours, _why) in TABLE.items() if here in files_of(ours)]
            if not any(covers(dotted, sources[dotted], name) for dotted in known):
                missing.append(f"{here}: {name}")
        assert missing == [] and theirs, (
            "enter into TABLE where the host defines them (python tests/test_hosts.py gives digests):\n"
            + "\n".join(missing)
        )

    def test_the_table_names_files_that_are_there(self) -> None:
        for dotted, (_, files, _why) in TABLE.items():
            for one in files_of(files):
                assert (PACKAGE / one).is_file(), f"{dotted}: no file {one}"


class TestProbe:
    """The finder sees what it is there for."""

    def found(self, text: str) -> set[str]:
        return {name for _, name in private_names({Path("probe.py"): ast.parse(text)}, {})}

    def test_it_sees_each_way_of_using_a_private_name(self) -> None:
        assert self.found("from diffusers.hooks import _hidden") == {"_hidden"}
        assert self.found("from torch._inside import anything") == {"anything"}
        assert self.found("pipe._pack(1)") == {"_pack"}
        assert self.found("flag = getattr(model, '_flag', None)") == {"_flag"}
        assert self.found("for name in ['_one']:\n    setattr(model, name, 1)") == {"_one"}
        assert self.found("import peft\nnames = peft\nnames.mixed.public = object()") == {"public"}
        assert self.found("class Ours(Theirs):\n    def _called_by_them(self): ...") == {"_called_by_them"}

    def test_it_leaves_our_own_alone(self) -> None:
        assert (
            self.found("def _mine(): ...\n_mine()\nclass A:\n    def b(self):\n        self._c = 1\n        self._c")
            == set()
        )

    def test_a_digest_follows_code_and_not_words(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def digest(text: str) -> str:
            (tmp_path / "host_under_test").mkdir(exist_ok=True)
            (tmp_path / "host_under_test" / "__init__.py").write_text("")
            (tmp_path / "host_under_test" / "part.py").write_text(text)
            importlib.invalidate_caches()
            return digest_of(source_of("host_under_test.part.Kind.method"))

        monkeypatch.syspath_prepend(str(tmp_path))
        before = digest("class Kind:\n    def method(self):\n        return 1\n")
        assert (
            digest('class Kind:\n    def method(self):\n        """Words."""\n        # More.\n\n        return 1\n')
            == before
        )
        assert digest("class Kind:\n    def method(self):\n        return 2\n") != before
        assert digest("class Kind:\n    def other(self):\n        return 1\n") == GONE


if __name__ == "__main__":
    for dotted, (_, files, why) in sorted(TABLE.items()):
        print(f'    "{dotted}":\n        ("{digest_of(source_of(dotted))}", "{files}", "{why}"),')
