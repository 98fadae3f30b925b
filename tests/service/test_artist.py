# SPDX-License-Identifier: Apache-2.0
"""One copy of the base: who is drawn with whom, as whom, and what is left of somebody who was deleted."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from peft_metalora import load_subject
from peft_metalora.bases import load_base
from peft_metalora.service.artist import Artist
from peft_metalora.service.people import Person
from peft_metalora.service.tasks import RefusedError, Task
from peft_metalora.service.tuning import Tuner
from service_tiny import Service, photo, settings, write_people

NAMES = "ann", "bob", "cleo"


def task(person: Person | None, seed: int = 0, **more) -> Task:
    plain = Task((person,), (), "a photo of a person", None, 16, 16, 1, None, seed, "png")
    return dataclasses.replace(plain, **more)


async def with_people(home, place, **changes) -> tuple[Service, list[Person]]:
    service = Service(home, place, **changes)
    for number, name in enumerate(NAMES):
        assert (await service.enrol(name, number)).status == 201
    return service, [service.people.find("acme", name) for name in NAMES]


async def at_once(artist, orders):
    """All of them wait before the first is drawn."""
    all_wait = threading.Event()
    waiting = asyncio.ensure_future(artist._between_batches(all_wait.wait))
    drawing = [asyncio.ensure_future(artist.draw(order)) for order in orders]
    while artist.statistics()["waiting"] < len(orders):
        await asyncio.sleep(0.001)
    all_wait.set()
    await waiting
    return await asyncio.gather(*drawing, return_exceptions=True)


@pytest.mark.parametrize("fold", [False, True])
def test_people_of_one_batch_are_drawn_as_alone(home, tmp_path, run, fold):
    async def work():
        service, people = await with_people(home, tmp_path, fold=fold)
        artist = service.pool.artists[0]
        orders = [task(one, 7) for one in [*people, None]]
        together = await at_once(artist, orders)
        return together, [await artist.draw(order) for order in orders], artist.statistics()

    together, alone, counts = run(work())
    assert (counts["images"], counts["batches"], counts["subjects"]) == (8, 5, 6)
    assert [one.batch for one in together] == [4] * 4 and [one.batch for one in alone] == [1] * 4
    assert (sum(one.hits for one in together), sum(one.misses for one in together)) == (0, 3)
    assert (sum(one.hits for one in alone), sum(one.misses for one in alone)) == (3, 0)
    for number, one in enumerate(alone):
        assert all(np.abs(pixels(one) - pixels(other)).max() > 10 for other in alone[:number]), "all look different"
    for one, other in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def pixels(drawn) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(drawn.content)), dtype=np.int16)


def test_only_what_is_alike_shares_a_batch_and_nobody_is_overtaken_for_ever(home, tmp_path, run):
    async def work():
        service, people = await with_people(home, tmp_path)
        artist = service.pool.artists[0]
        orders = [task(people[0]), task(people[1], steps=2), task(people[2]), task(people[0], width=32)]
        orders += [task(people[0], negative_prompt="hat", guidance=2.0), task(people[1], steps=2)]
        return await at_once(artist, orders)

    assert [one.batch for one in run(work())] == [2, 2, 2, 1, 1, 2]


def test_in_a_batch_that_fails_each_stands_for_itself(home, tmp_path, run, monkeypatch):
    async def work():
        service, people = await with_people(home, tmp_path)
        artist = service.pool.artists[0]
        whole = artist._draw_batch

        def draw_batch(tasks):
            if any(each.seed == 13 for each in tasks):
                raise RuntimeError("out of luck")
            return whole(tasks)

        monkeypatch.setattr(artist, "_draw_batch", draw_batch)
        orders = [task(people[0], 1), task(people[1], 13), task(people[2], 2)]
        return await at_once(artist, orders)

    first, failed, last = run(work())
    assert (first.batch, last.batch) == (1, 1) and isinstance(failed, RuntimeError)


def test_nothing_is_left_of_somebody_who_is_forgotten(home, tmp_path, run):
    async def work():
        service, people = await with_people(home, tmp_path)
        artist, ann = service.pool.artists[0], people[0]
        table = artist._table
        await asyncio.gather(*(artist.draw(task(one)) for one in people))
        slot = table.bring([ann.uid])[ann.uid]
        row = table._flat[slot].clone()
        waiting = asyncio.ensure_future(artist.draw(task(ann, 1)))
        while not artist.statistics()["waiting"]:
            await asyncio.sleep(0)
        await artist.forget(ann.uid)
        with pytest.raises(RefusedError, match="who was deleted"):
            await waiting
        with pytest.raises(RefusedError, match="who was deleted"):
            await artist.draw(task(ann, 2))  # what was on its way when she was deleted
        return ann, artist.statistics()["people"], table, slot, row

    ann, known, table, slot, row = run(work())
    assert row.any() and not table._flat[slot].any()
    assert ann.uid not in known and ann.uid not in table.names() and len(known) == 2
    numbers = np.frombuffer(ann.code, np.float32)
    for book in table._codes.values():
        for block in book._blocks:
            assert not (block == torch.from_numpy(numbers.copy())).all(1).any()


def test_a_request_that_brings_a_newer_person_shows_the_new_one(home, tmp_path, run):
    async def work():
        service, (ann, bob, _) = await with_people(home, tmp_path)
        artist = service.pool.artists[0]
        old, other = await artist.draw(task(ann)), await artist.draw(task(bob))
        new = dataclasses.replace(ann, code=bob.code, revision=ann.revision + 1)
        drawn = await artist.draw(task(new))
        late = await artist.draw(task(ann))  # on its way when she was rewritten
        return old, other, drawn, late

    old, other, drawn, late = run(work())
    assert old.content != other.content and drawn.content == late.content == other.content


def test_people_with_files_and_those_whom_nobody_asks_for_leave(home, tmp_path, run):
    names = write_people(home, tmp_path / "people" / "acme", 4)

    async def work():
        service = Service(home, tmp_path, host_capacity=2)
        artist = service.pool.artists[0]
        people = [service.people.find("acme", name) for name in names]
        first = [(await artist.draw(task(one))).content for one in people]
        known = artist.statistics()["people"], artist._table.names()
        return people, first, [(await artist.draw(task(one))).content for one in people], known

    people, first, again, (known, names) = run(work())
    assert len(set(first)) == 4 and first == again
    assert known == [one.uid for one in people[2:]] and {*names} == {*known, "nobody"}


def test_who_is_asked_for_while_they_leave_is_brought_again(home, tmp_path, run, monkeypatch):
    """Bug: who was asked for between the choice of who leaves and their leaving was waited for, and not there then."""
    chosen, go = threading.Event(), threading.Event()

    def slowly(self, uids):
        if uids:
            chosen.set()
            go.wait(10)
        evict(self, uids)

    evict = Artist._evict
    monkeypatch.setattr(Artist, "_evict", slowly)

    async def work():
        service, (ann, bob, _) = await with_people(home, tmp_path, host_capacity=1)
        artist = service.pool.artists[0]
        before = await artist.draw(task(ann))
        other = asyncio.ensure_future(artist.draw(task(bob)))
        await asyncio.to_thread(chosen.wait, 10)
        again = asyncio.ensure_future(artist.draw(task(ann)))
        while not artist.statistics()["waiting"]:
            await asyncio.sleep(0.001)
        go.set()
        await other
        return before.content == (await again).content

    assert run(work())


def test_a_service_that_starts_on_copies_that_run_shows_everybody(home, tmp_path, run):
    """Bug: a copy that was told to forget all whom it knew refused them from then on as deleted."""

    async def work():
        service, (ann, *_) = await with_people(home, tmp_path)
        artist = service.pool.artists[0]
        before = await artist.draw(task(ann))
        await artist.forget(None)
        assert artist.statistics()["people"] == [] and artist._table.names() == ["nobody"]
        return before.content == (await artist.draw(task(ann))).content

    assert run(work())


def test_who_cannot_be_shown_is_refused_in_a_sentence(home, tmp_path, run):
    async def work():
        service, (ann, *_) = await with_people(home, tmp_path)
        artist, refused = service.pool.artists[0], []
        for strange in (
            {"space": "0" * 64},
            {"down": "0" * 64},
            {"code": ann.code[:-4]},
            {"code": None, "name": "bob"},
        ):
            with pytest.raises(RefusedError) as refusal:
                await artist.draw(task(dataclasses.replace(ann, revision=ann.revision + 1, **strange)))
            refused.append((refusal.value.status, str(refusal.value)))
        return refused

    for status, said in run(work()):
        assert status == 409 and said.startswith("expected ") and "/" not in said


def test_a_tuner_has_let_go_of_who_is_deleted_when_that_is_confirmed(home, tmp_path, run):
    """Bug: a deletion was confirmed while a copy that tunes still had the person's photos, and trained on them."""

    async def work():
        config = settings(home, tmp_path, tuners=1, tune_steps=5, pretrained_model_name_or_path=str(home / "base"))
        tuner = Tuner(load_base(str(home / "base"), max_sequence_length=8), config)
        _, (ann, bob, _) = await with_people(home, tmp_path)
        photos = [base64.b64decode(photo())]
        progress = tuner.tune(photos, ann, None)
        assert await anext(progress) == 1
        await tuner.forget(bob.uid)
        forgetting = asyncio.ensure_future(tuner.forget(ann.uid))
        await asyncio.sleep(0.01)
        assert tuner._run is not None and not forgetting.done()
        for again in (progress, tuner.tune(photos, ann, None)):
            with pytest.raises(RefusedError, match="somebody who was deleted"):
                await anext(again)
        await forgetting
        assert tuner._run is None

    run(work())


