# SPDX-License-Identifier: Apache-2.0
"""What PEFT's common tests ask of every tuner, on small models of many kinds: a row is a model, a test a property."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from tuner_models import Mlp, config, down_source, flux, flux_inputs, randomise

from peft_metalora.errors import TensorDtypeError
from peft_metalora.tuner import MetaLoraConfig, set_down_loader, set_slots
from peft_metalora.tuner.on_model import meta_lora_layers


class Images(nn.Module):
    """Convolutions of one and two dimensions and a linear layer behind them."""

    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv1 = nn.Conv1d(8, 8, 3, padding=1)
        self.lin = nn.Linear(8, 5)

    def forward(self, x):
        return self.lin(self.conv1(torch.relu(self.conv0(x)).flatten(2)).mean(-1))


def unet():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def unet_inputs(batch):
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.ones(batch),
        "encoder_hidden_states": torch.randn(batch, 3, 8),
    }


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=30,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=30, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
    )


def tokens(batch):
    return {"input_ids": torch.randint(0, 30, (batch, 7))}


@dataclass
class Case:
    make: Any
    inputs: Any
    targets: Any
    settings: dict = field(default_factory=dict)


CASES = {
    "mlp": Case(Mlp, lambda b: {"x": torch.randn(b, 12)}, ["lin0", "lin1"]),
    "mlp, three slots": Case(Mlp, lambda b: {"x": torch.randn(b, 12)}, ["lin0", "lin1"], {"num_slots": 3}),
    "mlp, dora": Case(Mlp, lambda b: {"x": torch.randn(b, 12)}, ["lin1"], {"use_dora": True}),
    "mlp, patterns": Case(
        Mlp,
        lambda b: {"x": torch.randn(b, 12)},
        ["lin0", "lin1"],
        {"rank_pattern": {"lin0": 1}, "alpha_pattern": {"lin0": 7}, "meta_rank_pattern": {"lin1": 3}},
    ),
    "images": Case(Images, lambda b: {"x": torch.randn(b, 3, 8, 8)}, ["conv0", "conv1", "lin"]),
    "llama": Case(llama, tokens, "all-linear"),
    "gpt2": Case(gpt2, tokens, ["c_attn", "c_proj"]),
    "flux": Case(flux, flux_inputs, ["to_q", "to_k", "to_v", "to_out.0"]),
    "unet": Case(unet, unet_inputs, ["to_q", "to_v", "conv1", "conv2"]),
}


def output(model, inputs, **kwargs):
    result = model(**inputs, **kwargs)
    for name in ("logits", "sample"):
        if hasattr(result, name):
            return getattr(result, name)
    return result


@pytest.fixture(params=CASES)
def row(request):
    """Base model, adapted model with adapters that matter, inputs, and a maker of further configs."""
    case = CASES[request.param]
    torch.manual_seed(0)
    base, inputs = case.make().eval(), case.inputs(3)

    def settings(**more):
        return config(target_modules=copy.copy(case.targets), **{**case.settings, **more})

    model = get_peft_model(copy.deepcopy(base), settings()).eval()
    return base, randomise(model), inputs, settings


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_an_adapter_changes_the_output_and_disabling_it_gives_the_base(row):
    base, model, inputs, _ = row
    before = output(base, inputs)
    assert not torch.allclose(output(model, inputs), before, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), before)
    assert not torch.allclose(output(model, inputs), before, atol=1e-3)


def test_save_and_load(row, tmp_path):
    base, model, inputs, _ = row
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(output(loaded, inputs), output(model, inputs))
        ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


def test_a_subject_on_the_down_saves_and_loads_by_fingerprint(row, tmp_path):
    base, model, inputs, settings = row
    source = down_source(model)
    model.add_adapter("ann", settings(stage="subject", down="default"))
    model.set_adapter("ann")
    randomise(model, 5)
    source = down_source(model)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path, selected_adapters=["ann"])
    set_down_loader(lambda _: source)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ann")
    assert torch.equal(output(loaded, inputs), expected)


def test_merge_unmerge_and_unload(row):
    base, model, inputs, _ = row
    expected = output(model, inputs)
    weights = {name: value.clone() for name, value in model.state_dict().items() if "base_layer" in name}
    model.merge_adapter(safe_merge=True)
    close(output(model, inputs), expected)
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())
    merged = copy.deepcopy(model).merge_and_unload()
    close(output(merged, inputs), expected)
    assert {name for name, _ in merged.named_modules()} == {name for name, _ in base.named_modules()}
    assert torch.equal(output(model.unload(), inputs), output(base, inputs))


def test_several_adapters_with_their_own_gradients(row):
    _, model, inputs, settings = row
    model.add_adapter("other", settings())
    for name, rival in (("default", "other"), ("other", "default")):
        model.set_adapter(name)
        model.zero_grad(set_to_none=True)
        output(model, inputs).square().mean().backward()
        trained = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
        assert trained
        assert all(key.endswith(f".{name}") for key in trained)
        others = [parameter for key, parameter in model.named_parameters() if rival in key.split(".")]
        assert others and not any(parameter.requires_grad for parameter in others)


def test_delete_an_adapter(row):
    base, model, inputs, settings = row
    model.add_adapter("other", settings())
    expected = output(model, inputs)
    model.delete_adapter("other")
    assert not any("other" in name.split(".") for name in model.state_dict())
    assert torch.equal(output(model, inputs), expected)
    with warnings.catch_warnings(record=True):
        model.delete_adapter("default")
    assert torch.equal(output(model.base_model, inputs), output(base, inputs))


def test_a_batch_of_several_adapters_by_name(row):
    base, model, inputs, settings = row
    model.add_adapter("other", settings())
    randomise(model, 9)
    alone = {"__base__": output(base, inputs)}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = output(model, inputs)
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        mixed = output(model, inputs, adapter_names=names)
    for index, name in enumerate(names):
        close(mixed[index], alone[name][index])
    close(output(model, inputs), alone["other"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): nobody"):
        output(model, inputs, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match="in training mode"):
        output(model.train(), inputs, adapter_names=names)


@pytest.mark.parametrize("kind", ["decoder", "encoder and decoder"])
def test_beams_of_a_batch_of_several_adapters(kind):
    torch.manual_seed(0)
    if kind == "decoder":
        base = LlamaForCausalLM(
            LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        )
        targets = ["q_proj", "v_proj"]
    else:
        sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
        targets = ["q", "v"]
    settings = {"r": 2, "meta_r": 4, "init_weights": False, "target_modules": targets}
    model = get_peft_model(base, MetaLoraConfig(**settings)).eval()
    model.add_adapter("other", MetaLoraConfig(**settings))
    for _, layer in meta_lora_layers(randomise(model, 9)):
        for up in layer.metalora_up.values():
            up.data.mul_(20)
    tokens = torch.tensor([[3, 4, 5], [3, 4, 5], [3, 4, 5]])
    options = {"num_beams": 2, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model.generate(input_ids=tokens, **options)[0]
    with model.disable_adapter():
        alone["__base__"] = model.generate(input_ids=tokens, **options)[0]
    assert len({tuple(text.tolist()) for text in alone.values()}) == 3
    names = ["other", "__base__", "default"]
    mixed = model.generate(input_ids=tokens, adapter_names=names, **options)
    assert [text.tolist() for text in mixed] == [alone[name].tolist() for name in names]


def test_copies_and_pickles_are_independent_and_equal(row):
    _, model, inputs, _ = row
    set_slots(model, [0, -1, 0])
    expected = output(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, inputs), expected)
        indices = {id(layer.subject_index) for _, layer in meta_lora_layers(twin)}
        assert len(indices) == 1
        set_slots(twin, None)
        assert torch.equal(output(model, inputs), expected)


def test_a_training_step_learns(row):
    _, model, inputs, _ = row
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    losses = []
    for _ in range(2):
        loss = output(model, inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


def test_half_precision_base_with_and_without_upcast_adapters(row):
    base, _, inputs, settings = row
    halves = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    for upcast in (True, False):
        model = get_peft_model(copy.deepcopy(base).bfloat16(), settings(), autocast_adapter_dtype=upcast).eval()
        dtypes = {p.dtype for name, p in model.named_parameters() if "metalora_" in name}
        assert dtypes == {torch.float32 if upcast else torch.bfloat16}
        result = output(model, halves)
        assert result.dtype == torch.bfloat16
        result.float().square().mean().backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        assert trained and all(p.grad.dtype == p.dtype for p in trained)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loaded_onto_another_dtype_is_frozen(row, tmp_path, low_cpu_mem_usage):
    base, model, _, _ = row
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base).bfloat16(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_autocast(row):
    _, model, inputs, _ = row
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                result = output(model, inputs)
    expected = output(model, inputs)
    assert (result.float() - expected).norm() < 0.1 * expected.norm()


def test_injection_without_a_wrapper(row):
    base, model, inputs, settings = row
    injected = inject_adapter_in_model(settings(), copy.deepcopy(base)).eval()
    source, target = dict(meta_lora_layers(model)), dict(meta_lora_layers(injected))
    assert source.keys() == target.keys()
    for path, layer in target.items():
        layer.load_state_dict(source[path].state_dict())
    assert torch.equal(output(injected, inputs), output(model, inputs))


def test_layers_say_what_they_are(row, tmp_path):
    base, model, _, _ = row
    own = sum(p.numel() for name, p in model.named_parameters() if "metalora_" in name)
    assert model.get_nb_trainable_parameters() == (own, own + sum(p.numel() for p in base.parameters()))
    model.create_or_update_model_card(tmp_path)
    assert "library_name: peft" in (tmp_path / "README.md").read_text()
    for _, layer in meta_lora_layers(model):
        assert set(layer.r) == set(layer.scaling) == {"default"}
        assert layer.in_features and layer.out_features
        assert repr(layer).startswith("metalora.")
    assert all(
        status.adapter_layer if hasattr(status, "adapter_layer") else status for status in model.get_layer_status()
    )
    assert model.get_model_status().available_adapters == ["default"]


@pytest.fixture(scope="module")
def process_group():
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("stage", ["meta", "subject"])
@pytest.mark.parametrize("kind", ["mlp", "mlp, dora", "images", "llama", "flux", "unet"])
@pytest.mark.filterwarnings("ignore")
def test_state_of_a_model_wrapped_by_fsdp(kind, stage, process_group):
    case = CASES[kind]
    torch.manual_seed(0)
    base, inputs = case.make().eval(), case.inputs(2)
    settings = {"target_modules": case.targets, **case.settings}
    if stage == "subject":
        source = down_source(get_peft_model(copy.deepcopy(base), config(**copy.deepcopy(settings))))
        set_down_loader(lambda _: source)
        settings.update(stage="subject", down="a/b")
    model = FullyShardedDataParallel(
        randomise(get_peft_model(copy.deepcopy(base), config(**settings))).eval(),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    with torch.no_grad():
        expected = output(model, inputs)
    state = get_peft_model_state_dict(model)
    assert not any("fsdp" in key for key in state)
    loaded = get_peft_model(copy.deepcopy(base), config(**settings)).eval()
    set_peft_model_state_dict(loaded, state)
    close(output(loaded, inputs), expected)


@pytest.mark.filterwarnings("ignore")
def test_inference_under_fsdp_without_original_parameters(process_group):
    """Bug: FSDP puts attributes in the place of parameters then, and a pass without a gradient ended in a KeyError."""
    model, x = randomise(get_peft_model(Mlp(), config())).eval(), torch.randn(2, 12)
    model.requires_grad_(False)
    expected = model(x)
    wrapped = FullyShardedDataParallel(model, use_orig_params=False, device_id=torch.device("cpu"))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(wrapped(x), expected)


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Mlp(), nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.body(x))


def test_a_saved_module_with_a_counter_comes_back(tmp_path):
    """Bug: an adapter with `modules_to_save=["norm"]` was saved and never loaded again: no factor is an integer."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin0, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.lin0(x))

    model = get_peft_model(Normed(), config(target_modules=["lin0"], modules_to_save=["norm"]))
    model(torch.randn(8, 4))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Normed(), tmp_path)
    assert loaded.base_model.model.norm.modules_to_save["default"].num_batches_tracked == 1
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: one.long() if name.endswith("metalora_up") else one for name, one in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(TensorDtypeError, match=r"expected .*metalora_up in F64, F32, F16, BF16, found torch\.int64"):
        PeftModel.from_pretrained(Normed(), tmp_path)


