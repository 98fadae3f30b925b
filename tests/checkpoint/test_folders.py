# SPDX-License-Identifier: Apache-2.0
"""What lies in an artefact's folder: nothing older, nothing of another person, no half of two saves."""

import json
import multiprocessing
import os
import stat
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from artefacts_tiny import RANKS, TARGETS, TinyModel, edit_config, edit_tensors, with_down, with_subject, write_pair
from peft_metalora import MetaLoraConfig, errors, load_down, load_subject, save_down, save_subject
from peft_metalora.checkpoint import untrusted
from peft_metalora.checkpoint.card_file import sealed
from peft_metalora.tuner import down_fingerprint, down_state, fingerprint

FOLD = "pytorch_lora_weights.safetensors"


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_save_without_a_fold_leaves_no_older_fold(pair):
    """Bug: after a save with fold=False the fold in the folder was still that of the older tensors."""
    again = with_subject(with_down(), seed=99)
    save_subject(pair[1], again, "ann", down=pair[0], fold=False)
    assert set(files(pair[1])) == {"adapter_config.json", "adapter_model.safetensors"}
    (pair[1] / "notes.txt").write_text("mine")
    save_subject(pair[1], again, "ann", down=pair[0])
    save_subject(pair[1], again, "ann", down=pair[0], fold=False)
    assert set(files(pair[1])) == {"adapter_config.json", "adapter_model.safetensors", "notes.txt"}


@pytest.mark.parametrize("kind", ["Down", "another person", "an ordinary LoRA"])
def test_another_kind_or_another_person_is_not_replaced_unasked(kind, pair):
    """Bug: a save over a Down, somebody else or another adapter replaced it, and kept what it did not write."""
    model = with_subject(with_down(), "bob", seed=5)
    if kind == "an ordinary LoRA":
        edit_config(pair[1], peft_type="LORA")
    before = files(pair[1])
    with pytest.raises(errors.OutputExistsError, match="overwrite"):
        if kind == "Down":
            save_down(pair[1], model, "faces")
        else:
            save_subject(pair[1], model, "bob", down=pair[0])
    assert files(pair[1]) == before
    if kind == "Down":
        save_down(pair[1], model, "faces", overwrite=True)
        assert set(files(pair[1])) == {"adapter_config.json", "adapter_model.safetensors"}
    else:
        save_subject(pair[1], model, "bob", down=pair[0], overwrite=True)
        assert load_subject(pair[1]).config.subject_name == "bob"


def test_somebody_without_a_name_is_somebody_else(pair):
    """Bug: who had no name (one photo, a projection) replaced who had one, and the other way round."""
    model = with_subject(with_down(), "default", seed=5)
    before = files(pair[1])
    with pytest.raises(errors.OutputExistsError, match="found the subject 'ann', not without a name"):
        save_subject(pair[1], model, "default", down=pair[0])
    assert files(pair[1]) == before
    save_subject(pair[1], model, "default", down=pair[0], overwrite=True)
    save_subject(pair[1], model, "default", down=pair[0])
    with pytest.raises(errors.OutputExistsError, match="found a subject without a name, not 'ann'"):
        save_subject(pair[1], with_subject(with_down()), "ann", down=pair[0])
    loaded = PeftModel.from_pretrained(TinyModel(), str(pair[1]), adapter_name="mine")
    save_subject(pair[1], loaded, "mine")  # whom nobody named is the same as before
    assert load_subject(pair[1]).config.subject_name is None
    save_subject(pair[1].parent / "me", loaded, "mine", subject_name="me")
    assert load_subject(pair[1].parent / "me").config.subject_name == "me"


