# SPDX-License-Identifier: Apache-2.0
"""Subjects that are codes alone, as folders: they load as the subjects they expand to, and say what is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from artefacts_tiny import (
    CODE_SIZE,
    TinyModel,
    a_code,
    add_reader,
    edit_config,
    shrink,
    with_down,
    with_subject,
    write_code,
    write_pair,
)
from peft_metalora import errors, export_subject, load_down, load_subject, save_down, save_subject, write_subject
from peft_metalora.checkpoint import load_down as load_local_down
from peft_metalora.checkpoint import write_artefact
from peft_metalora.checkpoint.config_file import read_config
from peft_metalora.checkpoint.space import CodeSource, load_code, load_space, save_code
from peft_metalora.encoder import load_reader
from peft_metalora.files import staged_folder
from peft_metalora.tuner import subject_state

CODE, CONFIG, WEIGHTS = "subject_code.safetensors", "adapter_config.json", "adapter_model.safetensors"
FOLD = "pytorch_lora_weights.safetensors"
READER = {"subject_space.safetensors", "subject_encoder.safetensors", "encoder_config.json"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_pair(folder)
    write_code(folder / "bob", add_reader(folder / "faces"))
    return folder


@pytest.fixture
def place(tmp_path, made):
    """A Down that reads, `faces`; a subject with Mid and Up, `ann`; one that is a code, `bob`."""
    return shutil.copytree(made, tmp_path / "place")


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_a_code_loads_as_the_subject_that_it_expands_to(place):
    space = load_space(place / "faces")
    assert files(place / "bob") == {CODE, CONFIG}
    source = load_subject(place / "bob")
    assert isinstance(source, CodeSource) and source.config.subject_name == "bob"
    assert source.down.fingerprint == load_down(place / "faces").fingerprint
    for name, factor in space.expand(a_code(space).code).items():
        assert torch.equal(source.tensors[name], factor)
    model = with_subject(with_down())
    write_subject(model, "ann", source.tensors)
    for name, factor in subject_state(model, "ann").items():
        assert torch.equal(factor, source.tensors[name])


def test_the_folder_is_small_and_the_code_smaller(place):
    assert (place / "bob" / CODE).stat().st_size < 4 * CODE_SIZE + 400
    assert sum(path.stat().st_size for path in (place / "bob").iterdir()) < 3000


@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_it_is_exported_as_any_other(place, format):
    source = load_subject(place / "bob")
    export_subject(source, place / "lora", format)
    (path,) = (place / "lora").glob("*.safetensors")
    module = "blocks.0.to_q"
    pair = {name: tensor for name, tensor in load_file(path).items() if module in name}
    a, b = (next(t for name, t in pair.items() if which in name) for which in ("lora_A", "lora_B"))
    mid, up = (source.tensors[f"{module}.metalora_{part}"][0] for part in ("mid", "up"))
    down = source.down.tensors[f"{module}.metalora_down"]
    torch.testing.assert_close(b @ a, 1.5 * up @ mid @ down)


class TestTheDown:
    def test_it_names_what_it_reads_with_and_stays_itself(self, place):
        config, space = read_config(place / "faces"), load_space(place / "faces")
        assert config.format_version == 2 and config.space_fingerprint == space.fingerprint
        told = json.loads((place / "faces" / "encoder_config.json").read_text())
        assert config.encoder_fingerprint == told["encoder_fingerprint"]
        save_down(place / "bare", with_down(), "faces")
        assert load_local_down(place / "bare").fingerprint == load_local_down(place / "faces").fingerprint
        bare = json.loads((place / "bare" / CONFIG).read_text())
        assert bare["format_version"] == 1 and bare["space_fingerprint"] is None

    def test_a_tuned_subject_of_it_is_of_version_1(self, place):
        model = with_subject(with_down())
        save_subject(place / "ann", model, "ann", down=place / "faces")
        told = json.loads((place / "ann" / CONFIG).read_text())
        assert told["format_version"] == 1 and told["space_fingerprint"] is told["encoder_fingerprint"] is None

    def test_a_save_without_takes_them_away(self, place):
        save_down(place / "faces", with_down(), "faces")
        assert files(place / "faces") == {CONFIG, WEIGHTS}
        assert read_config(place / "faces").format_version == 1

    def test_version_1_has_none_whatever_lies_beside_it(self, place):
        edit_config(place / "faces", format_version=1)
        config = load_down(place / "faces").config
        assert config.space_fingerprint is config.encoder_fingerprint is None
        with pytest.raises(errors.ArtefactNotFoundError, match="found one of version 1 without"):
            load_subject(place / "bob")

    def test_a_new_pair_takes_the_place_of_the_old_one(self, place):
        other = add_reader(place / "faces", seed=4)
        assert read_config(place / "faces").space_fingerprint == other.fingerprint
        with pytest.raises(errors.FingerprintMismatchError, match="as the subject is a code of it"):
            load_subject(place / "bob")


def nan_in(folder):
    code = load_code(folder)
    header = {"down_fingerprint": code.down_fingerprint, "space_fingerprint": code.space_fingerprint}
    save_file({"code": torch.full((CODE_SIZE,), float("nan"))}, folder / CODE, metadata=header)


def longer(folder):
    code = load_code(folder)
    header = {"down_fingerprint": code.down_fingerprint, "space_fingerprint": code.space_fingerprint}
    save_file({"code": torch.zeros(CODE_SIZE + 1)}, folder / CODE, metadata=header)


def no_space(folder):
    save_down(folder.parent / "faces", with_down(), "faces")


def another_space(folder):
    space = load_space(folder.parent / "faces")
    with torch.no_grad():
        space.mean[0] += 1
    space.save(folder.parent / "faces")


def space_of_another_down(folder):
    save_down(folder.parent / "other", with_down(seed=8), "faces")
    add_reader(folder.parent / "other").save(folder.parent / "faces")


BAD = {
    "NaN": (nan_in, errors.NonFiniteError, "finite numbers in code"),
    "another size": (longer, errors.ShapeMismatchError, rf"a code \({CODE_SIZE},\) of this space"),
    "a Down without a space": (no_space, errors.ArtefactNotFoundError, "expected a Down with the subject space"),
    "the space's file is gone": (
        lambda f: (f.parent / "faces" / "subject_space.safetensors").unlink(),
        errors.ArtefactNotFoundError,
        "subject_space",
    ),
    "another space of the same Down": (another_space, errors.FingerprintMismatchError, "expected the space"),
    "the space of another Down": (space_of_another_down, errors.FingerprintMismatchError, "expected the space of the"),
    "no code": (lambda f: (f / CODE).unlink(), errors.ArtefactNotFoundError, "subject_code"),
    "another rank": (lambda f: edit_config(f, r=3), errors.RankMismatchError, "r=3"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), errors.ConfigFormatError, "without DoRA"),
    "a fingerprint that is none": (
        lambda f: edit_config(f, space_fingerprint="ann"),
        errors.ConfigFormatError,
        "64 hexadecimal digits",
    ),
    "another space than the code's": (
        lambda f: edit_config(f, space_fingerprint="0" * 64),
        errors.FingerprintMismatchError,
        "space_fingerprint 0000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_said_in_one_sentence(place, case):
    spoil, error, text = BAD[case]
    spoil(place / "bob")
    with pytest.raises(error, match=text):
        load_subject(place / "bob")


@pytest.mark.parametrize(
    "name", [f"bob/{CODE}", f"bob/{CONFIG}", *(f"faces/{name}" for name in (CONFIG, *sorted(READER)))]
)
def test_whatever_is_in_a_file_only_our_errors_come_out(place, name):
    path, rng = place / name, random.Random(0)
    good, refused = path.read_bytes(), 0
    for _ in range(12):
        data = bytearray(good)
        at = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at] = rng.randbytes(7)
            case 2:
                del data[at:]
        path.write_bytes(data)
        try:
            assert load_subject(place / "bob").tensors
            load_reader(place / "faces", load_down(place / "faces"), shrink)
        except errors.MetaLoraError:
            refused += 1
    assert refused > 6


def test_pefts_own_verbs_say_what_they_cannot(place):
    model = TinyModel()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(errors.WrongKindError, match="found a code alone"):
        PeftModel.from_pretrained(model, place / "bob")
    assert [name for name, _ in model.named_modules()] == names


class TestSaves:
    def test_each_kind_takes_the_place_of_the_other(self, place):
        space = load_space(place / "faces")
        save_subject(place / "bob", with_subject(with_down(), "bob"), "bob", down=place / "faces")
        assert files(place / "bob") == {CONFIG, WEIGHTS, FOLD}
        assert not isinstance(load_subject(place / "bob"), CodeSource)
        write_code(place / "bob", space)
        assert files(place / "bob") == {CONFIG, CODE} and isinstance(load_subject(place / "bob"), CodeSource)

    def test_so_it_does_where_others_have_files(self, place):
        """Bug: a folder with somebody's notes kept the old factors beside the new code."""
        space = load_space(place / "faces")
        for folder in (place / "ann", place / "bob"):
            (folder / "notes.txt").write_text("mine")
        write_code(place / "ann", space)
        assert files(place / "ann") == {CONFIG, CODE, "notes.txt"}
        save_subject(place / "bob", with_subject(with_down(), "bob"), "bob", down=place / "faces")
        assert files(place / "bob") == {CONFIG, WEIGHTS, FOLD, "notes.txt"}

    @pytest.mark.parametrize("kind", ["factors to code", "code to factors", "code to code"])
    def test_one_that_is_killed_between_its_files_leaves_the_old_or_the_new(self, place, monkeypatch, kind):
        space = load_space(place / "faces")
        folder = place / ("ann" if kind == "factors to code" else "bob")
        (folder / "notes.txt").write_text("mine")
        before = load_subject(folder).tensors
        after = place / "good" / folder.name
        after.parent.mkdir()
        os.symlink(place / "faces", place / "good" / "faces")

        def save(target):
            if kind == "code to factors":
                save_subject(target, with_subject(with_down(), "bob", seed=6), "bob", down=target.parent / "faces")
            else:
                write_code(target, space, seed=7)

        save(after)
        wanted = load_subject(after).tensors
        moves, replace, unlink = [], os.replace, type(folder).unlink

        def until(left):
            class Killed(BaseException):
                pass

            count = [left]

            def killing(work):
                def move(*args, **kwargs):
                    if not count[0]:
                        raise Killed
                    count[0] -= 1
                    moves.append(args)
                    return work(*args, **kwargs)

                return move

            monkeypatch.setattr("peft_metalora.files.os.replace", killing(replace))
            monkeypatch.setattr("peft_metalora.files.Path.unlink", killing(unlink))
            try:
                save(folder)
            except Killed:
                return False
            finally:
                monkeypatch.setattr("peft_metalora.files.os.replace", replace)
                monkeypatch.setattr("peft_metalora.files.Path.unlink", unlink)
            return True

        for left in range(8):
            done = until(left)
            found = load_subject(folder).tensors
            key = "blocks.0.to_q.metalora_up"
            assert torch.equal(found[key], before[key]) or torch.equal(found[key], wanted[key])
            if done:
                break
        assert done and torch.equal(found[key], wanted[key])

    def test_halves_of_two_saves_are_never_joined(self, place):
        """Bug: the new person's code stood under the old person's name after a save that was killed."""
        space = load_space(place / "faces")
        save_code(place / "bob", space.coded(torch.ones(CODE_SIZE), "eve"))
        source = load_subject(place / "bob")
        assert source.config.subject_name == "eve" and torch.equal(source.code.code, torch.ones(CODE_SIZE))

    def test_a_name_is_still_somebodys(self, place):
        with pytest.raises(errors.OutputExistsError, match="the subject 'bob'"):
            save_subject(place / "bob", with_subject(with_down(), "ann"), "ann", down=place / "faces")

    def test_numbers_that_are_none_are_not_written(self, place):
        space = load_space(place / "faces")
        before = (place / "bob" / CODE).read_bytes()
        bad = space.coded(torch.full((CODE_SIZE,), float("inf")))
        with pytest.raises(errors.NonFiniteError, match="the code"):
            write_artefact(place / "bob", load_subject(place / "bob").config, bad)
        assert (place / "bob" / CODE).read_bytes() == before


def test_what_is_replaced_goes_once_the_new_is_there(tmp_path):
    (tmp_path / "one").mkdir()
    for name in ("old", "other", "mine"):
        (tmp_path / "one" / name).write_text(name)
    with staged_folder(tmp_path / "one", replaced=("old", "new")) as stage:
        (stage / "new").write_text("new")
    assert files(tmp_path / "one") == {"new", "other", "mine"}
