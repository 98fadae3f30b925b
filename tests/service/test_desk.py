# SPDX-License-Identifier: Apache-2.0
"""The desk: who gets a place, who waits how long, who comes, is tuned and is deleted."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import sys
import threading
import time

import pytest

from peft_metalora.errors import WriteFailedError
from peft_metalora.service.journal import JsonLines, log
from peft_metalora.service.orders import SubjectOrder
from peft_metalora.service.tasks import RefusedError
from service_tiny import Gate, Service, photo, write_people


async def soon(true, seconds=5.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.005)


# Places


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate(), queue=3)
        inside = [asyncio.ensure_future(service.draw(None)) for _ in range(3)]
        await soon(lambda: len(service.pool.asked) == 3)
        start = time.monotonic()
        refused = [await service.draw(None) for _ in range(20)]
        seconds = time.monotonic() - start
        service.pool.open.set()
        return refused, seconds, await asyncio.gather(*inside), await service.draw(None)

    refused, seconds, inside, later = run(work())
    assert {answer.status for answer in refused} == {429} and seconds < 2
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert [answer.status for answer in [*inside, later]] == [200] * 4


def test_who_hangs_up_frees_the_place(home, tmp_path, run):
    async def work():
        service, gone = Service(home, tmp_path, pool=Gate(), queue=1), asyncio.Event()
        body = {"prompt": "a photo"}
        first = asyncio.ensure_future(service.ask("POST", "/images", body, hang_up=gone))
        await soon(lambda: service.pool.asked)
        assert (await service.draw(None)).status == 429
        gone.set()
        nothing = await first
        assert nothing.status == 0 and service.pool.dropped == 1
        service.pool.open.set()
        return await service.draw(None)

    assert run(work()).status == 200


def test_nobody_waits_for_ever(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate(), timeout=0.1)
        answer = await service.draw(None)
        return answer, service.pool.dropped, (await service.draw(None)).status

    answer, dropped, again = run(work())
    assert (answer.status, again, dropped) == (503, 503, 1)
    assert "within 0.1 s" in answer.error and int(answer.headers["retry-after"]) >= 1


def test_a_place_of_files_that_does_not_answer_keeps_no_place_in_the_queue(home, tmp_path, run, monkeypatch):
    """Bug: a request for somebody whose files did not answer held its place for ever; after some nobody got one."""
    write_people(home, tmp_path / "people" / "acme", 1)
    go = threading.Event()

    async def work():
        service = Service(home, tmp_path, pool=Gate(), timeout=0.2, queue=1)
        service.pool.open.set()
        monkeypatch.setattr(service.place, "stamp", lambda person: go.wait(20) and "")
        try:
            answers = [await service.draw("p00"), await service.ask("GET", "/subjects/p00")]
            answers.append(await service.enrol("p00"))
            return answers, await service.draw(None)
        finally:
            go.set()

    answers, nobody = run(work())
    assert [answer.status for answer in answers] == [503] * 3 and nobody.status == 200
    assert all("within 0.2 s" in answer.error for answer in answers)


def test_a_place_that_cannot_be_looked_at_is_said(home, tmp_path, run, monkeypatch):
    """Bug: while the place of the files could not be reached, the service was told to have failed (500)."""
    write_people(home, tmp_path / "people" / "acme", 1)

    async def work():
        service = Service(home, tmp_path, pool=Gate())

        def stamp(person):
            raise ConnectionError("no route to /secret")

        monkeypatch.setattr(service.place, "stamp", stamp)
        asked = [service.draw("p00"), service.ask("DELETE", "/subjects/p00"), service.enrol("p00")]
        answers = [await each for each in asked]
        monkeypatch.undo()
        return answers, (await service.ask("DELETE", "/subjects/p00")).status

    answers, later = run(work())
    assert [answer.status for answer in answers] == [503] * 3 and later == 200
    assert all("ask again later" in answer.error and "secret" not in answer.error for answer in answers)


@pytest.mark.parametrize("change", ["enrol", "replace", "delete"])
def test_a_write_that_does_not_end_holds_up_nobody_and_goes_on(home, tmp_path, run, monkeypatch, change):
    """Bug: who asked for a write that hung waited without an end, in a place of the queue; so did all of that name."""
    go = threading.Event()

    async def work():
        service = Service(home, tmp_path, pool=Gate(), timeout=0.2, queue=2)
        service.pool.open.set()
        if change != "enrol":
            await service.enrol("ann")
        name = "remove" if change == "delete" else "put_code"
        write = getattr(service.people, name)

        def slowly(*who, **own):
            if "ann" in who or getattr(who[0], "name", "") == "ann":
                go.wait(20)
            return write(*who, **own)

        def changed(**more):
            if change == "delete":
                return service.ask("DELETE", "/subjects/ann")
            return service.enrol("ann", replace=change == "replace", consent="new", **more)

        monkeypatch.setattr(service.people, name, slowly)
        try:
            late = await changed()
            assert service.desk._inside == 0, "it keeps no place"
            others = [await service.enrol("bob"), await service.draw(None)]
            again = [await changed(), await service.ask("DELETE", "/subjects/ann")]
            meanwhile = await service.draw("ann")
        finally:
            go.set()
        await soon(lambda: not service.desk._late)
        return service, late, others, again, meanwhile

    service, late, others, again, meanwhile = run(work())
    assert late.status == 504 and "within 0.2 s" in late.error and "GET /subjects/ann" in late.error
    assert int(late.headers["retry-after"]) >= 1
    assert [answer.status for answer in others] == [201, 200]
    assert [answer.status for answer in again] == [503, 503], "one change of somebody at a time"
    ann = service.people.entry("acme", "ann")
    if change == "delete":
        assert ann is None and service.pool.forgotten, "the copies forget them, too"
        assert meanwhile.status == 404
    else:
        assert ann.consent == "new"
        assert meanwhile.status == (404 if change == "enrol" else 200)


def test_a_late_write_that_fails_leaves_who_was_there(home, tmp_path, run, monkeypatch, caplog):
    """The desk holds the photos of no more people who are late than there are places."""
    go = threading.Event()

    def fails(*who, **own):
        go.wait(20)
        raise WriteFailedError(f"no room for {who[1]}")

    async def work():
        service = Service(home, tmp_path, pool=Gate(), timeout=0.2, queue=1)
        monkeypatch.setattr(service.people, "put_code", fails)
        try:
            late, full = await service.enrol("ann"), await service.enrol("bob")
        finally:
            go.set()
        await soon(lambda: not service.desk._late)
        monkeypatch.undo()
        found = await service.ask("GET", "/subjects/ann")
        return [answer.status for answer in (late, full, found, await service.enrol("ann"))]

    with caplog.at_level("INFO", log.name):
        assert run(work()) == [504, 503, 404, 201]
    lines = lines_of(caplog)
    assert any(line["event"] == "a late change failed" for line in lines) and "ann" not in json.dumps(lines)


# People


def test_somebody_comes_from_photos_with_their_consent(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path)
        without = await service.enrol("ann", consent="")
        first = await service.enrol("ann", consent="signed form 12")
        image = await service.draw("ann")
        again = await service.enrol("ann", 1)
        other = await service.enrol("ann", 1, replace=True, consent="by mail")
        return without, first, image, again, other, await service.draw("ann"), await service.ask("GET", "/subjects/ann")

    without, first, image, again, other, new, shown = run(work())
    assert [answer.status for answer in (without, first, again, other)] == [422, 201, 409, 201]
    assert first.json["consent"] == "signed form 12" and first.json["kind"] == "code"
    assert shown.json == other.json and shown.json["consent"] == "by mail"
    assert image.body != new.body, "a rewritten person is the new one"
    index = "".join(file.read_text() for file in (tmp_path / "index").iterdir())
    assert "by mail" in index and "signed form 12" not in index


def test_pages_of_people(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate())
        for name in ("e", "b", "d", "a", "c"):
            await service.enrol(name)
        pages, after = [], ""
        while after is not None:
            page = (await service.ask("GET", f"/subjects?limit=2&after={after}")).json
            pages.append([one["subject"] for one in page["subjects"]])
            after = page["next"]
        return pages, await service.ask("GET", "/subjects?limit=0")

    pages, refused = run(work())
    assert pages == [["a", "b"], ["c", "d"], ["e"]] and refused.status == 422


def test_a_service_that_starts_anew_knows_everybody(home, tmp_path, run):
    async def work():
        before = Service(home, tmp_path)
        await before.enrol("ann")
        await before.enrol("bob", 1)
        await before.ask("DELETE", "/subjects/bob")
        after = Service(home, tmp_path)
        return await before.draw("ann"), await after.draw("ann"), await after.draw("bob")

    before, after, bob = run(work())
    assert before.status == after.status == 200 and before.body == after.body
    assert bob.status == 404


def test_deleting_ends_what_is_drawn_of_somebody(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate())
        await service.enrol("ann")
        drawing = asyncio.ensure_future(service.draw("ann"))
        base = asyncio.ensure_future(service.draw(None))
        await soon(lambda: len(service.pool.asked) == 2)
        deleted = await service.ask("DELETE", "/subjects/ann")
        drawn, later = await drawing, await service.draw("ann")
        service.pool.open.set()
        return service, deleted, drawn, later, await base, await service.ask("DELETE", "/subjects/ann")

    service, deleted, drawn, later, base, twice = run(work())
    assert deleted.json == {"deleted": "ann", "replicas": 1}
    assert [answer.status for answer in (drawn, later, base, twice)] == [404, 404, 200, 404]
    assert service.pool.forgotten == [service.pool.asked[0].people[0].uid]


def test_a_deletion_that_the_operator_has_to_help_with_says_so(home, tmp_path, run):
    """Bug: who was a link was answered to be deleted, while what it pointed to stayed."""

    async def work():
        service = Service(home, tmp_path, pool=Gate())
        await service.enrol("ann")
        folder = tmp_path / "people" / "acme" / "ann"
        folder.parent.mkdir(parents=True)
        folder.symlink_to(tmp_path / "not mounted")
        refused = await service.ask("DELETE", "/subjects/ann")
        folder.unlink()
        return refused, await service.ask("DELETE", "/subjects/ann")

    refused, deleted = run(work())
    assert refused.status == 409 and "whoever runs this place has to remove it" in refused.error
    assert str(tmp_path) not in refused.error and deleted.status == 200


def test_a_deletion_is_confirmed_by_every_copy_or_asked_for_again(home, tmp_path, run):
    """Bug: a copy that did not answer keeps somebody, and the second request to delete finds nobody to delete."""

    class Deaf(Gate):
        hears = False

        async def forget(self, uid):
            await super().forget(uid)
            if not self.hears:
                raise RefusedError(503, "one did not")
            return 2

    async def work():
        service = Service(home, tmp_path, pool=Deaf())
        await service.enrol("ann")
        first = await service.ask("DELETE", "/subjects/ann")
        gone = await service.draw("ann")
        service.pool.hears = True
        return service, first, gone, await service.ask("DELETE", "/subjects/ann")

    service, first, gone, second = run(work())
    assert (first.status, first.headers["retry-after"], gone.status) == (503, "5", 404)
    assert second.json == {"deleted": "ann", "replicas": 2}
    assert len(service.pool.forgotten) == 2 and len(set(service.pool.forgotten)) == 1


def test_who_was_not_forgotten_is_with_the_next_of_their_name(home, tmp_path, run):
    """Bug: of a deletion that no copy had confirmed nothing was known any more once somebody new had the name."""

    class Deaf(Gate):
        hears = False

        async def forget(self, uid):
            if not self.hears:
                raise RefusedError(503, "one did not")
            return await super().forget(uid)

    async def work():
        service = Service(home, tmp_path, pool=Deaf())
        uids = set()
        for _ in range(2):
            await service.enrol("ann")
            uids.add(service.people.entry("acme", "ann").uid)
            first = await service.ask("DELETE", "/subjects/ann")
            service.pool.hears = True
        return first, uids, service.pool.forgotten

    answer, uids, forgotten = run(work())
    assert answer.status == 200 and len(uids) == 2 and {*forgotten} == uids


def test_a_deletion_goes_on_when_its_client_hangs_up(home, tmp_path, run):
    class Slow(Gate):
        async def forget(self, uid):
            await self.open.wait()
            return await super().forget(uid)

    async def work():
        service, gone = Service(home, tmp_path, pool=Slow()), asyncio.Event()
        await service.enrol("ann")
        asking = asyncio.ensure_future(service.ask("DELETE", "/subjects/ann", hang_up=gone))
        await soon(lambda: not [*service.people.page("acme")])
        gone.set()
        await asking
        service.pool.open.set()
        await soon(lambda: service.pool.forgotten)

    run(work())


def test_where_nothing_can_be_deleted_for_good_nobody_is_brought_in(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Gate())
        await service.enrol("ann")
        service.place.read_only = True
        return (
            await service.enrol("bob"),
            await service.ask("DELETE", "/subjects/ann"),
            await service.ask("GET", "/subjects"),
        )

    enrolled, deleted, people = run(work())
    assert (enrolled.status, deleted.status, people.status) == (403, 403, 200)


# Jobs


class Tuning(Gate):
    """Tunes in three steps; each waits for a permit."""

    def __init__(self) -> None:
        super().__init__()
        self.permits = asyncio.Semaphore(0)

    async def tune(self, photos, person, prompt):
        for step in range(1, 4):
            await self.permits.acquire()
            yield step
        yield {"adapter_config.json": b"{}", "adapter_model.safetensors": b"numbers"}


def test_somebody_is_tuned_as_a_job(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path, pool=Tuning(), tuners=1, tune_steps=3)
        begun = await service.enrol("ann", tune=True)
        road = f"/jobs/{begun.json['job']}"
        seen = [(await service.ask("GET", road)).json]
        strange = await service.ask("GET", road, tenant="other")
        for _ in range(3):
            service.pool.permits.release()
        job = service.desk.job("acme", begun.json["job"])
        await job.work
        seen.append((await service.ask("GET", road)).json)
        return begun, seen, strange, await service.ask("GET", "/subjects/ann")

    begun, (first, last), strange, person = run(work())
    assert begun.status == 202 and strange.status == 404
    assert (first["status"], first["step"], first["steps"]) == ("queued", 0, 3)
    assert (last["status"], last["step"]) == ("done", 3)
    assert person.json["kind"] == "files" and person.json["consent"] == "said yes"
    assert (tmp_path / "people" / "acme" / "ann" / "adapter_model.safetensors").read_bytes() == b"numbers"


class Counting(Tuning):
    """Says how many are tuned at once."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0

    async def tune(self, photos, person, prompt):
        self.inside += 1
        try:
            async for found in super().tune(photos, person, prompt):
                yield found
        finally:
            self.inside -= 1