@pytest.mark.parametrize("name", [FOLD, "adapter_model.safetensors"])
def test_a_lora_without_a_configuration_is_not_replaced_unasked(name, pair, tmp_path):
    """Bug: a save into a folder of somebody's LoRA, as diffusers writes one, deleted it: it was taken for a fold."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / name).write_bytes(b"somebody's")
    model = with_subject(with_down())
    for save in (save_down, save_subject):
        with pytest.raises(errors.OutputExistsError, match=rf"found another adapter \({name} without adapter_config"):
            save(tmp_path / "lora", model, "faces" if save is save_down else "ann")
    assert files(tmp_path / "lora") == {name: b"somebody's"}
    save_down(tmp_path / "lora", model, "faces", overwrite=True)
    assert set(files(tmp_path / "lora")) == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_name_goes_with_the_person_not_with_the_adapter(pair):
    """Bug: nothing in a folder said who it was, so that a save could not know whom it replaces."""
    model = PeftModel.from_pretrained(TinyModel(), str(pair[1]), adapter_name="someone")
    save_subject(pair[1], model, "someone")
    assert load_subject(pair[1]).config.subject_name == "ann"


def test_a_card_that_was_edited_stays_and_one_that_was_made_goes(pair):
    """Bug: the card of an older person stayed beside the tensors of another."""
    model = with_subject(with_down(), seed=99)
    (pair[1] / "README.md").write_text(sealed("# Ann\n"))
    save_subject(pair[1], model, "ann", down=pair[0])
    assert not (pair[1] / "README.md").exists()
    (pair[1] / "README.md").write_text(sealed("# Ann\n").replace("# Ann", "# Ann, by hand"))
    save_subject(pair[1], model, "ann", down=pair[0])
    assert "by hand" in (pair[1] / "README.md").read_text()


def test_a_subject_never_replaces_its_own_down(pair):
    """Bug: save_subject into the folder of its Down destroyed the Down, with no error."""
    before = files(pair[0])
    with pytest.raises(errors.ConfigError, match="apart"):
        save_subject(pair[0], with_subject(with_down()), "ann", down=pair[0], overwrite=True)
    assert files(pair[0]) == before


def test_rights_of_a_folder_and_of_its_files_stay(pair):
    """Bug: a folder of mode 700 became 755 and its files 644 with the next save."""
    os.chmod(pair[1], 0o700)
    os.chmod(pair[1] / "adapter_model.safetensors", 0o600)
    (pair[1] / FOLD).unlink()
    for keep in (False, True):
        if keep:
            (pair[1] / "notes.txt").write_text("mine")
        save_subject(pair[1], with_subject(with_down(), seed=3), "ann", down=pair[0])
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (pair[1], *pair[1].iterdir())}
        assert modes["ann"] == 0o700 and modes["adapter_model.safetensors"] == 0o600
        assert keep or modes[FOLD] == 0o600


def test_what_others_call_a_temporary_folder_is_not_swept_up(pair, tmp_path, monkeypatch):
    """Bug: the sweep took every old folder named .ann.<anything>.tmp, and a target called * took all of them."""
    kept = [tmp_path / ".ann.my-photos.tmp", tmp_path / ".ann.12-abcdefg1.tmp"]
    swept = tmp_path / ".ann.12-0123abcd.tmp"
    for path in (*kept, swept):
        path.mkdir()
        os.utime(path, (1, 1))
    monkeypatch.setattr("peft_metalora.files._swept", {})  # as another process, which has swept nothing yet
    save_subject(pair[1], with_subject(with_down()), "ann", down=pair[0])
    assert all(path.exists() for path in kept) and not swept.exists()


def test_every_file_is_flushed_through_a_handle_that_may_write(pair, tmp_path, monkeypatch):
    """Bug: fsync on a read-only handle fails on Windows, and with it every save."""
    import fcntl

    real, seen = os.fsync, []

    def fsync(handle):
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            seen.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    save_down(tmp_path / "new", with_down(), "faces")
    assert len(seen) == 2 and set(seen) == {os.O_RDWR}


# Downs by relative paths


@pytest.mark.parametrize("road", ["save_subject", "peft"])
def test_a_subject_saved_elsewhere_finds_its_down(road, pair, tmp_path):
    """Bug: the relative path of the first folder was written into the second, which could then not be loaded."""
    model = PeftModel.from_pretrained(TinyModel(), str(pair[1]), adapter_name="ann")
    there = tmp_path / "backup" / "deep" / "ann"
    if road == "peft":
        model.save_pretrained(str(there.parent), selected_adapters=["ann"])
        assert (there.parent / "ann" / "adapter_config.json").exists()
    else:
        save_subject(there, model, "ann")
    assert load_subject(there).down.fingerprint == load_down(pair[0]).fingerprint
    x = torch.randn(2, 8)
    torch.testing.assert_close(PeftModel.from_pretrained(TinyModel(), str(there))(x), model(x))


def test_a_down_below_a_subject_is_no_repository(tmp_path):
    """Bug: the path parts/down was written as it is, which is also how a repository is called."""
    model = with_subject(with_down())
    save_down(tmp_path / "ann" / "parts" / "down", model, "faces")
    save_subject(tmp_path / "ann", model, "ann", down=tmp_path / "ann" / "parts" / "down")
    assert json.loads((tmp_path / "ann" / "adapter_config.json").read_text())["down"] == "./parts/down"
    assert load_subject(tmp_path / "ann").down.fingerprint


# Fingerprints


def test_a_down_that_trained_on_has_a_new_fingerprint_and_loads_where_peft_saves_it(pair, tmp_path):
    """Bug: the fingerprint of the file was kept while the Down changed, and the folder of the new one was refused."""
    model = PeftModel.from_pretrained(TinyModel(), str(pair[0]), is_trainable=False)
    first = down_fingerprint(model, "default")
    assert first == load_down(pair[0]).fingerprint
    model.set_adapter("default")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert down_fingerprint(model, "default") == fingerprint(down_state(model, "default")) != first
    model.save_pretrained(str(tmp_path / "again"))
    assert load_down(tmp_path / "again").fingerprint == down_fingerprint(model, "default")


@pytest.mark.parametrize("claim", ["another's", None])
def test_a_fingerprint_that_a_file_claims_is_not_believed(claim, pair, tmp_path):
    """Bug: on PEFT's road a Down could claim any fingerprint, and subjects of that Down were put on it."""
    save_down(tmp_path / "fake", with_down(seed=77), "faces")
    forged = load_down(pair[0]).fingerprint if claim else None
    edit_config(tmp_path / "fake", down_fingerprint=forged)
    x = torch.linspace(-1, 1, 16).view(2, 8)
    right = PeftModel.from_pretrained(TinyModel(), str(pair[1]))(x)
    if claim:
        with pytest.raises(errors.FingerprintMismatchError):
            PeftModel.from_pretrained(TinyModel(), str(tmp_path / "fake"), adapter_name="f")
        return
    model = PeftModel.from_pretrained(TinyModel(), str(tmp_path / "fake"), adapter_name="f")
    model.load_adapter(str(pair[1]), "ann")
    model.set_adapter("ann")
    torch.testing.assert_close(model(x), right)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_run_of_stage_1_that_peft_saved_loads_as_the_mean(slots, tmp_path):
    """Bug: a Down with several slots was loaded with its people in it, and showed the first of them."""
    model = with_down(slots)
    wrapped = get_peft_model(TinyModel(), MetaLoraConfig(**RANKS, target_modules=TARGETS, num_slots=slots))
    state = {name: tensor for name, tensor in model.state_dict().items() if "metalora" in name}
    wrapped.base_model.model.load_state_dict(
        {name.replace(".faces", ".default"): tensor for name, tensor in state.items()}, strict=False
    )
    wrapped.save_pretrained(str(tmp_path / "run"))
    source = load_down(tmp_path / "run")
    assert source.config.num_slots == 1
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for part in ("mid", "up"):
        name = f"blocks.0.to_q.metalora_{part}"
        torch.testing.assert_close(source.tensors[name], saved[f"base_model.model.{name}"].mean(0, keepdim=True))


