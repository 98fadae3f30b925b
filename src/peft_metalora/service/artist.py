# SPDX-License-Identifier: Apache-2.0
"""One copy of the base: it draws whoever it is sent, many in a batch, reads photos, and forgets people when told to.

Each request brings the person along: a code, or where the files are and which revision of them. So a copy knows nobody
when it starts, nobody has to tell it of changes, and it never shows an older self of somebody.
"""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging

from ..bases import Base, load_base
from ..bases.memory import COMPILED, CPU, ready_to_draw, require_supported
from ..bases.precision import choose_device, choose_dtype
from ..checkpoint.base_model import base_to_load
from ..checkpoint.config_file import read_config
from ..checkpoint.reader_files import READER_FILES
from ..checkpoint.space import SubjectCode
from ..data.images import decode_image
from ..encoder import Reader, load_reader
from ..errors import ArtefactNotFoundError, DataError, MetaLoraError, PipelineError, RegionError
from ..hub.loading import HubOptions, folder_of, load_subject
from ..pipelines import enable_meta_lora
from ..tuner import DownSource, fold
from .journal import log
from .people import Person, Place
from .serve_settings import ServeConfig
from .tasks import Drawn, Offer, RefusedError, Task, cannot_be_reached, is_gone, to_its_end

_NOBODY = "nobody"  # no uid
_QUALITY = 95  # of JPEG and WebP
_FETCHED_AT_ONCE = 4  # people with files: asyncio has few threads, one of which draws


@dataclass
class _Waiting:
    """An image that waits to be drawn."""

    task: Task
    done: asyncio.Future[Drawn]


@dataclass
class _Errand:
    """What is done between two batches."""

    work: Callable[[], Any]
    done: asyncio.Future[Any]


