# SPDX-License-Identifier: Apache-2.0
"""Who shows is who was chosen: beside ordinary LoRAs, fused weights, what trains, and other people's hands."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, FluxPipeline, MotionAdapter, StableDiffusionPipeline, UNetMotionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.functional import set_adapter
from torch import nn

from artefacts_tiny import write_subjects
from families_tiny import tiny_pipeline
from peft_metalora import MetaLoraConfig, enable_meta_lora, errors, save_subject
from peft_metalora.pipelines.samples import batch_slots
from peft_metalora.pipelines.table import tables_of
from peft_metalora.tuner import subject_state, write_subject
from peft_metalora.tuner.on_model import meta_layers, meta_lora_layers
from pipelines_tiny import tiny_flux_pipeline, tiny_sd15_pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TOLERANCE = 1e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def picture(pipe, prompt="a photo of a person", **options):
    count = len(prompt) if isinstance(prompt, list) else 1
    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1)
    settings = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "np", "latents": noise}
    return pipe(prompt=prompt, **{**settings, **options}).images


def near(one, other):
    return np.abs(one - other).max() < TOLERANCE


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A Down, three subjects and an ordinary LoRA in a folder; the image of each and of the base."""
    folder, pipe = tmp_path_factory.mktemp("people"), tiny_flux_pipeline()
    images = {None: picture(pipe)}
    write_subjects(folder, pipe.transformer, "ann", "bob", "cleo", lora_alpha=16, target_modules=TARGETS)
    for name in ("ann", "bob", "cleo"):
        set_adapter(pipe.transformer, name)
        images[name] = picture(pipe)
    pipe = tiny_flux_pipeline()
    torch.manual_seed(7)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False), "style"
    )
    layers = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    FluxPipeline.save_lora_weights(folder / "style", transformer_lora_layers=layers)
    images["style"] = picture(pipe)
    return folder, images


@pytest.fixture
def pipe():
    return enable_meta_lora(tiny_flux_pipeline())


def with_style(pipe, folder):
    pipe.load_lora_weights(folder / "style", adapter_name="style")
    return pipe


# Others take adapters off


@pytest.mark.parametrize("how", ["unload_lora_weights", "model.unload_lora", "delete"])
def test_whom_others_took_off_is_not_shown_and_comes_back(people, pipe, how):
    """Bug: a table outlived its layers: the person who was loaded again drew the base under `subjects=`."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    assert near(picture(pipe, subjects="ann"), images["ann"])
    if how == "unload_lora_weights":
        FluxPipeline.from_pipe(pipe).unload_lora_weights()
    elif how == "model.unload_lora":
        pipe.transformer.unload_lora()
    else:
        pipe.transformer.delete_adapters("ann")
    with pytest.raises(errors.AdapterNotFoundError, match="'ann' among none"):
        picture(pipe, subjects="ann")
    assert near(picture(pipe), images[None])
    assert pipe.load_meta_lora(folder / "ann") == "ann"
    assert near(picture(pipe, subjects="ann"), images["ann"])
    pipe.add_subject(folder / "bob")
    assert near(picture(pipe, subjects="bob"), images["bob"])


def test_another_persons_adapter_under_the_same_name_shows(people, pipe):
    """Bug: the row of an adapter that was replaced behind the pipeline's back stayed in the slots."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann", "someone")
    picture(pipe, subjects="someone")
    pipe.transformer.delete_adapters("someone")
    pipe.load_meta_lora(folder / "bob", "someone")
    assert near(picture(pipe, subjects="someone"), images["bob"])


