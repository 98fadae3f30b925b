# SPDX-License-Identifier: Apache-2.0
"""The copies of a base as replicas of Ray Serve, and the desk in front of them.

Serve starts replicas, on several machines if there are, more under load, anew where one dies, and sends a request to
one that has room. Somebody with files goes to a replica that has read them, if it has room (`serve.multiplexed`); a
code is as quickly in a slot anywhere. HTTP ends in this process, at the desk: what is refused costs no more than that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

if os.environ.get("RAY_AUTH_MODE") != "token":
    # Read when ray is imported. A token that this process and its children alone have, ports on the loopback.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_enable_metrics_collection": "0"}
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil
import ray
import uvicorn
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from ..errors import ConfigError
from .api import make_api
from .desk import Desk
from .gauges import Gauges
from .journal import log, log_to
from .people import People, Person, Place
from .serve_settings import ServeConfig
from .tasks import Drawn, Offer, Progress, RefusedError, Task
from .tenants import Tenants

APP = "metalora"
_Answer = TypeVar("_Answer")
_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # seconds before a request whose replica died is sent again
_OBJECT_STORE = 256 * 2**20  # bytes: requests and images on their way
_HTTP: dict[str, Any] = {
    "access_log": False,
    "log_config": None,
    "server_header": False,
    "timeout_graceful_shutdown": 5,
    # Above that of usual clients and balancers: who is about to send on a connection finds it open.
    "timeout_keep_alive": 75,
}


@serve.deployment
class ArtistReplica:
    """An `Artist` as a replica; what it refuses comes back as a value, so that Serve takes it for no failure."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        from .artist import make_artist  # seconds of imports, which the other processes do without

        log_to(config.log_dir, "artist")
        self._artist: Any = None
        self._failure: Exception | None = None
        self._looks = 0
        try:
            self._artist = await make_artist(config)
        except Exception as error:
            log.exception("no copy", extra={"fields": {"why": str(error)}})  # nobody is known yet
            self._failure = error

        @serve.multiplexed(max_num_models_per_replica=config.slots)
        async def resident(_: str) -> None:
            """Tell Serve that somebody's files are here."""

        self._resident = resident

    async def offer(self) -> Offer | str:
        """As `Artist.offer`; or why there is no copy, for whoever starts the service."""
        return self._artist.offer if self._failure is None else f"{self._failure}"

    def check_health(self) -> None:
        """For Serve, which starts another replica where this raises; not yet at the first look, as it starts."""
        self._looks += 1
        if (why := self._broken()) is not None and self._looks > 1:
            raise why

    def _broken(self) -> BaseException | None:
        """Why no image comes of this copy."""
        return self._artist.fault if self._failure is None else self._failure

    async def draw(self, task: Task) -> Drawn | RefusedError:
        """As `Artist.draw`."""
        if self._broken() is not None:
            return _no_copy()
        if (uid := _with_files(task)) is not None:
            await self._resident(uid)
        return await _answered(self._artist.draw(task), "not drawn")

    async def read(self, photos: Sequence[bytes]) -> tuple[bytes, str, str] | RefusedError:
        """As `Artist.read`."""
        if self._broken() is not None:
            return _no_copy()
        return await _answered(self._artist.read(photos), "not read")

    async def forget(self, uid: str | None) -> None:
        """As `Artist.forget`."""
        if self._failure is None:  # else nobody is known
            await self._artist.forget(uid)

    async def statistics(self) -> dict[str, Any]:
        """As `Artist.statistics`, and which process it is."""
        return {"pid": os.getpid(), **({} if self._failure is not None else self._artist.statistics())}


@serve.deployment
class TunerReplica:
    """A `Tuner` as a replica."""

    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        from .tuning import make_tuner

        log_to(config.log_dir, "tuner")
        self._tuner = await make_tuner(config)

    async def tune(
        self, photos: Sequence[bytes], person: Person, prompt: str | None
    ) -> AsyncIterator[Progress | RefusedError]:
        """As `Tuner.tune`; a refusal is the last that comes."""
        try:
            async for found in self._tuner.tune(photos, person, prompt):
                yield found
        except RefusedError as error:
            yield error
        except Exception:
            log.exception("not tuned")
            raise

    async def forget(self, uid: str) -> None:
        """As `Tuner.forget`."""
        await self._tuner.forget(uid)


async def _answered(work: Coroutine[Any, Any, _Answer], otherwise: str) -> _Answer | RefusedError:
    try:
        return await work
    except RefusedError as error:
        return error
    except Exception:
        log.exception(otherwise)  # the desk knows no more than that
        raise


def _no_copy() -> RefusedError:
    return RefusedError(503, "expected a copy of the base that draws, found one that is broken", retry_after=30)


def _with_files(task: Task) -> str | None:
    return next((one.uid for one in task.people if one is not None and one.code is None), None)


