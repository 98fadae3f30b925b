# SPDX-License-Identifier: Apache-2.0
"""A run that is killed at any moment and resumed gives, bit for bit, what it would have given."""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from forked import forkserver
from peft_metalora.checkpoint.config_file import read_config
from peft_metalora.errors import ArtefactNotFoundError, ConfigError, CorruptFileError, OutputExistsError
from peft_metalora.training.engine.processes import Processes
from peft_metalora.training.engine.state import STATE_FILE, read_state, understanding, write_state
from peft_metalora.training.meta_train import meta_train
from peft_metalora.training.personalize import personalize
from peft_metalora.training.stage_1 import MetaTraining
from peft_metalora.training.stage_2 import Personalization
from peft_metalora.tuner.down import digest_of
from training_tiny import meta_config, personal_config, tiny_base, tiny_examples

KILLS = 5


def make_config(place, stage, output, **changes):
    shared = {"pretrained_model_name_or_path": str(place / "base"), "output_dir": str(output), "max_train_steps": 12}
    shared |= {"lr_scheduler": "cosine", **changes}
    if stage == "meta":
        shared = {"bucket_size": 2, "warmup_steps": 2, **shared}
        return meta_config(train_data_dir=str(place / "people"), **shared)
    photo = str(place / "people" / "person-0" / "0.png")
    down = str(place / "down") if stage == "meta-lora" else None
    return personal_config(instance_data_dir=photo, down=down, method=stage, **shared)


def run(config):
    (meta_train if hasattr(config, "train_data_dir") else personalize)(config, progress=False)


def result(output):
    return {path.name: load_file(path) for path in sorted(output.glob("*.safetensors"))}


@pytest.mark.parametrize("stage", ["meta", "meta-lora", "lora"])
def test_resumed_in_the_middle_equals_uninterrupted(place, tmp_path, stage):
    run(make_config(place, stage, tmp_path / "whole"))
    run(make_config(place, stage, tmp_path / "parts", checkpointing_steps=1))
    whole, parts = result(tmp_path / "whole"), result(tmp_path / "parts")
    assert all(torch.equal(whole[file][name], parts[file][name]) for file in whole for name in whole[file])
    for step in (1, 5, 6, 7, 11) if stage == "meta" else (1, 6, 11):  # 6 is the last step of the first bucket
        again = tmp_path / f"again-{step}"
        folder = str(tmp_path / "parts" / f"checkpoint-{step}")
        run(make_config(place, stage, again, resume_from_checkpoint=folder))
        found = result(again)
        assert all(torch.equal(whole[file][name], found[file][name]) for file in whole for name in whole[file])


@pytest.mark.parametrize("stage", ["meta", "meta-lora"])
def test_a_resumed_run_says_how_long_all_of_it_took(place, tmp_path, stage, monkeypatch):
    """Bug: facts, and the card, told the seconds since the run was resumed."""
    config = make_config(place, stage, tmp_path / "out", checkpointing_steps=6)
    with monkeypatch.context() as slow:
        slow.setattr(f"peft_metalora.training.stage_{1 if stage == 'meta' else 2}.time.perf_counter", ticking(100.0))
        run(config)
    run(replace(config, resume_from_checkpoint="checkpoint-6"))
    assert read_config(tmp_path / "out").facts["recipe"]["seconds"] > 100


def ticking(step):
    """A clock that is `step` later each time somebody looks."""
    times = itertools.count(1)
    return lambda: step * next(times)


@pytest.mark.parametrize("stage", ["meta", "meta-lora"])
def test_killed_at_random_and_resumed_equals_uninterrupted(place, tmp_path, stage):
    run(make_config(place, stage, tmp_path / "whole"))
    config = make_config(place, stage, tmp_path / "killed", checkpointing_steps=1, resume_from_checkpoint="latest")
    context = forkserver()
    moments, killed = random.Random(0), 0
    for _ in range(5 * KILLS):
        if killed == KILLS:
            break
        process = context.Process(target=run, args=(config,))
        process.start()
        seen = len(list((tmp_path / "killed").glob("checkpoint-*")))
        while process.is_alive() and len(list((tmp_path / "killed").glob("checkpoint-*"))) == seen:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:  # on a busy machine a run may end before its moment came: there is nothing to kill but a new one
            shutil.rmtree(tmp_path / "killed")
    run(config)
    assert killed == KILLS
    whole, found = result(tmp_path / "whole"), result(tmp_path / "killed")
    assert all(torch.equal(whole[file][name], found[file][name]) for file in whole for name in whole[file])