def test_taking_a_style_off_leaves_the_person(people, pipe):
    """Bug: `unload_lora_weights`, to take a style off, took the person off as well."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    with_style(pipe, folder)
    pipe.set_adapters(["ann", "style"])
    assert not near(picture(pipe), images["ann"])
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {"transformer": ["ann"]}
    assert near(picture(pipe), images["ann"]) and near(picture(pipe, subjects="ann"), images["ann"])
    pipe.unload_meta_lora()
    pipe.unload_lora_weights()
    assert near(picture(pipe), images[None])


@pytest.mark.parametrize("style_first", [True, False])
def test_a_style_and_a_person_on_the_same_layers_come_apart(people, pipe, style_first):
    """Bug: as above, for layers of one method inside those of the other."""
    folder, images = people
    if style_first:
        with_style(pipe, folder)
    pipe.load_meta_lora(folder / "ann")
    if not style_first:
        with_style(pipe, folder)
    pipe.unload_lora_weights()
    assert near(picture(pipe), images["ann"])
    assert {type(layer.base_layer) for layer in meta_layers(pipe.transformer)} == {nn.Linear}


@pytest.mark.parametrize("how", ["unload", "delete"])
def test_a_style_that_a_person_displaced_shows_again(people, pipe, how):
    """Bug: after `unload_meta_lora` an ordinary LoRA that had been active was loaded, and switched off."""
    folder, images = people
    with_style(pipe, folder)
    pipe.load_meta_lora(folder / "ann")
    pipe.load_meta_lora(folder / "bob")
    assert near(picture(pipe), images["bob"])
    if how == "unload":
        pipe.unload_meta_lora()
    else:
        pipe.delete_adapters(["ann", "bob"])
    assert pipe.get_active_adapters() == ["style"]
    assert near(picture(pipe), images["style"])


# Ordinary LoRAs on text encoders


@pytest.fixture(scope="module")
def styled_texts(tmp_path_factory):
    """SD 1.5: a person, and a LoRA of UNet and text encoder."""
    folder, pipe = tmp_path_factory.mktemp("sd15"), tiny_sd15_pipeline()
    write_subjects(folder, pipe.unet, "ann", target_modules=["to_q"])
    pipe, layers = tiny_sd15_pipeline(), {}
    for part, targets in (("unet", ["to_k"]), ("text_encoder", ["q_proj", "v_proj", "out_proj"])):
        model = getattr(pipe, part)
        model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="style")
    StableDiffusionPipeline.save_lora_weights(folder / "style", **layers)
    return folder


def test_choosing_a_person_switches_a_style_of_the_text_encoder_off(styled_texts):
    """Bug: `set_adapters("ann")` and a load of her left an ordinary LoRA of the text encoder active."""
    noise = torch.randn(1, 4, 8, 8)

    def draw(pipe):
        return pipe("a person", num_inference_steps=1, latents=noise, height=32, width=32, output_type="np").images

    alone = enable_meta_lora(tiny_sd15_pipeline())
    alone.load_meta_lora(styled_texts / "ann")
    wanted = draw(alone)
    pipe = enable_meta_lora(tiny_sd15_pipeline())
    pipe.load_lora_weights(styled_texts / "style", adapter_name="style")
    styled = draw(pipe)
    pipe.load_meta_lora(styled_texts / "ann")
    assert near(draw(pipe), wanted)
    pipe.set_adapters(["ann", "style"])
    assert not near(draw(pipe), wanted)
    pipe.set_adapters("ann")
    assert near(draw(pipe), wanted)
    pipe.unload_meta_lora()
    assert near(draw(pipe), styled), "of the text encoder too"


# Rows of loaded adapters


def test_what_is_written_into_a_loaded_person_shows(people, pipe):
    """Bug: `subjects=["ann"]` showed a copy of ann from before `write_subject`, or before she trained on."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    pipe.load_meta_lora(folder / "bob")
    assert near(picture(pipe, subjects="ann"), images["ann"])
    write_subject(pipe.transformer, "ann", subject_state(pipe.transformer, "bob"))
    assert near(picture(pipe, subjects="ann"), images["bob"])
    for layer in meta_layers(pipe.transformer):
        layer.metalora_up["ann"].data.zero_()
    assert near(picture(pipe, subjects="ann"), images[None])
    table = next(iter(tables_of(pipe.transformer).values()))
    hits = table.statistics().device_hits
    picture(pipe, subjects=["ann"])
    assert table.statistics().device_hits == hits + 1, "what has not changed is not copied again"


