# SPDX-License-Identifier: Apache-2.0
"""A service: many subjects on a few replicas of one base, and batches that mix subjects. Ray Serve does the rest.

    pip install 'peft-metalora[serve]'
    python examples/serve.py --demo --subjects people                     # the embedded base, on a CPU
    python examples/serve.py --base black-forest-labs/FLUX.1-dev --dtype bfloat16 --down faces --subjects people \\
        --replicas 8 --batch 4 --call '{"num_inference_steps": 28}'       # a GPU for each replica

`people` holds a folder for each subject. Ready in half a minute (embedded base, 2 cores); then an image is one request,
and what the replicas have done another:

    curl 127.0.0.1:8000/images -H 'content-type: application/json' -o ann.png \\
        -d '{"subject": "ann", "prompt": "a photo of a person, smiling", "seed": 1}'
    curl 127.0.0.1:8000/statistics
"""

import argparse
import asyncio
import dataclasses
import io
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import psutil
import ray
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

Job: TypeAlias = tuple[str, str, int]  # subject, prompt, seed
ATTEMPTS = 6  # of a request whose replica dies, 0.1 s to 1.6 s apart


@serve.deployment
class Artist:
    """One replica: a pipeline, the subjects that requests have brought to it, and a queue of those who wait."""

    async def __init__(self, options: argparse.Namespace) -> None:
        # Seconds of imports, which only a replica needs: the driver and the desk start without them.
        import torch
        from diffusers import DiffusionPipeline

        from peft_metalora import enable_meta_lora

        if options.demo:
            from peft_metalora.demo.embedded import ASSETS, BASE, MAX_SEQUENCE_LENGTH, RESOLUTION

            options.base, options.down = BASE, ASSETS / "down"
            size = {"height": RESOLUTION, "width": RESOLUTION, "max_sequence_length": MAX_SEQUENCE_LENGTH}
            options.call = {**size, **options.call}
        if options.device == "cpu":
            torch.set_num_threads(1)
        pipe = DiffusionPipeline.from_pretrained(options.base, dtype=getattr(torch, options.dtype))
        pipe.set_progress_bar_config(disable=True)
        self.pipe: Any = enable_meta_lora(pipe.to(options.device))
        self.pipe.load_meta_lora(options.down)
        self.table = self.pipe.enable_subject_slots(options.slots, host_capacity=16 * options.slots)
        self.options, self.counts = options, Counter(images=0, batches=0, subjects=0)
        self.queue: asyncio.Queue[tuple[Job, asyncio.Future[bytes]]] = asyncio.Queue()
        self.worker = asyncio.create_task(self._work())

        # Serve sends a request to where its subject is resident: to a replica that has called this for it.
        @serve.multiplexed(max_num_models_per_replica=options.slots)
        async def resident(subject: str) -> None:
            if subject not in self.table:
                await asyncio.to_thread(self.pipe.add_subject, options.subjects / subject, subject)

        self.resident = resident

    async def draw(self, subject: str, prompt: str, seed: int) -> bytes | str:
        """The PNG of an image, drawn in one batch with whoever else waits then; or why its subject cannot be loaded."""
        from peft_metalora.errors import MetaLoraError

        try:
            await self.resident(subject)
        except MetaLoraError as error:
            return str(error)
        done = asyncio.get_running_loop().create_future()
        self.queue.put_nowait(((subject, prompt, seed), done))
        return await done

    async def _work(self) -> None:
        # Not serve.batch: that splits a batch by subject, and closes the next one while this one is being drawn.
        while True:
            waiting = [await self.queue.get()]
            while len(waiting) < self.options.batch and not self.queue.empty():
                waiting.append(self.queue.get_nowait())
            waiting = [(job, done) for job, done in waiting if not done.cancelled()]
            results = await asyncio.to_thread(self._draw, [job for job, _ in waiting])
            for (_, done), result in zip(waiting, results, strict=True):
                if not done.cancelled():
                    done.set_exception(result) if isinstance(result, Exception) else done.set_result(result)

    def _draw(self, jobs: list[Job]) -> list[bytes | Exception]:
        """A PNG for each, or what went wrong with it: after a batch that fails, each is drawn alone."""
        try:
            return self._draw_batch(jobs) if jobs else []
        except Exception as error:
            return [error] if len(jobs) == 1 else [result for job in jobs for result in self._draw([job])]

    def _draw_batch(self, jobs: list[Job]) -> list[bytes | Exception]:
        import torch

        subjects, prompts, seeds = zip(*jobs, strict=True)
        images = self.pipe(
            list(prompts),
            subjects=list(subjects),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **self.options.call,
        ).images
        self.counts.update(images=len(jobs), batches=1, subjects=len(set(subjects)))
        return [_png(image) for image in images]

    async def statistics(self) -> dict[str, Any]:
        """What this replica has done since it started."""
        name = serve.get_replica_context().replica_id.unique_id
        return {"replica": name, "pid": os.getpid(), **self.counts, **dataclasses.asdict(self.table.statistics())}


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "png")
    return stream.getvalue()