def test_modules_to_save_train_save_and_load(tmp_path):
    torch.manual_seed(0)
    base, x = WithHead().eval(), torch.randn(3, 12)
    model = get_peft_model(copy.deepcopy(base), config(modules_to_save=["head"]))
    model(x).sum().backward()
    assert model.base_model.model.head.modules_to_save["default"].weight.grad is not None
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))


def test_trained_tokens_train_save_load_and_merge(tmp_path):
    torch.manual_seed(0)
    base, inputs = llama().eval(), {"input_ids": torch.tensor([[0, 7, 3, 1, 0, 9, 2]])}
    settings = {"target_modules": ["q_proj"], "trainable_token_indices": [0, 3]}
    model = get_peft_model(copy.deepcopy(base), config(**settings)).eval()
    output(model, inputs).sum().backward()
    rows = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    assert rows.grad.shape == (2, 16) and rows.grad.any()
    rows.data.add_(1)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), inputs), expected)
    merged = model.merge_and_unload()
    close(output(merged, inputs), expected)
    torch.testing.assert_close(merged.model.embed_tokens.weight[[0, 3]], rows.detach())
    assert torch.equal(merged.model.embed_tokens.weight[1], base.model.embed_tokens.weight[1])


def test_embeddings_saved_along_are_loaded(tmp_path):
    torch.manual_seed(0)
    base, inputs = llama().eval(), tokens(2)
    model = randomise(get_peft_model(copy.deepcopy(base), config(target_modules=["q_proj"]))).eval()
    model.get_input_embeddings().weight.data.add_(1)
    expected = output(model, inputs)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert torch.equal(output(PeftModel.from_pretrained(base, tmp_path), inputs), expected)


