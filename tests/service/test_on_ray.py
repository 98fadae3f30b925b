# SPDX-License-Identifier: Apache-2.0
"""The service on Ray Serve, started once: two copies, one of which is killed, over HTTP on the loopback."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import yaml

from peft_metalora import enable_meta_lora
from peft_metalora.bases import load_base
from peft_metalora.commands.serve import serving
from peft_metalora.errors import BaseModelMismatchError, ConfigError
from peft_metalora.service.tasks import Offer, RefusedError, Task
from service_tiny import TOKENS, Answer, photo, settings, write_people

CLIENTS, EACH = 24, 5
SLOTS = 8


class Http:
    """Requests to the service, as tenant acme if nothing else is said."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, method, path, body=None, tenant="acme") -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"content-type": "application/json", "authorization": f"Bearer {TOKENS[tenant][0]}"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        finally:
            connection.close()

    def draw(self, subject, seed=0, tenant="acme") -> Answer:
        body = {"subject": subject, "prompt": "a photo of a person", "seed": seed}
        return self("POST", "/images", body, tenant)

    def gauge(self, name) -> float:
        lines = self("GET", "/metrics", tenant="operator").body.decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def copies():
    """What each copy has done and whom it knows."""
    from ray import serve

    found = serve.get_deployment_handle("ArtistReplica", "metalora").broadcast("statistics")
    return [each for each in found.results(return_exceptions=True) if isinstance(each, dict)]


def test_a_copy_that_does_not_start_is_told_to_whoever_starts_the_service(home, tmp_path, run):
    """Bug: Serve tries twenty times, and the reason stands at the end of a traceback."""
    from peft_metalora.service.on_ray import ArtistReplica, RayPool

    replica = object.__new__(ArtistReplica.func_or_class)

    async def work():
        await replica.__init__(settings(home, tmp_path, pretrained_model_name_or_path=str(tmp_path / "nowhere")))
        replica.check_health()
        return await replica.draw(None), await replica.forget("0"), await replica.offer()

    refused, nothing, reason = run(work())
    assert refused.status == 503 and nothing is None
    asked = SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda: reason))
    with pytest.raises(ConfigError, match="found that they do not start: expected a diffusers pipeline at"):
        RayPool(SimpleNamespace(offer=asked), None)
    with pytest.raises(BaseModelMismatchError):
        replica.check_health()


@pytest.mark.parametrize("error", [torch.AcceleratorError("an illegal memory access"), StopIteration()])
def test_a_copy_of_which_no_image_comes_any_more_is_replaced(home, tmp_path, run, monkeypatch, error):
    """Bug: after a fault of the GPU, or the end of what draws, a copy failed for ever, and passed for healthy."""
    from peft_metalora.service.on_ray import ArtistReplica

    replica = object.__new__(ArtistReplica.func_or_class)
    task = Task((None,), (), "a photo of a person", None, 16, 16, 1, None, 0, "png")

    async def work():
        await replica.__init__(settings(home, tmp_path, pretrained_model_name_or_path=str(home / "base")))
        for _ in range(2):
            replica.check_health()

        def fails(*_):
            raise error

        monkeypatch.setattr(replica._artist, "_draw_batch", fails)
        with pytest.raises((torch.AcceleratorError, asyncio.TimeoutError)):
            await asyncio.wait_for(replica.draw(task), 2)
        with pytest.raises((torch.AcceleratorError, TypeError)):  # no future takes a StopIteration
            replica.check_health()
        return await replica.draw(task)

    assert run(work()).status == 503


def test_copies_that_tune_are_told_of_a_deletion_too(run):
    """Bug: they were not, so that a deletion was confirmed while one of them had the person's photos."""
    from peft_metalora.service.on_ray import RayPool

    class Copies:
        def __init__(self, answer):
            self.answer, self.told = answer, []

        def broadcast(self, method, uid):
            self.told.append((method, uid))
            return self

        async def results_async(self, **_):
            return [self.answer]

    async def states():
        return {}

    async def forget(artists, tuners, uid):
        pool = object.__new__(RayPool)
        pool._artists, pool._tuners, pool._states = artists, tuners, states
        return await pool.forget(uid)

    artists, tuners = Copies(None), Copies(None)
    assert run(forget(artists, tuners, "0")) == 1 and artists.told == tuners.told == [("forget", "0")]
    assert run(forget(artists, tuners, None)) == 1 and len(tuners.told) == 1, "who is tuned is not forgotten at a start"
    with pytest.raises(RefusedError, match="one that did not"):
        run(forget(artists, Copies(OSError()), "0"))


