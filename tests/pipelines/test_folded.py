# SPDX-License-Identifier: Apache-2.0
"""What is loaded is folded without a verb, and everything else about it is as if it were not."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from artefacts_tiny import write_subjects
from peft_metalora import enable_meta_lora
from peft_metalora.pipelines.table import tables_of
from peft_metalora.tuner import set_slots, unfold
from peft_metalora.tuner.on_model import meta_layers
from pipelines_tiny import tiny_flux_pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANKS = {"r": 2, "meta_r": 4, "lora_alpha": 4, "target_modules": TARGETS, "init_weights": False}


def image(pipe, **options):
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    generator = torch.Generator().manual_seed(0)
    return pipe(**{"prompt": "a photo of a person", **settings, "generator": generator, **options}).images


def same(one, other):
    return np.abs(one - other).max() < 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_subjects(tmp_path_factory.mktemp("people"), tiny_flux_pipeline().transformer, "ann", "bob", **RANKS)


@pytest.fixture
def pipe():
    return enable_meta_lora(tiny_flux_pipeline())


def folded(pipe):
    """Names of the adapters that every layer has a fold of."""
    layers = meta_layers(pipe.transformer)
    return set.intersection(*({name for name in one.metalora_folded if one.is_folded(name)} for one in layers))


def by_itself(pipe):
    """Whether the layers made a fold of whom they showed last."""
    return [layer.shown_subject is not None for layer in meta_layers(pipe.transformer)]


def unfolded_image(pipe, **options):
    """The picture by the road that training takes."""
    model = pipe.transformer
    unfold(model)
    factors = [factor for layer in meta_layers(model) for factor in layer.metalora_mid.values()]
    for factor in factors:
        factor.requires_grad_(True)  # what may train is not folded
    made = image(pipe, **options)
    assert not any(by_itself(pipe)) and not folded(pipe)
    for factor in factors:
        factor.requires_grad_(False)
    return made


def test_who_is_chosen_is_folded(folder, pipe):
    base = image(pipe)
    pictures = {}
    for name in ("ann", "bob"):
        pipe.load_meta_lora(folder / name)
        assert folded(pipe) == {name}, "and the one before no more"
        pictures[name] = image(pipe)
        assert same(unfolded_image(pipe), pictures[name])
    pipe.set_adapters("ann", 0.5)
    assert folded(pipe) == {"ann"}
    half = image(pipe)
    assert not same(half, pictures["ann"]) and same(unfolded_image(pipe), half)
    pipe.set_adapters(["ann", "bob"])
    assert folded(pipe) == {"ann", "bob"} and same(image(pipe), unfolded_image(pipe))
    pipe.delete_adapters("ann")
    pipe.set_adapters("bob")
    assert same(image(pipe), pictures["bob"])
    pipe.unload_meta_lora()
    assert np.array_equal(image(pipe), base)


def test_the_first_picture_has_the_bits_of_the_second(folder, pipe):
    for name in ("ann", "bob"):
        pipe.add_subject(folder / name)
    for options in ({"subjects": "ann"}, {"subjects": ["bob"]}, {"subjects": "ann", "num_images_per_prompt": 2}):
        first = image(pipe, **options)
        assert all(by_itself(pipe)) and np.array_equal(image(pipe, **options), first)


def test_a_table_folds_whom_a_whole_batch_shows(folder, pipe):
    """Bug: `subjects="ann"` gathered Ann's factors and never folded them."""
    for name in ("ann", "bob"):
        pipe.add_subject(folder / name)
    alone = {}
    for name in ("ann", "bob", "ann"):
        alone[name] = image(pipe, subjects=name)
        assert all(by_itself(pipe)) and same(unfolded_image(pipe, subjects=name), alone[name])
    mixed = image(pipe, prompt=["a photo of a person"] * 2, subjects=["ann", "bob"], num_images_per_prompt=1)
    assert mixed.shape[0] == 2
    (table,) = tables_of(pipe.transformer).values()
    pipe.add_subject(folder / "bob", "ann")
    assert same(image(pipe, subjects="ann"), alone["bob"]), "a subject that comes anew under a name shows"
    table.evict(["ann", "bob"])
    assert not any(by_itself(pipe)), "nothing of who was evicted stays"


