# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects on stock pipeline objects: loading, choosing, deleting, and undoing to the last bit."""

import sys
import threading

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from peft.functional import set_adapter
from safetensors.torch import load_file, save_file

from artefacts_tiny import edit_config, edit_tensors, write_subjects
from peft_metalora import errors
from peft_metalora.pipelines.loader import MetaLoraLoaderMixin, enable_meta_lora
from peft_metalora.tuner import MetaLoraLayer
from peft_metalora.tuner.on_model import meta_layers
from pipelines_tiny import tiny_flux_pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANKS = {"r": 2, "meta_r": 4, "lora_alpha": 4, "target_modules": TARGETS, "init_weights": False}
LORA = "pytorch_lora_weights.safetensors"


def image(pipe, prompt="a photo of a person", seed=0, **options):
    """One 16 x 16 image in two steps."""
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
    return pipe(prompt=prompt, **{**settings, "generator": torch.Generator().manual_seed(seed), **options}).images


def same(one, other):
    """Equal but for the rounding of matrix products, which may differ with the alignment of memory."""
    return np.abs(one - other).max() < 1e-5


def state_of(model):
    """What unload must bring back: modules by identity, weights, flags, attributes."""
    modules = {name: id(module) for name, module in model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # A flag of diffusers' own class, and the hooks that it makes on the first image.
    attributes = set(vars(model)) - {"_hf_peft_config_loaded", "_diffusers_hook"}
    return modules, weights, flags, sorted(attributes)


def assert_same_state(one, other):
    assert (one[0], one[2], one[3]) == (other[0], other[2], other[3])
    assert one[1].keys() == other[1].keys() and all(torch.equal(one[1][name], other[1][name]) for name in one[1])


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """A Down `faces`, the subjects `ann` and `bob` on it, and their images."""
    folder = tmp_path_factory.mktemp("artefacts")
    pipe = tiny_flux_pipeline()
    images = {"base": image(pipe)}
    write_subjects(folder, pipe.transformer, "ann", "bob", **RANKS)
    for name in ("ann", "bob"):
        set_adapter(pipe.transformer, name)
        images[name] = image(pipe)
    return folder, images


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    """The folder of an ordinary LoRA."""
    folder, other = tmp_path_factory.mktemp("style"), tiny_flux_pipeline()
    other.transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"], init_lora_weights=False), "style")
    layers = get_peft_model_state_dict(other.transformer, adapter_name="style")
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


@pytest.fixture
def pipe():
    return enable_meta_lora(tiny_flux_pipeline())


def test_enabling_changes_this_object_alone():
    pipe, other = tiny_flux_pipeline(), tiny_flux_pipeline()
    assert enable_meta_lora(pipe) is pipe is enable_meta_lora(pipe)
    assert isinstance(pipe, FluxPipeline) and type(pipe).__name__ == "FluxPipeline"
    assert not isinstance(other, MetaLoraLoaderMixin)
    assert type(enable_meta_lora(other)) is type(pipe)


def test_a_class_may_inherit_the_methods(artefacts):
    folder, images = artefacts

    class People(MetaLoraLoaderMixin, FluxPipeline):
        """A pipeline class of one's own."""

    pipe = People(**tiny_flux_pipeline().components)
    assert enable_meta_lora(pipe) is pipe and type(pipe) is People
    pipe.load_meta_lora(folder / "ann")
    pipe.load_meta_lora(folder / "bob")
    assert same(image(pipe, subjects="ann"), images["ann"])
    assert same(image(pipe), images["bob"])


def test_a_pipeline_without_a_denoiser_is_refused():
    with pytest.raises(errors.PipelineError, match="a transformer, a unet"):
        enable_meta_lora(object())


def test_a_subject_brings_its_down_once_and_shows(artefacts, pipe):
    folder, images = artefacts
    assert pipe.load_meta_lora(folder / "ann") == "ann"
    assert same(image(pipe), images["ann"])
    pipe.load_meta_lora(folder / "bob")
    assert same(image(pipe), images["bob"])
    layers = [module for module in pipe.transformer.modules() if isinstance(module, MetaLoraLayer)]
    assert layers and all(len(layer.metalora_down) == 1 for layer in layers)
    pipe.set_adapters("ann")
    assert same(image(pipe), images["ann"])
    assert pipe.get_active_adapters() == ["ann"]
    assert pipe.get_list_adapters() == {"transformer": ["ann", "bob"]}


def test_a_down_changes_no_image_until_it_is_chosen(artefacts, pipe):
    folder, images = artefacts
    pipe.load_meta_lora(folder / "faces", "women")
    assert same(image(pipe), images["base"])
    assert (pipe.get_active_adapters(), pipe.get_list_adapters()) == ([], {"transformer": ["women"]})
    pipe.set_adapters("women")
    assert not same(image(pipe), images["base"])
    pipe.load_meta_lora(folder / "ann")
    assert same(image(pipe), images["ann"])
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert list(layer.metalora_down) == ["women"]


def test_weights_scale_and_names_are_checked(artefacts, pipe):
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    pipe.set_adapters("ann", 0.0)
    assert same(image(pipe), images["base"])
    pipe.set_adapters(["ann"], [1.0])
    assert same(image(pipe), images["ann"])
    with pytest.raises(errors.AdapterStateError, match="expected 1 weights"):
        pipe.set_adapters(["ann"], [1.0, 2.0])
    with pytest.raises(errors.AdapterNotFoundError, match="load_meta_lora"):
        pipe.set_adapters(["ann", "eve"])
    assert pipe.get_active_adapters() == ["ann"]
    pipe.set_adapters([])
    for weight in ({"transformer": 0.5}, float("nan"), "1"):  # Bug: she was chosen, and then a TypeError came out
        with pytest.raises(errors.AdapterStateError, match="expected a finite number"):
            pipe.set_adapters("ann", weight)
    assert pipe.get_active_adapters() == []


@pytest.mark.parametrize(
    ("names", "weights", "error"),
    [
        (["ann", "style"], [float("nan"), 1.0], errors.AdapterStateError),
        (["ann", "style"], [{"transformer": {"single_transformer_blocks": 0.5}}, 1.0], errors.AdapterStateError),
        (["ann", "style"], [0.5, "x"], TypeError),
        (["ann", "ann"], [0.2, 1.0], errors.AdapterStateError),
        (["ann", "style", "ann"], [0.2, 0.0, 1.0], errors.AdapterStateError),
    ],
)
def test_refused_weights_beside_a_lora_change_nobody(artefacts, pipe, style, names, weights, error):
    """Bug: beside a LoRA a person took NaN, which made the image black, and weights that diffusers refused on half of
    the layers; named twice, she was there twice."""
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters("ann")
    with pytest.raises(error):
        pipe.set_adapters(names, weights)
    assert same(image(pipe), images["ann"]) and pipe.get_active_adapters() == ["ann"]
    assert same(image(pipe, subjects="ann"), images["ann"])
    pipe.set_adapters(["ann", "style"], [None, 0.0])
    assert same(image(pipe), images["ann"])


def test_a_person_beside_a_lora_is_as_fast_as_alone(artefacts, pipe, style):
    """Bug: beside a LoRA a person trained, which no image needs: they were not folded, and copied for each call."""
    pipe.load_meta_lora(artefacts[0] / "ann")
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["ann", "style"], [1.0, 0.5])
    layers = meta_layers(pipe.transformer)
    assert not any(layer.metalora_up["ann"].requires_grad for layer in layers)
    assert all(layer.is_folded("ann") for layer in layers)
    both = image(pipe)
    pipe.set_adapters("style", 0.5)
    assert same(image(pipe, subjects="ann"), both) and not same(image(pipe), both)