def test_who_waits_to_be_tuned_waits_at_the_desk_and_in_bounds(home, tmp_path, run):
    """Bug: any number of people could wait to be tuned, all their photos in memory, and all were sent to the tuners at
    once, into the memory in which images are on their way, too."""

    async def work():
        service = Service(home, tmp_path, pool=Counting(), tuners=2, queue=4)
        begun = [await service.enrol(f"p{number}", tune=True) for number in range(4)]
        await soon(lambda: service.pool.inside == 2)
        refused, untuned = await service.enrol("p4", tune=True), await service.enrol("p5")
        inside = service.pool.inside
        for _ in range(12):
            service.pool.permits.release()
        jobs = [service.desk.job("acme", one.json["job"]) for one in begun]
        await asyncio.wait([job.work for job in jobs])
        return refused, untuned, inside, jobs, service.people.entry("acme", "p4")

    refused, untuned, inside, jobs, nobody = run(work())
    assert (refused.status, untuned.status, inside, nobody) == (429, 201, 2, None)
    assert "who wait to be tuned" in refused.error and refused.headers["retry-after"]
    assert [job.status for job in jobs] == ["done"] * 4


@pytest.mark.parametrize("waits", [True, False])
def test_photos_of_who_is_deleted_are_in_no_job(home, tmp_path, run, monkeypatch, waits):
    photos = [bytes(bytearray(base64.b64decode(photo())))]
    monkeypatch.setattr(SubjectOrder, "decoded", lambda _: [*photos])
    before = sys.getrefcount(photos[0])

    async def work():
        service = Service(home, tmp_path, pool=Counting(), tuners=1)
        first = await service.enrol("ann", tune=True)
        await soon(lambda: service.pool.inside == 1)
        name = "ann"
        if waits:
            name = "bob"
            await service.enrol("bob", tune=True)
            await service.ask("DELETE", f"/jobs/{first.json['job']}")
            await service.enrol("cleo", tune=True)
            await service.ask("DELETE", "/subjects/cleo")
        held = sys.getrefcount(photos[0])
        deleted = await service.ask("DELETE", f"/subjects/{name}")
        return held, deleted.status, sys.getrefcount(photos[0])

    held, status, after = run(work())
    assert status == 200 and held > before == after


