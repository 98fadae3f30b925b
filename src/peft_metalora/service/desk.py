# SPDX-License-Identifier: Apache-2.0
"""What a service does with requests, without HTTP and without Ray: who gets a place, who is drawn, who comes and goes.

The desk is one object in one process. It knows everybody; the copies that draw know whom it sends them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from ..data.images import size_of
from ..errors import OutputExistsError, UnreadableImageError, UnsafeNameError
from .gauges import Gauges
from .journal import log
from .orders import ImageOrder, SubjectOrder
from .people import People, Person
from .serve_settings import ServeConfig
from .tasks import Drawn, Offer, Progress, RefusedError, Task, cannot_be_reached, is_gone, to_its_end

_Result = TypeVar("_Result")
_KEPT_JOBS = 1000  # that have ended


class Pool(Protocol):
    """The copies of the base, wherever they run."""

    async def draw(self, task: Task) -> Drawn:
        """As `Artist.draw`, by any copy; by another one if that dies."""

    async def read(self, photos: Sequence[bytes]) -> tuple[bytes, str, str]:
        """As `Artist.read`, by any copy."""

    async def forget(self, uid: str | None) -> int:
        """As `Artist.forget`, by every copy; returns their number, or raises if one has not confirmed."""

    def tune(self, photos: Sequence[bytes], person: Person, prompt: str | None) -> AsyncIterator[Progress]:
        """As `Tuner.tune`."""

    async def replicas(self) -> int:
        """How many there are."""


@dataclass
class Job:
    """A person who is being tuned."""

    id: str
    tenant: str
    name: str
    status: str = "queued"  # running, done, failed, cancelled
    step: int = 0
    error: str = ""
    work: asyncio.Task[None] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self.work is not None and self.work.done()

    def shown(self, steps: int) -> dict[str, Any]:
        """As a client sees it."""
        found = {"job": self.id, "subject": self.name, "status": self.status, "step": self.step, "steps": steps}
        return {**found, "error": self.error} if self.error else found


class Desk:
    """Takes requests of tenants.

    Args:
        offer: of the copies in `pool`.

    All methods raise `RefusedError` with what to tell the client.
    """

    def __init__(self, config: ServeConfig, people: People, pool: Pool, offer: Offer, gauges: Gauges) -> None:
        self.config, self.people, self.pool, self.offer, self.gauges = config, people, pool, offer, gauges
        self._inside = 0
        self._pace = 1.0  # seconds between two answers, smoothed
        self._answered = time.monotonic()
        self._at_work: dict[str, set[asyncio.Task[Any]]] = defaultdict(set)  # what shows somebody, by uid
        # A lock lasts as long as somebody holds it or waits for it.
        self._changes: weakref.WeakValueDictionary[tuple[str, str], asyncio.Lock] = weakref.WeakValueDictionary()
        self._late: set[asyncio.Task[Any]] = set()  # changes that go on, though nobody waits for them any more
        self._leaving: set[str] = set()
        self._unconfirmed: dict[tuple[str, str], set[str]] = {}  # uids, deleted but perhaps still known to a copy
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        # Whoever waits to be tuned waits here: photos that were sent ahead would fill the memory that images take, too.
        self._tuners = asyncio.Semaphore(max(1, config.tuners))
        self._counted = float("-inf"), 0  # when, and how many copies there were

    # Images

    async def draw(self, tenant: str, order: ImageOrder) -> Drawn:
        """An image: 404 for somebody who is not there, 409 or 422 for what cannot be shown, 429 or 503 for later."""
        with self._place():
            drawn: Drawn = await self._in_time(self._drawn(tenant, order))
        self.gauges.drawn(drawn)
        return drawn

    async def _drawn(self, tenant: str, order: ImageOrder) -> Drawn:
        people, boxes = await self._people_of(tenant, order)
        return await self._showing(
            Task(
                people,
                boxes,
                order.prompt,
                order.negative_prompt or None,
                order.width,
                order.height,
                order.steps,
                order.guidance,
                order.seed,
                order.format,
            )
        )

    async def _people_of(
        self, tenant: str, order: ImageOrder
    ) -> tuple[tuple[Person | None, ...], tuple[tuple[int, ...], ...]]:
        if order.places is None:
            return (None if order.subject is None else await self.person(tenant, order.subject),), ()
        if order.subject is not None:
            raise RefusedError(422, "expected subject or places, found both: name everybody in places")
        for place in order.places:
            left, top, right, bottom = place.box
            if not (0 <= left < right <= order.width and 0 <= top < bottom <= order.height):
                raise RefusedError(422, "places: expected boxes of left, top, right and bottom inside of the image")
        people = [None if place.subject is None else await self.person(tenant, place.subject) for place in order.places]
        return tuple(people), tuple(tuple(place.box) for place in order.places)

    async def person(self, tenant: str, name: str) -> Person:
        """Somebody of the tenant; 404."""
        if self.people.needs_to_look(tenant, name):
            person = await self._look_up(tenant, name)
        else:
            person = self.people.find(tenant, name)
        if person is None or person.uid in self._leaving:
            raise RefusedError(404, f"expected somebody of yours, found no {name}: see GET /subjects")
        return person

    async def _look_up(self, tenant: str, name: str) -> Person | None:
        """`People.find` where it asks the place, which may not answer."""
        try:
            return await self._in_time(asyncio.to_thread(self.people.find, tenant, name))
        except OSError as error:
            log.warning("nobody can be looked up", exc_info=error)
            raise cannot_be_reached(name) from error

    async def _showing(self, task: Task) -> Drawn:
        """Draw, unless somebody in it has been deleted since they were looked up, or is meanwhile."""
        shown = [one for one in task.people if one is not None]
        uids = [one.uid for one in shown]
        if not all(self._is_here(one) for one in shown):
            raise is_gone()
        # No turn of the loop from here to the entry in the books: whoever deletes finds it there.
        work = asyncio.ensure_future(self.pool.draw(task))
        for uid in uids:
            self._at_work[uid].add(work)
        try:
            return await work
        except asyncio.CancelledError:
            if work.cancelled() and not self._leaving.isdisjoint(uids):
                raise is_gone() from None
            work.cancel()
            raise
        finally:
            for uid in uids:
                self._at_work[uid].discard(work)
                if not self._at_work[uid]:
                    del self._at_work[uid]

    def _is_here(self, person: Person) -> bool:
        now = self.people.entry(person.tenant, person.name)
        return now is not None and now.uid == person.uid and person.uid not in self._leaving

    # People

    async def enrol(self, tenant: str, order: SubjectOrder) -> tuple[Person, Job | None]:
        """Bring somebody in from photos, and have them tuned if that is asked for.

        504: they are still being written, and come if that ends well; they are not tuned then.
        """
        self._may_write()
        if len(self._late) >= self.config.places:
            raise RefusedError(
                503, "expected to be able to write where the people are kept, found that no write ends", retry_after=5
            )
        if order.tune and not self.config.tuners:
            raise RefusedError(501, "expected no tuning, which this service does not do: leave tune out")
        if order.tune and sum(not job.has_ended for job in self._jobs.values()) >= self.config.places:
            raise RefusedError(
                429, "expected fewer people who wait to be tuned: ask again later, or leave tune out", retry_after=60
            )
        with self._place():
            photos = self._photos_of(order)
            return await self._unless_late(order.name, partial(self._bring_in, tenant, order, photos))

    async def _bring_in(
        self, tenant: str, order: SubjectOrder, photos: Sequence[bytes], late: asyncio.Event
    ) -> tuple[Person, Job | None]:
        async with self._in_turn(tenant, order.name):
            before = await self._look_up(tenant, order.name)
            if before is not None and not order.replace:
                raise RefusedError(409, f"expected a new name, found {order.name}, which is taken: give replace=true")
            code, down, space = await self._in_time(self.pool.read(photos))
            put = partial(self.people.put_code, tenant, order.name, code, down=down, space=space)
            try:
                person = await self._written(late, partial(put, consent=order.consent, before=before))
            except (OutputExistsError, UnsafeNameError) as error:
                raise RefusedError(409, str(error)) from error
            finally:
                if self.people.entry(tenant, order.name) != before:  # though whoever asked may have hung up
                    self._cancel_jobs(tenant, order.name)
            # In turn, so that a deletion finds the job; who has had their 504 does not know of one.
            tuned = order.tune and not late.is_set()
            return person, self._start_job(person, photos, order.instance_prompt) if tuned else None

    def _photos_of(self, order: SubjectOrder) -> list[bytes]:
        try:
            photos = order.decoded()
            for number, photo in enumerate(photos, 1):
                width, height = size_of(photo, f"photo {number}")
                if width * height > self.config.max_megapixels * 1e6:
                    raise RefusedError(
                        413,
                        f"expected photos of at most {self.config.max_megapixels:g} million pixels, found {width} x "
                        f"{height} in photo {number}: make it smaller",
                    )
        except (ValueError, UnreadableImageError) as error:
            raise RefusedError(422, str(error)) from error
        return photos

    async def delete(self, tenant: str, name: str) -> int:
        """Delete somebody from the disk and from every copy; returns the number of copies.

        Once begun it goes on, whoever hangs up, and after a 504; asking again does no harm.
        """
        self._may_write()
        deleting = self._unless_late(name, partial(self._delete, tenant, name))
        return await asyncio.shield(asyncio.ensure_future(deleting))

    async def _delete(self, tenant: str, name: str, late: asyncio.Event) -> int:
        async with self._in_turn(tenant, name):
            person = await self._look_up(tenant, name) or self.people.entry(tenant, name)
            uids = {*self._unconfirmed.get((tenant, name), ())}
            if person is not None:
                uids.add(person.uid)
            if not uids:
                raise RefusedError(404, f"expected somebody of yours, found no {name}: see GET /subjects")
            self._leaving |= uids
            try:
                jobs = self._cancel_jobs(tenant, name)
                for uid in uids:
                    for work in [*self._at_work.get(uid, ())]:
                        work.cancel()
                if person is not None:
                    try:
                        await self._written(late, partial(self.people.remove, person))
                    except UnsafeNameError as error:
                        raise RefusedError(409, str(error)) from error
                self._unconfirmed[tenant, name] = uids
                try:
                    for uid in uids:
                        replicas = await asyncio.wait_for(self.pool.forget(uid), self.config.timeout)
                except (asyncio.TimeoutError, RefusedError) as error:
                    raise RefusedError(
                        503,
                        f"{name} is deleted, but not every copy has confirmed that yet: delete again",
                        retry_after=5,
                    ) from error
                del self._unconfirmed[tenant, name]
                if jobs:
                    await asyncio.wait([job.work for job in jobs if job.work is not None], timeout=self.config.timeout)
                for job in jobs:
                    self._jobs.pop(job.id, None)
            finally:
                self._leaving -= uids
        return replicas

    def _changing(self, tenant: str, name: str) -> asyncio.Lock:
        """One change of somebody at a time."""
        return self._changes.setdefault((tenant, name), asyncio.Lock())

    @asynccontextmanager
    async def _in_turn(self, tenant: str, name: str) -> AsyncIterator[None]:
        """As `_changing`, for a request, which does not wait for ever."""
        lock = self._changing(tenant, name)
        await self._in_time(lock.acquire())
        try:
            yield
        finally:
            lock.release()

    async def _written(self, late: asyncio.Event, write: Callable[[], _Result]) -> _Result:
        """Have something written to its end; `late` is set once that has taken as long as a request may."""
        timer = asyncio.get_running_loop().call_later(self.config.timeout, late.set)
        try:
            return await to_its_end(write)
        finally:
            timer.cancel()

    async def _unless_late(self, name: str, change: Callable[[asyncio.Event], Coroutine[Any, Any, _Result]]) -> _Result:
        """What a change of somebody comes to; 504 once it is late, as nobody can tell yet: it goes on."""
        late = asyncio.Event()
        work, waiting = asyncio.ensure_future(change(late)), asyncio.ensure_future(late.wait())
        try:
            await asyncio.wait({work, waiting}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            work.cancel()
            raise
        finally:
            waiting.cancel()
            if late.is_set() or not work.done():
                self._late.add(work)
                work.add_done_callback(self._has_ended)
        if late.is_set():
            raise self._goes_on(f"/subjects/{name}")
        return work.result()

    def _has_ended(self, work: asyncio.Task[Any]) -> None:
        self._late.discard(work)
        if not work.cancelled() and (error := work.exception()) is not None:
            log.error("a late change failed", exc_info=error)

    def _goes_on(self, path: str) -> RefusedError:
        return RefusedError(
            504,
            f"expected this to end within {self.config.timeout:g} s, found that it goes on: GET {path} says later what "
            "came of it",
            retry_after=5,
        )

    def _may_write(self) -> None:
        if self.people.place.read_only:
            raise RefusedError(403, "expected no change of people, who are kept where nothing can be deleted for good")

    async def replicas(self) -> int:
        """How many copies there are, as of a second ago; the gauges know it and the number of people then."""
        if time.monotonic() - self._counted[0] > 1:
            self._counted = time.monotonic(), await self.pool.replicas()
        self.gauges.replicas.set(self._counted[1])
        self.gauges.people.set(len(self.people))
        return self._counted[1]

    # Jobs

    def job(self, tenant: str, name: str) -> Job:
        """A job of the tenant; 404."""
        job = self._jobs.get(name)
        if job is None or job.tenant != tenant:
            raise RefusedError(404, "expected a job of yours, found none of that name")
        return job

    async def cancel(self, tenant: str, name: str) -> Job:
        """End a job; the person stays who they were before it. 504: they are being written as who they are after it."""
        job = self.job(tenant, name)
        if job.work is not None and not job.work.done():
            job.work.cancel()
            await asyncio.wait([job.work], timeout=self.config.timeout)
            if not job.work.done():
                raise self._goes_on(f"/jobs/{name}")
        return job

    def _start_job(self, person: Person, photos: Sequence[bytes], prompt: str | None) -> Job:
        job = Job(secrets.token_hex(8), person.tenant, person.name)
        job.work = asyncio.create_task(self._tune(job, person, photos, prompt))
        self._jobs[job.id] = job
        ended = [each.id for each in self._jobs.values() if each.has_ended]
        for name in ended[: max(0, len(ended) - _KEPT_JOBS)]:
            del self._jobs[name]
        return job

    async def _tune(self, job: Job, person: Person, photos: Sequence[bytes], prompt: str | None) -> None:
        try:
            async with self._tuners:
                async for found in self.pool.tune(photos, person, prompt):
                    if isinstance(found, int):
                        job.status, job.step = "running", found
                        continue
                    async with self._changing(person.tenant, person.name):
                        if self.people.entry(person.tenant, person.name) == person:
                            await to_its_end(self._keep, job, person, found)
            if job.status != "done":
                job.status, job.error = "failed", "expected the person as they were, found that they have changed"
        except asyncio.CancelledError:
            if job.status != "done":
                job.status = "cancelled"
        except RefusedError as error:
            job.status, job.error = "failed", str(error)
        except Exception:
            job.status, job.error = "failed", "the service failed; its log says why"
            log.exception("job failed", extra={"fields": {"job": job.id}})

    def _keep(self, job: Job, person: Person, files: Mapping[str, bytes]) -> None:
        self.people.put_files(person, files)
        job.status = "done"

    def _cancel_jobs(self, tenant: str, name: str) -> list[Job]:
        """End all jobs of somebody; returns them."""
        jobs = [job for job in self._jobs.values() if (job.tenant, job.name) == (tenant, name)]
        for job in jobs:
            if job.work is not None:
                job.work.cancel()
        return jobs

    # Places

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among those who wait or are drawn, for as long as the block lasts; who hangs up leaves it."""
        if self._inside >= self.config.places:
            raise RefusedError(
                429,
                "expected a place in the queue, found it full: ask again later",
                retry_after=self._inside * self._pace,
            )
        self._inside += 1
        self.gauges.waiting.set(self._inside)
        try:
            yield
            now = time.monotonic()
            self._pace += 0.05 * (min(now - self._answered, 10.0) - self._pace)
            self._answered = now
        finally:
            self._inside -= 1
            self.gauges.waiting.set(self._inside)

    async def _in_time(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        task = asyncio.ensure_future(work)
        # Where who asked has hung up, nobody takes the error, and asyncio would log what it says: names.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            return await asyncio.wait_for(task, self.config.timeout)
        except asyncio.TimeoutError:
            raise RefusedError(
                503,
                f"expected an answer within {self.config.timeout:g} s, found none: ask again later",
                retry_after=self._inside * self._pace,
            ) from None
