# SPDX-License-Identifier: Apache-2.0
"""A Down that reads photos: its files, a person brought into a pipeline, and the command."""

from __future__ import annotations

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from artefacts_tiny import edit_config
from peft_metalora import enable_meta_lora, load_down, load_subject, save_down
from peft_metalora.bases import base_for
from peft_metalora.checkpoint.untrusted import TensorFile
from peft_metalora.cli import main
from peft_metalora.encoder import Reader, load_code, load_reader, save_reader
from peft_metalora.errors import (
    AdapterNotFoundError,
    AdapterStateError,
    ArtefactNotFoundError,
    ConfigError,
    FingerprintMismatchError,
    MissingDownError,
    NoFaceError,
    NoImagesError,
    NonFiniteError,
    UnreadableImageError,
    UnsafeNameError,
    WrongKindError,
)
from peft_metalora.hub import pull, push_down, push_subject
from peft_metalora.pipelines.readers import KEPT
from peft_metalora.pipelines.table import tables_of
from pipelines_tiny import tiny_flux_pipeline
from training_tiny import save_tiny_down, teach_to_read, with_tiny_down

SIZE = 6


def photo(folder, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = folder / f"ann-{seed}.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Down whose space and encoder are random, and its base."""
    home = tmp_path_factory.mktemp("reader")
    pipe = save_tiny_down(home)
    return teach_to_read(home / "down", SIZE, base_for(pipe))


@pytest.fixture
def down_folder(tmp_path, made):
    """A copy of that Down."""
    return shutil.copytree(made, tmp_path / "down")


@pytest.fixture
def opened(monkeypatch):
    """The files of tensors that were read."""
    files, before = [], TensorFile.read

    def read(self, names=None):
        files.append(self.path.name)
        return before(self, names)

    monkeypatch.setattr(TensorFile, "read", read)
    return files


def blind():
    """A detector that finds nobody."""
    return type("Blind", (), {"detect": lambda self, image: None})()


def draw(pipe, *, prompt="a photo of a person", seeds=(0,), **options):
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    options |= {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 8, "output_type": "np"}
    return torch.tensor(pipe(prompt, generator=generator, **options).images)


def test_a_person_is_in_the_pipeline_after_one_call(tmp_path, down_folder):
    pipe = enable_meta_lora(tiny_flux_pipeline())
    before = draw(pipe)
    assert pipe.read_subject(photo(tmp_path), "ann", down=down_folder) == "ann"
    ann = draw(pipe)
    assert not torch.allclose(ann, before, atol=1e-4)
    assert pipe.read_subject(Image.open(photo(tmp_path, 1)).convert("RGB"), "bob", down=down_folder) == "bob"
    assert not torch.allclose(draw(pipe), ann, atol=1e-5)
    pipe.set_adapters("ann")
    assert torch.equal(draw(pipe), ann)

    reader = load_reader(down_folder, load_down(down_folder), base_for(pipe).encode_images)
    code = reader.encoder.codes([Image.open(tmp_path / "ann-0.png").convert("RGB")])[0]
    state = {name: tensor for name, tensor in pipe.transformer.named_parameters() if name.endswith("_mid.ann")}
    for name, factor in reader.space.expand(code).items():
        if name.endswith("_mid"):
            torch.testing.assert_close(state[f"{name}.ann"], factor)
    pipe.unload_meta_lora()
    assert torch.equal(draw(pipe), before)


def test_a_person_is_read_into_a_slot(tmp_path, down_folder):
    pipe = enable_meta_lora(tiny_flux_pipeline())
    assert pipe.read_subject(photo(tmp_path), down=down_folder, as_adapter=False) == "ann-0"
    assert pipe.get_list_adapters() == {}, "no adapter of their own"
    in_slot = draw(pipe, subjects="ann-0")
    pipe.read_subject(photo(tmp_path), "ann", down=down_folder)
    torch.testing.assert_close(in_slot, draw(pipe), rtol=0, atol=1e-4)
    assert not torch.allclose(in_slot, draw(pipe, subjects=[None]), atol=1e-4)
    (table,) = tables_of(pipe.transformer).values()
    assert len(table._codes) == 1 and not table._host


def test_several_photos_are_the_mean_code(tmp_path, down_folder):
    pipe = enable_meta_lora(tiny_flux_pipeline())
    photos = [photo(tmp_path, 0), photo(tmp_path, 1)]
    pipe.read_subject(photos, "both", down=down_folder)
    reader = load_reader(down_folder, load_down(down_folder), base_for(pipe).encode_images)
    codes = [reader.encoder.codes([Image.open(path).convert("RGB")])[0] for path in photos]
    wanted = reader.space.expand(torch.stack(codes).mean(0))
    state = dict(pipe.transformer.named_parameters())
    for name, factor in wanted.items():
        torch.testing.assert_close(state[f"{name}.both"], factor, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_read_leaves_the_pipeline_as_it_was(tmp_path, down_folder):
    pipe = enable_meta_lora(tiny_flux_pipeline())
    with pytest.raises(NoImagesError, match=r"found nothing at .*nobody"):
        pipe.read_subject(tmp_path / "nobody.png", down=down_folder)
    broken, dark = tmp_path / "broken.png", tmp_path / "dark.png"
    broken.write_bytes(b"no image")
    Image.new("RGB", (8, 8)).save(dark)
    with pytest.raises(UnreadableImageError, match=r"broken\.png which cannot be decoded"):
        pipe.read_subject([photo(tmp_path), broken], down=down_folder)
    for hidden, called in ((dark, "dark.png"), (Image.open(dark), "photo 1")):
        with pytest.raises(NoFaceError, match=f"expected a face in .*{called}, found none"):
            pipe.read_subject(hidden, down=down_folder, face_crop=f"{__name__}:blind")
    with pytest.raises(NoImagesError, match="at least one photo"):
        pipe.read_subject([], down=down_folder)
    assert pipe.get_list_adapters() == {}
    pipe = enable_meta_lora(tiny_flux_pipeline())
    with pytest.raises(AdapterStateError, match="expected down="):
        pipe.read_subject(photo(tmp_path))
    (down_folder / "encoder_config.json").unlink()
    with pytest.raises(ArtefactNotFoundError, match="expected a Down with an encoder"):
        pipe.read_subject(photo(tmp_path), down=down_folder)
    assert pipe.get_list_adapters() == {}


def test_the_command_writes_a_subject_like_any_other(tmp_path, down_folder, capsys, opened):
    out = tmp_path / "ann"
    first, second = photo(tmp_path, 0), photo(tmp_path, 1)
    arguments = ["read", "--down", str(down_folder), "--photos", str(first), str(second), "--output_dir", str(out)]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "2 photo(s)" in capsys.readouterr().out
    assert opened.count("adapter_model.safetensors") == 1, "the Down, for its own sake"
    subject = load_subject(out)
    assert subject.config.subject_name == "ann" and subject.down.fingerprint == load_down(down_folder).fingerprint
    pipe = enable_meta_lora(tiny_flux_pipeline())
    pipe.load_meta_lora(out, "ann")
    loaded = draw(pipe)
    pipe.unload_meta_lora()
    pipe.read_subject([first, second], "ann", down=down_folder)
    torch.testing.assert_close(loaded, draw(pipe), rtol=0, atol=1e-5)
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "subject_code.safetensors"}
    assert main([*arguments, "--device", "cpu", "--whole"]) == 0
    factors = load_file(out / "adapter_model.safetensors")
    for name, factor in subject.tensors.items():
        torch.testing.assert_close(factors[f"base_model.model.{name}"], factor)
    assert load_file(out / "pytorch_lora_weights.safetensors")
    assert not (out / "subject_code.safetensors").exists()


def test_a_reader_of_another_down_is_refused_and_goes_when_the_down_does(tmp_path, down_folder):
    pipe = with_tiny_down(5)
    other = tmp_path / "other"
    save_down(other, pipe.transformer, "faces")
    reader = load_reader(down_folder, load_down(down_folder), base_for(pipe).encode_images)
    with pytest.raises(FingerprintMismatchError, match="trained on"):
        save_reader(other, reader.space, reader.encoder)
    with pytest.raises(FingerprintMismatchError, match="this reader"):
        Reader(reader.space, reader.encoder).read([Image.new("RGB", (16, 16))], load_down(other))
    save_down(down_folder, pipe.transformer, "faces")
    assert {path.name for path in down_folder.iterdir()} == {path.name for path in other.iterdir()}
    with pytest.raises(ArtefactNotFoundError, match="stage 2"):
        load_reader(down_folder, load_down(down_folder))


def test_it_goes_to_the_hub_and_comes_back_with_its_down(tmp_path, down_folder, server):
    push_down(down_folder, "ann/faces")
    sent = server.repos["ann/faces"].files()
    names = ("subject_space.safetensors", "subject_encoder.safetensors", "encoder_config.json")
    assert all(sent[name] == (down_folder / name).read_bytes() for name in names)
    pulled = pull("ann/faces", tmp_path / "copy")
    pipe = enable_meta_lora(tiny_flux_pipeline())
    pipe.read_subject(photo(tmp_path), "ann", down="ann/faces")
    ann = draw(pipe)
    pipe.unload_meta_lora()
    pipe.read_subject(photo(tmp_path), "ann", down=pulled)
    assert torch.equal(draw(pipe), ann)


def test_a_down_is_no_subject_before_a_tensor_is_read(down_folder, opened):
    """Bug: a whole Down was read to say that it is none."""
    with pytest.raises(WrongKindError, match="found a Down"):
        load_subject(down_folder)
    assert opened == []


class TestBlending:
    @pytest.fixture
    def pipe(self, tmp_path, down_folder):
        pipe = enable_meta_lora(tiny_flux_pipeline())
        pipe.read_subject(photo(tmp_path, 0), "ann", down=down_folder)
        pipe.read_subject(photo(tmp_path, 1), "bob", as_adapter=False)
        return pipe

    def code(self, pipe, name):
        return pipe._code_of(pipe.transformer, name).code

    def test_a_child_stands_between_both_and_is_a_whole_person(self, pipe, tmp_path, down_folder):
        assert pipe.blend_subjects({"ann": 0.5, "bob": 0.5}, "child") == "child"
        ann, bob, child = (self.code(pipe, name) for name in ("ann", "bob", "child"))
        assert torch.allclose(child.norm(), ann.norm(), rtol=1e-3) and child.norm() > 1.01 * (ann + bob).norm() / 2
        assert torch.allclose(child @ ann, child @ bob, rtol=1e-3)
        assert pipe.get_active_adapters() == ["child"]
        drawn = draw(pipe)
        for name in ("ann", "bob"):
            assert not torch.allclose(draw(pipe, subjects=name), drawn, atol=1e-4)
        pipe.save_meta_lora(tmp_path / "child", "child")
        assert torch.equal(load_subject(tmp_path / "child").code.code, child)

    def test_all_of_one_is_that_one(self, pipe):
        assert pipe.blend_subjects({"ann": 2, "bob": 0}, as_adapter=False) == "ann-bob"
        torch.testing.assert_close(self.code(pipe, "ann-bob"), self.code(pipe, "ann"))
        torch.testing.assert_close(draw(pipe, subjects="ann-bob"), draw(pipe, subjects="ann"), rtol=0, atol=1e-4)

    @pytest.mark.parametrize("weights", [{}, {"ann": 0}, {"ann": -1, "bob": 2}, {"ann": float("nan")}, {"ann": 1e400}])
    def test_shares_that_cannot_be(self, pipe, weights):
        with pytest.raises(ConfigError, match="a weight of at least 0"):
            pipe.blend_subjects(weights, "child")

    def test_who_cannot_be_blended_is_named(self, pipe, tmp_path, down_folder):
        with pytest.raises(AdapterNotFoundError, match="'nobody'"):
            pipe.blend_subjects({"ann": 1, "nobody": 1}, "child")
        with pytest.raises(AdapterStateError, match="a new adapter name, found 'bob'"):
            pipe.blend_subjects({"ann": 1, "bob": 1}, "bob")
        pipe.save_meta_lora(tmp_path / "whole", "ann", down=down_folder, whole=True)
        pipe.add_subject(tmp_path / "whole", "row")
        pipe.load_meta_lora(tmp_path / "whole", "tuned")
        for name in ("row", "tuned"):
            with pytest.raises(AdapterStateError, match=f"found '{name}' with a Mid and Up of their own"):
                pipe.blend_subjects({"ann": 1, name: 1}, "child")
        assert pipe.get_list_adapters() == {"transformer": ["ann", "tuned"]}


def test_the_second_photo_waits_for_no_file(tmp_path, down_folder, opened):
    pipe = enable_meta_lora(tiny_flux_pipeline())
    pipe.load_meta_lora(down_folder)
    opened.clear()
    pipe.read_subject(photo(tmp_path), "ann")
    assert sorted(opened) == ["subject_encoder.safetensors", "subject_space.safetensors"]
    opened.clear()
    pipe.read_subject(photo(tmp_path, 1), "bob", as_adapter=False)
    pipe.read_subject(photo(tmp_path, 2), "cleo", down=down_folder, as_adapter=False)
    assert opened == []
    copied = copy.deepcopy(pipe)
    assert KEPT in vars(pipe) and KEPT not in vars(copied)
    pipe.unload_meta_lora()
    assert KEPT not in vars(pipe)
    fresh = enable_meta_lora(tiny_flux_pipeline())
    fresh.read_subject(photo(tmp_path, 2), "cleo", down=down_folder)
    torch.testing.assert_close(draw(copied, subjects="cleo"), draw(fresh), rtol=0, atol=1e-4)


@pytest.mark.parametrize("how", ["from_pipe", "copy", "pickle"])
def test_who_has_the_people_knows_where_their_down_lies(tmp_path, down_folder, how):
    """Bug: a pipeline that shares a denoiser, a copy and a pickle could blend nobody and read no photo unasked: they
    took the Down for one that came from nowhere."""
    pipe = enable_meta_lora(tiny_flux_pipeline())
    pipe.load_meta_lora(down_folder, token="hf_secret")
    pipe.read_subject(photo(tmp_path), "ann")
    pipe.read_subject(photo(tmp_path, 1), "bob", as_adapter=False)
    if how == "from_pipe":
        other = enable_meta_lora(FluxPipeline.from_pipe(pipe))
    elif how == "copy":
        other = copy.deepcopy(pipe)
    else:
        pickled = pickle.dumps(pipe)
        assert b"hf_secret" not in pickled
        other = pickle.loads(pickled)
    other.set_progress_bar_config(disable=True)
    other.blend_subjects({"ann": 1.0, "bob": 0.0}, "child")
    torch.testing.assert_close(draw(other), draw(pipe, subjects="ann"), rtol=0, atol=1e-4)
    other.read_subject(photo(tmp_path, 2), "cleo")
    other.unload_meta_lora()
    assert not [name for name in vars(other.transformer) if "meta_lora" in name]


def test_an_encoder_that_was_trained_anew_is_noticed(tmp_path, down_folder):
    pipe = enable_meta_lora(tiny_flux_pipeline())
    pipe.read_subject(photo(tmp_path), "ann", down=down_folder)
    before = draw(pipe)
    reader = load_reader(down_folder, load_down(down_folder), base_for(pipe).encode_images)
    with torch.no_grad():
        reader.space.mean[0] += 1
    save_reader(down_folder, reader.space, reader.encoder)
    pipe.read_subject(photo(tmp_path), "again", down=down_folder)
    assert not torch.allclose(draw(pipe), before, atol=1e-5)


def test_many_codes_read_their_space_once(tmp_path, down_folder, opened):
    pipe, folder, wanted = read_as_code(tmp_path, down_folder)
    opened.clear()
    pipe.load_meta_lora(folder, "first")
    pipe.add_subject(folder, "second")
    pipe.add_subject(folder, "third")
    assert opened.count("subject_space.safetensors") == 1
    torch.testing.assert_close(draw(pipe, subjects="third"), wanted, rtol=0, atol=1e-4)


def test_a_code_whose_down_has_moved_is_expanded_with_the_one_that_is_loaded(tmp_path, down_folder):
    """Bug: the error said "load its Down first", and loading it did not help."""
    pipe, folder, wanted = read_as_code(tmp_path, down_folder)
    moved = down_folder.rename(tmp_path / "moved")
    with pytest.raises(MissingDownError, match="load its Down first"):
        pipe.load_meta_lora(folder)
    pipe.load_meta_lora(moved)
    pipe.load_meta_lora(folder)
    assert torch.equal(draw(pipe), wanted)


def read_as_code(tmp_path, down_folder, name="ann"):
    pipe = enable_meta_lora(tiny_flux_pipeline())
    pipe.read_subject(photo(tmp_path), name, down=down_folder)
    pipe.save_meta_lora(tmp_path / name, name, down=down_folder)
    drawn = draw(pipe)
    pipe.unload_meta_lora()
    return pipe, tmp_path / name, drawn


def test_a_folder_with_a_code_draws_the_same_on_every_road(tmp_path, down_folder):
    pipe, folder, wanted = read_as_code(tmp_path, down_folder)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "subject_code.safetensors"}
    assert pipe.load_meta_lora(folder) == "ann"
    assert torch.equal(draw(pipe), wanted)
    pipe.save_meta_lora(tmp_path / "again", "ann", down=down_folder)
    code = "subject_code.safetensors"
    assert (tmp_path / "again" / code).read_bytes() == (folder / code).read_bytes()
    pipe.save_meta_lora(tmp_path / "whole", "ann", down=down_folder, whole=True)
    pipe.add_subject(folder, "slot")
    pipe.add_subject(tmp_path / "whole", "row")
    both = draw(pipe, subjects=["slot", "row"], prompt=["a photo of a person"] * 2, seeds=(0, 0))
    torch.testing.assert_close(both[0], wanted[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(both[1], wanted[0], rtol=0, atol=1e-4)
    (table,) = tables_of(pipe.transformer).values()
    assert [*table._host] == ["row"] and table.space(load_subject(folder).space.fingerprint) is not None


@pytest.mark.parametrize("wrong", ["a Down of version 1", "no space", "another space", "NaN"])
def test_a_code_that_cannot_be_expanded_changes_nothing(tmp_path, down_folder, wrong):
    _, folder, _ = read_as_code(tmp_path, down_folder)
    match wrong:
        case "a Down of version 1":
            edit_config(down_folder, format_version=1)
        case "no space":
            (down_folder / "subject_space.safetensors").unlink()
        case "another space":
            reader = load_reader(down_folder, load_down(down_folder), base_for(tiny_flux_pipeline()).encode_images)
            with torch.no_grad():
                reader.space.mean[0] += 1
            save_reader(down_folder, reader.space, reader.encoder)
        case "NaN":
            code = load_code(folder)
            marks = {"down_fingerprint": code.down_fingerprint, "space_fingerprint": code.space_fingerprint}
            save_file({"code": code.code * float("nan")}, folder / "subject_code.safetensors", metadata=marks)
    pipe = enable_meta_lora(tiny_flux_pipeline())
    modules = [(name, id(module)) for name, module in pipe.transformer.named_modules()]
    for road in (pipe.load_meta_lora, pipe.add_subject):
        with pytest.raises((ArtefactNotFoundError, FingerprintMismatchError, NonFiniteError)):
            road(folder)
    assert [(name, id(module)) for name, module in pipe.transformer.named_modules()] == modules
    assert pipe.get_list_adapters() == {} and not tables_of(pipe.transformer)


def test_whoever_was_trained_since_keeps_mid_and_up(tmp_path, down_folder):
    pipe = enable_meta_lora(tiny_flux_pipeline())
    pipe.read_subject(photo(tmp_path), "ann", down=down_folder)
    ups = [p for name, p in pipe.transformer.named_parameters() if name.endswith("_up.ann")]
    with torch.no_grad():
        ups[0][0, 0] += 1e-3
    drawn = draw(pipe)
    pipe.save_meta_lora(tmp_path / "ann", "ann", down=down_folder)
    assert (tmp_path / "ann" / "adapter_model.safetensors").exists()
    pipe.unload_meta_lora()
    pipe.load_meta_lora(tmp_path / "ann")
    assert torch.equal(draw(pipe), drawn)


def test_a_code_goes_to_the_hub_and_comes_back(tmp_path, down_folder, server):
    pipe, folder, wanted = read_as_code(tmp_path, down_folder)
    push_down(down_folder, "ann/faces")
    push_subject(folder, "ann/me", down="ann/faces")
    sent = server.repos["ann/me"].files()
    assert "adapter_model.safetensors" not in sent and "pytorch_lora_weights.safetensors" in sent
    card = sent["README.md"].decode()
    whole = sum(len(content) for name, content in sent.items() if name != "README.md")
    code = len(sent["subject_code.safetensors"])
    assert f"| code | {code} bytes |" in card and f"| whole folder | {whole} bytes |" in card
    assert "as a code, on the Down" in card
    pipe.load_meta_lora("ann/me", "ann")
    torch.testing.assert_close(draw(pipe), wanted)
    pipe.unload_meta_lora()
    pulled = pull("ann/me", tmp_path / "pulled")
    assert (pulled / "subject_code.safetensors").read_bytes() == (folder / "subject_code.safetensors").read_bytes()
    pipe.add_subject(pulled, "ann")
    torch.testing.assert_close(draw(pipe, subjects="ann"), wanted, rtol=0, atol=1e-4)


def test_a_code_is_not_pushed_onto_a_down_that_cannot_expand_it(tmp_path, down_folder, server):
    _, folder, _ = read_as_code(tmp_path, down_folder)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (bare / name).write_bytes((down_folder / name).read_bytes())
    edit_config(bare, format_version=1)
    push_down(bare, "ann/bare")
    assert "subject_space.safetensors" not in server.repos["ann/bare"].files()
    with pytest.raises(ArtefactNotFoundError, match="expected a Down with the subject space"):
        push_subject(folder, "ann/me", down="ann/bare")
    assert "ann/me" not in server.repos


@pytest.mark.parametrize("name", ["subject_space.safetensors", "subject_encoder.safetensors", "encoder_config.json"])
def test_what_the_down_names_has_to_be_there_and_be_that(tmp_path, down_folder, server, name):
    """Bug: a Down went out without what it reads with, or with that of another training, and nobody said so."""
    (down_folder / name).rename(tmp_path / name)
    with pytest.raises(ArtefactNotFoundError, match=name):
        push_down(down_folder, "ann/faces")
    (tmp_path / name).rename(down_folder / name)
    if name.endswith(".safetensors"):
        with (down_folder / name).open("r+b") as file:
            file.seek(-3, 2)
            file.write(b"\x01\x02\x03")
    else:
        facts = json.loads((down_folder / name).read_text())
        (down_folder / name).write_text(json.dumps({**facts, "dropout": 0.3}))
    with pytest.raises(FingerprintMismatchError):
        push_down(down_folder, "ann/faces")
    assert "ann/faces" not in server.repos


def test_what_only_this_machine_has_is_not_published(down_folder, server):
    path = down_folder / "encoder_config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "source": "transformers:/home/ann/dino"}))
    with pytest.raises(UnsafeNameError, match="only this machine has"):
        push_down(down_folder, "ann/faces")
    path.write_text(json.dumps(facts))
    space = down_folder / "subject_space.safetensors"
    save_file(load_file(space), space, metadata={"down_fingerprint": "0" * 64})
    with pytest.raises(FingerprintMismatchError, match="found that of 0000"):
        push_down(down_folder, "ann/faces")
    assert "ann/faces" not in server.repos