def test_who_is_deleted_as_they_come_is_not_tuned(home, tmp_path, run, monkeypatch):
    async def work():
        service, writing, go_on = Service(home, tmp_path, pool=Tuning(), tuners=1), threading.Event(), threading.Event()
        put = service.people.put_code
        monkeypatch.setattr(service.people, "put_code", lambda *a, **k: (writing.set(), go_on.wait(5), put(*a, **k))[2])
        coming = asyncio.ensure_future(service.enrol("ann", tune=True))
        await soon(writing.is_set)
        leaving = asyncio.ensure_future(service.ask("DELETE", "/subjects/ann"))
        await asyncio.sleep(0.05)
        go_on.set()
        return (await coming).status, (await leaving).status, [*service.desk._jobs]

    assert run(work()) == (202, 200, [])


@pytest.mark.parametrize("how", ["cancelled", "deleted", "replaced"])
def test_a_job_that_ends_early_leaves_nothing(home, tmp_path, run, how):
    async def work():
        service = Service(home, tmp_path, pool=Tuning(), tuners=1)
        begun = await service.enrol("ann", tune=True)
        job = service.desk.job("acme", begun.json["job"])
        service.pool.permits.release()
        await soon(lambda: job.step == 1)
        if how == "cancelled":
            ended = await service.ask("DELETE", f"/jobs/{job.id}")
            assert ended.json["status"] == "cancelled"
        elif how == "deleted":
            assert (await service.ask("DELETE", "/subjects/ann")).status == 200
            # Bug: the job went on to tell the name of who was deleted.
            assert (await service.ask("GET", f"/jobs/{job.id}")).status == 404
        else:
            assert (await service.enrol("ann", 1, replace=True)).status == 201
        for _ in range(3):
            service.pool.permits.release()
        await asyncio.wait([job.work])
        return job, await service.ask("GET", "/subjects/ann")

    job, person = run(work())
    assert job.status == "cancelled" and not (tmp_path / "people").exists()
    assert person.status == (404 if how == "deleted" else 200)