# Numbers


def test_a_fold_that_half_precision_cannot_hold_is_not_written(tmp_path):
    """Bug: the fold beside a subject in fp16 held infinity."""
    model = with_subject(with_down()).half()
    for module in model.modules():
        if hasattr(module, "metalora_up") and "ann" in module.metalora_up:
            module.metalora_up["ann"].data.fill_(60000)
            module.scaling["ann"] = 4.0
            model.peft_config["ann"].lora_alpha = 8.0
    save_down(tmp_path / "half", model, "faces")
    with pytest.raises(errors.NonFiniteError, match="fold"):
        save_subject(tmp_path / "big", model, "ann", down=tmp_path / "half")
    assert not (tmp_path / "big").exists()
    save_subject(tmp_path / "big", model, "ann", down=tmp_path / "half", fold=False)
    assert load_subject(tmp_path / "big").tensors


def test_a_save_inside_autocast_writes_the_same_files(tmp_path):
    """Bug: the fold of a subject that was saved inside autocast was a product in bfloat16."""
    model = with_subject(with_down())
    save_down(tmp_path / "down", model, "faces")
    outside = save_subject(tmp_path / "outside", model, "ann", down=tmp_path / "down")
    with torch.autocast("cpu", torch.bfloat16):
        inside = save_subject(tmp_path / "inside", model, "ann", down=tmp_path / "down")
    assert files(inside) == files(outside) and FOLD in files(inside)