def test_disable_and_enable(artefacts, pipe):
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    pipe.disable_meta_lora()
    assert same(image(pipe), images["base"])
    pipe.enable_meta_lora()
    assert same(image(pipe), images["ann"])


def test_unload_restores_everything(artefacts, pipe):
    folder, images = artefacts
    pipe.transformer.proj_out.weight.requires_grad_(True)
    before = state_of(pipe.transformer)
    pipe.load_meta_lora(folder / "faces")
    pipe.load_meta_lora(folder / "ann")
    pipe.unload_meta_lora()
    assert_same_state(state_of(pipe.transformer), before)
    assert same(image(pipe), images["base"])
    pipe.load_meta_lora(folder / "ann")
    assert same(image(pipe), images["ann"])


def test_unload_restores_a_merged_model(artefacts, pipe):
    folder, _ = artefacts
    before = state_of(pipe.transformer)
    pipe.load_meta_lora(folder / "ann")
    for layer in [module for module in pipe.transformer.modules() if isinstance(module, MetaLoraLayer)]:
        layer.merge()
    pipe.unload_meta_lora()
    assert_same_state(state_of(pipe.transformer), before)


def test_deleting_the_last_adapter_restores_everything(artefacts, pipe):
    folder, images = artefacts
    before = state_of(pipe.transformer)
    pipe.load_meta_lora(folder / "faces")
    pipe.load_meta_lora(folder / "ann")
    pipe.load_meta_lora(folder / "bob")
    with pytest.raises(errors.AdapterStateError, match="ann, bob"):
        pipe.delete_adapters("faces")
    pipe.delete_adapters("bob")
    assert pipe.get_active_adapters() == [], "deleting one person never shows another"
    assert same(image(pipe), images["base"])
    pipe.set_adapters("ann")
    assert same(image(pipe), images["ann"])
    pipe.delete_adapters(["faces", "ann"])
    assert_same_state(state_of(pipe.transformer), before)