@pytest.mark.parametrize("bias", ["none", "all", "meta_lora_only"])
def test_biases_train_as_asked(bias, tmp_path):
    torch.manual_seed(0)
    base, x = WithHead().eval(), torch.randn(3, 12)
    model = get_peft_model(copy.deepcopy(base), config(bias=bias))
    names = {name.split("model.", 1)[1] for name, p in model.named_parameters() if p.requires_grad and "bias" in name}
    own = {"model.body.lin0.base_layer.bias", "model.body.lin1.base_layer.bias"}
    assert names == {"none": set(), "all": own | {"model.head.bias"}, "meta_lora_only": own}[bias]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "bias" in name:
                parameter.add_(1)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))


def test_layers_to_transform_and_excluded_modules():
    model = get_peft_model(llama(), config(target_modules=["q_proj", "v_proj"], layers_to_transform=[1]))
    assert {path for path, _ in meta_lora_layers(model)} == {f"model.layers.1.self_attn.{n}_proj" for n in "qv"}
    model = get_peft_model(llama(), config(target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.0\..*"))
    assert {path for path, _ in meta_lora_layers(model)} == {f"model.layers.1.self_attn.{n}_proj" for n in "qv"}


def test_default_targets_of_a_transformers_model():
    model = get_peft_model(llama(), MetaLoraConfig(r=2, meta_r=4))
    assert {path.rsplit(".", 1)[1] for path, _ in meta_lora_layers(model)} == {"q_proj", "v_proj"}


def test_gradient_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model, inputs = randomise(get_peft_model(llama(), config(target_modules=["q_proj", "v_proj"]))), tokens(2)

    def gradients():
        model.zero_grad(set_to_none=True)
        output(model.train(), inputs).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    again = gradients()
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        close(again[name], gradient)


@pytest.mark.parametrize("first", ["meta-lora", "lora"])
def test_mixed_with_lora_in_one_model(first):
    torch.manual_seed(0)
    base, x = Mlp().eval(), torch.randn(3, 12)
    lora = LoraConfig(r=2, target_modules=["lin0", "lin1"], init_lora_weights=False)
    configs = [config(), lora] if first == "meta-lora" else [lora, config()]
    model = get_peft_model(copy.deepcopy(base), configs[0], "a", mixed=True)
    model.add_adapter("b", configs[1])
    model.eval()
    parts = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        parts[name] = model(x)
        assert not torch.allclose(parts[name], base(x), atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.set_adapter(["a", "b"])
    both = model(x)
    assert not torch.allclose(both, parts["a"], atol=1e-3)
    model.delete_adapter("b")
    model.set_adapter("a")
    assert torch.equal(model(x), parts["a"])
    model = get_peft_model(copy.deepcopy(base), configs[0], "a", mixed=True)
    expected = model.eval()(x)
    close(model.merge_and_unload()(x), expected)


def test_compiles_without_breaks_for_training_and_serving():
    torch.manual_seed(0)
    model, x = randomise(get_peft_model(Mlp(), config(num_slots=2))), torch.randn(4, 12)
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    for index in (None, [0, 1]):
        set_slots(model, index)
        close(compiled(x), model(x))
        compiled(x).square().sum().backward()
        grad = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        model(x).square().sum().backward()
        plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert plain.keys() == grad.keys() == {name for name, p in model.named_parameters() if p.requires_grad} > set()
        for name, gradient in plain.items():
            close(grad[name], gradient)
        model.zero_grad(set_to_none=True)