# Two saves at once, and killed ones


def write_for_ever(ann: Path, models, ready) -> None:
    ready.set()
    while True:
        for model in models:
            save_subject(ann, model, "ann", down=ann.parent / "faces")


@pytest.mark.parametrize("others", [False, True])
def test_a_reader_gets_one_save_whole_while_another_writes_and_is_killed(others, tmp_path):
    """Bug: between two renames a reader had the configuration of one save with the tensors of the next; a kill there
    left such a pair for good."""
    _, ann = write_pair(tmp_path)
    if others:
        (ann / "notes.txt").write_text("a folder that cannot change in one step")
    ups = {}
    for seed, alpha in ((2, RANKS["lora_alpha"]), (2, 4), (3, 8)):
        model = with_subject(with_down(), seed=seed)
        ups[alpha] = model.blocks[0].to_q.metalora_up["ann"].detach()

    def alike() -> bool:
        source = load_subject(ann)
        return torch.equal(source.tensors["blocks.0.to_q.metalora_up"], ups[int(source.config.lora_alpha)])

    models = [with_subject(with_down(), seed=seed, lora_alpha=alpha) for seed, alpha in ((2, 4), (3, 8))]
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        ready = context.Event()
        writer = context.Process(target=write_for_ever, args=(ann, models, ready))
        writer.start()
        try:
            assert ready.wait(60)
            assert all(alike() for _ in range(60))
        finally:
            writer.kill()
            writer.join()
        assert alike()


# Hostile files


