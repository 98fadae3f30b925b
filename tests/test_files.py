# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole, never over what they are made from, and read only where they are files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from artefacts_tiny import write_pair
from peft_metalora import load_down, load_subject
from peft_metalora.cli import main
from peft_metalora.errors import CheckpointError, ConfigError
from peft_metalora.files import open_regular, require_apart, staged_folder


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
