# SPDX-License-Identifier: Apache-2.0
"""A service in this process: a tiny base, a Down that reads photos, and a client that speaks ASGI to it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import inject_adapter_in_model
from PIL import Image

from peft_metalora import enable_meta_lora, save_subject
from peft_metalora.bases import base_for, load_base
from peft_metalora.service.api import make_api
from peft_metalora.service.artist import Artist
from peft_metalora.service.desk import Desk
from peft_metalora.service.gauges import Gauges
from peft_metalora.service.people import People, Place
from peft_metalora.service.serve_settings import ServeConfig
from peft_metalora.service.tasks import Drawn, Offer
from peft_metalora.service.tenants import Tenants
from pipelines_tiny import tiny_flux_pipeline

TOKENS = {"acme": ["token-of-acme-0123456789"], "other": ["token-of-other-0123456789"]}
TOKENS["operator"] = ["token-of-the-operator-0123"]


def photo(seed: int = 0, size: int = 40) -> str:
    """A photo as a client sends it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return base64.b64encode(stream.getvalue()).decode()


def settings(home: Path, people: Path | str, **changes) -> ServeConfig:
    given = {"down": str(home / "down"), "people": str(people), "device": "cpu", "resolution": 16, "batch_size": 4}
    given |= {"max_resolution": 32, "num_inference_steps": 1, "max_sequence_length": 8, "slots": 6, "timeout": 20.0}
    return ServeConfig(**{**given, **changes})


class Pool:
    """Copies of the base in this process, asked in turn."""

    def __init__(self, artists: list[Artist]) -> None:
        self.artists, self.turn = artists, 0

    def next(self) -> Artist:
        self.turn += 1
        return self.artists[self.turn % len(self.artists)]

    async def draw(self, task):
        return await self.next().draw(task)

    async def read(self, photos):
        return await self.next().read(photos)

    async def forget(self, uid):
        for artist in self.artists:
            await artist.forget(uid)
        return len(self.artists)

    async def replicas(self):
        return len(self.artists)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self) -> str:
        return self.json["error"]

    @property
    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.body)), dtype=np.int16)


class Client:
    """Requests to an ASGI application, as tenant acme if nothing else is said."""

    def __init__(self, api) -> None:
        self.api = api

    async def __call__(
        self, method, path, body=None, *, tenant="acme", token=None, raw=None, headers=(), hang_up=None
    ) -> Answer:
        """A request; `hang_up` is an event after which the client is gone."""
        path, _, query = path.partition("?")
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        own = {"content-type": "application/json", "content-length": str(len(content)), "host": "127.0.0.1:8000"}
        token = token or (TOKENS[tenant][0] if tenant else None)
        own |= {"authorization": f"Bearer {token}"} if token else {}
        own |= dict(headers)
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "root_path": ""}
        scope |= {"query_string": query.encode(), "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"}}
        scope |= {"headers": [(k.encode(), v.encode()) for k, v in own.items()], "client": ("127.0.0.1", 1)}
        parts = [content[start : start + 65536] for start in range(0, len(content), 65536)] or [b""]
        sent: list[dict] = []

        async def receive():
            if parts:
                part = parts.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(parts)}
            await (hang_up or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await self.api(scope, receive, send)
        if not sent:
            return Answer(0, {}, b"")
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], found, b"".join(part.get("body", b"") for part in sent[1:]))


class Service:
    """All of it but Ray."""

    def __init__(self, home: Path, people: Path | str, copies: int = 1, pool=None, tenants=True, **changes) -> None:
        self.config = settings(home, people, **changes)
        self.place = Place(self.config.people)
        if pool is None:
            bases = [base_for(tiny_flux_pipeline(), max_sequence_length=8) for _ in range(copies)]
            pool = Pool([Artist(base, self.place, self.config) for base in bases])
            offer = pool.artists[0].offer
        else:
            offer = pool.offer
        self.pool, self.people = pool, People(self.place)
        self.desk = Desk(self.config, self.people, pool, offer, Gauges())
        self.ask = Client(make_api(self.desk, Tenants(TOKENS) if tenants else None))

    async def enrol(self, name: str, seed: int = 0, tenant: str = "acme", **more) -> Answer:
        body = {"name": name, "photos": [photo(seed)], "consent": "said yes", **more}
        return await self.ask("POST", "/subjects", body, tenant=tenant)

    async def draw(self, subject: str | None, seed: int = 0, tenant: str = "acme", **more) -> Answer:
        body = {"subject": subject, "prompt": "a photo of a person", "seed": seed, **more}
        return await self.ask("POST", "/images", body, tenant=tenant)


def write_people(home: Path, folder: Path, count: int) -> list[str]:
    """Subject folders as stage 2 writes them, all different; returns their names."""
    pipe = enable_meta_lora(load_base(str(home / "base")).pipeline)
    pipe.load_meta_lora(home / "down", "faces")
    model = pipe.transformer
    subject = replace(
        model.peft_config["faces"], stage="subject", down="faces", num_slots=count, start="mean", facts={}
    )
    inject_adapter_in_model(subject, model, "people")
    noise = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("metalora_up.people"):
            parameter.data += 2 * torch.randn(parameter.shape, generator=noise)
    names = [f"p{number:02}" for number in range(count)]
    for slot, name in enumerate(names):
        save_subject(folder / name, model, "people", slot=slot, down=home / "down", fold=False, subject_name=name)
    return names


class Gate:
    """A pool that draws nothing until its gate is opened; one pixel then."""

    offer = Offer(resolution=16, multiple=8, negative=True)

    def __init__(self) -> None:
        self.asked, self.dropped, self.forgotten = [], 0, []
        self.open = asyncio.Event()

    async def draw(self, task):
        self.asked.append(task)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.dropped += 1
            raise
        return Drawn(b"image", 1, 0.1, 1, 0)

    async def read(self, photos):
        return np.arange(6, dtype=np.float32).tobytes(), "down", "space"

    async def forget(self, uid):
        self.forgotten.append(uid)
        return 1

    async def replicas(self):
        return 1
