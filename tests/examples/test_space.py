# SPDX-License-Identifier: Apache-2.0
"""The Space's folder: its head is what the Hub reads, and `python app.py` serves the page to who has a token."""

from __future__ import annotations

import os
import runpy
import socket
import threading
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"


def test_the_head_is_what_a_space_takes():
    """Bug: a Space that installs a Gradio older than the page asks for, or does not know what to start."""
    head = yaml.safe_load((SPACE / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert head["sdk"] == "gradio" and (SPACE / head["app_file"]).is_file()
    assert len(head["short_description"]) <= 60 and head["license"] == "apache-2.0"
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {head["colorFrom"], head["colorTo"]} <= colours
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert head["python_version"] in Requirement(f"python{project['requires-python']}").specifier
    wanted = Requirement((SPACE / "requirements.txt").read_text(encoding="utf-8").strip())
    assert wanted.name == project["name"] and wanted.extras == {"app"}
    gradio = next(one for one in map(Requirement, project["optional-dependencies"]["app"]) if one.name == "gradio")
    assert head["sdk_version"] in gradio.specifier


def start(monkeypatch, **environment):
    monkeypatch.setenv("TOKENS", environment.pop("TOKENS", ""))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SPACE / "app.py"), run_name="__main__")
    return ended.value.code


def test_without_tokens_it_does_not_start(monkeypatch):
    assert "expected the secret TOKENS" in start(monkeypatch)


def test_it_serves_the_page_to_who_has_a_token(monkeypatch, tmp_path):
    """Bug: a page for everybody on the internet, or one that answers where the Hub does not ask."""
    pytest.importorskip("gradio")
    import uvicorn

    monkeypatch.chdir(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen, answer = {}, uvicorn.Server.run

    def run(server, sockets=None):
        """Answers in a thread until this test has asked what it wants to know."""
        working = threading.Thread(target=answer, args=(server, sockets))
        working.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}") as browser:
                seen["stranger"] = browser.get("/config").status_code
                seen["wrong"] = browser.post("/login", data={"username": "ann", "password": "x"}).status_code
                seen["login"] = browser.post("/login", data={"username": "ann", "password": TOKEN}).status_code
                seen["page"] = browser.get("/config").status_code
        finally:
            server.should_exit = True
            working.join(20)

    monkeypatch.setattr(uvicorn.Server, "run", run)
    assert start(monkeypatch, TOKENS=f"ann: {TOKEN}\n", GRADIO_SERVER_PORT=str(port), FLAGS="--device cpu") == 0
    assert seen == {"stranger": 401, "wrong": 400, "login": 200, "page": 200}
    assert (tmp_path / "people").is_dir() and TOKEN not in "".join(os.environ.values())


TOKEN = "a-word-of-this-test-that-is-long-enough"
