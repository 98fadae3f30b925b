# SPDX-License-Identifier: Apache-2.0
"""Files of Downs and subjects: what goes in comes out, and whatever is wrong is refused by name."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from PIL import Image

from artefacts_tiny import (
    RANKS,
    TARGETS,
    TinyModel,
    edit_config,
    edit_tensors,
    shrink,
    with_down,
    with_subject,
    write_pair,
)
from peft_metalora import MetaLoraConfig, checkpoint, errors, fingerprint, load_subject, save_down, save_subject
from peft_metalora.checkpoint.base_model import check_fits, with_twins
from peft_metalora.checkpoint.untrusted import MAX_CONFIG_BYTES, read_tensors
from peft_metalora.encoder import load_reader
from peft_metalora.files import write_bytes, write_tensors
from peft_metalora.tuner import down_state, subject_state

GOLDEN_2 = [0.422272, -0.491449, -0.475998, -0.214426]
GOLDEN_CODE = [0.055124, 0.417407, -1.930357, 0.857704, 0.600122]
GOLDEN = [-2.81102, -1.85639, -0.90177, 0.05286, 1.00749, 1.96212, 2.91675, 3.87138]
FIRST = "base_model.model.blocks.0.to_q."


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Round trips


def test_a_down_comes_back_with_its_start_and_its_facts(tmp_path):
    model = with_down(slots=3)
    save_down(tmp_path / "faces", model, "faces", facts={"domain": "faces"}, base_model="a/base", base_revision="main")
    source = checkpoint.load_down(tmp_path / "faces")

    state = down_state(model, "faces")
    assert equal(source.tensors, state)
    assert source.fingerprint == fingerprint(state) == source.config.down_fingerprint
    assert source.tensors["blocks.0.to_q.metalora_mid"].shape == (1, RANKS["r"], RANKS["meta_r"])
    assert source.config.num_slots == 1
    assert (source.config.facts, source.config.revision) == ({"domain": "faces"}, "main")
    assert source.config.base_model_name_or_path == "a/base"


def test_a_published_down_holds_the_mean_of_the_slots(tmp_path):
    model = with_down(slots=3)
    save_down(tmp_path / "faces", model, "faces")
    layer = model.blocks[1].to_out
    tensors = checkpoint.load_down(tmp_path / "faces").tensors
    assert torch.equal(tensors["blocks.1.to_out.metalora_up"][0], layer.metalora_up["faces"].mean(0))


def test_a_subject_comes_back_with_its_down(pair):
    _, folder = pair
    source = load_subject(folder)
    assert set(source.tensors) == {
        f"blocks.{i}.{t}.metalora_{p}" for i in (0, 1) for t in TARGETS for p in ("mid", "up")
    }
    assert source.config.down == "../faces"
    assert source.config.down_fingerprint == source.down.fingerprint


def test_each_slot_is_a_subject_of_its_own(tmp_path):
    model = with_subject(with_down(), slots=3)
    save_down(tmp_path / "faces", model, "faces")
    save_subject(tmp_path / "second", model, "ann", slot=1, down=tmp_path / "faces")
    assert equal(load_subject(tmp_path / "second").tensors, subject_state(model, "ann", 1))


def test_equal_adapters_make_equal_files(tmp_path):
    one, other = write_pair(tmp_path / "a")[1], write_pair(tmp_path / "b")[1]
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def test_the_pair_moves_together_and_the_down_may_lie_inside_the_subject(pair, tmp_path):
    shutil.move(tmp_path / "faces", tmp_path / "moved" / "faces")
    shutil.move(tmp_path / "ann", tmp_path / "moved" / "ann")
    assert load_subject(tmp_path / "moved" / "ann").down.fingerprint
    shutil.move(tmp_path / "moved" / "faces", tmp_path / "moved" / "ann" / "down")
    edit_config(tmp_path / "moved" / "ann", down="down")
    assert load_subject(tmp_path / "moved" / "ann").down.fingerprint


def test_the_fingerprint_knows_neither_order_nor_metadata_nor_prefix(pair):
    down, _ = pair
    before = checkpoint.load_down(down).fingerprint
    path = down / "adapter_model.safetensors"
    turned = {name.removeprefix("base_model.model."): t for name, t in reversed(list(read_tensors(path).items()))}
    write_tensors(path, turned, {"remark": "turned round"})
    assert checkpoint.load_down(down).fingerprint == before


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path):
    for length in (640, 896):
        header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
        raw = json.dumps(header).encode().ljust(length)
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + raw + b"\0" * 4)
        assert read_tensors(tmp_path / "x.safetensors")["a"].tolist() == [0.0]


def test_fields_of_a_newer_peft_do_no_harm(pair):
    down, _ = pair
    edit_config(down, a_field_of_tomorrow=[1, 2])
    assert checkpoint.load_down(down).config.r == RANKS["r"]


# Refusals: what is broken, the error, a piece of its message


def _truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _append(folder):
    with open(folder / "adapter_model.safetensors", "ab") as file:
        file.write(b"more")


def _huge_header(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + path.read_bytes()[8:])


def _header(folder, edit):
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + length])
    text = edit(table)
    raw = (text if isinstance(text, str) else json.dumps(table)).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def _rename(folder, new):
    edit_tensors(folder, lambda tensors: tensors.update({new: tensors.pop(FIRST + "metalora_up")}))


def _as_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def _overlap(table):
    names = [name for name in table if name != "__metadata__"]
    table[names[0]]["data_offsets"], table[names[0]]["shape"] = (
        table[names[1]]["data_offsets"],
        table[names[1]]["shape"],
    )


def _swap_shape(tensors):
    tensors[FIRST + "metalora_up"] = tensors[FIRST + "metalora_up"].transpose(1, 2).contiguous()


def _set(name, value):
    def edit(tensors):
        tensors[FIRST + name] = value(tensors[FIRST + name])

    return edit


def _nan(tensor):
    tensor.view(-1)[0] = float("nan")
    return tensor


def _config_text(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


REFUSALS = {
    "no folder": (shutil.rmtree, errors.ArtefactNotFoundError, ": expected a"),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), errors.ArtefactNotFoundError, "nothing"),
    "no tensors": (lambda f: (f / "adapter_model.safetensors").unlink(), errors.ArtefactNotFoundError, "nothing"),
    "configuration is a list": (
        lambda f: (f / "adapter_config.json").write_text("[]"),
        errors.CorruptFileError,
        "object",
    ),
    "configuration is cut off": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        errors.CorruptFileError,
        "JSON",
    ),
    "configuration is deep": (
        _config_text("[" * 50_000),
        errors.CorruptFileError,
        "JSON",
    ),
    "configuration is large": (
        lambda f: (f / "adapter_config.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1)),
        errors.CorruptFileError,
        "at most",
    ),
    "configuration has NaN": (
        _config_text('{"r": NaN}'),
        errors.CorruptFileError,
        "not a number",
    ),
    "another adapter": (lambda f: edit_config(f, peft_type="LORA"), errors.WrongKindError, "META_LORA"),
    "newer format": (lambda f: edit_config(f, format_version=3), errors.FormatVersionError, "found 3"),
    "version is text": (lambda f: edit_config(f, format_version="1"), errors.ConfigFormatError, "format_version"),
    "rank is text": (lambda f: edit_config(f, r="2"), errors.ConfigFormatError, "expected r to be"),
    "rank is huge": (lambda f: edit_config(f, r=10**30), errors.ConfigFormatError, "2**20"),
    "rank is a truth": (lambda f: edit_config(f, r=True), errors.ConfigFormatError, "expected r to be"),
    "rank does not fit": (lambda f: edit_config(f, r=3), errors.RankMismatchError, "r=3"),
    "meta_r does not fit": (lambda f: edit_config(f, meta_r=5), errors.RankMismatchError, "meta_r=5"),
    "scale is infinite": (lambda f: edit_config(f, lora_alpha=1e300), errors.ConfigFormatError, "lora_alpha"),
    "slow expression": (
        lambda f: edit_config(f, rank_pattern={"(a+)+$": 2}),
        errors.ConfigFormatError,
        "rank_pattern",
    ),
    "hostile fingerprint": (lambda f: edit_config(f, down_fingerprint="../x"), errors.ConfigFormatError, "hexadecimal"),
    "trained tokens": (
        lambda f: edit_config(f, trainable_token_indices=[1]),
        errors.ConfigFormatError,
        "trainable_token_indices",
    ),
    # Bug: an export ended in a TypeError.
    "class is a number": (
        lambda f: edit_config(f, auto_mapping={"base_model_class": 5}),
        errors.ConfigFormatError,
        "auto_mapping",
    ),
    "extra modules": (lambda f: edit_config(f, modules_to_save=["norm"]), errors.ConfigFormatError, "modules_to_save"),
    "cut off": (_truncate, errors.CorruptFileError, "cut off"),
    "something behind the end": (_append, errors.CorruptFileError, "behind its end"),
    "huge header": (_huge_header, errors.CorruptFileError, "header of at most"),
    "empty file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), errors.CorruptFileError, "header"),
    "header is no JSON": (lambda f: _header(f, lambda t: "{{"), errors.CorruptFileError, "JSON"),
    "key given twice": (lambda f: _header(f, lambda t: '{"a": {}, "a": {}}'), errors.CorruptFileError, "twice"),
    "offsets overlap": (lambda f: _header(f, _overlap), errors.CorruptFileError, "overlap"),
    "path in a name": (lambda f: _rename(f, "../../etc/passwd"), errors.UnsafeNameError, "etc/passwd"),
    "foreign tensor": (lambda f: _rename(f, FIRST + "lora_A"), errors.ForeignKeysError, "lora_A"),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop(FIRST + "metalora_up")),
        errors.MissingKeysError,
        "metalora_up",
    ),
    "swapped shape": (lambda f: edit_tensors(f, _swap_shape), errors.RankMismatchError, "blocks.0.to_q"),
    "wrong slots": (
        lambda f: edit_tensors(f, _set("metalora_mid", lambda t: torch.cat([t, t]))),
        errors.ShapeMismatchError,
        "slots",
    ),
    "integers": (
        lambda f: edit_tensors(f, _set("metalora_up", lambda t: t.to(torch.int8))),
        errors.TensorDtypeError,
        "I8",
    ),
    "not a number": (lambda f: edit_tensors(f, _set("metalora_up", _nan)), errors.NonFiniteError, "metalora_up"),
    "pickle": (_as_pickle, errors.PickleRefusedError, "run code"),
    "pickle in disguise": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(pickle.dumps({}, protocol=4)),
        errors.PickleRefusedError,
        "run code",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
@pytest.mark.parametrize("kind", ["down", "subject"])
def test_what_is_wrong_is_refused_by_name(pair, case, kind):
    spoil, error, words = REFUSALS[case]
    folder = pair[kind == "subject"]
    load = load_subject if kind == "subject" else checkpoint.load_down
    load(folder)
    spoil(folder)
    with pytest.raises(error) as caught:
        load(folder)
    assert words in str(caught.value)
    assert isinstance(caught.value, errors.MetaLoraError)


def test_a_down_is_no_subject_and_a_subject_no_down(pair):
    down, subject = pair
    with pytest.raises(errors.WrongKindError, match=r"expected a subject.*load_down"):
        load_subject(down)
    with pytest.raises(errors.WrongKindError, match=r"expected a Down.*load_subject"):
        checkpoint.load_down(subject)


def test_another_down_is_refused(pair, tmp_path):
    _, subject = pair
    save_down(tmp_path / "faces", with_down(seed=9), "faces")
    with pytest.raises(errors.FingerprintMismatchError, match=r"expected the Down .* found"):
        load_subject(subject)


def test_a_changed_down_is_refused(pair):
    edit_tensors(pair[0], _set("metalora_down", lambda t: t + 1))
    with pytest.raises(errors.FingerprintMismatchError):
        checkpoint.load_down(pair[0])


@pytest.mark.parametrize("name", ["../../faces", "~/faces", "C:\\faces", "..", "../ann/../../x", "a\0b"])
def test_a_down_outside_the_folder_is_refused(pair, name):
    edit_config(pair[1], down=name)
    with pytest.raises(errors.UnsafeNameError, match="beside the subject"):
        load_subject(pair[1])


@pytest.mark.parametrize("name", [None, "", "faces", "nowhere"])
def test_a_subject_whose_down_is_not_here_says_so(pair, name):
    edit_config(pair[1], down=name)
    with pytest.raises(errors.MissingDownError, match=r"Load its Down first|load its Down first"):
        load_subject(pair[1])


def test_a_subject_needs_the_modules_of_its_down(pair):
    gone = [FIRST + "metalora_mid", FIRST + "metalora_up"]
    edit_tensors(pair[1], lambda tensors: [tensors.pop(name) for name in gone])
    with pytest.raises(errors.MissingKeysError, match="modules of its Down"):
        load_subject(pair[1])


def test_another_base_is_refused(pair):
    source = checkpoint.load_down(pair[0])
    check_fits(TinyModel(), source)
    wider = TinyModel()
    wider.blocks[0].to_q = torch.nn.Linear(9, 6)
    with pytest.raises(errors.BaseModelMismatchError, match=r"blocks.0.to_q.*\(6, 8\).*found \(6, 9\)"):
        check_fits(wider, source)
    with pytest.raises(errors.BaseModelMismatchError, match="without"):
        check_fits(torch.nn.Linear(2, 2), source)


def test_a_base_of_another_name_is_refused(tmp_path):
    save_down(tmp_path / "faces", with_down(), "faces", base_model="a/one")
    model = TinyModel()
    model.name_or_path = "a/other"
    with pytest.raises(errors.BaseModelMismatchError, match="a/one, found a/other"):
        check_fits(model, checkpoint.load_down(tmp_path / "faces"))


def test_a_twin_that_a_down_says_it_fits_is_taken_and_told(tmp_path):
    """Bug: what was trained on Raw was refused on Turbo."""
    save_down(tmp_path / "faces", with_down(), "faces", base_model="a/raw", facts={"fits": ["a/turbo", 5, "/no repo"]})
    down, model = checkpoint.load_down(tmp_path / "faces"), TinyModel()
    model.name_or_path = "a/turbo"
    with pytest.warns(UserWarning, match="^faces was trained on a/raw and says that it fits a/turbo$"):
        check_fits(model, down, name="faces")
    model.name_or_path = "a/other"
    with pytest.raises(errors.BaseModelMismatchError, match=r"found a/other.* or on a/turbo, which it says it fits\."):
        check_fits(model, down)
    edit_config(tmp_path / "faces", facts={"fits": "a/other"})
    with pytest.raises(errors.BaseModelMismatchError, match="a/raw, found a/other"):
        check_fits(model, checkpoint.load_down(tmp_path / "faces"))


def test_known_twins_are_named_by_themselves():
    assert with_twins("krea/Krea-2-Raw", ["a/b"]) == ["a/b", "krea/Krea-2-Turbo"]
    assert with_twins("a/b", ["a/b"]) == with_twins(None) == []


# Saving


def test_saving_refuses_what_loading_would(tmp_path):
    model = with_subject(with_down())
    with pytest.raises(errors.WrongKindError, match=r"^ann: expected a Down .* Use save_subject\."):
        save_down(tmp_path / "x", model, "ann")
    with pytest.raises(errors.WrongKindError, match=r"^faces: expected a subject .* Use save_down\."):
        save_subject(tmp_path / "x", model, "faces")
    with pytest.raises(errors.AdapterNotFoundError, match="found no 'bob' among \\['ann', 'faces'\\]"):
        save_subject(tmp_path / "x", model, "bob")
    with torch.no_grad():
        model.blocks[0].to_q.metalora_up["ann"].fill_(float("nan"))
    with pytest.raises(errors.NonFiniteError):
        save_subject(tmp_path / "x", model, "ann")
    assert not (tmp_path / "x").exists()


def test_a_folder_keeps_the_files_of_others(pair):
    (pair[0] / "notes.txt").write_text("mine")
    save_down(pair[0], with_down(seed=9), "faces")
    assert (pair[0] / "notes.txt").read_text() == "mine"
    assert checkpoint.load_down(pair[0]).fingerprint == fingerprint(down_state(with_down(seed=9), "faces"))


def _save_with_little_disk(folder: Path, queue) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    try:
        save_down(folder, with_down(seed=9), "faces")
    except errors.WriteFailedError as error:
        queue.put(str(error))
    else:
        queue.put("saved")


def test_a_full_disk_leaves_the_old_files(pair, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    before = checkpoint.load_down(pair[0]).fingerprint
    process = context.Process(target=_save_with_little_disk, args=(pair[0], queue))
    process.start()
    process.join(20)
    assert "unchanged" in queue.get()
    assert checkpoint.load_down(pair[0]).fingerprint == before
    assert sorted(os.listdir(tmp_path)) == ["ann", "faces"]


def _save_for_ever(folder: Path) -> None:
    models = [with_down(seed=1), with_down(seed=9)]
    while True:
        for model in models:
            save_down(folder, model, "faces", facts={"print": fingerprint(down_state(model, "faces"))})


def test_a_killed_save_leaves_the_old_files_or_the_new(tmp_path):
    context = multiprocessing.get_context("fork")
    folder = tmp_path / "faces"
    prints = {fingerprint(down_state(with_down(seed=seed), "faces")) for seed in (1, 9)}
    for attempt in range(12):
        process = context.Process(target=_save_for_ever, args=(folder,))
        process.start()
        while not folder.exists():
            time.sleep(0.002)
        time.sleep(0.004 * attempt + 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        source = checkpoint.load_down(folder)
        assert source.fingerprint in prints
        assert source.config.facts == {"print": source.fingerprint}


def test_single_files_are_replaced_whole(tmp_path):
    write_bytes(tmp_path / "deep" / "a", b"one")
    write_bytes(tmp_path / "deep" / "a", b"two")
    assert [path.read_bytes() for path in (tmp_path / "deep").iterdir()] == [b"two"]
    with pytest.raises(errors.WriteFailedError, match="free some space"):
        write_bytes(tmp_path / "deep" / "a" / "b", b"under a file")


def test_files_have_the_rights_of_any_new_file(pair, tmp_path):
    (tmp_path / "plain").touch()
    wanted = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for folder in pair for path in folder.iterdir()} == {wanted}


# Files of this release, kept


def test_a_file_of_format_1_still_loads_and_shows_the_same():
    """tests/checkpoint/format_1 was written by release 0.1 with `write_pair`; it must load for ever."""
    folder = Path(__file__).parent / "format_1"
    source = load_subject(folder / "ann")
    assert source.down.fingerprint == "b0f3416c0be718da191dd254a4e4d566bdbebdcad9bd2771fb71ec32c46a9626"
    assert (source.config.r, source.config.meta_r, source.config.lora_alpha) == (2, 4, 3)
    assert source.down.config.facts == {"domain": "faces", "subjects": 2}
    model = TinyModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    shown = PeftModel.from_pretrained(model, str(folder / "ann"))(torch.linspace(-1, 1, 8).unsqueeze(0))
    torch.testing.assert_close(shown[0], torch.tensor(GOLDEN), rtol=1e-5, atol=1e-5)


def test_files_of_format_2_still_load():
    """tests/checkpoint/format_2 was written with `write_pair`, `add_reader` and `write_code`; it must load for ever."""
    folder = Path(__file__).parent / "format_2"
    source = load_subject(folder / "bob")
    assert source.down.config.space_fingerprint == source.config.space_fingerprint == source.space.fingerprint
    assert source.config.subject_name == "bob" and source.code.code.shape == (5,)
    mid = source.tensors["blocks.0.to_q.metalora_mid"]
    torch.testing.assert_close(mid.flatten()[:4], torch.tensor(GOLDEN_2), rtol=1e-5, atol=1e-5)
    reader = load_reader(folder / "faces", source.down, shrink)
    code = reader.read([Image.new("RGB", (16, 16), (200, 100, 50))], source.down).code.code
    torch.testing.assert_close(code, torch.tensor(GOLDEN_CODE), rtol=1e-4, atol=1e-4)


# PEFT's own verbs


def test_a_relative_down_is_beside_the_subject_and_not_beside_the_process(tmp_path, monkeypatch):
    for place in ("mine", "other"):
        model = get_peft_model(TinyModel(), MetaLoraConfig(**RANKS, target_modules=TARGETS, init_weights=False))
        model.save_pretrained(tmp_path / place / "down")
    settings = {**RANKS, "target_modules": TARGETS, "stage": "subject", "init_weights": False}
    model.add_adapter("ann", MetaLoraConfig(**settings, down="default"))
    save_subject(tmp_path / "other" / "ann", model, "ann", down=tmp_path / "other" / "down")
    (tmp_path / "mine" / "work").mkdir()
    monkeypatch.chdir(tmp_path / "mine" / "work")
    model.set_adapter("ann")
    x = torch.randn(3, 8)
    again = PeftModel.from_pretrained(TinyModel(), str(tmp_path / "other" / "ann"))
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("case", ["cut off", "missing tensor", "not a number", "pickle", "swapped shape"])
def test_peft_refuses_a_broken_file_before_it_touches_the_model(pair, case):
    model = PeftModel.from_pretrained(TinyModel(), str(pair[1]))
    x = torch.randn(3, 8)
    before, names, wanted = model.state_dict(), [name for name, _ in model.named_modules()], model(x)
    for folder in pair:
        REFUSALS[case][0](folder)
        with pytest.raises(REFUSALS[case][1]):
            model.load_adapter(str(folder), "again")
        bare = TinyModel()
        with pytest.raises(REFUSALS[case][1]):
            PeftModel.from_pretrained(bare, str(folder))
        assert [name for name, _ in bare.named_modules()] == [name for name, _ in TinyModel().named_modules()]
    assert list(model.peft_config) == ["default"] and [name for name, _ in model.named_modules()] == names
    assert equal(model.state_dict(), before) and torch.equal(model(x), wanted)


def test_patterns_of_any_kind_are_written_as_module_paths(tmp_path):
    settings = {"rank_pattern": {r".*\.to_q": 1}, "alpha_pattern": {r"blocks\.[01]\.to_(out|x)": 7}}
    model = with_subject(with_down(**settings), **settings)
    save_down(tmp_path / "faces", model, "faces")
    save_subject(tmp_path / "ann", model, "ann", down=tmp_path / "faces")
    source = load_subject(tmp_path / "ann")
    assert source.config.rank_pattern == {r"^blocks\.0\.to_q$": 1, r"^blocks\.1\.to_q$": 1}
    assert source.config.alpha_pattern == {r"^blocks\.0\.to_out$": 7, r"^blocks\.1\.to_out$": 7}
    assert equal(source.tensors, subject_state(model, "ann"))


def test_dora_subjects_keep_their_magnitudes(tmp_path):
    model = with_subject(with_down(), use_dora=True)
    x = torch.randn(3, 8)
    save_down(tmp_path / "faces", model, "faces")
    folder = save_subject(tmp_path / "ann", model, "ann", down=tmp_path / "faces")
    assert not (folder / "pytorch_lora_weights.safetensors").exists(), "no ordinary LoRA can say it"
    source = load_subject(folder)
    assert source.tensors["blocks.0.to_q.metalora_magnitude"].shape == (1, 6)
    for block in model.blocks:
        block.to_q.set_adapter("ann")
        block.to_out.set_adapter("ann")
    torch.testing.assert_close(PeftModel.from_pretrained(TinyModel(), str(folder))(x), model(x))
    edit_tensors(folder, lambda tensors: tensors.pop(FIRST + "metalora_magnitude"))
    with pytest.raises(errors.MissingKeysError, match="metalora_magnitude"):
        load_subject(folder)


def test_peft_saves_and_loads_both_kinds(tmp_path):
    model = get_peft_model(TinyModel(), MetaLoraConfig(**RANKS, target_modules=TARGETS, init_weights=False))
    x = torch.randn(3, 8)
    model.save_pretrained(tmp_path / "down")
    settings = {**RANKS, "target_modules": TARGETS, "init_weights": False}
    model.add_adapter("ann", MetaLoraConfig(**settings, stage="subject", down="default"))
    save_subject(tmp_path / "ann", model, "ann", down=tmp_path / "down")
    model.set_adapter("ann")
    wanted = model(x)

    assert load_subject(tmp_path / "ann").down.fingerprint
    again = PeftModel.from_pretrained(TinyModel(), str(tmp_path / "ann"))
    assert torch.equal(again(x), wanted)
    again.load_adapter(str(tmp_path / "down"), "faces")
    again.load_adapter(str(tmp_path / "ann"), "bob")
    again.set_adapter("bob")
    assert torch.equal(again(x), wanted)
    downs = again.base_model.model.blocks[0].to_q.metalora_down
    assert len(downs) == 2, "the two subjects share one Down; the meta adapter owns the other"


def test_peft_puts_nothing_on_a_model_whose_layers_have_other_outputs(pair):
    """Bug: Ups of two layers exchanged were found out by torch, when the adapter was on the model already."""
    model = PeftModel.from_pretrained(TinyModel(), str(pair[0]), adapter_name="faces")

    def exchange(tensors):
        one, other = (f"base_model.model.blocks.0.{name}.metalora_up" for name in ("to_q", "to_out"))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    edit_tensors(pair[1], exchange)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(errors.BaseModelMismatchError, match=r"expected a base model whose blocks\.0\.to_out is"):
        model.load_adapter(str(pair[1]), "ann")
    assert [name for name, _ in model.named_parameters()] == before
    assert list(model.peft_config) == ["faces"]


@pytest.mark.parametrize("name", ["modules_to_save", "trainable_token_indices"])
def test_an_empty_list_of_further_modules_is_none(pair, name):
    """Bug: PEFT looked for the embedding of an empty list of tokens, and a ValueError of its own came out."""
    edit_config(pair[1], **{name: []})
    source = load_subject(pair[1])
    assert getattr(source.config, name) is None


@pytest.mark.parametrize("text", ["1e400", "9" * 400])
def test_a_number_that_no_float_holds_is_refused_on_reading(pair, text):
    """Bug: an OverflowError came out of a load, and a ValueError of a pull that was to write what it had read."""
    for name in ("lora_alpha", "facts"):
        path = pair[1] / "adapter_config.json"
        kept = path.read_text()
        edit_config(pair[1], **{name: "@" if name == "lora_alpha" else {"steps": "@"}})
        path.write_text(path.read_text().replace('"@"', text))
        if name == "lora_alpha" or text == "1e400":
            with pytest.raises((errors.CorruptFileError, errors.ConfigFormatError)):
                load_subject(pair[1])
        path.write_text(kept)


def test_nothing_is_written_that_would_be_too_long_to_be_read(tmp_path):
    """Bug: a configuration was written that the next load refused for its size."""
    with pytest.raises(errors.ConfigFormatError, match="which is all that is read again"):
        save_down(tmp_path / "down", with_down(), "faces", facts={"text": "x" * 300_000})
    assert not (tmp_path / "down").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"subject_name": "Ann\xa0B"}, "a name of at most 256 printable characters for the subject"),
        ({"subject_name": "a" * 257}, "a name of at most 256 printable characters for the subject"),
        ({"base_revision": "a b"}, "expected revision to be a branch, tag or commit"),
        ({"down_revision": "../a"}, "expected down_revision to be a branch, tag or commit"),
        ({"facts": {"a": "[" * 70_000}}, "lists and objects"),
        ({"facts": {"a": float("nan")}}, "expected facts of plain JSON"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(pair, options, says):
    """Bug: who was learned from a folder of an odd name, or on an odd revision, was written and then refused."""
    before = (pair[1] / "adapter_config.json").read_bytes()
    with pytest.raises(errors.ConfigFormatError, match=says):
        save_subject(pair[1], with_subject(with_down()), "ann", down=pair[0], overwrite=True, **options)
    assert (pair[1] / "adapter_config.json").read_bytes() == before


@pytest.mark.parametrize("revision", ["refs/pr/1", "v1.0+cu128", "faces@512", "_old"])
def test_revisions_that_git_knows_are_read(pair, revision):
    """Bug: a subject on a branch of such a name was written, and refused when it was read."""
    save_subject(pair[1], with_subject(with_down()), "ann", down=pair[0], base_revision=revision)
    assert load_subject(pair[1]).config.revision == revision


def test_names_of_modules_that_no_tensor_has_never_reach_peft(pair):
    """Bug: PEFT compared each of 12,000 names of `target_modules` with each other one, for 40 seconds."""
    edit_config(pair[0], target_modules=[*TARGETS, *(f"absent.{number}" for number in range(100))])
    model = PeftModel.from_pretrained(TinyModel(), pair[0])
    named = model.peft_config["default"].target_modules
    assert isinstance(named, str)
    assert "absent" not in named
    assert model.base_model.model.blocks[0].to_q.r["default"] == RANKS["r"]