@pytest.mark.parametrize("by", ["pipe", "model"])
def test_a_weight_holds_in_a_batch_too(people, pipe, by):
    """Bug: after `set_adapters("ann", 0.5)` the image of `subjects="ann"` showed her in full."""
    folder, images = people
    for name in ("bob", "ann"):
        pipe.load_meta_lora(folder / name)
    weigh = pipe.set_adapters if by == "pipe" else pipe.transformer.set_adapters
    assert near(picture(pipe, subjects="ann"), images["ann"])
    for weight in (0.5, 0.3):
        weigh(["ann"], [weight])
        wanted = picture(pipe)
        assert not near(wanted, images["ann"])
        assert near(picture(pipe, subjects="ann"), wanted)
    mixed = picture(pipe, ["a photo of a person"] * 3, subjects=["ann", "bob", None])
    assert near(mixed[:1], wanted) and near(mixed[1:2], images["bob"]) and near(mixed[2:], images[None])
    in_part = picture(pipe, regions=[("ann", (0, 0, 32, 32))])
    pipe.set_adapters("bob")
    assert near(picture(pipe, subjects="ann"), wanted), "until she is given another one"
    weigh(["ann"], [1.0])
    assert near(picture(pipe, subjects="ann"), images["ann"])
    assert not near(picture(pipe, regions=[("ann", (0, 0, 32, 32))]), in_part)
    weigh(["ann"], [0.0])
    assert near(picture(pipe, subjects="ann"), images[None])


