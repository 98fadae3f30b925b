# SPDX-License-Identifier: Apache-2.0
"""Subjects beside what else people switch on in a pipeline: the rows of the table in docs/pipelines.md."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch._dynamo.testing
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from peft.functional import set_adapter
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from artefacts_tiny import write_subjects
from peft_metalora import enable_meta_lora, errors
from peft_metalora.pipelines import calling, loader
from peft_metalora.pipelines.table import tables_of
from peft_metalora.tuner.on_model import meta_lora_layers
from pipelines_tiny import tiny_flux_pipeline

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out"]
# Rounding of another batch size, at a pixel of 0 to 1.
TOLERANCE = 1e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PERSON = "a photo of a person"


def picture(pipe, prompt=PERSON, **options):
    """Images (n, 32, 32, 3) in two steps; each has the noise that it has alone and in every precision."""
    count = len(prompt) if isinstance(prompt, list) else 1
    noise = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1)
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", "latents": noise}
    return pipe(prompt=prompt, **{**settings, **options}).images


def distance(one, other):
    return np.abs(one - other).max()


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """A Down and three subjects, the folder of them, and the image of each and of the base."""
    folder = tmp_path_factory.mktemp("people")
    pipe = tiny_flux_pipeline()
    images = {None: picture(pipe)}
    write_subjects(folder, pipe.transformer, "ann", "bob", "cleo", lora_alpha=16, target_modules=TARGETS)
    for name in ("ann", "bob", "cleo"):
        set_adapter(pipe.transformer, name)
        images[name] = picture(pipe)
    return folder, images


@pytest.fixture
def pipe():
    return enable_meta_lora(tiny_flux_pipeline())


def assert_everybody_shows(pipe, people, tolerance=TOLERANCE):
    """Loaded, per sample, from slots, and gone again: each image as it is without the pipeline's other features."""
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    assert distance(picture(pipe), images["ann"]) < tolerance
    pipe.load_meta_lora(folder / "bob")
    assert distance(picture(pipe), images["bob"]) < tolerance
    pipe.add_subject(folder / "cleo")
    for _ in range(2):
        mixed = picture(pipe, [PERSON] * 4, subjects=["ann", None, "bob", "cleo"])
        for row, name in enumerate(("ann", None, "bob", "cleo")):
            assert distance(mixed[row], images[name][0]) < tolerance
    pipe.set_adapters("ann")
    pipe.fuse_meta_lora()
    assert distance(picture(pipe), images["ann"]) < tolerance
    pipe.unfuse_meta_lora()
    pipe.unload_meta_lora()
    assert distance(picture(pipe), images[None]) < tolerance


def by_model(pipe):
    pipe.enable_model_cpu_offload(device=DEVICE)


def by_sequence(pipe):
    pipe.enable_sequential_cpu_offload(device=DEVICE)


def by_groups(**options):
    def offload(pipe):
        pipe.transformer.enable_group_offload(onload_device=DEVICE, **options)
        for rest in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            rest.to(DEVICE)

    return offload


OFFLOADS = {
    "model": by_model,
    "leaf": by_groups(offload_type="leaf_level"),
    "block": by_groups(offload_type="block_level", num_blocks_per_group=1),
}
if DEVICE.type == "cuda":  # accelerate's sequential offload cannot compute on a CPU, and only a GPU has streams
    OFFLOADS |= {
        "sequential": by_sequence,
        "leaf, streams": by_groups(offload_type="leaf_level", use_stream=True),
        "leaf, recorded streams": by_groups(offload_type="leaf_level", use_stream=True, record_stream=True),
        "block, streams": by_groups(offload_type="block_level", num_blocks_per_group=1, use_stream=True),
    }


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload(people, pipe, offload):
    OFFLOADS[offload](pipe)
    assert_everybody_shows(pipe, people)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_enabled_after_the_load(people, pipe, offload):
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    OFFLOADS[offload](pipe)
    pipe.add_subject(folder / "bob")
    for _ in range(2):
        assert distance(picture(pipe), images["ann"]) < TOLERANCE
    mixed = picture(pipe, [PERSON] * 2, subjects=["ann", "bob"])
    assert distance(mixed[0], images["ann"][0]) < TOLERANCE and distance(mixed[1], images["bob"][0]) < TOLERANCE
    hooks = {
        name
        for module in pipe.transformer.modules()
        for name in ("_hf_hook", "_diffusers_hook")
        if hasattr(module, name)
    }
    assert hooks, "the offload stays on"