def test_somebody_is_tuned_step_by_step(home, tmp_path, run):
    async def work():
        config = settings(home, tmp_path, tuners=1, tune_steps=2)
        config = dataclasses.replace(config, pretrained_model_name_or_path=str(home / "base"))
        base = load_base(str(home / "base"), max_sequence_length=8)
        before = {name: weight.clone() for name, weight in base.denoiser.state_dict().items()}
        service, (person, *_) = await with_people(home, tmp_path)
        tuner = Tuner(base, config)
        photos = [base64.b64decode(photo())]
        steps = [step async for step in tuner.tune(photos, person, None)]
        with pytest.raises(RefusedError, match="photos to learn from"):
            [step async for step in tuner.tune([b"none"], person, None)]
        early = tuner.tune(photos, person, "a photo of ann")
        assert await anext(early) == 1
        await early.aclose()
        begun = asyncio.ensure_future(anext(tuner.tune(photos, person, None)))
        await asyncio.sleep(0.01)
        begun.cancel()
        await asyncio.wait([begun])
        artist, found = service.pool.artists[0], service.people.put_files(person, steps[-1])
        drawn = [pixels(await artist.draw(task(one))) for one in (None, person, found)]
        return steps, before, base.denoiser.state_dict(), drawn

    (*steps, files), before, after, (nobody, read, tuned) = run(work())
    assert np.abs(tuned - read).max() < 5 < 10 < np.abs(tuned - nobody).max(), "tuned from who was read"
    assert steps == [1, 2]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert load_subject(tmp_path).config.subject_name == "ann"


