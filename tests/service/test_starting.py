# SPDX-License-Identifier: Apache-2.0
"""What is known before Ray starts is refused before it, in a sentence; and how a copy holds its base."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import socket

import numpy as np
import pytest
import torch
from PIL import Image

from peft_metalora.cli import main
from peft_metalora.demo.embedded import of_the_demo
from peft_metalora.demo.faces import write_dataset
from peft_metalora.demo.judges import load_embedder
from peft_metalora.errors import ConfigError
from peft_metalora.service.artist import make_artist
from peft_metalora.service.people import Person
from peft_metalora.service.tasks import Task
from service_tiny import Pool, Service, settings


@pytest.fixture
def one_thread(monkeypatch):
    """A copy takes its share of the cores for the whole process: here that would be all tests after it."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"down": None}, "expected the Down of the people"),
        ({"host": "0.0.0.0"}, "expected tokens for a service on 0.0.0.0"),
        ({"slots": 3}, "slots must hold a batch"),
        ({"replicas": 0}, "replicas must be at least 1"),
        ({"max_replicas": 1, "replicas": 2}, "max_replicas must be at least replicas"),
        ({"rate": 0.0}, "rate must be more than 0"),
        ({"port": 0}, "port must be between 1 and 65535"),
        ({"tuners": -1}, "tuners must be at least 0"),
        ({"num_inference_steps": 60}, "num_inference_steps must be at most max_inference_steps"),
    ],
)
def test_settings_that_cannot_be(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, tmp_path, **change)


def test_a_start_that_cannot_be_is_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    (tmp_path / "people").mkdir()
    (tmp_path / "tokens.yaml").write_text("acme: token-of-acme-0123456789")
    (tmp_path / "tokens.yaml").chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, said in (
            (["--people", "nowhere"], "expected a folder for people, found none at nowhere"),
            (["--port", port], f"expected a free port {port} on 127.0.0.1"),
            (["--tokens", str(tmp_path / "tokens.yaml")], "expected a file of tokens that its owner alone may read"),
            (["--ray_address", "auto"], "expected a Ray cluster with its token authentication on"),
        ):
            assert main(["serve", "--demo", "--people", str(tmp_path / "people"), *flags]) == 2
            assert said in capsys.readouterr().err


def test_however_a_copy_holds_its_base_it_draws_the_same_people(home, tmp_path, run, monkeypatch, one_thread):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model))
    code = torch.randn(6, generator=torch.Generator().manual_seed(1)).numpy().tobytes()
    ways = [{}, {"fold": True, "compile": True}, {"offload": "group"}, {"quantize": "int8"}]

    async def work():
        drawn = []
        for way in ways:
            artist = await make_artist(settings(home, tmp_path, **way))
            space = artist._reader.space
            ann = Person("acme", "ann", "0" * 32, 1, "yes", 0.0, space.down_fingerprint, space.fingerprint, code)
            tasks = [Task((one,), (), "a photo of a person", None, 16, 16, 1, None, 3, "png") for one in (ann, None)]
            images = await asyncio.gather(*map(artist.draw, tasks))
            drawn.append(np.stack([Image.open(io.BytesIO(image.content)) for image in images]).astype(np.int16))
        return drawn

    plain, *others = run(work())
    assert np.abs(plain[0] - plain[1]).max() > 24
    for way, found in zip(ways[1:], others, strict=True):
        assert np.abs(found - plain).max() <= (24 if "quantize" in way else 1), way
    assert [type(model).__name__ for model in compiled] == ["FluxTransformer2DModel"]


def test_no_prompt_is_quoted_where_a_copy_writes(home, tmp_path, run, monkeypatch, one_thread):
    """Bug: diffusers warns of a prompt that is too long and quotes it; Ray keeps what a copy writes in files."""
    import diffusers

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("diffusers"), "handlers", [handler])
    diffusers.utils.logging.set_verbosity_warning()

    async def work():
        artist = await make_artist(settings(home, tmp_path))
        await artist.draw(Task((None,), (), "a photo of a person " * 9, None, 16, 16, 1, None, 3, "png"))

    try:
        run(work())
    finally:
        diffusers.utils.logging.set_verbosity_warning()
    assert not [one for one in said if "a photo of" in one]


def test_the_demo_draws_who_was_read_off_a_photo(tmp_path, run, one_thread):
    folders = sorted(write_dataset(tmp_path / "photos", "held-out", 2, 2).iterdir())
    (tmp_path / "people").mkdir()
    demo = {"demo": True, "down": None, "resolution": None, "max_resolution": 64, "num_inference_steps": 4}

    async def work():
        pool = Pool([await make_artist(of_the_demo(settings(tmp_path, tmp_path / "people", **demo)))])
        pool.offer = pool.artists[0].offer
        service = Service(tmp_path, tmp_path / "people", pool=pool, **demo)
        drawn = []
        for folder in folders:
            photo = base64.b64encode((folder / "0.png").read_bytes()).decode()
            body = {"name": folder.name, "photos": [photo], "consent": "said yes"}
            assert (await service.ask("POST", "/subjects", body)).status == 201
            drawn.append(Image.open(io.BytesIO((await service.draw(folder.name)).body)))
        return drawn

    embedder = load_embedder()
    drawn, others = embedder.embed(run(work())), embedder.embed([Image.open(folder / "1.png") for folder in folders])
    assert (drawn.vectors @ others.vectors.T).argmax(1).tolist() == [0, 1], "each is nearest to their own other photo"