def test_model_offload_keeps_its_device(people, pipe):
    pipe.enable_model_cpu_offload(device=DEVICE)
    pipe.load_meta_lora(people[0] / "ann")
    assert pipe._offload_device == torch.device(DEVICE.type, 0) and hasattr(pipe.transformer, "_hf_hook")


def test_sequential_offload_parks_the_base_and_keeps_the_factors(people, pipe, tmp_path):
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    model = pipe.transformer
    pipe.enable_sequential_cpu_offload(device=DEVICE)
    pipe.add_subject(folder / "bob")
    pipe.load_meta_lora(folder / "cleo")
    for _, layer in meta_lora_layers(model):
        assert layer.base_layer.weight.is_meta
        factors = [p for name, p in layer.named_parameters() if not name.startswith("base_layer.")]
        assert factors and not any(factor.is_meta for factor in factors)
    pipe.save_meta_lora(tmp_path / "copy", "ann", down=folder / "faces")
    saved, given = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "copy", folder / "ann"))
    assert saved.keys() == given.keys() and all(torch.equal(saved[name], given[name]) for name in given)
    pipe.fuse_meta_lora()
    pipe.unfuse_meta_lora()
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert distance(picture(pipe), images["cleo"]) < TOLERANCE
    assert distance(picture(pipe, subjects="bob"), images["bob"]) < TOLERANCE


def test_fused_under_sequential_offload_the_base_is_the_sum(people, pipe):
    folder, images = people
    pipe.enable_sequential_cpu_offload(device=DEVICE)
    pipe.load_meta_lora(folder / "ann")
    pipe.fuse_meta_lora()
    pipe.remove_all_hooks()
    pipe.to("cpu")
    assert distance(picture(pipe), images["ann"]) < TOLERANCE
    pipe.unload_meta_lora()
    assert distance(picture(pipe), images[None]) == 0


def test_group_offload_to_disk_is_refused(people, pipe, tmp_path):
    folder, images = people
    pipe.transformer.enable_group_offload(
        onload_device=DEVICE, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "disk")
    )
    with pytest.raises(errors.PipelineError, match="Leave out offload_to_disk_path"):
        pipe.load_meta_lora(folder / "ann")
    assert pipe.get_list_adapters() == {}
    assert distance(picture(pipe), images[None]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(people, pipe, dtype):
    folder, _ = people
    pipe.to(dtype)
    base = picture(pipe)
    assert_everybody_shows(pipe, people, tolerance=0.05)
    assert np.array_equal(picture(pipe), base)
    for name in ("ann", "bob"):
        pipe.load_meta_lora(folder / name)
    mixed = picture(pipe, [PERSON] * 2, subjects=["ann", "bob"])
    assert distance(mixed[:1], mixed[1:]) > 0.01
    assert np.array_equal(picture(pipe, subjects=[None]), base)


def test_a_cast_after_the_load(people, pipe):
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    pipe.add_subject(folder / "bob")
    pipe.to(torch.bfloat16)
    assert distance(picture(pipe), images["ann"]) < 0.05
    assert distance(picture(pipe, subjects="bob"), images["bob"]) < 0.05
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}


