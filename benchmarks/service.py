# SPDX-License-Identifier: Apache-2.0
"""examples/serve.py under load: many subjects, a replica killed midway, and every answer accounted for.

    python benchmarks/service.py            2 cores, 3 min; writes benchmarks/results/service.json

Subjects are the embedded Down's mean with noise in Up, so that each shows another image. Half of the answers are in
when a replica gets SIGKILL. Afterwards one pipeline in this process draws a sample of the images again, one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import psutil
import torch
from peft import inject_adapter_in_model
from PIL import Image

from peft_metalora import enable_meta_lora, save_subject
from peft_metalora.demo.embedded import MAX_SEQUENCE_LENGTH, RESOLUTION, load_base
from peft_metalora.demo.run import DOWN

SCRIPT = Path(__file__).parents[1] / "examples" / "serve.py"
PROMPT, CALL = "a photo of a person, smiling", {"num_inference_steps": 1}
DEMO_CALL = {"height": RESOLUTION, "width": RESOLUTION, "max_sequence_length": MAX_SEQUENCE_LENGTH}
PATIENCE = 300  # seconds for whatever is waited for


def make_people(folder: Path, count: int) -> list[str]:
    """Write subject folders; returns their names."""
    pipe = enable_meta_lora(load_base())
    pipe.load_meta_lora(DOWN, "faces")
    model = pipe.transformer
    down = model.peft_config["faces"]
    subject = dataclasses.replace(down, stage="subject", down="faces", num_slots=count, start="mean", facts={})
    inject_adapter_in_model(subject, model, "people")
    noise = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("metalora_up.people"):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    names = [f"person-{number:03}" for number in range(count)]
    for slot, name in enumerate(names):
        save_subject(folder / name, model, "people", slot=slot, down=DOWN, fold=False)
    return names


def _alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that only waits for its parent to notice its end does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Service:
    """examples/serve.py as a process of its own; leaving the `with` ends it and all that it started."""

    def __init__(self, people: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = [sys.executable, str(SCRIPT), "--demo", "--subjects", str(people), "--port", str(self.port)]
        self.command += ["--call", json.dumps(CALL), *options]
        self.left: list[str] = []  # processes that outlived their end

    def __enter__(self) -> Service:
        # Ray's sockets have paths of at most 107 characters.
        self.scratch = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
        self.log = Path(self.scratch.name) / "log"
        # One thread a process: there are more replicas than cores.
        environment = {**os.environ, "RAY_TMPDIR": self.scratch.name, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = psutil.Popen(self.command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            self._wait_until(lambda: "ready at" in self.log.read_text())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def _wait_until(self, done: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not done():
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"expected the service within {PATIENCE} s, found:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """One HTTP request; gives status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def statistics(self) -> dict[str, Any]:
        """What the replicas report."""
        found: dict[str, Any] = json.loads(self.ask("GET", "/statistics")[1])
        return found

    def kill(self, pid: int) -> None:
        """SIGKILL for a replica that surely holds requests: for a moment it takes them and cannot answer."""
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)

    def wait_for_replicas(self, count: int) -> None:
        """Until as many replicas as this answer."""
        self._wait_until(lambda: len(self.statistics()["replicas"]) == count)


@dataclasses.dataclass
class Answer:
    """One request and what came back."""

    subject: str
    seed: int
    status: int = 0
    body: bytes = b""
    seconds: float = 0.0

    def pixels(self) -> np.ndarray[Any, Any]:
        return np.asarray(Image.open(io.BytesIO(self.body)), dtype=np.int16)


def load(service: Service, people: Sequence[str], requests: int, clients: int) -> tuple[list[Answer], dict[str, Any]]:
    """Send all requests, kill a replica when half are answered; gives the answers and its statistics from before."""
    orders = [Answer(people[number % len(people)], number) for number in range(requests)]
    random.Random(0).shuffle(orders)
    victim = service.statistics()["replicas"][0]

    def send(order: Answer) -> Answer:
        start = time.monotonic()
        body = {"subject": order.subject, "prompt": PROMPT, "seed": order.seed}
        try:
            order.status, order.body = service.ask("POST", "/images", body)
        except (OSError, http.client.HTTPException) as error:
            order.body = repr(error).encode()
        order.seconds = time.monotonic() - start
        return order

    with ThreadPoolExecutor(clients) as pool, ThreadPoolExecutor(1) as observer:
        looks: list[Future[dict[str, Any]]] = []
        for number, _ in enumerate(as_completed([pool.submit(send, order) for order in orders])):
            if number == requests // 3:  # the replicas answer this among their images: whenever they come to it
                looks.append(observer.submit(service.statistics))
            if number == requests // 2:
                service.kill(victim["pid"])
    seen = [each for look in looks for each in look.result()["replicas"] if each["pid"] == victim["pid"]]
    return orders, (seen or [victim])[-1]