def test_a_job_that_is_cancelled_too_late_is_done(home, tmp_path, run, monkeypatch):
    """Bug: a job that was cancelled while its person was being written was told as cancelled, though they had
    changed."""

    async def work():
        service, writing, go_on = Service(home, tmp_path, pool=Tuning(), tuners=1), threading.Event(), threading.Event()
        put = service.people.put_files
        monkeypatch.setattr(service.people, "put_files", lambda *a: (writing.set(), go_on.wait(5), put(*a))[2])
        begun = await service.enrol("ann", tune=True)
        for _ in range(3):
            service.pool.permits.release()
        await soon(writing.is_set)
        cancelling = asyncio.ensure_future(service.ask("DELETE", f"/jobs/{begun.json['job']}"))
        await asyncio.sleep(0.01)
        go_on.set()
        return await cancelling, await service.ask("GET", "/subjects/ann")

    cancelled, person = run(work())
    assert (cancelled.json["status"], person.json["kind"]) == ("done", "files")


def test_a_job_that_is_being_written_can_be_asked_to_end(home, tmp_path, run, monkeypatch):
    """Bug: who ended a job waited without an end for a write that hung."""

    async def work():
        service, go_on = Service(home, tmp_path, pool=Tuning(), tuners=1, timeout=0.3), threading.Event()
        writing, put = threading.Event(), service.people.put_files
        monkeypatch.setattr(service.people, "put_files", lambda *a: (writing.set(), go_on.wait(20), put(*a))[2])
        path = f"/jobs/{(await service.enrol('ann', tune=True)).json['job']}"
        for _ in range(3):
            service.pool.permits.release()
        await soon(writing.is_set)
        late = await service.ask("DELETE", path)
        go_on.set()
        await soon(lambda: all(job.has_ended for job in service.desk._jobs.values()))
        return late, await service.ask("GET", path)

    late, job = run(work())
    assert (late.status, job.json["status"]) == (504, "done") and "GET /jobs/" in late.error