def test_vae_tiling_and_slicing(people, pipe):
    folder, _ = people
    pipe.vae.enable_slicing()
    assert_everybody_shows(pipe, people)
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 4
    pipe.vae.enable_tiling()
    base = picture(pipe)
    pipe.load_meta_lora(folder / "ann")
    assert distance(picture(pipe), base) > 10 * TOLERANCE
    pipe.add_subject(folder / "bob")
    mixed = picture(pipe, [PERSON] * 2, subjects=["ann", None])
    assert distance(mixed[:1], picture(pipe)) < TOLERANCE
    assert distance(mixed[1:], base) < TOLERANCE


def test_from_pipe_shares_adapters_and_slots(people, pipe):
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    pipe.add_subject(folder / "bob")
    other = enable_meta_lora(FluxPipeline.from_pipe(pipe))
    other.set_progress_bar_config(disable=True)
    assert distance(picture(other), images["ann"]) < TOLERANCE
    assert distance(picture(other, subjects="bob"), images["bob"]) < TOLERANCE
    other.load_meta_lora(folder / "cleo")
    assert distance(picture(pipe), images["cleo"]) < TOLERANCE
    edit = enable_meta_lora(FluxImg2ImgPipeline.from_pipe(pipe))
    assert edit.get_active_adapters() == ["cleo"]
    edit.unload_meta_lora()
    assert distance(picture(pipe), images[None]) == 0


def test_callbacks_see_every_step_and_may_stop_the_call(people, pipe):
    folder, images = people
    pipe.load_meta_lora(folder / "ann")
    steps = []

    def look(running, step, timestep, tensors):
        steps.append((step, tuple(tensors["latents"].shape)))
        running._interrupt = step == 0 and stop
        return tensors

    stop = False
    assert distance(picture(pipe, callback_on_step_end=look, subjects="ann"), images["ann"]) < TOLERANCE
    assert [step for step, _ in steps] == [0, 1]
    stop = True
    assert distance(picture(pipe, callback_on_step_end=look, subjects="ann"), images["ann"]) > TOLERANCE

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture(pipe, callback_on_step_end=fail, subjects="ann")
    pipe._interrupt = False
    assert pipe.get_active_adapters() == ["ann"]
    assert distance(picture(pipe), images["ann"]) < TOLERANCE, "an image that failed leaves no subject behind"


def test_threads_that_load_and_bring_change_no_running_image(people, pipe):
    folder, _ = people
    names = ("ann", "bob", "cleo")
    pipe.load_meta_lora(folder / "faces")
    table = pipe.enable_subject_slots(2)
    for name in names:
        pipe.add_subject(folder / name)
    # Slots are compared with themselves: another kernel may round otherwise than the image of an adapter alone.
    alone = {name: picture(pipe, subjects=name) for name in names}
    problems, done, turns = [], threading.Event(), itertools.count()

    def loads():
        number = 0
        try:
            while not done.is_set():
                number += 1
                pipe.add_subject(folder / names[number % 3], f"guest-{number % 2}")
                table.evict([f"guest-{number % 2}"])
                pipe.enable_meta_lora()
                name = pipe.load_meta_lora(folder / names[number % 3])
                pipe.set_adapters([])
                pipe.delete_adapters(name)
        except Exception as error:
            problems.append(error)

    def brings():
        try:
            while not done.is_set():
                table.preload([names[next(turns) % 3], names[next(turns) % 3]])
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for work in (loads, brings)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(12):
            name = names[turn % 3]
            assert np.array_equal(picture(pipe, subjects=name), alone[name])
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not problems


def test_a_name_of_the_slots_is_no_adapters(people, pipe):
    folder, images = people
    pipe.add_subject(folder / "ann")
    with pytest.raises(errors.AdapterStateError, match="evict it"):
        pipe.load_meta_lora(folder / "bob", "ann")
    assert pipe.load_meta_lora(folder / "ann") == "ann-1"
    pipe.delete_adapters("ann-1")
    assert distance(picture(pipe, subjects="ann"), images["ann"]) < TOLERANCE