def test_a_subject_and_an_ordinary_lora_live_side_by_side(artefacts, pipe):
    folder, images = artefacts
    pipe.transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"], init_lora_weights=False), "style")
    styled = image(pipe)
    pipe.load_meta_lora(folder / "ann")
    assert same(image(pipe), images["ann"])
    pipe.set_adapters(["ann", "style"], [1.0, 1.0])
    both = image(pipe)
    assert not same(both, images["ann"]) and not same(both, styled)
    pipe.unload_meta_lora()
    pipe.set_adapters("style")
    assert same(image(pipe), styled)


def test_a_lora_takes_nobodys_place(artefacts, pipe, style):
    """Bug: a hotswap onto a person's name, which PEFT refuses, took the person off; onto that of the slots, all in
    them. A LoRA could have the name of somebody in the slots."""
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    pipe.add_subject(folder / "bob")
    slots = next(name for name in pipe.transformer.peft_config if name.startswith("slots-"))
    for name in ("ann", "bob", slots):
        for hotswap in (False, True):
            with pytest.raises(errors.AdapterStateError, match=f"expected a new adapter name, found '{name}'"):
                pipe.load_lora_weights(style, adapter_name=name, hotswap=hotswap)
    with pytest.raises(errors.AdapterNotFoundError, match="expected a loaded Down or subject"):
        pipe.fuse_lora(adapter_names=[slots])
    assert same(image(pipe), images["ann"]) and pipe.get_active_adapters() == ["ann"]
    assert same(image(pipe, subjects="bob"), images["bob"])
    for hotswap in (False, True):
        pipe.load_lora_weights(style, adapter_name="style", hotswap=hotswap)
    assert pipe.get_list_adapters() == {"transformer": ["ann", "style"]}