def test_saves_are_those_of_the_factors(folder, pipe, tmp_path):
    pipe.load_meta_lora(folder / "ann")
    image(pipe)
    pipe.save_meta_lora(tmp_path / "again", "ann", down=folder / "faces")
    before, after = (load_file(where / "adapter_model.safetensors") for where in (folder / "ann", tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_training_begins_without_a_verb(folder, pipe, tmp_path):
    pipe.load_meta_lora(folder / "ann")
    before, model = image(pipe), pipe.transformer
    factors = [part["ann"] for layer in meta_layers(model) for part in (layer.metalora_mid, layer.metalora_up)]
    for factor in factors:
        factor.requires_grad_(True)
    optimizer = torch.optim.AdamW(factors, lr=0.05, fused=True)
    inputs = {
        "hidden_states": torch.randn(1, 4, 16),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.rand(1),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    model(**inputs, return_dict=False)[0].square().sum().backward()
    assert all(factor.grad is not None and factor.grad.any() for factor in factors)
    optimizer.step()
    trained = image(pipe)
    assert not same(trained, before)
    pipe.save_meta_lora(tmp_path / "trained", "ann", down=folder / "faces")
    pipe.load_meta_lora(tmp_path / "trained", "again")
    assert folded(pipe) == {"again"} and same(image(pipe), trained)


def bob_into_ann(pipe):
    with torch.no_grad():
        for layer in meta_layers(pipe.transformer):
            for part in (layer.metalora_mid, layer.metalora_up):
                part["ann"].copy_(part["bob"])


@pytest.mark.parametrize("compiled_first", [True, False])
def test_what_is_written_shows_in_a_compiled_pipeline(folder, pipe, compiled_first):
    """Bug: a graph read the fold of before beside the new Up: somebody who is neither."""
    pipe.load_meta_lora(folder / "bob")
    bob = image(pipe)
    pipe.load_meta_lora(folder / "ann")
    torch._dynamo.reset()
    if compiled_first:
        pipe.transformer.compile(backend="eager")
        image(pipe)
    bob_into_ann(pipe)
    if not compiled_first:
        pipe.transformer.compile(backend="eager")
    assert same(image(pipe), bob)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_what_is_trained_shows_in_a_compiled_pipeline(folder, pipe, options):
    """Bug: a model that trained in eval mode, compiled, went on with the fold of before."""
    pipe.load_meta_lora(folder / "ann")
    torch._dynamo.reset()
    pipe.transformer.compile(backend="eager")
    before, model = image(pipe), pipe.transformer
    factors = [part["ann"] for layer in meta_layers(model) for part in (layer.metalora_mid, layer.metalora_up)]
    for factor in factors:
        factor.requires_grad_(True)
    optimizer = torch.optim.AdamW(factors, lr=0.1, **options)
    for _ in range(2):
        image(pipe)
        torch.manual_seed(0)
        given = {
            "hidden_states": torch.randn(1, 16, 16),
            "encoder_hidden_states": torch.randn(1, 4, 16),
            "pooled_projections": torch.randn(1, 16),
            "timestep": torch.ones(1),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(4, 3),
        }
        model(**given).sample.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for factor in factors:
        factor.requires_grad_(False)
    trained = image(pipe)
    model._compiled_call_impl = None
    assert not same(trained, before) and same(trained, unfolded_image(pipe))


def test_who_is_loaded_in_inference_mode_is_as_any_other(folder, pipe):
    """Bug: torch counts no writes into what is made there, so that a fold stayed; and nobody could come in outside."""
    with torch.inference_mode():
        pipe.load_meta_lora(folder / "bob")
        bob = image(pipe)
        pipe.load_meta_lora(folder / "ann")
        ann = image(pipe)
        pipe.add_subject(folder / "bob", "robert")
        assert same(image(pipe, subjects="robert"), bob)
        pipe.to(torch.float64).to(torch.float32)
        assert folded(pipe) == {"ann"}
    pipe.add_subject(folder / "ann", "anna")
    assert same(image(pipe, subjects="anna"), ann) and same(image(pipe, subjects="bob"), bob)
    with torch.inference_mode():
        bob_into_ann(pipe)
        assert same(image(pipe), bob)


def test_beside_a_fused_subject(folder, pipe):
    pipe.load_meta_lora(folder / "ann")
    before = image(pipe)
    pipe.fuse_meta_lora()
    assert np.abs(image(pipe) - before).max() < 1e-4
    pipe.unfuse_meta_lora()
    assert np.array_equal(image(pipe), before)


def test_on_a_quantised_base(folder, pipe):
    quantize_(pipe.transformer, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith(("to_q", "to_v")))
    pipe.load_meta_lora(folder / "ann")
    assert folded(pipe) == {"ann"}
    found = image(pipe)
    unfold(pipe.transformer)
    set_slots(pipe.transformer, [0])
    assert np.abs(image(pipe) - found).max() < 1e-4