def test_the_slots_are_nobody_by_a_name(people, pipe, tmp_path):
    """Bug: a message named the adapter of the slots, and under that name whoever lay in the first one was shown, fused
    and saved; deleted, it took everybody along."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    pipe.add_subject(folder / "bob")
    picture(pipe, subjects="bob")
    (table,) = tables_of(pipe.transformer).values()
    with pytest.raises(errors.AdapterNotFoundError, match=r"found no 'zoe' among \['ann'\]"):
        pipe.set_adapters("zoe")
    uses = (
        pipe.set_adapters,
        pipe.fuse_meta_lora,
        pipe.delete_adapters,
        partial(pipe.save_meta_lora, tmp_path / "saved"),
    )
    for use in uses:
        with pytest.raises(errors.AdapterNotFoundError, match=r"found no 'slots-\w+' among \['ann'\]"):
            use(table.adapter_name)
        with pytest.raises(errors.AdapterNotFoundError, match=r"'bob' in the table of slots alone. Show it with subj"):
            use("bob")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(errors.AdapterNotFoundError, match=r"found 'slots-\w+' among ann, bob\."):
        picture(pipe, subjects=table.adapter_name)
    assert near(picture(pipe), images["ann"]) and near(picture(pipe, subjects="bob"), images["bob"])


def test_a_name_is_one_persons(people, pipe, tmp_path):
    """Bug: `add_subject(folder, "ann")` hid a loaded ann from `subjects=`, or lived under two Downs at once."""
    folder, images = people
    pipe.load_meta_lora(folder / "faces")
    pipe.load_meta_lora(folder / "ann")
    for name in ("ann", "faces"):
        with pytest.raises(errors.AdapterStateError, match="a loaded adapter's"):
            pipe.add_subject(folder / "bob", name)
    assert pipe.add_subject(folder / "ann") == "ann-1"
    assert near(picture(pipe, subjects="ann"), images["ann"])
    other = write_subjects(tmp_path, tiny_flux_pipeline().transformer, "eve", target_modules=["to_q"])
    with pytest.raises(errors.AdapterStateError, match="on another Down has"):
        pipe.add_subject(other / "eve", "ann-1")
    assert pipe.add_subject(other / "eve", "eve") == "eve"


def other_rank(folder, name):
    """A subject of rank 3 on the Down of rank 2."""
    model = tiny_flux_pipeline().transformer
    settings = {"r": 3, "meta_r": 3, "target_modules": TARGETS, "start": "fresh", "init_weights": False}
    inject_adapter_in_model(MetaLoraConfig(**settings, stage="subject", down=str(folder.parent / "faces")), model, name)
    return save_subject(folder, model, name, down=folder.parent / "faces")


def test_a_table_that_holds_nobody_stays_unless_its_down_goes(people, pipe, tmp_path):
    """Bug: a deleted subject took empty tables along, of its own Down and others, with the room that was asked for."""
    folder, images = people
    pipe.load_meta_lora(folder / "faces")
    table = pipe.enable_subject_slots(3)
    write_subjects(tmp_path, tiny_flux_pipeline().transformer, "dan", seed=2, lora_alpha=16, target_modules=TARGETS)
    pipe.load_meta_lora(tmp_path / "dan")
    pipe.delete_adapters("dan")
    pipe.add_subject(folder / "ann")
    assert near(picture(pipe, subjects="ann"), images["ann"]) and table.names() == ["ann"] and table.capacity == 3
    table.evict(["ann"])
    pipe.load_meta_lora(folder / "bob")
    pipe.delete_adapters("bob")
    pipe.add_subject(folder / "ann")
    assert near(picture(pipe, subjects="ann"), images["ann"]) and table.names() == ["ann"]
    table.evict(["ann"])
    pipe.delete_adapters("faces")
    assert tables_of(pipe.transformer) == {} and near(picture(pipe), images[None])


def test_a_refused_subject_leaves_no_table(people, pipe):
    """Bug: a table was made before the subject was checked, and stayed, empty, on the denoiser."""
    folder, images = people
    odd = other_rank(folder / "odd", "odd")
    modules = [id(module) for module in pipe.transformer.modules()]
    with pytest.raises(errors.AdapterStateError, match="as all of the table have"):
        pipe.add_subject(odd)
    assert [id(module) for module in pipe.transformer.modules()] == modules
    assert not tables_of(pipe.transformer) and not getattr(pipe.transformer, "peft_config", {})
    pipe.load_meta_lora(odd)
    with pytest.raises(errors.AdapterStateError, match="as all of the table have"):
        picture(pipe, subjects="odd")
    assert pipe.get_list_adapters() == {"transformer": ["odd"]} and not tables_of(pipe.transformer)
    pipe.load_meta_lora(folder / "ann")
    assert near(picture(pipe, subjects="ann"), images["ann"]), "the table has the Down's rank, not the first subject's"


def test_a_subject_is_read_again_from_the_folder_that_was_named(people, pipe, tmp_path, monkeypatch):
    """Bug: a relative path was looked up from wherever the process was by then, where another person may lie."""
    folder, images = people
    shutil.copytree(folder / "bob", tmp_path / "ann")
    monkeypatch.chdir(folder)
    pipe.load_meta_lora("faces")
    pipe.enable_subject_slots(1, host_capacity=1)
    for name in ("ann", "cleo"):
        pipe.add_subject(name)
    monkeypatch.chdir(tmp_path)
    for name in ("cleo", "ann", "cleo", "ann"):
        assert near(picture(pipe, subjects=name), images[name])


def test_a_subject_that_is_read_again_is_read_whole(people, pipe, tmp_path):
    """Bug: after it had left host memory, a folder's new tensors came in with the old folder's scale."""
    folder, _ = people

    def person(alpha, seed):
        model = tiny_flux_pipeline().transformer
        settings = {"r": 2, "meta_r": 3, "lora_alpha": alpha, "target_modules": TARGETS, "init_weights": False}
        torch.manual_seed(seed)
        config = MetaLoraConfig(**settings, stage="subject", down=str(folder / "faces"))
        inject_adapter_in_model(config, model, "eve")
        save_subject(tmp_path / "eve", model, "eve", down=folder / "faces")

    person(4, 1)
    pipe.load_meta_lora(folder / "faces")
    pipe.enable_subject_slots(1, host_capacity=1)
    pipe.add_subject(tmp_path / "eve")
    person(32, 2)
    pipe.add_subject(folder / "bob")
    picture(pipe, subjects="bob")
    again = picture(pipe, subjects="eve")
    fresh = enable_meta_lora(tiny_flux_pipeline())
    fresh.load_meta_lora(tmp_path / "eve")
    assert near(again, picture(fresh))


# Fused, disabled, in training


@pytest.mark.parametrize("how", ["fuse_meta_lora", "fuse_lora"])
@pytest.mark.parametrize(
    "call",
    [
        lambda pipe, folder: picture(pipe, subjects=[None]),
        lambda pipe, folder: picture(pipe, subjects="ann"),
        lambda pipe, folder: picture(pipe, regions=[("ann", (0, 0, 16, 32))]),
        lambda pipe, folder: pipe.set_adapters("bob"),
        lambda pipe, folder: pipe.load_meta_lora(folder / "cleo"),
        lambda pipe, folder: pipe.add_subject(folder / "cleo"),
        lambda pipe, folder: pipe.enable_subject_slots(2),
        lambda pipe, folder: pipe.delete_adapters("bob"),
    ],
    ids=["nobody", "subjects", "regions", "set_adapters", "load", "add_subject", "slots", "delete"],
)
def test_what_is_fused_stays_fused(people, pipe, how, call):
    """Bug: PEFT takes merged adapters out of the weights when others are chosen, so that a call unfused for good."""
    folder, images = people
    pipe.load_meta_lora(folder / "bob")
    pipe.load_meta_lora(folder / "ann")
    getattr(pipe, how)()
    with pytest.raises(errors.AdapterStateError, match="unfuse"):
        call(pipe, folder)
    assert all(layer.merged_adapters == ["ann"] for layer in meta_layers(pipe.transformer))
    assert near(picture(pipe), images["ann"])
    pipe.unfuse_meta_lora()
    assert near(picture(pipe, subjects="bob"), images["bob"])


def test_a_fused_style_stays_fused(people, pipe):
    """Bug: a call with `subjects=` took an ordinary LoRA out of the weights, too."""
    folder, _ = people
    pipe.load_meta_lora(folder / "ann")
    with_style(pipe, folder)
    pipe.set_adapters(["ann", "style"])
    wanted = picture(pipe)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    style = layer if hasattr(layer, "lora_B") and layer.lora_B else layer.base_layer
    style.merge(adapter_names=["style"])
    assert near(picture(pipe, subjects="ann"), wanted)
    assert style.merged_adapters == ["style"]


def test_disabled_people_are_not_asked_for_in_vain(people, pipe):
    """Bug: after `disable_meta_lora`, `subjects=` drew the base without a word; a load then showed by half."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    pipe.disable_meta_lora()
    for wish in ({"subjects": "ann"}, {"regions": [("ann", (0, 0, 32, 32))]}):
        with pytest.raises(errors.AdapterStateError, match="enable_meta_lora"):
            picture(pipe, **wish)
    assert near(picture(pipe, subjects=[None]), images[None])
    other = write_subjects(folder / "other", tiny_flux_pipeline().transformer, "eve", target_modules=["proj_mlp"])
    pipe.load_meta_lora(other / "eve")
    assert near(picture(pipe), images[None]), "until enable_meta_lora"
    pipe.enable_meta_lora()
    assert near(picture(pipe, subjects="ann"), images["ann"])
    assert not near(picture(pipe), images[None])


