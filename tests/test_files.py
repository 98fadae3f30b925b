# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole, and never over what they are made from."""

import subprocess
import sys

import pytest

from peft_metalora.errors import ConfigError
from peft_metalora.files import require_apart, staged_folder


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