def test_slots_wait_for_the_image(people, pipe):
    folder, images = people
    pipe.load_meta_lora(folder / "faces")
    table = pipe.enable_subject_slots(1)
    for name in ("ann", "bob"):
        pipe.add_subject(folder / name)
    threads = []

    def bring_meanwhile(pipe, step, timestep, tensors):
        if not threads:
            threads.append(threading.Thread(target=table.preload, args=(["bob"],)))
            threads[0].start()
            threads[0].join(0.3)
            assert threads[0].is_alive(), "bringing waits for the image"
        return tensors

    shown = picture(pipe, subjects="ann", callback_on_step_end=bring_meanwhile)
    threads[0].join()
    assert distance(shown, images["ann"]) < TOLERANCE
    assert table.bring(["bob"]) == {"bob": 0} and table.statistics().device_hits == 1


def test_host_memory_fills_while_an_image_is_drawn(people, pipe):
    folder, images = people
    pipe.load_meta_lora(folder / "faces")
    table = pipe.enable_subject_slots(2)
    pipe.add_subject(folder / "ann")
    threads = []

    def add_meanwhile(pipe, step, timestep, tensors):
        if not threads:
            for arguments in ((folder / "bob",), (folder / "cleo", "ann")):
                threads.append(threading.Thread(target=pipe.add_subject, args=arguments))
                threads[-1].start()
                threads[-1].join(60)
                assert not threads[-1].is_alive(), "host memory does not wait for the image"
        return tensors

    shown = picture(pipe, subjects="ann", callback_on_step_end=add_meanwhile)
    assert distance(shown, images["ann"]) < TOLERANCE, "who is being drawn stays"
    assert distance(picture(pipe, subjects="bob"), images["bob"]) < TOLERANCE
    assert distance(picture(pipe, subjects="ann"), images["cleo"]) < TOLERANCE, "replaced for the next image"
    assert table.statistics().on_device == 2


@pytest.mark.parametrize("moment", ["load", "inject"])
def test_a_name_is_an_adapters_or_a_subjects_of_the_table(people, pipe, monkeypatch, moment):
    """Bug: add_subject, which does not wait for a load, took the name that an adapter came under at the time."""
    folder, images = people
    pipe.load_meta_lora(folder / "faces")
    table, refused = pipe.enable_subject_slots(2), []

    def add() -> None:
        try:
            pipe.add_subject(folder / "bob", "me")
        except errors.AdapterStateError as error:
            refused.append(error)

    original = getattr(loader, moment)

    def meanwhile(*args, **kwargs):
        if not other.ident:
            other.start()
            other.join(60)
        return original(*args, **kwargs)

    other = threading.Thread(target=add)
    monkeypatch.setattr(loader, moment, meanwhile)
    if moment == "load":  # the files are read, and nothing has changed
        with pytest.raises(errors.AdapterStateError, match="expected a new adapter name, found 'me'"):
            pipe.load_meta_lora(folder / "ann", "me")
        assert table.names() == ["me"] and not refused and "me" not in pipe.transformer.peft_config
    else:
        pipe.load_meta_lora(folder / "ann", "me")
        assert table.names() == [] and "a loaded adapter's" in str(refused[0])
    assert distance(picture(pipe, subjects="me"), images["bob" if moment == "load" else "ann"]) < TOLERANCE


def test_two_that_come_at_once_without_a_name_get_two(people, pipe, monkeypatch):
    """Bug: of two subjects whose folders have one name the second took the first one's place while that came in."""
    folder, _ = people
    original = calling.free_name
    other = threading.Thread(target=pipe.add_subject, args=(folder / "ann",))

    def meanwhile(taken, path):
        name = original(taken, path)
        if not other.ident:
            other.start()
            other.join(0.5)
        return name

    monkeypatch.setattr(calling, "free_name", meanwhile)
    pipe.add_subject(folder / "ann")
    other.join()
    (table,) = tables_of(pipe.transformer).values()
    assert sorted(table.names()) == ["ann", "ann-1"]