@pytest.mark.parametrize("call", ["subjects", "regions", "nobody", "add_subject", "a Down", "delete"])
def test_an_adapter_in_training_trains_on(people, pipe, call):
    """Bug: a call with `subjects=` froze what trained, and forgot the slots that training had chosen."""
    folder, _ = people
    pipe.load_meta_lora(folder / "bob")
    pipe.load_meta_lora(folder / "ann")
    model = pipe.transformer
    model.set_adapter("ann")
    index = meta_layers(model)[0].subject_index
    index.write((0, -1), torch.device("cpu"))
    flags = {
        name: p.requires_grad for name, p in model.named_parameters() if "slots-" not in name and "bob" not in name
    }
    assert any(flags.values())
    match call:
        case "subjects":
            picture(pipe, subjects="bob")
        case "regions":
            picture(pipe, regions=[("bob", (0, 0, 32, 32))])
        case "nobody":
            picture(pipe, subjects=[None])
        case "add_subject":
            pipe.add_subject(folder / "cleo")
        case "a Down":
            pipe.load_meta_lora(folder / "faces")
        case _:
            pipe.delete_adapters("bob")
    now = dict(model.named_parameters())
    assert {name: now[name].requires_grad for name in flags} == flags
    assert index.values == (0, -1) and pipe.get_active_adapters() == ["ann"]


# More rows than images