def compare(folder: Path, answers: Sequence[Answer]) -> tuple[int, int]:
    """Draw images again, alone: the largest difference of a pixel in levels of 256, and the smallest to the base's."""
    pipe = enable_meta_lora(load_base())
    pipe.load_meta_lora(DOWN)
    pipe.enable_subject_slots(1)
    same, other = [], []
    for answer in answers:
        pipe.add_subject(folder / answer.subject)
        for subjects, differences in ((answer.subject, same), ([None], other)):
            image = pipe(
                PROMPT,
                subjects=subjects,
                generator=torch.Generator().manual_seed(answer.seed),
                **CALL,
                **DEMO_CALL,
            ).images[0]
            differences.append(int(np.abs(np.asarray(image, dtype=np.int16) - answer.pixels()).max()))
    return max(same), min(other)


def refusals(service: Service, folder: Path, person: str) -> list[int]:
    """Ask for nobody, for a path, and for a subject whose file is torn; gives the statuses."""
    shutil.copytree(folder / person, folder / "torn")
    weights = folder / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    return [
        service.ask("POST", "/images", {"subject": subject, "prompt": PROMPT})[0]
        for subject in ("nobody", f"../{person}", "torn")
    ]


def measure(
    subjects: int, requests: int, clients: int, replicas: int, sample: int, wait: bool = True
) -> dict[str, Any]:
    """The whole run; returns its figures.

    Args:
        wait: until the replica that was killed is replaced, to say how long that takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        people = make_people(Path(folder), subjects)
        start = time.monotonic()
        with Service(Path(folder), "--replicas", str(replicas), "--slots", str(max(16, subjects // 2))) as service:
            ready = time.monotonic() - start
            refused = refusals(service, Path(folder), people[0])
            start = time.monotonic()
            answers, victim = load(service, people, requests, clients)
            seconds = time.monotonic() - start
            if wait:
                service.wait_for_replicas(replicas)
            whole_again = time.monotonic() - start - seconds
            found = service.statistics()
        answered = [answer for answer in answers if answer.status == 200]
        # The slowest are those that were asked again.
        slowest = sorted(answered, key=lambda answer: answer.seconds)[-sample // 2 :]
        same, other = compare(Path(folder), [*answered[:: max(1, 2 * len(answered) // sample)], *slowest])
    every = [victim, *found["replicas"]]
    keys = ("images", "batches", "subjects", "registered", "device_hits", "device_misses")
    total = {key: sum(each[key] for each in every) for key in keys}
    latencies = np.array([answer.seconds for answer in answers])
    return {
        "subjects": subjects,
        "requests": requests,
        "failed": requests - len(answered),
        "repeated": found["repeated"],
        "refused": refused,
        "ready_seconds": round(ready, 1),
        "seconds": round(seconds, 1),
        "whole_again_seconds": round(whole_again, 1),
        "seconds_median": round(float(np.median(latencies)), 2),
        "seconds_p99": round(float(np.quantile(latencies, 0.99)), 2),
        "mean_batch": round(total["images"] / total["batches"], 1),
        "subjects_per_batch": round(total["subjects"] / total["batches"], 1),
        "resident_rate": round(total["device_hits"] / (total["device_hits"] + total["device_misses"]), 3),
        "replicas_per_subject": round(total["registered"] / subjects, 2),
        "compared": sample,
        "difference_levels": same,
        "difference_to_base_levels": other,
        "processes_left": len(service.left),
    }


def main() -> None:
    """Run it and write the figures."""
    from origin import origin, write  # beside this file, which is on the path of a script only

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--subjects", type=int, default=200)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64, help="Requests on their way at any time.")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--sample", type=int, default=40, help="Answers that are drawn again.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "service.json")
    options = vars(parser.parse_args())
    output = options.pop("output")
    figures = measure(**options)
    result = {
        **origin("cpu", "ray"),
        "cores": os.cpu_count(),
        "figures": figures,
    }
    print(json.dumps(result, indent=2))
    write(output, result)


if __name__ == "__main__":
    main()