def test_offloading_stays_where_a_lora_is_loaded_beside_a_person(artefacts, pipe, style, tmp_path):
    """Bug: diffusers put it back on the first accelerator, or failed without one, and left it off after an error."""
    pipe.load_meta_lora(artefacts[0] / "ann")
    pipe.enable_model_cpu_offload(device="cpu")
    pipe.load_lora_weights(style, adapter_name="style")
    broken = {name: one[:-1] if "lora_B" in name else one for name, one in load_file(style / LORA).items()}
    save_file({name: one.contiguous() for name, one in broken.items()}, tmp_path / LORA)
    with pytest.raises(RuntimeError, match="size mismatch"):
        pipe.load_lora_weights(tmp_path, adapter_name="broken")
    assert pipe._offload_device == torch.device("cpu", 0) and hasattr(pipe.transformer, "_hf_hook")
    pipe.set_adapters("ann")
    assert same(image(pipe), artefacts[1]["ann"])


def test_two_loras_beside_a_person(artefacts, pipe, style):
    """Bug: on FLUX.1 the second one ended in a KeyError, as diffusers finds no weights below two methods."""
    pipe.load_meta_lora(artefacts[0] / "ann")
    for name in ("one", "two"):
        pipe.load_lora_weights(style, adapter_name=name)
    pipe.set_adapters(["ann", "one"], [1.0, 1.0])
    wanted = image(pipe)
    pipe.set_adapters(["ann", "one", "two"], [1.0, 0.5, 0.5])
    assert same(image(pipe), wanted)
    pipe.set_adapters("ann")
    assert not same(image(pipe), wanted)
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {"transformer": ["ann"]}


def test_diffusers_verbs_reach_a_compiled_denoiser(artefacts, pipe, style):
    """Bug: under torch.compile's wrapper they did nothing, without a word: whoever had been active went on to show."""
    folder, images = artefacts
    for name in ("ann", "bob"):
        pipe.load_meta_lora(folder / name)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters(["ann", "style"], [1.0, 0.5])
    both, plain = image(pipe), pipe.transformer
    pipe.set_adapters("bob")
    torch._dynamo.reset()
    pipe.transformer = compiled = torch.compile(plain, backend="eager")
    assert same(image(pipe), images["bob"])
    pipe.set_adapters(["ann", "style"], [1.0, 0.5])
    assert same(image(pipe), both)
    pipe.disable_lora()
    assert same(image(pipe), images["base"])
    pipe.enable_lora()
    pipe.fuse_lora()
    assert all(layer.merged_adapters == ["ann"] for layer in meta_layers(plain)) and same(image(pipe), both)
    pipe.unfuse_lora()
    pipe.delete_adapters("style")
    assert pipe.get_list_adapters() == {"transformer": ["ann", "bob"]} and pipe.transformer is compiled
    assert same(image(pipe), images["ann"])


def test_the_scale_of_a_fusion_ends_with_it(artefacts, pipe):
    """Bug: after `fuse_lora(lora_scale=0.5)` and `unfuse_lora` half of the person showed in all later images."""
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    pipe.set_adapters("ann", 0.5)
    half = image(pipe)
    pipe.set_adapters("ann")
    pipe.fuse_lora(lora_scale=0.5)
    assert same(image(pipe), half)
    pipe.unfuse_lora()
    assert same(image(pipe), images["ann"]) and same(image(pipe, subjects="ann"), images["ann"])


@pytest.mark.parametrize("name", ["an", "s", "0"])
def test_a_hotswap_of_a_lora_leaves_people_alone(artefacts, pipe, style, name):
    """Bug: PEFT zeroes each parameter with "lora_" and the LoRA's name in its path that the new file lacks: so it did
    Mid, Up and Down of people, where that name was part of theirs or of a module's."""
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    pipe.add_subject(folder / "bob")
    assert same(image(pipe, subjects="bob"), images["bob"])
    for hotswap in (False, True):
        pipe.load_lora_weights(style, adapter_name=name, hotswap=hotswap)
    pipe.set_adapters(["ann", name], [1.0, 0.0])
    assert same(image(pipe), images["ann"])
    for person in ("ann", "bob"):
        assert same(image(pipe, subjects=person), images[person])