def film(family_pipe):
    """AnimateDiff on tiny SD 1.5, with a Down and two people."""
    adapter = MotionAdapter(
        block_out_channels=tuple(family_pipe.unet.config.block_out_channels),
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    torch.manual_seed(3)
    unet = UNetMotionModel.from_unet2d(family_pipe.unet, adapter)
    parts = {name: getattr(family_pipe, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    return AnimateDiffPipeline(**parts, unet=unet, motion_adapter=adapter)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_each_film_keeps_its_person(tmp_path, guidance):
    """Bug: a UNet for videos sees each frame as a row, and frames of one film took the people in turn."""
    pipe = enable_meta_lora(film(tiny_sd15_pipeline()))
    pipe.set_progress_bar_config(disable=True)
    targets = ["to_q", "to_k", "to_v", "time_emb_proj", "ff.net.2"]
    write_subjects(tmp_path, copy.deepcopy(pipe.unet), "ann", "bob", lora_alpha=16, target_modules=targets)
    for name in ("ann", "bob"):
        pipe.load_meta_lora(tmp_path / name)
    noise = torch.randn(4, 4, 3, 8, 8)

    def shot(prompts, subjects, rows, **options):
        settings = {"num_frames": 3, "num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}
        return pipe(
            prompts, subjects=subjects, latents=noise[rows], guidance_scale=guidance, **settings, **options
        ).frames

    both = shot(["a person", "a person"], ["ann", "bob"], [0, 1])
    torch.testing.assert_close(both[:1], shot(["a person"], "ann", [0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(both[1:], shot(["a person"], "bob", [1]), rtol=0, atol=1e-5)
    assert (both[1:] - shot(["a person"], "ann", [1])).abs().max() > 1e-3
    with pytest.raises(errors.AdapterStateError, match="Generate one subject at a time"):
        shot(["a person", "a person"], ["ann", "bob"], [0, 1], num_videos_per_prompt=2)  # which AnimateDiff ignores


def test_several_films_of_each_prompt(people):
    """Bug: only `num_images_per_prompt` was read, so films took the people in turn, or were refused."""

    class Films(FluxPipeline):
        def __call__(self, prompt, num_videos_per_prompt=1, **options):
            return super().__call__(prompt, num_images_per_prompt=num_videos_per_prompt, **options)

    folder, images = people
    pipe = enable_meta_lora(Films(**tiny_flux_pipeline().components))
    pipe.set_progress_bar_config(disable=True)
    for name in ("ann", "bob"):
        pipe.load_meta_lora(folder / name)
    prompts, noise = ["a photo of a person"] * 2, torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    for subjects in (["ann", "bob"], ["ann", "ann", "bob", "bob"]):
        shown = picture(pipe, prompts, subjects=subjects, num_videos_per_prompt=2, latents=noise.expand(4, -1, -1))
        assert near(shown[:2], images["ann"]) and near(shown[2:], images["bob"])


def test_rows_of_nobody_knows_whom_are_refused(people, pipe, monkeypatch):
    """Bug: a batch that was a multiple of the images repeated them as for guidance, whatever its rows were."""
    assert batch_slots([1, -1], 4) == [1, -1, 1, -1] and batch_slots([2, 2], 7) == [2] * 7
    assert batch_slots([2, 2], 0) == [2]
    for rows in (0, 1, 3, 10):
        with pytest.raises(errors.AdapterStateError, match=f"found {rows} rows"):
            batch_slots([1, -1], rows)
    folder, _ = people
    pipe.load_meta_lora(folder / "ann")
    forward = type(pipe.transformer).forward

    def frames(self, hidden_states, **kwargs):
        return forward(self, hidden_states, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", frames)
    monkeypatch.setattr(type(pipe), "do_classifier_free_guidance", False, raising=False)
    prompts = ["a person", "a person"]
    picture(pipe, prompts, subjects=["ann", None])
    with pytest.raises(errors.AdapterStateError, match="found 4 rows"):
        picture(pipe, prompts, subjects=["ann", None], latents=torch.randn(4, 16, 16))


def test_compiled_in_place_the_rows_are_followed(people):
    """Bug: as above; and a hook that came after `model.compile()` would not have been called."""
    pipe = enable_meta_lora(tiny_pipeline("sd15"))
    folder = people[0] / "sd15"
    write_subjects(folder, copy.deepcopy(pipe.unet), "ann", "bob", lora_alpha=16, target_modules=["to_q", "to_v"])
    noise, prompts = torch.randn(2, 4, 8, 8), ["a person", "a person"]

    def draw(**options):
        settings = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "np", "latents": noise}
        return pipe(prompts, **settings, **options).images

    for name in ("ann", "bob"):
        pipe.load_meta_lora(folder / name)
    wanted = draw(subjects=["ann", "bob"])
    draw(subjects=["bob", "ann"])
    pipe.unet.compile(backend="eager")
    try:
        assert near(draw(subjects=["ann", "bob"]), wanted)
        assert near(draw(subjects=["bob", "ann"])[0], draw(subjects="bob")[0])
    finally:
        torch._dynamo.reset()


# Devices and copies


def test_adapters_move_to_another_device(people, pipe):
    """Bug: diffusers' `set_lora_device` ended in an AttributeError on layers of ours."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    pipe.load_meta_lora(folder / "bob")
    with_style(pipe, folder)
    FluxPipeline.from_pipe(pipe).set_lora_device(["style"], "cpu")
    pipe.set_lora_device(["ann", "style"], "cpu")
    with pytest.raises(errors.AdapterNotFoundError, match="'zoe'"):
        pipe.set_lora_device(["zoe"], "cpu")
    pipe.set_adapters("ann")
    assert near(picture(pipe), images["ann"])


def test_a_down_moves_with_the_last_of_its_users(people, pipe):
    """Bug: as above; a Down that moved with the first of them would be missed by the others."""
    pipe.load_meta_lora(people[0] / "ann")
    pipe.load_meta_lora(people[0] / "bob")
    layer = meta_layers(pipe.transformer)[0]
    for names, there in ((["ann"], torch.device("cpu")), (["ann", "bob"], DEVICE)):
        pipe.set_lora_device(names, DEVICE)
        assert layer.metalora_up["ann"].device.type == DEVICE.type
        assert next(iter(layer.metalora_down.values())).device.type == there.type


def copied(pipe, how):
    if how == "deepcopy":
        return copy.deepcopy(pipe)
    return pickle.load(io.BytesIO(pickle.dumps(pipe)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_everybody(people, pipe, how):
    """Bug: an enabled pipeline did not pickle; a deep copy lost who came by `add_subject`, and listed the table."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    table = next(iter([pipe.add_subject(folder / "bob"), *tables_of(pipe.transformer).values()][1:]))
    table.host_capacity = 1
    pipe.add_subject(folder / "cleo", token="hf_secret")
    picture(pipe, subjects="cleo")
    twin = copied(pipe, how)
    twin.set_progress_bar_config(disable=True)
    assert type(twin) is type(pipe) and isinstance(twin, FluxPipeline)
    assert twin.get_list_adapters() == pipe.get_list_adapters() == {"transformer": ["ann"]}
    assert near(picture(twin), images["ann"])
    for name in ("bob", "cleo", "ann", "bob"):
        assert near(picture(twin, subjects=name), images[name])
    (own,) = tables_of(twin.transformer).values()
    assert own is not table and own.names() == [*table.names(), "ann"]
    for _, layer in meta_lora_layers(twin.transformer):
        layer.metalora_mid[own.adapter_name].data.zero_()
    assert near(picture(pipe, subjects="cleo"), images["cleo"]), "the copy's slots are its own"
    twin.unload_meta_lora()
    assert near(picture(twin), images[None]) and near(picture(pipe), images["ann"])
    if how == "pickle":
        assert b"hf_secret" not in pickle.dumps(pipe)


def test_nobody_comes_into_the_slots_of_an_image_that_is_drawn(people, pipe):
    """Bug: a callback that preloaded the next one put them into the slot of the image, which went on as theirs."""
    folder, _ = people
    pipe.load_meta_lora(folder / "faces")
    table = pipe.enable_subject_slots(2)

    def shows(name, callback=None):
        return picture(pipe, subjects=name, num_inference_steps=2, callback_on_step_end=callback)

    images = {None: shows([None])}
    for name in ("ann", "bob", "cleo"):
        pipe.add_subject(folder / name)
        images[name] = shows(name)

    def next_ones(pipe, step, time, tensors):
        if step == 0:
            for name in ("bob", "cleo"):
                table.preload([name])
            pipe.add_subject(folder / "bob", "ann")  # for the next image on
            table.preload(["ann"])
            with pytest.raises(errors.AdapterStateError, match="the 1 of an image that is being drawn"):
                table.preload(["bob", "cleo"])
        return tensors

    assert near(shows("ann", next_ones), images["ann"])
    assert near(shows("ann"), images["bob"])

    def deletes(pipe, step, time, tensors):
        if step == 0:
            table.evict(["bob"])
            table.preload(["cleo"])
        return tensors

    gone = shows("bob", deletes)
    assert not any(near(gone, images[name]) for name in ("bob", "cleo"))
    mixed = picture(pipe, ["a photo of a person"] * 2, subjects=["cleo", None], num_inference_steps=2)
    assert near(mixed[:1], images["cleo"]) and near(mixed[1:], images[None]), "the slot is free again"
