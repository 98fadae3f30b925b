# SPDX-License-Identifier: Apache-2.0
"""`metalora serve` under load: 10,000 people, twice the load that it can carry, copies killed, people deleted midway.

    python benchmarks/service.py            2 cores, about 40 min; writes benchmarks/results/service.json

Everybody is a code of a random subject space on the embedded Down, so that each shows another image. First the
capacity: as many images a second as a number of clients get who each wait for an answer. Then requests arrive at random
moments, whether or not others are answered: at 0.8 of the capacity, and at twice the capacity. During the latter two
copies get SIGKILL, people are deleted and others are brought in. Then the capacity once more, because a machine does
not stay the same: the goodput is compared with the mean of both. Afterwards every picture that was answered is drawn
again, alone.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import os
import random
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from PIL import Image

from peft_metalora import enable_meta_lora, load_down
from peft_metalora.bases import base_for
from peft_metalora.checkpoint.space import CODE_SIZE
from peft_metalora.demo.embedded import DOWN, MAX_SEQUENCE_LENGTH, RESOLUTION, load_base
from peft_metalora.demo.scoring import INFERENCE_STEPS
from peft_metalora.encoder import EncoderConfig, SubjectSpace, load_reader, make_encoder, save_reader

PROMPT, STEPS = "a photo of a person, smiling", INFERENCE_STEPS
PATIENCE = 300  # seconds for whatever is waited for
TENANTS = ("acme", "blue", "corp", "duke")
TOLERANCE = 2  # levels of 256 that a batch may differ from one image


# People


def make_reading_down(folder: Path) -> None:
    """The embedded Down with a random space and a random encoder."""
    shutil.copytree(DOWN, folder)
    space = SubjectSpace.around(load_down(folder), CODE_SIZE)
    noise = torch.Generator().manual_seed(0)
    start = 0
    for name, shape in space.layout:
        stop = start + int(np.prod(shape))
        if name.endswith("_up"):
            space.basis.data[:, start:stop].normal_(std=0.05 / CODE_SIZE**0.5, generator=noise)
        start = stop
    config = EncoderConfig(resolution=RESOLUTION, code_size=CODE_SIZE, width=16, hidden=64)
    torch.manual_seed(0)
    save_reader(folder, space.rounded(), make_encoder(config, base_for(load_base()).encode_images))


@dataclasses.dataclass(frozen=True)
class Someone:
    """A person of a tenant; the code is theirs, or is read from the photo."""

    tenant: str
    name: str
    code: bytes | None = None
    photo: bytes | None = None


def make_people(place: Path, down: Path, count: int) -> list[Someone]:
    """Write the index of a service with everybody in it."""
    reader = load_reader(down, load_down(down), base_for(load_base()).encode_images)
    codes = torch.randn(count, CODE_SIZE, generator=torch.Generator().manual_seed(1))
    codes = torch.nn.functional.layer_norm(codes, (CODE_SIZE,)).numpy()
    people = [
        Someone(TENANTS[number % len(TENANTS)], f"p{number:05}", codes[number].tobytes()) for number in range(count)
    ]
    shards: dict[str, list[dict[str, Any]]] = {}
    for one in people:
        record = {"tenant": one.tenant, "name": one.name, "uid": secrets.token_hex(16), "revision": 1}
        record |= {"consent": "made up for a benchmark", "enrolled": time.time(), "down": reader.space.down_fingerprint}
        record |= {"space": reader.space.fingerprint, "code": base64.b64encode(one.code or b"").decode()}
        shards.setdefault(f"{sha256(f'{one.tenant}/{one.name}'.encode()).digest()[0]:02x}", []).append(record)
    (place / "index").mkdir(parents=True)
    for shard, records in shards.items():
        (place / "index" / f"{shard}.json").write_text(json.dumps({"format": 1, "people": records}))
    return people


def newcomers(count: int) -> list[Someone]:
    """People with a photo of noise each."""
    found = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "png")
        found.append(Someone(TENANTS[number % len(TENANTS)], f"new{number:03}", photo=stream.getvalue()))
    return found


# The service, as a process of its own


class Service:
    """`metalora serve` on the loopback; leaving the `with` ends it and all that it started."""

    def __init__(self, place: Path, down: Path, replicas: int, batch: int, queue: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.tokens = {name: secrets.token_urlsafe(32) for name in (*TENANTS, "operator")}
        tokens = place / "tokens.yaml"
        tokens.write_text(json.dumps(self.tokens))
        tokens.chmod(0o600)
        options = {"people": place, "down": down, "tokens": tokens, "port": self.port, "replicas": replicas}
        options |= {"batch_size": batch, "queue": queue, "num_inference_steps": STEPS}
        self.command = [sys.executable, "-m", "peft_metalora.cli", "serve", "--demo"]
        self.command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.replicas = replicas
        self.left: list[str] = []  # processes that outlived their end

    def __enter__(self) -> Service:
        # Ray's sockets have paths of at most 107 characters.
        self.scratch = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
        self.log = Path(self.scratch.name) / "log"
        environment = {**os.environ, "RAY_TMPDIR": self.scratch.name, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = psutil.Popen(self.command, stdout=log, stderr=log, env=environment, start_new_session=True)
        end = time.monotonic() + PATIENCE
        while "serving at" not in self.log.read_text():
            if time.monotonic() > end or self.process.poll() is not None:
                said = self.log.read_text()[-4000:]
                self.__exit__()
                raise RuntimeError(f"expected the service within {PATIENCE} s, found:\n{said}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        family = [self.process, *(self.process.children(recursive=True) if _alive(self.process) else [])]
        self.process.terminate()
        end = time.monotonic() + 60
        while (left := [process for process in family if _alive(process)]) and time.monotonic() < end:
            time.sleep(0.2)
        self.left = [str(process) for process in left]
        for process in left:
            process.kill()
        self.process.wait(10)
        self.scratch.cleanup()

    def copies(self) -> list[psutil.Process]:
        """The processes of the copies."""
        return [one for one in self.process.children(recursive=True) if "ArtistReplica" in one.name() + _line(one)]

    def kill_a_copy(self) -> None:
        """SIGKILL for a copy that surely holds requests: for a moment it takes them and cannot answer."""
        victim = self.copies()[0]
        victim.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        victim.kill()


def _alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that only waits for its parent to notice its end does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


# Load


@dataclasses.dataclass
class Answer:
    """A request and what came back."""

    person: Someone
    seed: int
    asked: float = 0.0
    status: int = 0
    retry_after: str | None = None
    body: bytes = b""
    seconds: float = 0.0


class Clients:
    """Requests of all tenants, over connections that stay open."""

    def __init__(self, service: Service, session: aiohttp.ClientSession) -> None:
        self._service, self._session, self._next = service, session, 0

    async def ask(self, method: str, path: str, tenant: str, body: Any = None) -> tuple[int, str | None, bytes]:
        """Status, Retry-After and body; status 0 for a connection that broke."""
        headers = {"authorization": f"Bearer {self._service.tokens[tenant]}"}
        url = f"http://127.0.0.1:{self._service.port}{path}"
        try:
            async with self._session.request(method, url, json=body, headers=headers) as answer:
                return answer.status, answer.headers.get("retry-after"), await answer.read()
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
            return 0, None, repr(error).encode()

    async def draw(self, person: Someone) -> Answer:
        """One image of somebody, of a seed of its own."""
        self._next += 1
        answer = Answer(person, self._next, time.monotonic())
        body = {"subject": person.name, "prompt": PROMPT, "seed": answer.seed}
        answer.status, answer.retry_after, answer.body = await self.ask("POST", "/images", person.tenant, body)
        answer.seconds = time.monotonic() - answer.asked
        return answer

    async def persistently(self, method: str, path: str, tenant: str, body: Any = None) -> int:
        """As `ask`; who is told to come again later does."""
        while True:
            status, retry_after, _ = await self.ask(method, path, tenant, body)
            if retry_after is None:
                return status
            await asyncio.sleep(int(retry_after))


async def capacity(clients: Clients, people: Sequence[Someone], count: int, at_once: int) -> tuple[float, list[Answer]]:
    """Images a second that so many clients get who each wait for an answer; the first fifth warms up."""
    orders, answers, start = iter(range(count)), [], 0.0
    chosen = random.Random(1)

    async def one() -> None:
        nonlocal start
        for number in orders:
            if number == count // 5:
                start = time.monotonic()
            answers.append(await clients.draw(chosen.choice(people)))

    await asyncio.gather(*(one() for _ in range(at_once)))
    return (count - count // 5) / (time.monotonic() - start), answers


async def arrive(clients: Clients, people: Sequence[Someone], count: int, rate: float, notice: Any) -> list[Answer]:
    """Send so many requests at random moments, `rate` a second, whether or not others are answered.

    Args:
        notice: is told how many were sent.
    """
    chosen, asked = random.Random(2), []
    due = time.monotonic()
    for number in range(count):
        due += chosen.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        notice(number)
        asked.append(asyncio.ensure_future(clients.draw(chosen.choice(people))))
    return await asyncio.gather(*asked)


async def comings_and_goings(
    clients: Clients, leaving: Sequence[Someone], coming: Sequence[Someone], gone: dict[Someone, float]
) -> tuple[list[Answer], list[Answer], Counter[int]]:
    """Delete some, four at a time, and ask for each afterwards; bring others in and draw them.

    Returns:
        The answers of who was deleted and of who came, and the statuses of deletions and enrolments.
    """
    statuses: Counter[int] = Counter()
    turns, after, drawn = asyncio.Semaphore(4), [], []

    async def delete(person: Someone) -> None:
        async with turns:
            statuses[await clients.persistently("DELETE", f"/subjects/{person.name}", person.tenant)] += 1
            gone[person] = time.monotonic()
            after.append(await clients.draw(person))

    async def enrol(person: Someone) -> None:
        async with turns:
            photo = base64.b64encode(person.photo or b"").decode()
            body = {"name": person.name, "photos": [photo], "consent": "made up for a benchmark"}
            statuses[await clients.persistently("POST", "/subjects", person.tenant, body)] += 1
            while (answer := await clients.draw(person)).status == 429:
                await asyncio.sleep(int(answer.retry_after or 1))
            drawn.append(answer)

    await asyncio.gather(*map(delete, leaving), *map(enrol, coming))
    return after, drawn, statuses


# Drawn again


def draw_alone(work: tuple[Path, Sequence[tuple[Someone, int, bytes]]]) -> list[tuple[int, int]]:
    """The largest difference of each picture to the one that is drawn alone, and to the base's; in levels of 256."""
    down, answers = work
    torch.set_num_threads(1)
    pipe = enable_meta_lora(load_base())
    pipe.set_progress_bar_config(disable=True)
    pipe.load_meta_lora(down)
    table = pipe.enable_subject_slots(1)
    reader = load_reader(down, table.down, base_for(pipe).encode_images)
    size = {"height": RESOLUTION, "width": RESOLUTION, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    found = []
    for number, (person, seed, body) in enumerate(answers):
        if person.photo is not None:
            code = reader.codes([[Image.open(io.BytesIO(person.photo)).convert("RGB")]])[0][0]
        else:
            code = torch.from_numpy(np.frombuffer(person.code or b"", np.float32).copy())
        table.register_code("somebody", reader.space.coded(code), reader.space)
        pixels = np.asarray(Image.open(io.BytesIO(body)), dtype=np.int16)
        differences = []
        for subjects in ("somebody", [None]) if number % 20 == 0 else ("somebody",):
            noise = torch.Generator().manual_seed(seed)
            image = pipe(PROMPT, subjects=subjects, generator=noise, num_inference_steps=STEPS, **size).images[0]
            differences.append(int(np.abs(np.asarray(image, dtype=np.int16) - pixels).max()))
        found.append((differences[0], differences[-1] if len(differences) > 1 else 256))
    return found


def compare(down: Path, answers: Sequence[Answer]) -> list[tuple[int, int]]:
    """As `draw_alone`, by all cores."""
    parts = os.cpu_count() or 1
    work = [(down, [(one.person, one.seed, one.body) for one in answers[part::parts]]) for part in range(parts)]
    with ProcessPoolExecutor(parts) as pool:
        return [one for part in pool.map(draw_alone, work) for one in part]


# All of it


async def load(
    service: Service, people: Sequence[Someone], requests: int, changes: int
) -> tuple[dict[str, Any], list[Answer]]:
    """The three loads; returns figures and the pictures that are to be compared."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        clients = Clients(service, session)
        fraction = max(50, requests // 10)
        most, first = await capacity(clients, people, fraction, at_once=2 * service.replicas * 8)
        print(f"capacity: {most:.1f} images a second", file=sys.stderr)
        steady = await arrive(clients, people, fraction, 0.8 * most, lambda number: None)
        print(f"at 0.8: {Counter(one.status for one in steady)}", file=sys.stderr)

        leaving, coming = people[:changes], newcomers(changes)
        gone: dict[Someone, float] = {}
        others: list[asyncio.Future[Any]] = []
        loop = asyncio.get_running_loop()

        def notice(number: int) -> None:
            if number in (int(0.3 * requests), int(0.6 * requests)):
                others.append(loop.run_in_executor(None, service.kill_a_copy))
            if number == int(0.4 * requests):
                others.append(asyncio.ensure_future(comings_and_goings(clients, leaving, coming, gone)))

        start = time.monotonic()
        twice = await arrive(clients, people, requests, 2 * most, notice)
        seconds = time.monotonic() - start
        found = [one for one in await asyncio.gather(*others) if one is not None]
        after, drawn, statuses = found[0]
        print(f"at twice: {Counter(one.status for one in twice)}, changes: {statuses}", file=sys.stderr)
        again, last = await capacity(clients, people[changes:], fraction, at_once=2 * service.replicas * 8)
        print(f"capacity afterwards: {again:.1f} images a second", file=sys.stderr)
        _, _, text = await clients.ask("GET", "/metrics", "operator")

    every = [*first, *steady, *twice, *after, *drawn, *last]
    answered = [one for one in every if one.status == 200]
    refused = [one for one in every if one.status == 429]
    late = [one for one in every if one.person in gone and one.asked > gone[one.person]]
    # Somebody who is being deleted is not there, from when that begins; nobody else is.
    accounted = sum(one.status in (200, 429) or (one.status == 404 and one.person in gone) for one in every)
    seconds_of = {
        name: [one.seconds for one in some if one.status == 200] for name, some in (("0_8", steady), ("twice", twice))
    }
    goodput = sum(one.status == 200 for one in twice) / seconds
    gauges = {line.split()[0]: float(line.split()[1]) for line in text.decode().splitlines() if line[0] != "#"}
    figures: dict[str, Any] = {
        "people": len(people),
        "requests": len(twice),
        "capacity_images_per_s": round(most, 2),
        "capacity_images_per_s_afterwards": round(again, 2),
        "goodput_images_per_s": round(goodput, 2),
        "goodput_at_twice_over_capacity": round(goodput / ((most + again) / 2), 3),
        "answered_at_twice": sum(one.status == 200 for one in twice),
        "lost": len(every) - accounted,
        "refused": len(refused),
        "refused_with_retry_after": round(
            sum(one.retry_after is not None for one in refused) / max(1, len(refused)), 3
        ),
        "replicas_killed": 2,
        "repeated": int(gauges["metalora_repeated_total"]),
        "deleted": statuses[200],
        "deleted_still_served": sum(one.status == 200 for one in late),
        "asked_for_after_deletion": len(late),
        "enrolled": statuses[201],
        "mean_batch": round(gauges["metalora_batch_images_sum"] / gauges["metalora_batch_images_count"], 2),
    }
    for name, numbers in seconds_of.items():
        for share in (50, 95, 99):
            figures[f"p{share}_s_at_{name}"] = round(float(np.percentile(numbers, share)), 3)
    return figures, answered


def measure(people: int, requests: int, changes: int, replicas: int, batch: int) -> dict[str, Any]:
    """The whole run; returns its figures."""
    with tempfile.TemporaryDirectory() as scratch:
        place, down = Path(scratch) / "people", Path(scratch) / "down"
        make_reading_down(down)
        everybody = make_people(place, down, people)
        start = time.monotonic()
        with Service(place, down, replicas, batch, queue=4 * batch * replicas) as service:
            ready = time.monotonic() - start
            figures, answered = asyncio.run(load(service, everybody, requests, changes))
        start = time.monotonic()
        differences = compare(down, answered)
        print(f"{len(answered)} pictures compared in {time.monotonic() - start:.0f} s", file=sys.stderr)
        own, base = zip(*differences, strict=True)
        figures |= {
            "compared": len(answered),
            "wrong_person": sum(difference > TOLERANCE for difference in own),
            "difference_levels": max(own),
            "difference_to_base_levels": min(base),
            "ready_seconds": round(ready, 1),
            "replicas": replicas,
            "processes_left": len(service.left),
        }
    return figures


def main() -> None:
    """Run it and write the figures."""
    from origin import origin, write  # beside this file, which is on the path of a script only

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--people", type=int, default=10_000)
    parser.add_argument("--requests", type=int, default=5000, help="At twice the capacity; a tenth of it before.")
    parser.add_argument("--changes", type=int, default=100, help="People deleted, and as many brought in.")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "service.json")
    options = vars(parser.parse_args())
    output = options.pop("output")
    result = {**origin("cpu", "ray"), "cores": os.cpu_count(), "figures": measure(**options)}
    print(json.dumps(result, indent=2))
    write(output, result)


if __name__ == "__main__":
    main()