def test_who_hangs_up_as_somebody_is_replaced_ends_their_job_too(home, tmp_path, run, monkeypatch):
    """Bug: of who was replaced by a client that hung up then, the photos stayed in a job, and were learned from."""

    async def work():
        service, writing, go_on = Service(home, tmp_path, pool=Tuning(), tuners=1), threading.Event(), threading.Event()
        begun, gone = await service.enrol("ann", tune=True), asyncio.Event()
        put = service.people.put_code
        monkeypatch.setattr(service.people, "put_code", lambda *a, **k: (writing.set(), go_on.wait(5), put(*a, **k))[2])
        body = {"name": "ann", "photos": [photo(1)], "consent": "by mail", "replace": True}
        replacing = asyncio.ensure_future(service.ask("POST", "/subjects", body, hang_up=gone))
        await soon(writing.is_set)
        gone.set()
        await asyncio.sleep(0.01)
        go_on.set()
        await replacing
        job = service.desk.job("acme", begun.json["job"])
        await asyncio.wait([job.work], timeout=1)
        return job.status, service.people.entry("acme", "ann").consent

    assert run(work()) == ("cancelled", "by mail")


def test_photos_that_cannot_be_read_end_no_job(home, tmp_path, run):
    """Bug: who was to be replaced by photos that no copy could read was tuned no more."""

    class Blind(Tuning):
        async def read(self, photos):
            if self.blind:
                raise RefusedError(422, "expected a face")
            return await super().read(photos)

        blind = False

    async def work():
        service = Service(home, tmp_path, pool=Blind(), tuners=1)
        begun = await service.enrol("ann", tune=True)
        service.pool.blind = True
        assert (await service.enrol("ann", 1, replace=True)).status == 422
        for _ in range(3):
            service.pool.permits.release()
        job = service.desk.job("acme", begun.json["job"])
        await asyncio.wait([job.work])
        return job.status

    assert run(work()) == "done"