class Artist:
    """A pipeline behind a queue; made inside a running event loop.

    Args:
        base: the pipeline, where it is to be. place: where those with files are kept.

    Raises:
        As `load_meta_lora` and `load_reader`.
    """

    def __init__(self, base: Base, place: Place, config: ServeConfig) -> None:
        self._base, self._place, self._config = base, place, config
        self._pipe: Any = enable_meta_lora(base.pipeline)
        self._pipe.set_progress_bar_config(disable=True)
        hub = hub_of(config)
        self._pipe.load_meta_lora(config.down, "down", **hub)
        self._table = self._pipe.enable_subject_slots(config.slots)
        if config.fold:
            fold(base.denoiser, [self._table.adapter_name])
        self._reader = _reader_of(config, self._table.down, base, hub)
        if self._reader is not None:
            # The space is where the slots are from now on, whoever comes and goes.
            space = self._reader.space
            self._table.register_code(_NOBODY, space.coded(torch.zeros(space.code_size)), space)
        self._accepts = base.call_arguments
        self._known: OrderedDict[str, int] = OrderedDict()  # uid -> revision, least recently used first
        self._wanted: Counter[str] = Counter()  # uids of what waits or is drawn
        self._gone: set[str] = set()
        self._queue: list[_Waiting] = []
        self._errands: list[_Errand] = []
        self._arrived = asyncio.Event()
        # By uid, for as long as somebody holds it or waits for it: who is being brought.
        self._coming: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._fetching = asyncio.Semaphore(_FETCHED_AT_ONCE)
        self._moving = threading.Lock()  # of people into the table and out of it
        self._counts: Counter[str] = Counter(images=0, batches=0, subjects=0)
        self._fault: Exception | None = None
        self._worker = asyncio.create_task(self._work())

    @property
    def offer(self) -> Offer:
        """What the pipeline has."""
        multiple, side = self._base.pixel_multiple, self._config.resolution or self._base.default_side
        return Offer(side // multiple * multiple, multiple, "negative_prompt" in self._accepts)

    @property
    def fault(self) -> BaseException | None:
        """What this copy does not get over, if there is such a thing: no image comes of it any more."""
        if self._worker.done() and not self._worker.cancelled():
            return self._worker.exception()
        return self._fault

    async def draw(self, task: Task) -> Drawn:
        """Draw an image, in one batch with whoever else waits then.

        Raises:
            RefusedError: a person who is gone or cannot be shown, or what the pipeline does not do.
        """
        uids = [one.uid for one in task.people if one is not None]
        self._wanted.update(uids)
        try:
            await self._get_ready(task)
            if not self._gone.isdisjoint(uids):
                raise is_gone()
            waiting = _Waiting(task, asyncio.get_running_loop().create_future())
            self._queue.append(waiting)
            self._arrived.set()
            return await waiting.done
        finally:
            self._wanted -= Counter(uids)

    async def read(self, photos: Sequence[bytes]) -> tuple[bytes, str, str]:
        """The code of a person, and the fingerprints of the Down and the space that it belongs to.

        Raises:
            RefusedError: photos that cannot be read, or a Down that reads none.
        """
        if self._reader is None:
            raise RefusedError(501, "expected a Down that reads photos, found one without an encoder")
        found: tuple[bytes, str, str] = await self._between_batches(partial(self._read, self._reader, photos))
        return found

    async def forget(self, uid: str | None) -> None:
        """Forget a person for good: what waits for them is refused, their numbers are overwritten.

        None: overwrite everybody for whom nothing waits; whoever is here still comes again with the next request.
        """
        if uid is not None:
            self._gone.add(uid)
        for waiting in self._queue:
            if any(one is not None and one.uid == uid for one in waiting.task.people) and not waiting.done.done():
                waiting.done.set_exception(is_gone())
        for coming in [*self._coming.values()] if uid is None else [self._lock_of(uid)]:
            async with coming:  # who was just being brought is there by now
                pass
        leaving = [one for one in self._known if one not in self._wanted] if uid is None else [uid]
        for one in leaving:
            self._known.pop(one, None)
        await self._between_batches(partial(self._evict, leaving))

    def statistics(self) -> dict[str, Any]:
        """What this copy has done since it started, and whom it knows."""
        return {**self._counts, "waiting": len(self._queue), "people": [*self._known]}

    # People

    async def _get_ready(self, task: Task) -> None:
        """Have all people of a task in host memory, as they are by now; other batches may be drawn meanwhile."""
        for person in task.people:
            if person is None:
                continue
            async with self._lock_of(person.uid):
                if person.uid in self._gone:
                    continue
                if person.revision > self._known.get(person.uid, -1):
                    async with self._fetching if person.code is None else nullcontext():
                        await to_its_end(self._bring, person)
                self._known.move_to_end(person.uid)

    def _lock_of(self, uid: str) -> asyncio.Lock:
        return self._coming.setdefault(uid, asyncio.Lock())

    def _surplus(self) -> list[str]:
        """Who has to leave host memory, those that nobody has asked for the longest: known no more from now on."""
        over = len(self._known) - self._config.host_capacity
        leaving = [uid for uid in [*self._known] if uid not in self._wanted][:over] if over > 0 else []
        for uid in leaving:
            del self._known[uid]
        return leaving

    def _evict(self, uids: Sequence[str]) -> None:
        """Let people out of the table, but for those who have been brought again meanwhile."""
        with self._moving:
            here = [uid for uid in uids if uid not in self._known and uid in self._table]
            if here:
                self._table.evict(here)

    def _bring(self, person: Person) -> None:
        try:
            if person.code is None:
                with self._place.files(person) as folder:
                    source = load_subject(folder, known_down=self._table.down.named)
                enter = partial(self._table.add, person.uid, source)
            elif self._reader is None:
                raise RefusedError(409, "expected a Down with the space of this person, found one without")
            else:
                enter = partial(self._table.register_code, person.uid, code_of(person), self._reader.space)
            with self._moving:
                enter()
                self._known[person.uid] = person.revision
        except (MetaLoraError, OSError) as error:
            log.warning("person cannot be shown", exc_info=error, extra={"fields": {"person": person.uid}})
            if not isinstance(error, (MetaLoraError, FileNotFoundError)):
                raise cannot_be_reached(person.name) from error
            raise RefusedError(
                409,
                f"expected {person.name} to be somebody whom this service can show, found {type(error).__name__}: "
                "bring them in again",
            ) from error

    def _read(self, reader: Reader, photos: Sequence[bytes]) -> tuple[bytes, str, str]:
        try:
            images = [decode_image(photo, f"photo {number}") for number, photo in enumerate(photos, 1)]
            code = reader.read(images, self._table.down).code
        except DataError as error:
            raise RefusedError(422, str(error)) from error
        return code.code.numpy().astype(np.float32).tobytes(), code.down_fingerprint, code.space_fingerprint

    # Images

    async def _between_batches(self, work: Callable[[], Any]) -> Any:
        errand = _Errand(work, asyncio.get_running_loop().create_future())
        self._errands.append(errand)
        self._arrived.set()
        return await errand.done

    async def _work(self) -> None:
        """The one who uses the pipeline: errands that have come up, then a batch, and so on."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            errands, self._errands = self._errands, []
            for errand in errands:
                self._finish(errand.done, await asyncio.to_thread(_outcome, errand.work))
            if batch := self._next_batch():
                tasks, leaving = [waiting.task for waiting in batch], self._surplus()
                for waiting, result in zip(batch, await asyncio.to_thread(self._draw, tasks, leaving), strict=True):
                    self._finish(waiting.done, result)
                self._arrived.set()  # there may be more

    def _finish(self, done: asyncio.Future[Any], result: Any) -> None:
        """Give a result, or an error, to who still waits for it."""
        if isinstance(result, torch.AcceleratorError):  # a process is rid of it only when it ends
            self._fault = result
        if done.done():
            return
        if isinstance(result, Exception):
            done.set_exception(result)
        else:
            done.set_result(result)

    def _next_batch(self) -> list[_Waiting]:
        """Whoever has waited longest, and whoever can be drawn with them; who has hung up waits no longer."""
        self._queue = [waiting for waiting in self._queue if not waiting.done.done()]
        kind = self._queue[0].task.kind if self._queue else None
        batch = [waiting for waiting in self._queue if waiting.task.kind == kind][: self._config.batch_size]
        chosen = set(map(id, batch))
        self._queue = [waiting for waiting in self._queue if id(waiting) not in chosen]
        return batch

    def _draw(self, tasks: Sequence[Task], leaving: Sequence[str] = ()) -> list[Drawn | Exception]:
        """An image for each, or what went wrong with it: after a batch that fails, each is drawn alone."""
        try:
            self._evict(leaving)
            return [*self._draw_batch(tasks)]
        except Exception as error:
            if len(tasks) > 1:
                return [result for task in tasks for result in self._draw([task])]
            if isinstance(error, (PipelineError, RegionError)):
                return [RefusedError(422, str(error))]
            return [error]

    def _draw_batch(self, tasks: Sequence[Task]) -> list[Drawn]:
        first, start, before = tasks[0], time.monotonic(), self._table.statistics()
        options: dict[str, Any] = {
            "prompt": [task.prompt for task in tasks],
            "width": first.width,
            "height": first.height,
            "num_inference_steps": first.steps,
            "generator": [torch.Generator().manual_seed(task.seed) for task in tasks],
        }
        if first.negative_prompt is not None:
            options["negative_prompt"] = [task.negative_prompt for task in tasks]
        if first.guidance is not None:
            # A base that was distilled to take its guidance as a number needs a true one beside a negative prompt.
            true = first.negative_prompt is not None and "true_cfg_scale" in self._accepts
            options["true_cfg_scale" if true else "guidance_scale"] = first.guidance
        if "max_sequence_length" in self._accepts:
            options["max_sequence_length"] = self._base.max_sequence_length
        if first.boxes:
            names = [None if one is None else one.uid for one in first.people]
            options["regions"] = [*zip(names, first.boxes, strict=True)]
        else:
            options["subjects"] = [None if task.people[0] is None else task.people[0].uid for task in tasks]
        images = self._base.draw(**options)
        after, seconds = self._table.statistics(), time.monotonic() - start
        shown = {one.uid for task in tasks for one in task.people if one is not None}
        self._counts.update(images=len(tasks), batches=1, subjects=len(shown))
        misses = after.device_misses - before.device_misses
        return [
            Drawn(
                _encoded(image, task.format),
                len(tasks),
                seconds,
                # Of the batch, told once.
                hits=after.device_hits - before.device_hits if task is first else 0,
                misses=misses if task is first else 0,
            )
            for image, task in zip(images, tasks, strict=True)
        ]


def _reader_of(config: ServeConfig, down: DownSource, base: Base, hub: HubOptions) -> Reader | None:
    try:
        folder = folder_of(str(config.down), READER_FILES, **hub)
        return load_reader(folder, down, base.encode_images, config.face_model)
    except ArtefactNotFoundError:
        return None


def _outcome(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        return error


def _encoded(image: Any, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({} if kind == "png" else {"quality": _QUALITY}))
    return stream.getvalue()


async def make_artist(config: ServeConfig) -> Artist:
    """Load base and Down where they are to be.

    Raises:
        BaseModelMismatchError, CheckpointError, ConfigError: they cannot be used.
    """
    base, config = load_copy(config, "draw", *([COMPILED] if config.compile else []))
    artist = Artist(base, Place(config.people), config)
    if config.compile:
        base.denoiser.compile()
    return artist


def load_copy(config: ServeConfig, use: str, *circumstances: str) -> tuple[Base, ServeConfig]:
    """A copy of the base on its device, and the settings with where the base lies.

    Args:
        use, circumstances: as `require_supported` takes them.

    Raises:
        As `make_artist`.
    """
    diffusers_logging.set_verbosity_error()  # its warnings quote what of a prompt was too long
    device = choose_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // config.replicas))
        circumstances += (CPU,)
    require_supported(config, use, *circumstances)
    found = read_config(folder_of(str(config.down), **hub_of(config)))
    asked = config.pretrained_model_name_or_path
    name, revision = base_to_load(asked, config.revision, found, str(config.down), config.generic)
    base = load_base(
        name,
        revision=revision,
        dtype=choose_dtype(config.mixed_precision, device),
        local_files_only=config.local_files_only,
        memory=config,
        generic=config.generic,
        device=device,
        max_sequence_length=config.max_sequence_length,
    )
    ready_to_draw(base.pipeline, config, device)
    return base, replace(config, pretrained_model_name_or_path=name, revision=revision)


def hub_of(config: ServeConfig) -> HubOptions:
    """How the Down is fetched."""
    return {"revision": config.down_revision, "local_files_only": config.local_files_only}


def code_of(person: Person) -> SubjectCode:
    """The code of somebody, as the index has it."""
    numbers = torch.from_numpy(np.frombuffer(person.code or b"", np.float32).copy())
    return SubjectCode(numbers, person.down, person.space)