def index_of(place) -> list[dict]:
    """Everybody whom the index names."""
    return [one for file in (place / "index").iterdir() for one in json.loads(file.read_text())["people"]]


def test_health_is_told_while_every_thread_waits_for_the_place(run, monkeypatch):
    """Bug: replicas were counted in one of asyncio's few threads, which a place that does not answer holds."""
    from peft_metalora.service import on_ray

    offer = SimpleNamespace(remote=lambda: SimpleNamespace(result=lambda: Offer(16, 8, True)))
    states = {"ArtistReplica": SimpleNamespace(replica_states={"RUNNING": 2})}
    status = SimpleNamespace(applications={on_ray.APP: SimpleNamespace(deployments=states)})
    monkeypatch.setattr(on_ray.serve, "status", lambda: status)
    go = threading.Event()

    async def work():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        hung = asyncio.ensure_future(asyncio.to_thread(go.wait, 20))
        await asyncio.sleep(0)
        try:
            return await asyncio.wait_for(on_ray.RayPool(SimpleNamespace(offer=offer), None).replicas(), 2)
        finally:
            go.set()
            await hung

    assert run(work()) == 2


@pytest.fixture(scope="module")
def service(home, tmp_path_factory):
    """The service with 16 people of files, and 4 that were read from photos."""
    place = tmp_path_factory.mktemp("people")
    files = write_people(home, place / "people" / "acme", 16)
    tokens = place / "tokens.yaml"
    tokens.write_text(yaml.safe_dump(TOKENS))
    tokens.chmod(0o600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = settings(
        home,
        place,
        replicas=2,
        batch_size=8,
        slots=SLOTS,
        tokens=str(tokens),
        port=port,
        timeout=60.0,
        queue=60,
        log_dir=str(tmp_path_factory.mktemp("logs")),
    )
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with serving(config):
        ask = Http(port)
        codes = [f"c{number}" for number in range(4)]
        for number, name in enumerate(codes):
            answer = ask("POST", "/subjects", {"name": name, "photos": [photo(number)], "consent": "said yes"})
            assert answer.status == 201, answer.body
        with pytest.raises(ConfigError, match=f"expected a free port {port} on 127.0.0.1"), serving(config):
            pass
        yield SimpleNamespace(ask=ask, place=place, files=files, codes=codes, port=port, logs=Path(config.log_dir))
    left = [one for one in psutil.Process().children(recursive=True) if one.pid not in before]
    assert not [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_somebody_deleted_is_gone_from_every_copy(service):
    """Bug: a copy that nobody told, or that was drawing just then, still shows somebody who is deleted."""
    ask, place = service.ask, service.place
    for name in ("c0", "p00"):
        assert ask.draw(name).status == 200
        entry = next(entry for entry in index_of(place) if entry["name"] == name)
        with ThreadPoolExecutor(16) as pool:
            drawn = [*pool.map(lambda seed, name=name: ask.draw(name, seed).status, range(32))]
            assert set(drawn) == {200}
            assert [each for each in copies() if entry["uid"] in each["people"]]
            drawing = [pool.submit(ask.draw, name, seed) for seed in range(16)]
            answer = ask("DELETE", f"/subjects/{name}")
            assert (answer.status, answer.json) == (200, {"deleted": name, "replicas": 2})
            assert ask.draw(name).status == 404
            assert {each.result().status for each in drawing} <= {200, 404}
        known = copies()
        assert len(known) == 2 and not [each for each in known if entry["uid"] in each["people"]]
        assert not (place / "people" / "acme" / name).exists()
        assert entry["uid"] not in "".join(file.read_text() for file in (place / "index").iterdir())


def test_photos_on_their_way_are_never_on_the_disk(service):
    """Bug: where requests of together more than 256 MB waited, Ray wrote photos to its folder in the system's place for
    temporary files, and what was written stayed there when the service was killed."""
    import ray

    waiting = [ray.put(np.zeros(2**26, np.uint8)) for _ in range(5)]
    session = Path(ray.init(ignore_reinit_error=True).address_info["session_dir"])
    assert session.is_dir() and not [*session.glob("ray_spilled_objects*/*")]
    assert len(ray.get(waiting[0])) == 2**26


def test_a_rewritten_person_is_the_new_one_within_a_second(service):
    def looks(name):
        with ThreadPoolExecutor(8) as pool:
            return {answer.body for answer in pool.map(lambda _: service.ask.draw(name), range(8))}

    old, other = looks("p01"), looks("p02")
    assert len(old) == len(other) == 1 and old != other
    folder = service.place / "people" / "acme"
    shutil.copytree(folder / "p02", folder / "new")
    (folder / "p01").rename(folder / "old")
    (folder / "new").rename(folder / "p01")
    time.sleep(1)
    assert looks("p01") == other


def test_nothing_listens_beyond_the_loopback_without_a_token(service):
    import grpc

    beyond = []
    for process in psutil.Process().children(recursive=True):
        for socket_ in process.net_connections():
            if socket_.status == psutil.CONN_LISTEN and "127.0.0.1" not in socket_.laddr.ip:
                beyond.append((process.name(), socket_.laddr.port))
    assert all(name.startswith("ray::Serve") for name, _ in beyond), "the replicas' own, which Serve opens everywhere"
    for _, port in beyond:
        call = grpc.insecure_channel(f"127.0.0.1:{port}").unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"", timeout=10)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_who_hangs_up_is_not_waited_for(service):
    body = json.dumps({"prompt": "a photo", "steps": 50, "width": 32, "height": 32}).encode()
    head = f"POST /images HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKENS['acme'][0]}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    for _ in range(4):
        with socket.create_connection(("127.0.0.1", service.port)) as client:
            client.sendall(head.encode() + body)
            time.sleep(0.05)
    end = time.monotonic() + 10
    while service.ask.gauge("metalora_queue") and time.monotonic() < end:
        time.sleep(0.05)
    log = "".join(file.read_text() for file in service.logs.glob("desk-*.jsonl"))
    statuses = [json.loads(line).get("status") for line in log.splitlines()]
    assert 499 in statuses and service.ask.gauge("metalora_queue") == 0


def test_no_request_fails_while_a_copy_is_killed(service, home):
    """Everybody is asked for five times; one of the two copies gets SIGKILL with requests in its hands."""
    everybody = [*service.files[2:], *service.codes[1:]]
    orders = [(name, number) for number in range(EACH) for name in everybody]
    random.Random(0).shuffle(orders)
    slow = {"prompt": "a photo of a person", "steps": 50, "width": 32, "height": 32}

    with ThreadPoolExecutor(2 * CLIENTS) as pool:
        held = [pool.submit(service.ask, "POST", "/images", {**slow, "seed": seed}) for seed in range(CLIENTS)]
        asked = {order: pool.submit(service.ask.draw, *order) for order in orders}
        waiting: list[int] = []
        while not waiting:
            assert not all(done.done() for done in held), "nobody waited for anybody"
            seen = copies()
            waiting = [one["pid"] for one in seen if one["waiting"]]
        victim = waiting[0]
        os.kill(victim, signal.SIGSTOP)  # for a moment it takes requests and cannot answer
        time.sleep(0.5)
        os.kill(victim, signal.SIGKILL)
        answers = {order: done.result() for order, done in asked.items()}
    assert {done.result().status for done in held} == {200}
    assert {answer.status for answer in answers.values()} == {200}
    assert service.ask.gauge("metalora_repeated_total") >= 1, "what the dead copy was drawing was asked again"

    known = [each for each in [*(one for one in seen if one["pid"] == victim), *copies()] if each["images"]]
    images, batches, subjects = (sum(each[key] for each in known) for key in ("images", "batches", "subjects"))
    assert batches < subjects <= images <= 8 * batches, "a batch mixes people"

    # Alone in a batch and among others, rounded to the 256 levels of a PNG.
    pipe = enable_meta_lora(load_base(str(home / "base")).pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_meta_lora(home / "down")
    pipe.enable_subject_slots(1)
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "max_sequence_length": 8}
    same, other = [], []
    for name, seed in [order for order in orders if order[0] in service.files][::7]:
        pipe.add_subject(service.place / "people" / "acme" / name, name)
        for subjects, differences in ((name, same), ([None], other)):
            noise = torch.Generator().manual_seed(seed)
            image = pipe("a photo of a person", subjects=subjects, generator=noise, **options).images[0]
            difference = np.abs(np.asarray(image, dtype=np.int16) - answers[name, seed].pixels)
            differences.append(int(difference.max()))
    assert max(same) <= 1 and min(other) > 2