@pytest.mark.parametrize("verb", ["load_lora_weights", "fuse_lora", "unfuse_lora", "disable_lora", "enable_lora"])
def test_diffusers_verbs_wait_for_a_running_image(artefacts, pipe, style, verb):
    """Bug: a LoRA that another thread loaded came into the image that was drawn; who it turned off went out of it."""
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    if verb != "load_lora_weights":
        pipe.load_lora_weights(style, adapter_name="style")
        pipe.set_adapters("ann")
    if verb == "unfuse_lora":
        pipe.fuse_lora(adapter_names=["ann"])
    given = {"load_lora_weights": ([style], {}), "fuse_lora": ([], {"adapter_names": ["style"]})}
    args, options = given.get(verb, ([], {}))
    other = threading.Thread(target=getattr(pipe, verb), args=args, kwargs=options)

    def meanwhile(pipe, step, timestep, tensors):
        if not other.ident:
            other.start()
            other.join(0.3)
            assert other.is_alive(), "it waits for the image"
        return tensors

    assert same(image(pipe, callback_on_step_end=meanwhile), images["ann"])
    other.join()


def test_texts_and_several_images_of_each_with_subjects(artefacts, pipe):
    folder, images = artefacts
    for name in ("ann", "bob"):
        pipe.load_meta_lora(folder / name)
    noise = [torch.Generator().manual_seed(0) for _ in range(4)]
    prompts = ["a photo of a person"] * 2
    mixed = image(pipe, prompts, subjects=["ann", "bob"], num_images_per_prompt=2, generator=noise)
    for row, name in enumerate(("ann", "ann", "bob", "bob")):
        assert same(mixed[row : row + 1], images[name])


def _foreign_base(folder):
    edit_tensors(
        folder / "faces",
        lambda t: [t.update({name.replace("attn.to_q", "attn.to_x"): t.pop(name)}) for name in list(t)],
    )
    edit_config(folder / "faces", down_fingerprint=None)