def test_files_that_come_slowly_hold_up_nobody_else(home, tmp_path, run, monkeypatch):
    """Bug: while the files of one person were fetched, no other image of that copy was drawn, not even of nobody."""
    names, go = write_people(home, tmp_path / "people" / "acme", 2), threading.Event()

    async def work():
        service, (ann, *_) = await with_people(home, tmp_path)
        artist, fetch = service.pool.artists[0], service.place.files

        def files(person):
            if person.name == names[0]:
                go.wait(20)
            return fetch(person)

        monkeypatch.setattr(service.place, "files", files)
        slow, other = [service.people.find("acme", name) for name in names]
        waiting = [asyncio.ensure_future(artist.draw(task(slow, seed))) for seed in (0, 0)]
        try:
            await asyncio.sleep(0.05)
            for order in (task(None), task(ann), task(other)):
                assert (await asyncio.wait_for(artist.draw(order), 5)).content
            await asyncio.wait_for(artist.forget(ann.uid), 5)
            forgotten = asyncio.ensure_future(artist.forget(slow.uid))
            await asyncio.sleep(0.05)
            assert not forgotten.done(), "they are just being brought"
        finally:
            go.set()
        await forgotten
        for each in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(each, RefusedError) and each.status == 404
        assert slow.uid not in artist._table.names()

    run(work())


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(ConnectionError("no route"), 503, "ask again later"), (FileNotFoundError("gone"), 409, "bring them in again")],
)
def test_a_place_that_cannot_be_reached_is_no_fault_of_the_person(
    home, tmp_path, run, monkeypatch, error, status, said
):
    """Bug: while the place of the files did not answer, clients were told to bring everybody in again."""
    name = write_people(home, tmp_path / "people" / "acme", 1)[0]

    async def work():
        service = Service(home, tmp_path)

        def files(person):
            raise error

        monkeypatch.setattr(service.place, "files", files)
        return await service.draw(name)

    answer = run(work())
    assert answer.status == status and answer.error.endswith(said) and name in answer.error
    assert ("retry-after" in answer.headers) == (status == 503)