@pytest.mark.parametrize("optimizer", ["Adafactor", "SGD"])
def test_state_of_other_optimisers_survives(optimizer, tmp_path):
    base = tiny_base()
    training = MetaTraining(base, tiny_examples(base), meta_config(optimizer=optimizer, max_train_steps=6))
    config = meta_config(resume_from_checkpoint=str(tmp_path))
    for step in training.steps():
        if step.number == 3:
            write_state(tmp_path, training.state_dict(), config)
    expected = training.state_dict()["factors"]
    base = tiny_base()
    resumed = MetaTraining(base, tiny_examples(base), meta_config(optimizer=optimizer, max_train_steps=6, seed=1))
    resumed.load_state_dict(read_state(config))
    assert [step.number for step in resumed.steps()] == [4, 5, 6]
    assert all(torch.equal(one, other) for one, other in zip(expected, resumed.state_dict()["factors"], strict=True))


def test_latest_is_none_before_the_first_checkpoint(tmp_path):
    assert read_state(meta_config(output_dir=str(tmp_path), resume_from_checkpoint="latest")) is None


def test_states_that_do_not_fit_are_refused(tmp_path):
    config = personal_config(resume_from_checkpoint=str(tmp_path))
    with pytest.raises(ArtefactNotFoundError, match=STATE_FILE):
        read_state(config)
    write_state(tmp_path, {"steps": 1}, config)
    assert read_state(config) == {"steps": 1}
    with pytest.raises(ConfigError, match="other values of learning_rate, seed"):
        read_state(personal_config(resume_from_checkpoint=str(tmp_path), seed=5, learning_rate=0.5))
    content = (tmp_path / STATE_FILE).read_bytes()
    for broken in (content[: len(content) // 2], b"", b"x" * 100):
        (tmp_path / STATE_FILE).write_bytes(broken)
        with pytest.raises(CorruptFileError, match="resume from an earlier checkpoint"):
            read_state(config)


@pytest.mark.parametrize("stage", ["meta", "meta-lora"])
def test_resume_takes_what_leaves_the_past_as_it_was(place, tmp_path, stage):
    """Bug: more steps, and the same photos, base and Down in another place, were refused."""
    settings = {"lr_scheduler": "constant", "checkpointing_steps": 2}
    one_bucket = {"bucket_size": None} if stage == "meta" else {}
    run(make_config(place, stage, tmp_path / "whole", **{**settings, "max_train_steps": 14}, **one_bucket))
    run(make_config(place, stage, tmp_path / "short", **settings, **one_bucket))
    moved = tmp_path / "moved"
    shutil.copytree(place, moved)
    for place_of in tmp_path.glob("short/checkpoint-*"):
        if place_of.name not in ("checkpoint-2", "checkpoint-10"):
            shutil.rmtree(place_of)
    # 10 is the latest, though a name with 2 sorts after it.
    longer = {**settings, "max_train_steps": 14, "resume_from_checkpoint": "latest"}
    run(make_config(moved, stage, tmp_path / "short", **longer, **one_bucket))
    whole, found = result(tmp_path / "whole"), result(tmp_path / "short")
    assert all(torch.equal(whole[file][name], found[file][name]) for file in whole for name in whole[file])
    shutil.rmtree(tmp_path / "short" / "checkpoint-10")
    longer["resume_from_checkpoint"] = "checkpoint-2"  # by its name in output_dir
    run(make_config(moved, stage, tmp_path / "short", **longer, **one_bucket))
    found = result(tmp_path / "short")
    assert all(torch.equal(whole[file][name], found[file][name]) for file in whole for name in whole[file])


@pytest.mark.parametrize(("stage", "cls"), [("meta", MetaTraining), ("lora", Personalization)])
def test_a_finished_run_is_made_longer_from_its_end(place, tmp_path, monkeypatch, stage, cls):
    """Bug: the last step had no checkpoint, so that steps before it would have been trained again."""
    settings = {"lr_scheduler": "constant", "checkpointing_steps": 4, "resume_from_checkpoint": "latest"}
    settings |= {"bucket_size": None} if stage == "meta" else {}
    run(make_config(place, stage, tmp_path / "out", **{**settings, "max_train_steps": 8}))
    passes, real = [], cls._loss
    monkeypatch.setattr(cls, "_loss", lambda self: passes.append(None) or real(self))
    run(make_config(place, stage, tmp_path / "out", **{**settings, "max_train_steps": 11}))
    assert len(passes) == 3


def test_resume_names_what_it_refuses(place, tmp_path):
    """Bug: it named the settings without their values, and other photos under the same path were accepted."""
    config = make_config(place, "meta", tmp_path / "down", checkpointing_steps=2)
    run(config)
    resumed = replace(config, resume_from_checkpoint="latest")
    told = r"other values of learning_rate, rank \(learning_rate was 0.01 and is 0.5; rank was 2 and is 3\)"
    with pytest.raises(ConfigError, match=told):
        run(replace(resumed, learning_rate=0.5, rank=3))
    with pytest.raises(ConfigError, match=r"max_train_steps was 12 and is 14.*constant rate"):
        run(replace(resumed, max_train_steps=14))
    with pytest.raises(ConfigError, match=r"at least the 12 steps .*, found 9"):
        constant = {"lr_scheduler": "constant", "bucket_size": None, "output_dir": str(tmp_path / "constant")}
        run(replace(config, **constant))
        run(replace(resumed, **constant, max_train_steps=9))
    people = tmp_path / "people"
    shutil.copytree(place / "people", people)
    shutil.copy(people / "person-0" / "0.png", people / "person-1" / "1.png")
    with pytest.raises(ConfigError, match=r"photos of the run that wrote .*found others \(person-1\)"):
        run(replace(resumed, train_data_dir=str(people)))
    shutil.rmtree(people / "person-1")
    with pytest.raises(ConfigError, match=r"photos .*3 then and 2 now"):
        run(replace(resumed, train_data_dir=str(people)))


OWN = """
from peft_metalora.bases.flux1 import Flux1
from training_tiny import Corner


class Own(Flux1):
    def loss(self, *arguments):
        return {scale} * super().loss(*arguments)


def detector():
    return Corner(12)
"""


def test_code_of_ones_own_that_was_edited_meanwhile_is_told(place, tmp_path, monkeypatch, recwarn):
    """Bug: a class of a base was known by its name. A run went on with another loss, and nobody heard of it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(scale):
        (tmp_path / "own_code.py").write_text(OWN.format(scale=scale))
        sys.modules.pop("own_code", None)

    own = {"generic": f"{tmp_path}/own_code.py:Own", "face_crop": "own_code:detector", "face_margin": 0.0}
    config = make_config(place, "meta-lora", tmp_path / "out", checkpointing_steps=6, **own)
    write(1.0)
    run(config)
    resumed = replace(config, resume_from_checkpoint="checkpoint-6")
    run(resumed)
    assert not [one for one in recwarn if "the code that" in str(one.message)]
    write(2.0)
    told = (
        r"the code that generic, face_crop names is not what it was when .*checkpoint-6 was written\. The run goes on"
    )
    with pytest.warns(UserWarning, match=told):
        run(resumed)
    write(3.0)
    # It is this run's all the same.
    with pytest.warns(UserWarning, match=r"the code that generic.*checkpoint-12"):
        run(replace(resumed, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("stage", ["meta", "meta-lora"])
def test_no_checkpoint_and_no_tracker_says_where_photos_lie(place, tmp_path, stage):
    """Bug: states and the trackers' settings held absolute paths of a person's photos."""
    output = tmp_path / "out"
    run(make_config(place, stage, output, checkpointing_steps=5, report_to="tensorboard"))
    kept = [path for where in ("checkpoint-5", "logs") for path in (output / where).rglob("*") if path.is_file()]
    assert {STATE_FILE, "hparams.yml"} <= {path.name for path in kept}
    for path in kept:
        content = path.read_bytes()
        assert str(place / "people").encode() not in content
        assert path.name != STATE_FILE or str(place.parent).encode() not in content


def test_what_another_run_left_is_refused_before_any_work(place, tmp_path):
    """Bug: somebody else's checkpoint was found in the way in the middle of a run, or taken for one of this run."""
    config = make_config(place, "meta-lora", tmp_path / "out", checkpointing_steps=5, max_train_steps=6)
    run(replace(config, instance_data_dir=str(place / "people" / "person-0")))
    for path in (tmp_path / "out").iterdir():
        if path.is_file():
            path.unlink()
    other = {"instance_data_dir": str(place / "people" / "person-1")}
    with pytest.raises(OutputExistsError, match="checkpoint-5"):
        run(replace(config, **other))
    with pytest.raises(ConfigError, match="photos of the run"):
        run(replace(config, **other, overwrite=True, resume_from_checkpoint="latest"))
    run(replace(config, **other, overwrite=True))


@pytest.mark.parametrize("killed", [None, 4])
def test_a_killed_run_goes_on_beside_the_checkpoints_of_an_older_one(place, tmp_path, monkeypatch, killed):
    """Bug: 'latest' took the older run's checkpoint of more steps. It was refused with the advice to start anew, or to
    give the older run's settings, and what the killed run had learned was lost."""
    out = tmp_path / "out"
    older = make_config(place, "meta", out, checkpointing_steps=2, resume_from_checkpoint="latest")
    newer = replace(older, learning_rate=0.02)
    run(replace(newer, output_dir=str(tmp_path / "whole")))
    run(older)

    def write_and_die(folder, *arguments):
        write_state(folder, *arguments)
        if folder.name == f"checkpoint-{killed}":
            raise RuntimeError("killed")

    if killed is None:
        with pytest.raises(ConfigError, match="checkpoint-12, found other values of learning_rate"):
            run(newer)
        return
    with monkeypatch.context() as patch:
        patch.setattr("peft_metalora.training.engine.state.write_state", write_and_die)
        with pytest.raises(RuntimeError, match="killed"):
            run(replace(newer, resume_from_checkpoint=None))
    steps, real = [], MetaTraining._loss
    monkeypatch.setattr(MetaTraining, "_loss", lambda self: steps.append(None) or real(self))
    with pytest.warns(UserWarning, match=r"going on from .*checkpoint-4: .*checkpoint-12 is of another run"):
        run(newer)
    assert len(steps) == 8
    whole, found = result(tmp_path / "whole"), result(out)
    assert all(torch.equal(whole[file][name], found[file][name]) for file in whole for name in whole[file])


@pytest.mark.parametrize("stage", ["meta", "meta-lora"])
def test_no_folder_that_another_trainer_calls_alike_is_removed(place, tmp_path, stage):
    """Bug: `checkpoints_total_limit` removed whatever was called checkpoint-<step>, and the end of a run whatever held
    a LoRA: checkpoints of diffusers' own scripts, and files that somebody kept in one of ours."""
    out = tmp_path / "out"
    mine = [out / "checkpoint-1" / "notes.txt", out / "checkpoint-4" / "why.txt"]
    mine.append(out / "checkpoint-3" / "optimizer.bin")
    mine.append(out / "checkpoint-3" / "pytorch_lora_weights.safetensors")
    mine.append(out / "checkpoint-500" / "pytorch_lora_weights.safetensors")
    mine.append(out / "checkpoint-500" / "optimizer.bin")
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (out / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    (out / "checkpoint-5" / ".training_state.safetensors.1-0123abcd.tmp").mkdir(parents=True)  # of a killed write
    run(make_config(place, stage, out, checkpointing_steps=4, checkpoints_total_limit=1, overwrite=True))
    assert all(path.read_text() == "mine" for path in mine) and (out / "checkpoint-2").is_symlink()
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3, 4, 12, 500)}
    assert list((out / "checkpoint-4").iterdir()) == [out / "checkpoint-4" / "why.txt"]


def test_another_number_of_processes_is_refused(tmp_path):
    """Bug: it was accepted, and the subjects of the processes that were missing were lost."""
    config = meta_config(output_dir=str(tmp_path), resume_from_checkpoint="latest")
    folder = tmp_path / "checkpoint-6"
    for rank in range(2):
        write_state(folder, {"rank": rank}, config, Processes(rank, 2))
    for wanted in ("latest", "checkpoint-6"):
        with pytest.raises(ConfigError, match=r"the 2 process\(es\) .*found 1: start as many"):
            read_state(replace(config, resume_from_checkpoint=wanted))
    with pytest.raises(ConfigError, match=r"the 2 process\(es\) .*found 3: start as many"):
        read_state(replace(config, resume_from_checkpoint="checkpoint-6"), Processes(2, 3))
    direct = replace(config, resume_from_checkpoint=str(folder))
    assert read_state(direct, Processes(1, 2)) == {"rank": 1}
    (folder / "training_state-1.safetensors").unlink()
    with pytest.raises(ArtefactNotFoundError, match="training_state-1"):
        read_state(direct, Processes(1, 2))


def hostile_states(good):
    """States that are readable and make no sense."""
    yield from ([], None, 5, {}, {"steps": 1})
    for key in good:
        for value in (None, [], {}, "abc", -(10**30), float("inf"), [[[]]], {"a": {"b": []}}, torch.zeros(2)):
            yield {**good, key: value}


def test_states_that_make_no_sense_are_corrupt_files(tmp_path):
    """Bug: KeyError, AttributeError, TypeError, RecursionError and others reached the user."""
    base = tiny_base()
    training = MetaTraining(base, tiny_examples(base), meta_config())
    list(itertools.islice(training.steps(), 2))
    learning = Personalization(tiny_base(), tiny_examples(base, subjects=1), personal_config(method="lora"))
    list(itertools.islice(learning.steps(), 2))
    taken = 0
    for one in (training, learning):
        good = one.state_dict()
        for state in hostile_states(good):
            try:
                with understanding(tmp_path):
                    one.load_state_dict(state)
                list(one.steps())
                taken += 1
            except (CorruptFileError, ConfigError):
                pass
        one.load_state_dict(good)
        assert list(one.steps())
    assert taken < 10
    config = personal_config(resume_from_checkpoint=str(tmp_path))
    write_state(tmp_path, {"steps": 1}, config)
    header = load_header(tmp_path / STATE_FILE)
    deep = "[" * 100000
    for text in ("5", "null", "[]", deep, '["dict", 5]', '["dict", [["state", 1]]]', '["tensor", "9"]', "1e999"):
        digest = hashlib.sha256(f"{text}|{digest_of({})}".encode()).hexdigest()
        metadata = {"training_state": text, "training_state_sha256": digest}
        for broken in (metadata, {**metadata, "training_state": header.replace("1", "2")}, {}):
            save_file({}, tmp_path / STATE_FILE, metadata=broken)
            with pytest.raises(CorruptFileError, match="resume from an earlier checkpoint"):
                read_state(config)


def test_random_numbers_of_the_other_kind_of_device_are_named():
    """Bug: a checkpoint of a GPU was called corrupt on a CPU, though the docs say that a run may go on elsewhere."""
    base = tiny_base()
    training = MetaTraining(base, tiny_examples(base), meta_config())
    next(training.steps())
    state = {**training.state_dict(), "generator": torch.zeros(16, dtype=torch.uint8)}
    with (
        pytest.raises(ConfigError, match=r"^expected a GPU, .* found a CPU, .*: choose another device"),
        understanding("x"),
    ):
        training.load_state_dict(state)


def test_a_bit_that_flipped_in_a_tensor_of_a_state_is_found(tmp_path):
    """Bug: only the JSON of a state had a digest; a run went on from other numbers in silence."""
    config = personal_config(resume_from_checkpoint=str(tmp_path))
    write_state(tmp_path, {"mid": torch.arange(4.0)}, config)
    raw = bytearray((tmp_path / STATE_FILE).read_bytes())
    raw[-3] ^= 1
    (tmp_path / STATE_FILE).write_bytes(raw)
    with pytest.raises(CorruptFileError, match="not as it was written"):
        read_state(config)


def load_header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()["training_state"]


def test_a_subject_is_beside_each_state(place, tmp_path):
    run(make_config(place, "meta-lora", tmp_path / "ann", checkpointing_steps=5))
    names = sorted(path.name for path in (tmp_path / "ann" / "checkpoint-5").iterdir())
    assert names[0] == "adapter_config.json" and names[-1] == STATE_FILE
