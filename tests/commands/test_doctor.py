# SPDX-License-Identifier: Apache-2.0
"""`metalora doctor`: what is missing is named with what it is for and how to get it, and decides the exit code."""

import json
import sys
from pathlib import Path

import pytest

from peft_metalora.cli import main
from peft_metalora.commands import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def look(capsys, *arguments):
    code = main(["doctor", "--local_files_only", "--json", *arguments])
    return code, {one["about"]: one for one in json.loads(capsys.readouterr().out)["findings"]}


def test_a_machine_that_can_work(capsys):
    code, found = look(capsys)
    assert code == 0
    assert found["torch"]["state"] == "ok" and "needs >=" in found["torch"]["found"]
    assert {"device", "processors", "Hub", "cache of the Hub", "working folder"} <= {*found, "device"}


def test_what_is_needed_and_missing_is_bad(capsys, monkeypatch):
    version = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"peft": "0.10", "tqdm": None}.get(name, version(name)))
    code, found = look(capsys)
    assert code == 1
    assert found["peft"]["state"] == found["tqdm"]["state"] == "bad"
    assert found["peft"]["found"].startswith("0.10 (needs >=") and "pip install 'peft>=" in found["peft"]["found"]
    assert main(["doctor", "--local_files_only"]) == 1
    assert capsys.readouterr().out.endswith("2 thing(s) to mend\n")


def test_what_only_some_need_is_a_note(capsys, monkeypatch):
    version = doctor._version
    gone = {"insightface": "2.1", "onnxruntime": None, "deepspeed": None}
    monkeypatch.setattr(
        doctor, "_version", lambda name: gone.get(name, version(name)) if name in gone else version(name)
    )
    code, found = look(capsys)
    assert code == 0
    assert found["[face]"]["found"].startswith(
        "missing (onnxruntime): pip install 'peft-metalora[face]'; for R-FaceSim"
    )
    assert found["deepspeed"]["state"] == "note"


def test_a_cache_that_cannot_be_written_is_bad(capsys, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    code, found = look(capsys)
    assert code == 1 and "closed to you" in found["cache of the Hub"]["found"]


def test_each_extra_has_what_it_is_for():
    """Bug: an extra that doctor does not know."""
    assert doctor.EXTRAS.keys() == PROJECT["optional-dependencies"].keys() - {"dev", "docs", "test"}
    assert PROJECT["name"] == doctor.DISTRIBUTION


def test_a_token_is_asked_about_only_where_it_may(monkeypatch, capsys):
    monkeypatch.setattr(doctor.huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(doctor.huggingface_hub, "whoami", lambda: {"name": "ann"})
    assert doctor._hub(True).found.endswith("not asked whether it is good")
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", False)
    assert doctor._hub(False).found == "logged in as ann"

    def refused():
        raise OSError("no way")

    monkeypatch.setattr(doctor.huggingface_hub, "whoami", refused)
    assert doctor._hub(False).state == "note"