# Compiled, and quantised


def wide_flux():
    """The tiny pipeline with a transformer of width 64: bitsandbytes' CPU kernels take outputs that 32 divides."""
    return tiny_flux_pipeline(attention_head_dim=32)


@pytest.fixture(scope="module")
def wide_people(tmp_path_factory):
    """A Down and three subjects of `wide_flux`."""
    settings = {"meta_r": 4, "lora_alpha": 16, "target_modules": TARGETS[:4]}
    return write_subjects(tmp_path_factory.mktemp("wide"), wide_flux().transformer, "ann", "bob", "cleo", **settings)


def four_bit(model, path, linear):
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    model.get_submodule(path.rpartition(".")[0]).register_module(path.rpartition(".")[2], layer.to("cpu").eval())


def eight_bit(model, path, linear):
    layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    model.get_submodule(path.rpartition(".")[0]).register_module(path.rpartition(".")[2], layer.to("cpu").eval())


def torchao(model, path, linear):
    quantize_(linear, Int8WeightOnlyConfig())
    settings = SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    model.hf_quantizer = SimpleNamespace(quantization_config=settings)


@pytest.mark.parametrize("quantise", [four_bit, eight_bit, torchao])
def test_a_quantised_denoiser(wide_people, quantise):
    pipe = enable_meta_lora(wide_flux())
    exact = picture(pipe)
    for path, module in list(pipe.transformer.named_modules()):
        if type(module) is nn.Linear and path.rpartition(".")[2] in ("to_q", "to_k", "to_v", "0") and "attn" in path:
            quantise(pipe.transformer, path, module)
    base = picture(pipe)
    assert 1e-6 < distance(base, exact) < 0.1
    alone = {None: base}
    for name in ("ann", "bob"):
        pipe.load_meta_lora(wide_people / name)
        alone[name] = picture(pipe)
        assert distance(alone[name], base) > 1e-3
    # Eight-bit products quantise their inputs with the whole batch in view.
    tolerance = 0.01
    mixed = picture(pipe, [PERSON] * 3, subjects=["ann", None, "bob"])
    for row, name in enumerate(("ann", None, "bob")):
        others = [distance(mixed[row], alone[other][0]) for other in alone if other != name]
        assert distance(mixed[row], alone[name][0]) < min(tolerance, *others)
    assert np.array_equal(picture(pipe, subjects=[None]), base)
    pipe.set_adapters("ann")
    pipe.fuse_meta_lora()
    assert distance(picture(pipe), alone["ann"]) < 0.1, "the rounding of the quantiser"
    pipe.unfuse_meta_lora()
    assert np.array_equal(picture(pipe), alone["ann"])
    pipe.unload_meta_lora()
    assert np.array_equal(picture(pipe), base)


def test_a_compiled_denoiser_never_compiles_anew(people, pipe):
    folder, images = people
    pipe.load_meta_lora(folder / "faces")
    table = pipe.enable_subject_slots(2)
    for name in ("ann", "bob", "cleo"):
        pipe.add_subject(folder / name)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True, dynamic=False)
    try:
        picture(pipe, [PERSON] * 2, subjects=["ann", "bob"])
        graphs = counter.frame_count
        assert graphs >= 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            for pair in (["bob", "cleo"], ["cleo", None], ["ann", "ann"], ["bob", "ann"]):
                mixed = picture(pipe, [PERSON] * 2, subjects=pair)
                for row, name in enumerate(pair):
                    assert distance(mixed[row], images[name][0]) < TOLERANCE
            table.evict(["cleo"])
            pipe.add_subject(folder / "cleo", "guest")
            shown = picture(pipe, [PERSON] * 2, subjects=["guest", "bob"])
            assert distance(shown[:1], images["cleo"]) < TOLERANCE
        assert counter.frame_count == graphs
    finally:
        torch._dynamo.reset()