BROKEN = {
    "truncated": (
        lambda f: (f / "ann" / "adapter_model.safetensors").write_bytes(b"12345678"),
        errors.CorruptFileError,
        "ann",
    ),
    "foreign file": (lambda f: edit_config(f / "ann", peft_type="LORA"), errors.WrongKindError, "ann"),
    "wrong rank": (lambda f: edit_config(f / "ann", r=1), errors.RankMismatchError, "ann"),
    "another base": (_foreign_base, errors.BaseModelMismatchError, "faces"),
    "a base of another name": (
        lambda f: edit_config(f / "faces", base_model_name_or_path="a/other"),
        errors.BaseModelMismatchError,
        "faces",
    ),
    "no Down": (lambda f: edit_config(f / "ann", down="elsewhere"), errors.MissingDownError, "ann"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_refused_load_leaves_the_pipeline_as_it_was(artefacts, tmp_path, pipe, case, loaded):
    import shutil

    folder, images = artefacts
    shutil.copytree(folder, tmp_path / "copy")
    spoil, error, name = BROKEN[case]
    spoil(tmp_path / "copy")
    pipe.transformer.register_to_config(_name_or_path="a/base")
    if loaded:
        pipe.load_meta_lora(folder / "bob")
    before, adapters = state_of(pipe.transformer), pipe.get_list_adapters()
    if loaded and case == "no Down":
        assert pipe.load_meta_lora(tmp_path / "copy" / name) == "ann", "its Down is on the model already"
        return
    with pytest.raises(error):
        pipe.load_meta_lora(tmp_path / "copy" / name)
    assert_same_state(state_of(pipe.transformer), before)
    assert pipe.get_list_adapters() == adapters
    assert same(image(pipe), images["bob" if loaded else "base"])


def test_a_failure_while_injecting_is_undone(artefacts, pipe, monkeypatch):
    folder, images = artefacts
    before = state_of(pipe.transformer)

    def fail(*_):
        raise RuntimeError("no memory")

    monkeypatch.setattr("peft_metalora.pipelines.loader.copy_factors", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        pipe.load_meta_lora(folder / "ann")
    assert_same_state(state_of(pipe.transformer), before)
    assert same(image(pipe), images["base"])


def test_a_taken_name_is_refused_and_a_free_one_found(artefacts, pipe):
    folder, _ = artefacts
    pipe.load_meta_lora(folder / "ann")
    with pytest.raises(errors.AdapterStateError, match="'ann'"):
        pipe.load_meta_lora(folder / "bob", "ann")
    assert pipe.load_meta_lora(folder / "ann") == "ann-1"


@pytest.mark.parametrize("name", ["a.b", "pop", "../x"])
def test_a_name_that_modules_cannot_hold_is_refused(artefacts, pipe, name):
    with pytest.raises(errors.AdapterStateError, match="Choose another one"):
        pipe.load_meta_lora(artefacts[0] / "ann", name)


def test_saved_from_a_pipeline_it_loads_again(artefacts, pipe, tmp_path):
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    pipe.save_meta_lora(tmp_path / "copy", "ann", down=folder / "faces")
    pipe.unload_meta_lora()
    pipe.load_meta_lora(tmp_path / "copy")
    assert same(image(pipe), images["ann"])


def test_half_precision_shows_the_subject_and_keeps_the_fingerprint(artefacts, pipe, tmp_path):
    folder, _ = artefacts
    pipe.to(torch.bfloat16)
    base = image(pipe)
    pipe.load_meta_lora(folder / "ann")
    pipe.load_meta_lora(folder / "bob")
    assert not same(image(pipe), base)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert len(layer.metalora_down) == 1
    pipe.save_meta_lora(tmp_path / "copy", "ann", down=folder / "faces")
    pipe.unload_meta_lora()
    assert pipe.load_meta_lora(tmp_path / "copy") == "copy-1", "torch keeps the plain name for itself"
    assert same(image(pipe), image(pipe))


def test_from_pipe_and_saving_still_work(artefacts, pipe, tmp_path):
    folder, images = artefacts
    pipe.load_meta_lora(folder / "ann")
    shared = FluxPipeline.from_pipe(pipe)
    shared.set_progress_bar_config(disable=True)
    assert same(image(shared), images["ann"])
    pipe.unload_meta_lora()
    pipe.save_pretrained(tmp_path / "saved")
    again = FluxPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert same(image(again), images["base"])


def test_no_load_takes_longer_for_the_people_who_are_there(artefacts, pipe):
    """Bug: PEFT walked over everybody's factors at each load: a hundred loads took 0.9 s, the fourth hundred 3.1 s."""
    folder, images = artefacts

    def calls(name):
        """Functions called, of Python and of C, while one more person is loaded and shown."""
        count = 0

        def note(frame, event, argument):
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            pipe.load_meta_lora(folder / "ann", name)
        finally:
            sys.setprofile(None)
        return count

    for number in range(3):
        pipe.load_meta_lora(folder / "bob", f"early-{number}")
    few = calls("few")
    for number in range(20):
        pipe.load_meta_lora(folder / "bob", f"late-{number}")
    assert calls("many") < 1.02 * few
    assert pipe.get_active_adapters() == ["many"] and same(image(pipe), images["ann"])
    assert not any(parameter.requires_grad for parameter in pipe.transformer.parameters())
    layer = next(module for module in pipe.transformer.modules() if isinstance(module, MetaLoraLayer))
    assert len(layer.metalora_mid) == len(list(layer.metalora_mid.parameters())) == 25
    pipe.set_adapters("late-7")
    assert same(image(pipe), images["bob"])