def test_a_job_that_fails_says_so(home, tmp_path, run):
    class Failing(Gate):
        async def tune(self, photos, person, prompt):
            yield 1
            raise RefusedError(422, "expected photos to learn from")

    async def work():
        service = Service(home, tmp_path, pool=Failing(), tuners=1)
        begun = await service.enrol("ann", tune=True)
        await asyncio.wait([service.desk.job("acme", begun.json["job"]).work])
        return (await service.ask("GET", f"/jobs/{begun.json['job']}")).json, await service.ask("GET", "/subjects/ann")

    job, person = run(work())
    assert (job["status"], job["error"]) == ("failed", "expected photos to learn from")
    assert person.json["kind"] == "code", "they stay who they were"


def lines_of(caplog) -> list[dict]:
    return [json.loads(JsonLines().format(record)) for record in caplog.records if record.name == log.name]


def test_a_line_of_the_log_has_no_name_and_no_prompt(home, tmp_path, run, caplog):
    async def work():
        service = Service(home, tmp_path)
        with caplog.at_level("INFO", log.name):
            await service.enrol("ann-of-the-log")
            await service.draw("ann-of-the-log", prompt="a photo of a secret")

    run(work())
    lines = lines_of(caplog)
    assert [line["route"] for line in lines if line["event"] == "request"] == ["/subjects", "/images"]
    assert lines[-1]["status"] == 200 and lines[-1]["tenant"] == "acme" and lines[-1]["batch"] == 1
    assert "ann-of-the-log" not in json.dumps(lines) and "secret" not in json.dumps(lines)


def test_what_an_error_says_stays_out_of_the_log(home, tmp_path, run, caplog, monkeypatch):
    """Bug: errors of files name their path, and so the person: somebody who could not be shown, deleted or tuned stood
    in the log by name, for good."""
    name = "ann-of-the-log"
    folder = tmp_path / "people" / "acme" / name

    async def work():
        service = Service(home, tmp_path)
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{")
        drawn = await service.draw(name)
        monkeypatch.setattr(service.place, "remove", lambda *paths: (folder / "torn").read_bytes())
        return drawn, await service.ask("DELETE", f"/subjects/{name}")

    drawn, deleted = run(work())
    assert (drawn.status, deleted.status) == (409, 500)
    lines = [line for line in lines_of(caplog) if line["event"] != "request"]
    assert name not in json.dumps(lines) and str(tmp_path) not in json.dumps(lines)
    shown, failed = lines[0]["error"], lines[-1]["error"]
    assert shown.endswith("CorruptFileError") or shown.endswith("ConfigFormatError"), shown
    assert "FileNotFoundError (errno 2)" in failed and failed.endswith("WriteFailedError") and "people.py" in failed


def test_who_hangs_up_leaves_no_name_in_a_log(home, tmp_path, run, caplog):
    """Bug: of a client that hung up as it was refused asyncio logged the refusal, with the name of the person."""

    async def work():
        service, gone = Service(home, tmp_path, pool=Gate()), asyncio.Event()

        async def person(tenant, name):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise RefusedError(404, f"found no {name}") from None

        service.desk.person = person
        body = {"subject": "ann", "prompt": "a photo"}
        asked = asyncio.ensure_future(service.ask("POST", "/images", body, hang_up=gone))
        await soon(lambda: service.desk._inside)
        gone.set()
        await asked
        gc.collect()

    run(work())
    assert "ann" not in caplog.text