api = FastAPI()


class Order(BaseModel):
    """What a client asks for."""

    subject: str = Field(pattern="^[A-Za-z0-9_-]+$")  # a name of a folder, never a path
    prompt: str = Field(max_length=2000)
    seed: int = Field(default=0, ge=0, lt=2**63)


@serve.deployment(max_ongoing_requests=1000)
@serve.ingress(api)
class Desk:
    """The HTTP side: finds a replica for each request, and another one if that dies."""

    def __init__(self, artists: DeploymentHandle[Any], subjects: Path) -> None:
        self.artists, self.subjects, self.repeated = artists, subjects, 0

    @api.post("/images", response_class=Response)
    async def images(self, order: Order) -> Response:
        """An image as PNG; 404 for a subject that is not there, 422 for one that cannot be loaded."""
        if not (self.subjects / order.subject).is_dir():
            raise HTTPException(404, f"no subject {order.subject}")
        draw = self.artists.options(method_name="draw", multiplexed_model_id=order.subject)
        for attempt in range(ATTEMPTS):
            try:
                drawn = await draw.remote(order.subject, order.prompt, order.seed)
                if isinstance(drawn, str):
                    raise HTTPException(422, drawn)
                return Response(drawn, media_type="image/png")
            except RayActorError:  # the same image again, from another replica: a request is its seed
                self.repeated += 1
                await asyncio.sleep(0.1 * 2 ** min(attempt, 4))
        raise HTTPException(503, f"no replica finished in {ATTEMPTS} attempts")

    @api.get("/statistics")
    async def statistics(self) -> dict[str, Any]:
        """Requests asked again because a replica died, and what each living replica has done."""
        found = await self.artists.broadcast("statistics").results_async(return_exceptions=True)
        return {"repeated": self.repeated, "replicas": [each for each in found if isinstance(each, dict)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="black-forest-labs/FLUX.1-dev")
    parser.add_argument("--demo", action="store_true", help="use the embedded base and its Down")
    parser.add_argument("--down", default="", help="the Down of all subjects")
    parser.add_argument("--subjects", type=Path, required=True, help="folder with a folder for each subject")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--call", type=json.loads, default={}, help="what else a call of the pipeline gets, as JSON")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="most images in one call of the pipeline")
    parser.add_argument("--slots", type=int, default=64, help="subjects on a replica's device")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    if options.slots < options.batch:
        parser.error(f"expected --slots of at least --batch, found {options.slots} and {options.batch}")
    options.subjects, options.device = options.subjects.resolve(), "cuda"
    if options.demo:
        options.device = "cpu"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init("local", include_dashboard=False, object_store_memory=256 * 2**20, log_to_driver=False)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # Ray has put its own there, which skips what follows
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": options.port, "request_timeout_s": 600})
        artists = Artist.options(
            num_replicas=options.replicas,
            max_ongoing_requests=4 * options.batch,  # room in the queue of the replica that has the subject
            ray_actor_options={"num_cpus": 0, "num_gpus": int(options.device == "cuda")},
        )
        serve.run(Desk.options(ray_actor_options={"num_cpus": 0}).bind(artists.bind(options), options.subjects))
        print(f"ready at http://127.0.0.1:{options.port}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        processes = psutil.Process().children(recursive=True)
        ray.shutdown()  # and not serve.shutdown() before it, which waits for replicas that are just starting
        for process in psutil.wait_procs(processes, timeout=1)[1]:
            process.kill()  # on a busy machine Ray's own agents would stay for a minute


if __name__ == "__main__":
    main()
