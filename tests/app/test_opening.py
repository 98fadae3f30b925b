# SPDX-License-Identifier: Apache-2.0
"""The page behind HTTP: who may open it, from where, and what it refuses."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app_tiny import estimates, photo
from peft_metalora.app.app_settings import AppConfig
from peft_metalora.app.opening import serving_page
from peft_metalora.cli import main
from peft_metalora.errors import ConfigError
from peft_metalora.service.tenants import Tenants

TOKENS = {"ann": ["token-of-ann-0123456789"], "bob": ["token-of-bob-0123456789"]}
TOKENS["operator"] = ["token-of-the-operator-0123"]


@contextmanager
def client(app, tenants=None):
    with (
        serving_page(app.studio, app.place, app.config, tenants, estimates) as server,
        TestClient(server.config.app, base_url="http://127.0.0.1:7860") as asking,
    ):
        yield asking


def test_this_machine_alone_may_ask_by_its_own_name(tried):
    with client(tried(max_body_mb=0.01)) as asking:
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.is_dir() and asking.get("/").status_code == 200
        # A page of the web whose name was turned to this address.
        assert asking.get("/config", headers={"host": "elsewhere.example"}).status_code == 400
        sent = asking.post("/gradio_api/upload", files={"files": ("a.png", photo(size=(200, 100)))})
        assert sent.status_code == 413
        assert asking.get("/gradio_api/info").json()["named_endpoints"] == {}
        assert asking.get(f"/gradio_api/file={__file__}").status_code == 403
    assert not folder.exists() and "GRADIO_TEMP_DIR" not in os.environ


def test_an_upload_that_ends_in_the_middle_leaves_no_photo(tried):
    """Bug: what had come of a photo when its sender hung up lay in the page's folder until the page was closed."""
    folder, there = [], []
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + photo()

    async def receive():
        if not folder:
            folder.append(Path(os.environ["GRADIO_TEMP_DIR"]))
            return {"type": "http.request", "body": head, "more_body": True}
        there.extend(path.read_bytes() for path in folder[0].glob("*") if path.is_file())
        return {"type": "http.disconnect"}

    async def send(_):
        pass

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/upload", "root_path": "", "query_string": b""}
    scope |= {"scheme": "http", "http_version": "1.1", "server": ("127.0.0.1", 7860), "client": ("127.0.0.1", 1)}
    scope |= {"headers": [(b"host", b"127.0.0.1"), (b"content-type", b"multipart/form-data; boundary=x")]}
    with client(tried()) as asking:
        with suppress(Exception):
            asyncio.run(asking.app(scope, receive, send))
        assert there and not [path for path in folder[0].rglob("*") if path.is_file()]


def test_users_enter_with_their_own_token(tried):
    with client(tried(), Tenants(TOKENS)) as asking:
        assert asking.get("/config").status_code == 401
        assert asking.post("/gradio_api/upload", files={"files": ("a.png", photo())}).status_code == 401
        for user, token in (("ann", TOKENS["bob"][0]), ("ann", "no token"), ("operator", TOKENS["operator"][0])):
            assert asking.post("/login", data={"username": user, "password": token}).status_code == 400
        assert asking.get("/config").status_code == 401
        assert asking.post("/login", data={"username": "ann", "password": TOKENS["ann"][0]}).status_code == 200
        assert asking.get("/config").json()["username"] == "ann"


def test_no_other_sites_page_asks_in_a_users_name(tried):
    """Bug: Gradio's cookie comes along from everywhere, and every site was allowed to read the answers. Any page that a
    user who had logged in came by could look at their people, export and delete them."""
    with client(tried(), Tenants(TOKENS)) as asking:
        asking.post("/login", data={"username": "ann", "password": TOKENS["ann"][0]})
        own = {"host": "people.example", "cookie": "; ".join(f"{k}={v}" for k, v in asking.cookies.items())}

        def told(site, mode, method="GET", path="/config", origin="https://evil.example"):
            headers = {**own, "origin": origin, "sec-fetch-site": site, "sec-fetch-mode": mode}
            return asking.request(method, path, headers=headers).status_code

        assert [told(site, "cors") for site in ("cross-site", "same-site")] == [403, 403]
        assert told("cross-site", "navigate", "POST", "/gradio_api/queue/join") == 403
        assert told("cross-site", "navigate", path="/") == 200  # a link to the page
        assert told("same-origin", "cors", origin="https://people.example") == told("none", "navigate") == 200


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"host": "0.0.0.0"}, "expected tokens"),
        ({"port": 0}, "port"),
        ({"demo": False}, "the Down"),
        ({"max_photos": 0}, "max_photos"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        AppConfig(**{"demo": True, **changes})


def test_a_port_that_is_taken_is_a_sentence_and_loads_nothing(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        people = str(tmp_path / "people")
        assert main(["app", "--demo", "--people", people, "--port", port]) == 2
    assert f"expected a free port {port}" in capsys.readouterr().err and not (tmp_path / "people").exists()


def test_without_the_extra_the_page_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "peft_metalora.app.opening")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--demo", "--people", str(tmp_path / "people")]) == 2
    assert "pip install 'peft-metalora[app]'" in capsys.readouterr().err and not (tmp_path / "people").exists()