class RayPool:
    """The replicas as the desk's pool.

    Raises:
        ConfigError: there is no copy of the base, and why.
    """

    def __init__(self, artists: DeploymentHandle[Any], tuners: DeploymentHandle[Any] | None) -> None:
        self._artists, self._tuners, self.gauges = artists, tuners, Gauges()
        # Of its own: asyncio's few threads may all be at a place of people that does not answer.
        self._watch = ThreadPoolExecutor(1, "replicas")
        offer: Offer | str = artists.offer.remote().result()
        if isinstance(offer, str):
            raise ConfigError(f"expected copies of the base, found that they do not start: {offer}")
        self.offer = offer

    async def draw(self, task: Task) -> Drawn:
        """As `Artist.draw`; another replica draws it if one dies: a request is its seed."""
        handle = self._artists.options(method_name="draw", multiplexed_model_id=_with_files(task) or "")
        drawn: Drawn = await self._answer(lambda: handle.remote(task))
        return drawn

    async def read(self, photos: Sequence[bytes]) -> tuple[bytes, str, str]:
        """As `Artist.read`."""
        found: tuple[bytes, str, str] = await self._answer(lambda: self._artists.read.remote(photos))
        return found

    async def _answer(self, ask: Callable[[], Any]) -> Any:
        for wait in (*_WAITS, None):
            asked = ask()
            try:
                found = await asked
            except asyncio.CancelledError:
                asked.cancel()
                raise
            except RayActorError:
                if wait is None:
                    break
                self.gauges.repeated.inc()
                await asyncio.sleep(wait)
                continue
            if isinstance(found, RefusedError):
                raise found
            return found
        raise RefusedError(503, "expected a copy of the base that draws, found that several died", retry_after=10)

    async def tune(self, photos: Sequence[bytes], person: Person, prompt: str | None) -> AsyncIterator[Progress]:
        """As `Tuner.tune`."""
        if self._tuners is None:
            raise RefusedError(501, "expected no tuning, which this service does not do")
        progress: Any = self._tuners.options(stream=True).tune.remote(photos, person, prompt)
        try:
            async for found in progress:
                if isinstance(found, RefusedError):
                    raise found
                yield found
        finally:
            progress.cancel()

    async def forget(self, uid: str | None) -> int:
        """As `Artist.forget` and `Tuner.forget`, by all; returns when those that Serve is putting down are gone too."""
        known = [self._artists] if uid is None or self._tuners is None else [self._artists, self._tuners]
        found, *_ = [await _forgotten(copies, uid) for copies in known]
        while (await self._states()).get("STOPPING"):
            await asyncio.sleep(0.2)
        return found

    async def replicas(self) -> int:
        """How many run."""
        return (await self._states()).get("RUNNING", 0)

    async def _states(self) -> dict[str, int]:
        status = await asyncio.get_running_loop().run_in_executor(self._watch, serve.status)
        states = status.applications[APP].deployments["ArtistReplica"].replica_states
        return {str(getattr(state, "value", state)): count for state, count in states.items()}


async def _forgotten(copies: DeploymentHandle[Any], uid: str | None) -> int:
    """Have all copies forget somebody; how many they are."""
    found = await copies.broadcast("forget", uid).results_async(return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException) and not isinstance(error, RayActorError):  # who died knows nobody
            log.error("not forgotten", exc_info=error)
            raise RefusedError(503, "expected every copy to forget, found one that did not", retry_after=5)
    return len(found)


@contextmanager
def running(config: ServeConfig, tenants: Tenants | None, listening: socket.socket) -> Iterator[threading.Thread]:
    """The service, ready, for as long as the block lasts; Ray ends with it where it was started for it.

    Args:
        listening: where HTTP is answered.

    Yields:
        The thread that answers.
    """
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    people = People(Place(config.people))
    log_to(config.log_dir, "desk")
    try:
        _start_ray(config)
        pool = _deploy(config)
        asyncio.run(
            pool.forget(None)
        )  # copies on a cluster may have been here before, and know somebody who is deleted
        desk = Desk(config, people, pool, pool.offer, pool.gauges)
        server = uvicorn.Server(uvicorn.Config(make_api(desk, tenants), **_HTTP))
        thread = threading.Thread(target=server.run, args=([listening],), name="desk")
        thread.start()
        log.info("ready", extra={"fields": {"people": len(people)}})
        try:
            yield thread
        finally:
            server.should_exit = True
            thread.join()
    finally:
        _end(before, own=config.ray_address is None)


def _start_ray(config: ServeConfig) -> None:
    options: dict[str, Any] = {"address": config.ray_address}
    if config.ray_address is None:
        options = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE}
        options["_system_config"] = {"automatic_object_spilling_enabled": False}  # photos are never on the disk
    ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)


def _deploy(config: ServeConfig) -> RayPool:
    serve.start(proxy_location="Disabled")
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0, "num_gpus": int(_on_gpu(config))}}
    many: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas is not None:
        scale = {"min_replicas": config.replicas, "max_replicas": config.max_replicas}
        many = {"autoscaling_config": {**scale, "target_ongoing_requests": 2 * config.batch_size}}
    room = 4 * config.batch_size  # in the queue of the replica that has the person
    kind: Any = ArtistReplica
    artists = kind.options(**options, **many, max_ongoing_requests=room).bind(config)
    found = serve.run(artists, name=APP, route_prefix=None)
    tuners = None
    if config.tuners:
        kind = TunerReplica
        some = kind.options(**options, num_replicas=config.tuners, max_ongoing_requests=1000).bind(config)
        tuners = serve.run(some, name=f"{APP}-tuners", route_prefix=None)
    return RayPool(found, tuners)


def _on_gpu(config: ServeConfig) -> bool:
    return (
        not config.demo
        and not (config.device or "cuda").startswith("cpu")
        and ray.cluster_resources().get("GPU", 0) > 0
    )


def _end(before: set[int], own: bool) -> None:
    """End the service, and Ray where it is ours."""
    if not own:
        if ray.is_initialized():
            for name in (f"{APP}-tuners", APP):
                serve.delete(name)
            ray.shutdown()
        return
    started = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    ray.shutdown()  # not serve.shutdown() before it, which waits for replicas that are just starting
    for process in psutil.wait_procs(started, timeout=1)[1]:
        process.kill()  # on a busy machine Ray's own agents would stay for a minute
