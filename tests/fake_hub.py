# SPDX-License-Identifier: Apache-2.0
"""A Hub on the loopback address: the few endpoints that uploads and downloads use, repositories kept in memory.

It speaks to the real `huggingface_hub` client, so that a test sees which bytes were really sent, with which token
and into which kind of repository.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import transformers.utils.hub
from huggingface_hub import constants

TOKEN = "hf_token_of_ann"


@dataclass
class Repo:
    """One repository: its visibility and the files of each revision, by commit id; `refs` names revisions."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main", gone: set[str] = frozenset()) -> str:
        before = self.commits.get(self.refs.get(ref, ""), {})
        tree = {**{name: content for name, content in before.items() if name not in gone}, **files}
        oid = hashlib.sha1(repr(sorted((k, hashlib.sha1(v).digest()) for k, v in tree.items())).encode()).hexdigest()
        self.commits[oid] = tree
        self.refs[ref] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


class FakeHub:
    """`with FakeHub() as hub:` serves at `hub.endpoint`; `hub.repos` and `hub.requests` show what happened."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(_Handler):
            def __init__(self, *args: object) -> None:
                self.hub = hub
                super().__init__(*args)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo_id: str, files: dict[str, bytes], private: bool = False, ref: str = "main") -> str:
        """Put files into a repository without the network; returns the commit id."""
        repo = self.repos.setdefault(repo_id, Repo(private))
        return repo.commit(files, ref)

    def downloads(self, name: str) -> int:
        """How often the bytes of a file of this name were fetched."""
        return sum(method == "GET" and "/resolve/" in path and path.endswith(name) for method, path in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        self._read()

    def do_HEAD(self) -> None:
        self._read()

    def do_PUT(self) -> None:
        self.hub.requests.append(("PUT", self.path))
        self.hub.lfs[self.path.rsplit("/", 1)[1]] = self._body()
        self._send(200, b"")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(("POST", path))
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.startswith("/api/validate-yaml"):
            self._json(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False} for f in files]
            self._json(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            reply = [{**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{o['oid']}"}}} for o in objects]
            self._json(200, {"transfer": "basic", "objects": reply})
        elif "/branch/" in path:
            repo_id, _, branch = path.removeprefix("/api/models/").partition("/branch/")
            refs = self.hub.repos[repo_id].refs
            self._json(409 if branch in refs else 200, {})
            refs.setdefault(branch, refs["main"])
        elif "/commit/" in path:
            self._commit(path, body)
        else:
            self._json(404, {"error": path})

    def _create(self, request: dict) -> None:
        owner = request.get("organization") or "ann"
        repo_id = f"{owner}/{request['name']}"
        exists = repo_id in self.hub.repos
        private = request.get("visibility") == "private" or bool(request.get("private"))
        if not exists:
            self.hub.repos[repo_id] = Repo(private)
            self.hub.repos[repo_id].commit({})
        self._json(409 if exists else 200, {"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id})

    def _commit(self, path: str, body: bytes) -> None:
        repo_id, _, ref = path.removeprefix("/api/models/").partition("/commit/")
        files, gone = {}, set()
        for line in body.splitlines():
            item = json.loads(line)
            if item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.lfs[item["value"]["oid"]]
            elif item["key"] == "deletedFile":
                gone.add(item["value"]["path"])
        oid = self.hub.repos[repo_id].commit(files, ref, gone)
        self._json(200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}", "commitOid": oid})

    def _read(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if path == "/api/whoami-v2":
            return self._json(200, {"type": "user", "name": "ann", "orgs": []})
        is_api = path.startswith("/api/models/")
        repo_id = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self._json(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if is_api:
            return self._info(repo_id, repo, path.removeprefix(f"/api/models/{repo_id}").strip("/"))
        revision, _, name = path.removeprefix(f"/{repo_id}/resolve/").partition("/")
        files = repo.files(revision)
        if files is None:
            return self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": repo.refs.get(revision, revision)}
        if name not in files:
            return self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **commit})
        self._send(200, files[name], {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', **commit})

    def _info(self, repo_id: str, repo: Repo, rest: str) -> None:
        what, _, revision = rest.partition("/")
        revision = revision.split("/")[0] or "main"
        files = repo.files(revision)
        if files is None and repo.commits:
            return self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        files = files or {}
        if what == "tree":
            return self._json(
                200,
                [
                    {"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                    for k, v in files.items()
                ],
            )
        siblings = [{"rfilename": name} for name in files]
        sha = repo.refs.get(revision, revision)
        self._json(200, {"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def point_at(hub_endpoint, cache, monkeypatch):
    """Make the client talk to a fake Hub and keep what it fetches in a folder of the test."""
    monkeypatch.setattr(constants, "ENDPOINT", hub_endpoint)
    template = hub_endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub_endpoint)
    # transformers (PEFT pushes through it) keeps a client of its own, made on first use by whichever test came first.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)  # 5.0 has none
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