def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(pair):
    """Bug: a FIFO as configuration or weights was waited for without end."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        kept = (pair[1] / name).read_bytes()
        (pair[1] / name).unlink()
        os.mkfifo(pair[1] / name)
        with pytest.raises(errors.CorruptFileError, match="pipe"):
            load_subject(pair[1])
        (pair[1] / name).unlink()
        (pair[1] / name).write_bytes(kept)


def test_a_sparse_file_is_compared_with_its_down_before_it_is_read(pair, monkeypatch):
    """Bug: a file of a few kilobytes that claims 8 GB was read whole before its shapes were compared with the Down."""
    path = pair[1] / "adapter_model.safetensors"
    header, start = {}, 0
    for name, tensor in load_file(path).items():
        shape = [1, 2**28, 2] if name.endswith("0.to_q.metalora_up") else list(tensor.shape)
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + start)
    real = untrusted._read_tensor  # what costs the memory

    def read(file, entry, path):
        assert entry.stop - entry.start < 10**6
        return real(file, entry, path)

    monkeypatch.setattr(untrusted, "_read_tensor", read)
    with pytest.raises(errors.ShapeMismatchError, match="6 outputs"):
        load_subject(pair[1])


def test_many_patterns_cost_as_much_as_few(pair, monkeypatch):
    """Bug: each of thousands of patterns was compiled anew for each module: 40 s for a file of 200 kB."""
    import re

    edit_config(pair[0], rank_pattern={f"x{number:05d}y": 2 for number in range(6000)})
    real, compiled = re.compile, []
    monkeypatch.setattr(re, "compile", lambda *args: compiled.append(args) or real(*args))
    load_down(pair[0])
    assert len(compiled) <= 2 * 6000


@pytest.mark.parametrize(
    "changes",
    [
        {"num_slots": 2**33},
        {"r": 2**28},
        {"lora_alpha": float("inf")},
        {"rank_pattern": {"(a+)+b": 2}},
        {"r": 2**28, "modules_to_save": ["norm"]},
        {"down_revision": "../../etc"},
        {"format_version": 99},
    ],
)
def test_pefts_road_has_the_checks_of_ours(changes, pair):
    """Bug: PEFT's own verbs loaded configurations that ours refuse, and `modules_to_save` switched every check off."""
    edit_config(pair[1], **changes)
    model = TinyModel()
    with pytest.raises(errors.MetaLoraError):
        PeftModel.from_pretrained(model, str(pair[1]))
    assert not [name for name, _ in model.named_parameters() if "metalora" in name]


@pytest.mark.parametrize(("of", "value"), [(torch.float32, 1e39), (torch.bfloat16, 1e39), (torch.float16, 1e5)])
def test_numbers_that_a_model_cannot_hold_are_refused_on_pefts_road(of, value, pair):
    """Bug: they became infinity on the model, and everything that it drew NaN."""
    edit_tensors(pair[1], lambda tensors: tensors.update({name: t.double() * 0 + value for name, t in tensors.items()}))
    model = TinyModel().to(of)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(errors.NonFiniteError, match=r"expected numbers that torch.float.* can hold"):
        PeftModel.from_pretrained(model, str(pair[1]))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_slow_expression_of_a_file_is_never_matched(pair):
    """Bug: target_modules of a file was matched as it stood, and an expression of it could take for ever."""
    edit_config(pair[1], target_modules=r"(([a-z0-9._]+)+)+!|blocks\.0\.to_q")
    x = torch.linspace(-1, 1, 16).view(2, 8)
    model = PeftModel.from_pretrained(TinyModel(), str(pair[1]))
    assert model(x).shape == (2, 8)
    assert "!" not in model.peft_config["default"].target_modules


def test_foreign_tensors_do_not_switch_the_checks_off(pair):
    """Bug: a tensor named as PEFT names embeddings let every other tensor of the file through unchecked."""
    tensors = load_file(pair[1] / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("metalora_up"))
    tensors[name] = tensors[name] * float("nan")
    tensors["base_model.model.wte.weight"] = torch.zeros(1)
    save_file(tensors, pair[1] / "adapter_model.safetensors")
    with pytest.raises(errors.NonFiniteError):
        PeftModel.from_pretrained(TinyModel(), str(pair[1]))


def test_a_down_is_compared_with_the_model_by_its_header(pair, monkeypatch):
    """Bug: a Down of another model was read whole before anybody compared its shapes."""
    from peft_metalora import hub

    monkeypatch.setattr("peft_metalora.checkpoint.untrusted._read_tensor", lambda *_: pytest.fail("read"))
    with pytest.raises(errors.BaseModelMismatchError):
        hub.load(pair[0], model=torch.nn.Linear(2, 2))


def test_edited_tensors_still_load(pair):
    """A file that somebody changed on purpose is read as it is; only halves of two saves are told apart."""
    edit_tensors(pair[1], lambda t: [t.__setitem__(name, 2 * value) for name, value in list(t.items())])
    assert load_subject(pair[1]).tensors
