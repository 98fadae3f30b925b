# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole, never over what they are made from, and read only where they are files."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from artefacts_tiny import write_pair
from peft_metalora import files, load_down, load_subject
from peft_metalora.cli import main
from peft_metalora.errors import CheckpointError, ConfigError, WriteFailedError
from peft_metalora.files import open_regular, require_apart, staged_folder, temporary_folder, write_bytes, write_tensors


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "other name").symlink_to(folder)
    return folder


@pytest.mark.parametrize("output", ["faces", "./faces/", "faces/../faces", "other name", "faces/new", "other name/a/b"])
def test_an_output_that_is_an_input_or_lies_in_it_is_refused(output, source, tmp_path, monkeypatch):
    """Bug: an output that was an input, by whatever path, replaced it with exit code 0."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="apart from down"):
        require_apart(output, data=None, down=source)


@pytest.mark.parametrize("output", ["faces/adapter_model.safetensors", "faces", "other name"])
def test_a_weights_file_and_its_folder_are_no_output(output, source, tmp_path):
    """Bug: `project --lora L/file --output_dir L` lost the LoRA that it read."""
    with pytest.raises(ConfigError, match="apart from lora"):
        require_apart(tmp_path / output, lora=source / "adapter_model.safetensors")


@pytest.mark.parametrize("output", ["ann", "faces2", ".", "new/place"])
def test_outputs_beside_and_around_an_input_are_good(output, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    require_apart(output, down=source, data="owner/repository", base=None)
    require_apart("owner/repository", down="owner/repository")  # nothing here has that name
    require_apart("photo folder", photo=source / "adapter_model.safetensors")


@pytest.mark.parametrize("why", ["another disk", "a closed parent"])
def test_a_folder_is_written_where_nothing_beside_it_can_be(why, tmp_path, monkeypatch):
    """Bug: a run into a mounted volume, or a link to another disk, failed at its end: a rename does not lead there."""
    disk = "/dev/shm" if why == "another disk" else None
    with tempfile.TemporaryDirectory(dir=disk) as there:
        place = tmp_path / "around" / "out"
        place.parent.mkdir()
        if disk is None:
            place.mkdir()
            access, make = os.access, os.mkdir

            def mkdir(path, *options):
                if Path(path).parent == place.parent:
                    raise PermissionError(path)
                make(path, *options)

            monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place.parent and access(path, mode))
            monkeypatch.setattr(os, "mkdir", mkdir)
        else:
            if os.stat(there).st_dev == os.stat(tmp_path).st_dev:
                pytest.skip("one disk alone")
            place.symlink_to(there)
        for content in ("old", "new"):
            with staged_folder(place, stale=["fold"]) as stage:
                for name in ("config", "weights", "fold"):
                    (stage / name).write_text(content)
        assert {path.name: path.read_text() for path in place.iterdir()} == dict.fromkeys(
            ("config", "weights", "fold"), "new"
        )
        assert [path.name for path in place.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["config", "fold", "code"])
def test_a_folder_by_the_name_of_a_file_is_not_replaced(name, tmp_path):
    """Bug: it was deleted with what lay in it, or the save ended between two of its files."""
    place = tmp_path / "out"
    (place / name).mkdir(parents=True)
    (place / name / "mine").write_text("mine")
    (place / "weights").write_text("old")
    with (
        pytest.raises(WriteFailedError, match=f"{name} is a folder"),
        staged_folder(place, stale=["fold"], replaced=["code"]) as stage,
    ):
        for written in ("config", "weights"):
            (stage / written).write_text("new")
    assert (place / name / "mine").read_text() == "mine" and (place / "weights").read_text() == "old"


@pytest.mark.parametrize("before", [[], ["config"], ["config", "photo"]])
def test_the_folder_that_somebody_works_in_stays_where_it_is(before, tmp_path):
    """Bug: a save to `.` in an empty folder removed the shell's working directory, and a second save exchanged it."""
    place = tmp_path / "here"
    place.mkdir()
    for name in before:
        (place / name).write_text("old")
    shell = subprocess.Popen([sys.executable, "-c", "input(); open('found', 'w').close()"], cwd=place, stdin=-1)
    try:
        with staged_folder(place) as stage:
            for name in ("config", "weights"):
                (stage / name).write_text("new")
        shell.communicate(b"\n")
    finally:
        shell.kill()
    assert {path.name for path in place.iterdir()} == {"config", "weights", "found", *before}
    assert (place / "config").read_text() == (place / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


# What a killed process leaves


def fork(work) -> int:
    """A process of this program that does some work and is killed, whatever becomes of that."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    return child


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def staged(folder: Path) -> None:
    with staged_folder(folder / "ann") as stage:
        (stage / "adapter_model.safetensors").write_bytes(b"ann")
        killed()


def saved(folder: Path) -> None:
    # As safetensors does, which writes beside the file that it was given.
    def save_file(tensors, path, metadata):
        path.with_name(".tmpQ8vX2a").write_bytes(b"ann")
        killed()

    files.save_file = save_file
    write_tensors(folder / "code.safetensors", {"code": torch.ones(2)})


def written(folder: Path) -> None:
    files._flush = lambda path: killed()
    write_bytes(folder / "00.json", b"ann")


def kept_apart(folder: Path) -> None:
    tempfile.tempdir = str(folder)
    with temporary_folder() as own:
        (own / "photo").write_bytes(b"ann")
        killed()


def later(monkeypatch, seconds: float) -> None:
    now = time.time() + seconds
    monkeypatch.setattr(files.time, "time", lambda: now)
    files._swept.clear()  # as another process, which has swept nothing yet


forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@forks
@pytest.mark.parametrize("work", [staged, saved, written, kept_apart])
def test_what_a_killed_write_left_goes_with_the_next_one(work, tmp_path, monkeypatch):
    """Bug: temporary files of a killed write stayed for good, and a person's weights in them."""
    os.waitpid(fork(lambda: work(tmp_path)), 0)
    assert b"ann" in [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    later(monkeypatch, files.STALE_SECONDS - 10)
    write_bytes(tmp_path / "else", b"else")
    assert len([*tmp_path.iterdir()]) == 2  # it may belong to a process on another machine
    later(monkeypatch, 20)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as own:
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
        assert {path.name for path in tmp_path.iterdir()} == {"else", own.name}
    assert [path.name for path in tmp_path.iterdir()] == ["else"]


@forks
def test_what_a_living_process_writes_is_left_alone(tmp_path, monkeypatch):
    told, tell = os.pipe()

    def work() -> None:
        with staged_folder(tmp_path / "ann") as stage:
            (stage / "adapter_model.safetensors").write_bytes(b"ann")
            os.write(tell, b".")
            time.sleep(60)

    child = fork(work)
    os.read(told, 1)
    later(monkeypatch, 10 * files._UNSEEN_SECONDS)
    with staged_folder(tmp_path / "bob") as stage:
        files.sweep(tmp_path, older_than=0)
        assert stage.is_dir() and len([*tmp_path.iterdir()]) == 2
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bob"]


def left(folder: Path, host: str, seconds_ago: float) -> Path:
    stage = folder / f".ann.12-0123abcd{host}.tmp"
    stage.mkdir()
    (stage / "photo").write_bytes(b"ann")
    for path in (stage / "photo", stage):
        os.utime(path, (time.time() - seconds_ago,) * 2)
    return stage


def test_of_somebody_who_is_deleted_nothing_stays_whatever_the_clock_says(tmp_path):
    """Bug: with a clock that was set back, what a killed write had left of a deleted person stayed."""
    stage = left(tmp_path, files._HOST, -3600)
    files.sweep(tmp_path)
    assert stage.exists()
    files.sweep(tmp_path, older_than=0)
    assert not stage.exists()


def test_what_another_machine_may_hold_is_left_alone_for_a_day(tmp_path, monkeypatch):
    """Bug: on NFS, which shows no lock of another machine, what that one held for ten minutes was deleted under it."""
    own, theirs, older = (left(tmp_path, host, files.STALE_SECONDS + 1) for host in (files._HOST, "89abcdef", ""))
    files.sweep(tmp_path)
    assert not own.exists() and theirs.exists() and older.exists()
    later(monkeypatch, files._UNSEEN_SECONDS)
    files.sweep(tmp_path)
    assert not theirs.exists() and not older.exists()


def test_a_folder_for_temporary_files_is_never_open_to_others(tmp_path, monkeypatch):
    """Bug: for a moment it had the rights of any folder, which under umask 0 let others put links into it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen, held = [], files.held
    monkeypatch.setattr(files, "held", lambda folder: seen.append(folder.stat().st_mode & 0o777) or held(folder))
    before = os.umask(0)
    try:
        with temporary_folder():
            assert seen == [0o700]
    finally:
        os.umask(before)


def test_what_is_not_of_a_write_of_ours_is_never_swept(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo").write_bytes(b"mine")
    for name in (".ann.my-photos.tmp", ".ann.12-abcdefg1.tmp", "ann.12-0123abcd.tmp", ".ann.12-0123abcd.tmp.old"):
        (tmp_path / name).mkdir()
    (tmp_path / ".bob.12-0123abcd.tmp").symlink_to(mine)
    (tmp_path / ".cleo.12-0123abcd.tmp").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    later(monkeypatch, 10 * files._UNSEEN_SECONDS)
    files.sweep(tmp_path, older_than=0)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def pipe(tmp_path: Path):
    """Makes a path a named pipe with a word in it, whose end never comes: a reader with the bug fails, or waits."""
    opened = []

    def make(path: Path, content: bytes = b"{}") -> Path:
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        opened.append(os.open(path, os.O_RDWR))
        os.write(opened[-1], content)
        return path

    yield make
    for handle in opened:
        os.close(handle)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["down", "subject"])
def test_a_pipe_is_neither_configuration_nor_weights(tmp_path: Path, pipe, file: str, kind: str) -> None:
    """Bug: a named pipe as adapter_config.json or adapter_model.safetensors was waited for, for ever."""
    down, subject = write_pair(tmp_path)
    pipe((down if kind == "down" else subject) / file)
    with pytest.raises(CheckpointError, match="a pipe or a device"):
        load_down(down) if kind == "down" else load_subject(subject)


def test_a_pipe_is_no_file_of_settings(tmp_path: Path, pipe, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: `--config` waited for a named pipe, for ever."""
    assert main(["evaluate", "--config", str(pipe(tmp_path / "run.yaml", b"seeds: 1\n"))]) != 0
    assert "a pipe or a device" in capsys.readouterr().err


def test_devices_and_folders_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="a pipe or a device"):
        open_regular("/dev/zero")
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "gone")
    (tmp_path / "there").write_bytes(b"\0word")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"\0word"
