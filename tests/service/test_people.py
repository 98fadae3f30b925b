# SPDX-License-Identifier: Apache-2.0
"""Where the people of a service are kept: a folder or any place of fsspec."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from threading import Thread
from uuid import uuid4

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from peft_metalora.cli import main
from peft_metalora.errors import ConfigError, CorruptFileError, OutputExistsError, UnsafeNameError, WriteFailedError
from peft_metalora.service import people as people_module
from peft_metalora.service.people import LOOK_EVERY, UNRECORDED, People, Person, Place

CODE = np.arange(6, dtype=np.float32).tobytes()
OWN = {"down": "d", "space": "s", "consent": "said yes"}
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"numbers"}


@pytest.fixture(params=["folder", "memory", "sftp"])
def place(request, tmp_path, sftp):
    """A local folder, a place that has files whole or not at all, and one that writes in place and makes no folders."""
    urls = {"folder": f"{tmp_path}", "memory": f"memory://{uuid4().hex}", "sftp": f"{sftp}{tmp_path}"}
    return Place(urls[request.param])


def paths(place) -> list[str]:
    return sorted(path[len(place.root) :].lstrip("/") for path in place.fs.find(place.root))


def contents(place) -> bytes:
    return b"".join(place.fs.cat_file(path) for path in place.fs.find(place.root))


def test_codes_and_files_are_there_at_the_next_start(place):
    people = People(place)
    ann = people.put_code("acme", "ann", CODE, **OWN)
    bob = people.put_files(people.put_code("acme", "bob", CODE, **OWN), FILES)
    again = People(place)
    assert len(again) == 2 and again.entry("acme", "ann") == ann and again.entry("acme", "bob") == bob
    assert again.entry("acme", "ann").code == CODE and bob.code is None
    assert paths(place)[-2:] == [f"people/acme/bob/{name}" for name in sorted(FILES)]
    with place.files(bob) as folder:
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES


def test_files_of_an_older_self_go(place):
    """Bug: what the operator had put there lay on beside the files of who was tuned."""
    people = People(place)
    place.fs.makedirs(f"{place.root}/people/acme/ann")
    place.fs.pipe_file(f"{place.root}/people/acme/ann/subject_code.safetensors", b"older")
    people.put_files(people.find("acme", "ann"), FILES)
    assert paths(place)[-2:] == [f"people/acme/ann/{name}" for name in sorted(FILES)] and b"older" not in contents(
        place
    )


def test_a_rename_keeps_who_it_is_and_their_files(place):
    people = People(place)
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)
    bob = people.put_code("acme", "bob", CODE, **OWN)
    anna, bert = people.rename(ann, "anna"), people.rename(bob, "bert")
    assert (anna.uid, anna.consent, anna.enrolled) == (ann.uid, ann.consent, ann.enrolled) and bert.code == CODE
    for each in (people, People(place)):
        assert [one.name for one in each.page("acme")] == ["anna", "bert"]
        assert each.find("acme", "anna").uid == ann.uid and each.find("acme", "ann") is None
    assert paths(place)[-2:] == [f"people/acme/anna/{name}" for name in sorted(FILES)]


def test_a_rename_that_ends_in_the_middle_leaves_nothing_without_a_name(place, monkeypatch):
    people = People(place)
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)

    def refuses(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(place, "move", refuses)
    with pytest.raises(WriteFailedError, match="disk full"):
        people.rename(ann, "anna")
    monkeypatch.undo()
    again = People(place)
    assert again.find("acme", "ann").uid == ann.uid
    for name in ("ann", "anna"):
        again.remove(again.entry("acme", name))
    assert b"numbers" not in contents(place) and len(People(place)) == 0


def test_names_of_a_rename_that_ends_in_the_middle_are_two_people(place, monkeypatch):
    """Bug: both names had one uid. Who was brought in anew under one of them was drawn under the other one, too, and a
    copy that was told to forget one refused both."""
    people = People(place)
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)

    def refuses(*_, **__):
        raise OSError("killed")

    monkeypatch.setattr(place, "move", refuses)
    with pytest.raises(WriteFailedError):
        people.rename(ann, "anna")
    monkeypatch.undo()
    again = People(place)
    assert again.entry("acme", "ann").uid == ann.uid != again.entry("acme", "anna").uid


def enrolled(people: People) -> Person:
    ann = people.put_code("acme", "ann", CODE, **OWN)
    people.place.write(f"{people.place.photos(ann)}/001", b"photo of the first")
    return ann


def renamed(people: People) -> None:
    people.rename(people.put_files(enrolled(people), FILES), "anna")


def replaced(people: People) -> None:
    people.put_code("acme", "ann", bytes(reversed(CODE)), **OWN, before=people.put_files(enrolled(people), FILES))


def deleted(people: People) -> None:
    people.remove(people.put_files(enrolled(people), FILES))


@pytest.mark.parametrize("change", [renamed, replaced, deleted])
def test_wherever_a_change_is_killed_names_delete_all_and_nobody_is_another_one(change, monkeypatch):
    """Each write but the first few is the last: a new start finds everybody apart, and deletes all there is by name."""

    class KilledError(BaseException):
        pass

    def counted(work, left):
        def once(*args, **more):
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
            return work(*args, **more)

        return once

    for writes in itertools.count():
        place, left = Place(f"memory://{uuid4().hex}"), [writes]
        with monkeypatch.context() as patch:
            for name in ("pipe_file", "cp_file", "rm_file"):
                patch.setattr(place.fs, name, counted(getattr(place.fs, name), left))
            try:
                change(People(place))
                break
            except KilledError:
                pass
        again = People(place)
        everybody = again.page("acme")
        assert len({one.uid for one in everybody}) == len(everybody)
        for one in everybody:
            if one.code == bytes(reversed(CODE)):
                assert not place.fs.exists(place.photos(one)), "photos of another one"
            again.remove(one)
        left_over = contents(place)
        assert b"photo" not in left_over and b"numbers" not in left_over and b"said yes" not in left_over, writes
    assert writes > 5


def torn(whole, left, error):
    """`pipe_file` of a place that writes in place: the call after `left` others fails half way, and all after it."""

    def pipe_file(path, content, **more):
        left[0] -= 1
        if left[0] == -1:
            whole(path, content[: len(content) // 2], **more)
        if left[0] < 0:
            raise error
        whole(path, content, **more)

    return pipe_file


BESIDE_ANN = next(
    name
    for name in map("bob{}".format, itertools.count())
    if hashlib.sha256(f"acme/{name}".encode()).digest()[0] == hashlib.sha256(b"acme/ann").digest()[0]
)


@pytest.mark.parametrize("error", [KeyboardInterrupt("killed"), OSError("connection lost")])
@pytest.mark.parametrize("change", ["enrolled", "replaced", "deleted"])
def test_a_write_in_place_that_ends_half_way_loses_nobody_and_brings_nobody_back(change, error, monkeypatch):
    """Bug: on places such as sftp a killed write left half a file of the index. It refused the start, and with it were
    lost all who stood in it."""
    for writes in range(9):
        place = Place(f"memory://{uuid4().hex}")
        people = People(place)
        bob = people.put_code("acme", BESIDE_ANN, CODE, **OWN)
        ann = None if change == "enrolled" else people.put_code("acme", "ann", CODE, **OWN)
        with monkeypatch.context() as patch:
            patch.setattr(place.fs, "pipe_file", torn(place.fs.pipe_file, [writes], error))
            try:
                if change == "deleted":
                    people.remove(ann)
                else:
                    people.put_code("acme", "ann", bytes(reversed(CODE)), **OWN, before=ann)
                break
            except (KeyboardInterrupt, WriteFailedError):
                pass
        if isinstance(error, OSError) and ann is not None:  # this process goes on
            people.remove(ann)
            assert people.entry("acme", "ann") is None is People(place).entry("acme", "ann")
        again = People(place)
        assert again.entry("acme", BESIDE_ANN) == bob
        assert not [path for path in paths(place) if not path.endswith(".json")]
        if again.entry("acme", "ann") is not None:
            again.remove(again.entry("acme", "ann"))
        assert [one.name for one in People(place).page("acme")] == [BESIDE_ANN]
        assert b'"ann"' not in contents(place)
    assert writes == 2


def test_of_a_tuning_whose_write_in_place_ends_half_way_nobody_is_shown_and_nothing_stays(monkeypatch):
    """Half of the files is there, but who is entered is the code until the last of them is whole."""
    for writes in range(9):
        place = Place(f"memory://{uuid4().hex}")
        people = People(place)
        ann = people.put_code("acme", "ann", CODE, **OWN)
        with monkeypatch.context() as patch:
            patch.setattr(place.fs, "pipe_file", torn(place.fs.pipe_file, [writes], KeyboardInterrupt("killed")))
            try:
                people.put_files(ann, FILES)
                break
            except KeyboardInterrupt:
                pass
        again = People(place)
        now = again.entry("acme", "ann")
        whole = {path.rpartition("/")[2]: place.fs.cat_file(path) for path in place.fs.find(place.folder(ann))} == FILES
        assert now == ann or (now.code is None and whole)
        again.put_code("acme", "ann", bytes(reversed(CODE)), **OWN, before=now)
        assert not place.fs.exists(place.folder(ann))
    assert writes == 4


@pytest.mark.parametrize("writes", range(4))
def test_after_a_write_that_failed_half_way_the_next_one_may_too(writes, monkeypatch):
    """A second copy that is the only whole one is not written over."""
    place = Place(f"memory://{uuid4().hex}")
    people = People(place)
    bob = people.put_code("acme", BESIDE_ANN, CODE, **OWN)
    for left in (1, writes):
        with monkeypatch.context() as patch, suppress(WriteFailedError):
            patch.setattr(place.fs, "pipe_file", torn(place.fs.pipe_file, [left], OSError("connection lost")))
            people.put_code("acme", "ann", CODE, **OWN)
    assert People(place).entry("acme", BESIDE_ANN) == bob


def test_a_file_of_the_index_that_a_killed_write_took_away_is_written_again():
    """Bug: where a place removes a file before it writes it anew, all who stood in it were gone at the next start."""
    place = Place(f"memory://{uuid4().hex}")
    ann = People(place).put_code("acme", "ann", CODE, **OWN)
    (path,) = place.fs.ls(f"{place.root}/index", detail=False)
    place.fs.mv(path, f"{path}.new")
    assert People(place).entry("acme", "ann") == ann == People(place).entry("acme", "ann")
    assert place.fs.ls(f"{place.root}/index", detail=False) == [path]


def test_a_start_reads_the_index_and_walks_no_folder(place, monkeypatch):
    people = People(place)
    for number in range(20):
        people.put_files(people.put_code("acme", f"p{number}", CODE, **OWN), FILES)
    listed = []
    ls = place.fs.ls
    monkeypatch.setattr(place.fs, "ls", lambda path, *a, **k: (listed.append(path), ls(path, *a, **k))[1])
    assert len(People(place)) == 20
    assert [path.rstrip("/").endswith("index") for path in listed] == [True] * len(listed)


def test_nothing_of_somebody_deleted_is_left(place):
    people = People(place)
    people.put_code("acme", "bob", CODE, **OWN)
    before = contents(place)
    ann = people.put_files(people.put_code("acme", "ann", CODE, **{**OWN, "consent": "by ann"}), FILES)
    place.write(f"{place.photos(ann)}/001", b"a photo")  # as the page keeps them
    people.remove(ann)
    assert people.find("acme", "ann") is None and People(place).entry("acme", "ann") is None
    assert not [path for path in paths(place) if "ann" in path]
    left = contents(place)
    assert b"by ann" not in left and ann.uid.encode() not in left and before in left


@pytest.mark.parametrize("how", ["deleted", "read anew"])
def test_nothing_is_left_in_files_that_a_killed_service_never_finished(how, tmp_path):
    """Bug: temporary files of a service that was killed kept the weights and the code of somebody who was deleted."""
    people = People(Place(str(tmp_path)))
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)
    for left in (
        "people/acme/.ann.12-0123abcd.tmp",
        "people/acme/.anna.12-0123abcd.tmp",
        "index/.00.json.12-0123abcd.tmp",
    ):
        (tmp_path / left).mkdir()
        (tmp_path / left / "left").write_bytes(b"of ann")
    if how == "deleted":
        people.remove(ann)
    else:
        people.put_code("acme", "ann", CODE, **OWN, before=ann)
    assert not [*tmp_path.rglob("*.tmp")]


def test_what_was_never_finished_goes_before_the_name_does(tmp_path, monkeypatch):
    """Bug: of a service that was killed as it deleted somebody, unfinished files stayed that no name deletes."""
    people = People(Place(str(tmp_path)))
    ann = people.put_code("acme", "ann", CODE, **OWN)
    (tmp_path / "people" / "acme" / ".ann.12-0123abcd.tmp").mkdir(parents=True)

    def killed(*_):
        raise OSError("killed")

    monkeypatch.setattr(Place, "write", killed)
    with pytest.raises(WriteFailedError):
        people.remove(ann)
    assert not [*tmp_path.rglob("*.tmp")]


def test_a_start_sweeps_the_index(tmp_path):
    """Bug: what was left of an index stayed there with the codes of all people in it."""
    (tmp_path / "index" / ".00.json.12-0123abcd.tmp").mkdir(parents=True)
    People(Place(str(tmp_path)))
    assert not [*(tmp_path / "index").iterdir()]


def test_photos_of_who_was_replaced_go_with_them(place):
    """Bug: photos that the page had kept stayed, also where the service deleted somebody."""
    people = People(place)
    ann = people.put_code("acme", "ann", CODE, **OWN)
    place.write(f"{place.photos(ann)}/001", b"a photo")
    people.put_code("acme", "ann", bytes(reversed(CODE)), **OWN, before=ann)
    assert not place.fs.exists(place.photos(ann))


@pytest.mark.parametrize("known", [True, False])
def test_nobody_is_entered_beside_photos_of_another_one(place, monkeypatch, known):
    """Bug: photos of who was replaced went after the entry of who came. A service that was killed between had one
    person entered beside another one's photos, from which the page would polish them."""
    people = People(place)
    ann = people.put_code("acme", "ann", CODE, **OWN)
    place.write(f"{place.photos(ann)}/001", b"a photo of another one")
    if not known:
        people.place.remove(people.index)
        people = People(place)
    seen, write = [], Place.write
    monkeypatch.setattr(Place, "write", lambda *a: (seen.append(place.fs.exists(place.photos(ann))), write(*a)))
    people.put_code("acme", "ann", bytes(reversed(CODE)), **OWN, before=ann if known else None)
    assert seen and not any(seen)


def test_nobody_is_renamed_to_beside_photos_of_another_one(place):
    """Bug: photos that lay under the new name, of a page that was killed long ago, were the renamed person's then."""
    people = People(place)
    ann = enrolled(people)
    place.write(f"{place.photos(ann)[: -len('ann')]}cleo/002", b"a photo of another one")
    cleo = people.rename(ann, "cleo")
    assert [path.rpartition("/")[2] for path in place.fs.find(place.photos(cleo))] == ["001"]


def test_a_consent_is_dated_to_when_it_was_given(place, monkeypatch):
    """Bug: who took the place of another one, with a consent of the same words, had that one's date beside it."""
    people = People(place)
    monkeypatch.setattr(time, "time", lambda: 1.0)
    ann = people.put_code("acme", "ann", CODE, **OWN)
    monkeypatch.setattr(time, "time", lambda: 2.0)
    new = people.put_code("acme", "ann", bytes(reversed(CODE)), **OWN, before=ann)
    monkeypatch.setattr(time, "time", lambda: 3.0)
    assert [one.enrolled for one in (ann, new, people.put_files(new, FILES))] == [1.0, 2.0, 2.0]


def test_a_newer_self_is_newer_though_the_clock_was_set_back(place, monkeypatch):
    """Bug: with the clock set back, who was replaced, tuned or rewritten had an older revision than before, so that
    copies went on to show who they had been."""
    people = People(place)
    ann = people.put_code("acme", "ann", CODE, **OWN)
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    new = people.put_code("acme", "ann", bytes(reversed(CODE)), **OWN, before=ann)
    tuned = people.put_files(new, FILES)
    place.fs.pipe_file(f"{place.folder(ann)}/adapter_model.safetensors", b"other numbers")
    monkeypatch.setattr("peft_metalora.service.people.LOOK_EVERY", 0.0)
    assert ann.revision < new.revision < tuned.revision < people.find("acme", "ann").revision


def test_a_removal_that_ends_in_the_middle_is_done_again(place, monkeypatch):
    """Bug: the entry goes first, the files stay, and the next look takes them for somebody new."""
    people = People(place)
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)

    def full(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Place, "write", full)
        with pytest.raises(WriteFailedError, match="no space left"):
            people.remove(ann)
    assert not [path for path in paths(place) if path.startswith("people/")]
    again = People(place)
    assert again.entry("acme", "ann") == ann
    again.remove(ann)
    assert People(place).entry("acme", "ann") is None


@pytest.mark.parametrize("what", ["people", "photos"])
def test_files_that_cannot_be_looked_for_are_not_taken_for_gone(sftp, tmp_path, monkeypatch, what):
    """Bug: where the place did not answer for a moment, as its folder was looked for, a deletion left the files, took
    the name out and said that all was done. The next look took them for somebody whom the operator had put there."""
    people = People(Place(f"{sftp}{tmp_path}"))
    ann = people.put_files(enrolled(people), FILES)
    stat = os.stat

    def lost(path, *args, **more):
        if str(path).endswith(f"/{what}/acme/ann"):
            raise OSError("connection lost")
        return stat(path, *args, **more)

    for change in (lambda: people.remove(ann), lambda: people.rename(ann, "anna")):
        with monkeypatch.context() as patch:
            patch.setattr(people.place.fs.ftp, "stat", lost, raising=False)
            with pytest.raises(WriteFailedError, match="connection lost"):
                change()
        assert people.entry("acme", "ann") == ann
    people.remove(people.entry("acme", "ann"))
    people.remove(people.entry("acme", "anna"))
    assert b"numbers" not in contents(people.place) and b"photo" not in contents(people.place)
    assert people.find("acme", "ann") is None is people.find("acme", "anna")


def test_files_that_were_left_beside_a_code_go_with_the_person(place, monkeypatch):
    """Bug: files of somebody whose tuning ended as they were being written stayed when another one took their place,
    because they were known as a code."""
    people = People(place)
    ann = people.put_code("acme", "ann", CODE, **OWN)
    with monkeypatch.context() as patch, pytest.raises(WriteFailedError):
        patch.setattr(place, "write_safely", lambda *_: people.place.fs.cat_file(f"{place.root}/not there"))
        people.put_files(ann, FILES)
    assert people.entry("acme", "ann") == ann and b"numbers" in contents(place)
    people.put_code("acme", "ann", bytes(reversed(CODE)), **OWN, before=ann)
    assert b"numbers" not in contents(place)


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_look_at_rewritten_files_brings_nobody_back(place, monkeypatch, how):
    """Bug: who was deleted, or replaced by another one, as their rewritten files were looked at was entered again."""
    people, threads = People(place), []
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)
    place.fs.pipe_file(f"{place.folder(ann)}/adapter_model.safetensors", b"other numbers")
    next_revision = people_module._next_revision

    def meanwhile(person):
        if not threads:
            change = people.remove if how == "deleted" else partial(people.put_code, "acme", "ann", CODE, **OWN)
            threads.append(Thread(target=change, args=() if how == "replaced" else (ann,)))
            threads[0].start()
            threads[0].join(0.3)
        return next_revision(person)

    monkeypatch.setattr(people_module, "LOOK_EVERY", 0.0)
    monkeypatch.setattr(people_module, "_next_revision", meanwhile)
    people.find("acme", "ann")
    threads[0].join()
    now = people.entry("acme", "ann")
    assert now is None if how == "deleted" else now.code == CODE


SUBJECT = {**FILES, "adapter_config.json": b'{"peft_type": "META_LORA", "stage": "subject"}'}


@pytest.fixture
def linked(tmp_path):
    """People, and what the folder of ann among them is a link to: a subject's folder elsewhere."""
    there, folder = tmp_path / "another disk" / "ann", tmp_path / "place" / "people" / "acme" / "ann"
    for made in (there, folder.parent):
        made.mkdir(parents=True)
    for name, content in SUBJECT.items():
        (there / name).write_bytes(content)
    folder.symlink_to(there, target_is_directory=True)
    return People(Place(str(tmp_path / "place"))), there


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_of_a_folder_that_is_a_link_the_files_go_too(linked, how):
    """Bug: the link went and the person's numbers stayed where it pointed to, or, by an older fsspec, the deletion
    failed for ever."""
    people, there = linked
    ann = people.find("acme", "ann")
    if how == "deleted":
        people.remove(ann)
    else:
        people.put_code("acme", "ann", CODE, **OWN, before=ann)
    assert not there.exists() and not os.path.lexists(people.place.folder(ann)) and there.parent.is_dir()
    assert len(People(people.place)) == (how == "replaced")


def test_of_a_link_a_removal_that_ends_in_the_middle_is_done_again(linked, monkeypatch):
    """What tells whose files they are goes last, so that the rest is not refused as nobody's."""
    people, there = linked
    ann = people.find("acme", "ann")
    unlink, left = os.unlink, [1]

    def once(*args, **more):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("gone for lunch")
        unlink(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr("os.unlink", once)
        patch.setattr("pathlib.Path.unlink", once)
        with pytest.raises(WriteFailedError, match="gone for lunch"):
            people.remove(ann)
    assert [path.name for path in there.iterdir()] == ["adapter_config.json"]
    people.remove(ann)
    assert not there.exists() and len(People(people.place)) == 0


def anothers_file(there, folder) -> None:
    (there / "bob.safetensors").write_bytes(b"bob")


def a_down(there, folder) -> None:
    (there / "adapter_config.json").write_text('{"peft_type": "META_LORA", "stage": "meta"}')


def anothers_link(there, folder) -> None:
    (folder.parent / "bob").symlink_to(there, target_is_directory=True)


def a_linked_file(there, folder) -> None:
    folder.unlink()
    folder.mkdir()
    for name in SUBJECT:
        (folder / name).symlink_to(there / name)


def not_mounted(there, folder) -> None:
    there.rename(there.parent / "elsewhere")


@pytest.mark.parametrize("how", ["deleted", "replaced", "tuned"])
@pytest.mark.parametrize("spoil", [anothers_file, a_down, anothers_link, a_linked_file, not_mounted])
def test_what_may_not_be_one_persons_alone_is_left_to_the_operator(linked, spoil, how):
    """Bug: somebody counted as deleted while links led to their numbers, or would be back once their disk was mounted;
    and whoever was tuned took what else lay where the link pointed to with them."""
    people, there = linked
    ann = people.find("acme", "ann")
    people.place.write(f"{people.place.photos(ann)}/001", b"a photo")
    spoil(there, there.parents[1] / "place" / "people" / "acme" / "ann")
    before = {path: path.is_file() and path.read_bytes() for path in there.parents[1].rglob("*")}
    with pytest.raises(UnsafeNameError, match="people/acme/ann to hold the files of one person alone, found a link"):
        if how == "deleted":
            people.remove(ann)
        elif how == "replaced":
            people.put_code("acme", "ann", CODE, **OWN, before=ann)
        else:
            people.put_files(ann, FILES)
    assert {path: path.is_file() and path.read_bytes() for path in there.parents[1].rglob("*")} == before
    assert people.entry("acme", "ann") == ann


def test_once_the_operator_has_removed_a_link_the_person_can_be_deleted(linked):
    people, there = linked
    ann = people.find("acme", "ann")
    anothers_file(there, None)
    os.unlink(people.place.folder(ann))
    people.remove(ann)
    assert len(People(people.place)) == 0 and (there / "bob.safetensors").exists()


def test_files_that_the_operator_puts_there_are_somebody(place):
    people = People(place)
    assert people.find("acme", "ann") is None
    place.fs.makedirs(f"{place.root}/people/acme/ann")
    for name, content in FILES.items():
        place.fs.pipe_file(f"{place.root}/people/acme/ann/{name}", content)
    assert people.find("acme", "ann") is None, "nobody looks again at once"
    time.sleep(LOOK_EVERY)
    ann = people.find("acme", "ann")
    assert ann.consent == UNRECORDED and ann.code is None
    assert people.find("other", "ann") is None and people.find("acme", "../acme/ann") is None
    assert People(place).entry("acme", "ann") == ann


def test_rewritten_files_are_a_new_revision(place, monkeypatch):
    people = People(place)
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)
    assert people.find("acme", "ann") == ann and not people.needs_to_look("acme", "ann")
    place.fs.pipe_file(f"{place.folder(ann)}/adapter_model.safetensors", b"other numbers")
    monkeypatch.setattr("peft_metalora.service.people.LOOK_EVERY", 0.0)
    assert people.needs_to_look("acme", "ann")
    new = people.find("acme", "ann")
    assert new.revision > ann.revision and new.uid == ann.uid
    assert people.find("acme", "ann") == new
    place.fs.rm(place.folder(ann), recursive=True)
    assert people.find("acme", "ann") is None and people.entry("acme", "ann") is not None


def test_who_looks_at_the_same_time_finds_the_same_person(place, monkeypatch):
    """Bug: of requests that looked at rewritten files at once, all but the first got who had been there before."""
    people = People(place)
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)
    place.fs.pipe_file(f"{place.folder(ann)}/adapter_model.safetensors", b"other numbers")
    monkeypatch.setattr("peft_metalora.service.people.LOOK_EVERY", 0.0)
    first, stamp = [], place.stamp

    def meanwhile(person):
        if not first:
            first.append(None)
            first[0] = people.find("acme", "ann")
        return stamp(person)

    monkeypatch.setattr(place, "stamp", meanwhile)
    found = people.find("acme", "ann")
    assert found == first[0] == people.entry("acme", "ann") and found.revision > ann.revision


def test_names_that_a_disk_takes_for_one_are_never_two_people(tmp_path, monkeypatch):
    """Bug: on a disk that ignores capitals, as most of Macs and Windows do, Ann had the photos and the files of ann."""
    folder, photos = Place.folder, Place.photos
    monkeypatch.setattr(Place, "folder", lambda *a: folder(*a).lower())
    monkeypatch.setattr(Place, "photos", lambda *a: photos(*a).lower())
    monkeypatch.setattr(Place, "ignores_case", lambda _: True, raising=False)
    people = People(Place(str(tmp_path).lower()))
    ann = people.put_files(people.put_code("acme", "ann", CODE, **OWN), FILES)
    assert people.find("acme", "Ann") is None
    with pytest.raises(OutputExistsError, match="Ann beside ann"):
        people.put_code("acme", "Ann", CODE, **OWN)
    bob = people.put_code("acme", "bob", CODE, **OWN)
    with pytest.raises(OutputExistsError, match="ANN beside ann"):
        people.rename(bob, "ANN")
    people.put_code("acme", "ann", CODE, **OWN, before=ann)
    assert [one.name for one in people.page("acme")] == ["ann", "bob"]


def test_a_disk_is_asked_whether_it_ignores_capitals(tmp_path):
    place = Place(str(tmp_path))
    assert not place.ignores_case() or (tmp_path / "INDEX").samefile(tmp_path / "index")


def test_files_are_listed_as_they_are_now(monkeypatch):
    """Bug: file systems that remember what a folder holds gave a copy the names of somebody's older files, so that the
    person could be shown there no more."""
    place = Place(f"memory://{uuid4().hex}")
    ann = People(place).put_code("acme", "ann", CODE, **OWN)
    place.write_files(ann, FILES)
    ls, known = place.fs.ls, {}

    def remembering(path, detail=True, **more):
        return known.setdefault((path, detail), ls(path, detail=detail, **more))

    monkeypatch.setattr(place.fs, "ls", remembering)
    monkeypatch.setattr(place.fs, "invalidate_cache", lambda path=None: known.clear())
    for added, removed in (("subject_code.safetensors", "adapter_model.safetensors"), ("more", "adapter_config.json")):
        with place.files(ann) as folder:
            names = {file.name for file in folder.iterdir()}
        assert names == {path.rpartition("/")[2] for path in place.fs.find(place.folder(ann))}
        place.fs.pipe_file(f"{place.folder(ann)}/{added}", b"new")
        place.fs.rm_file(f"{place.folder(ann)}/{removed}")


def test_a_place_that_keeps_copies_is_refused():
    """Bug: whoever was deleted stayed in the cache of a URL such as simplecache::s3://bucket/people."""
    with pytest.raises(ConfigError, match="of which no copies are kept, found 'simplecache::memory"):
        Place("simplecache::memory://people")


@pytest.mark.parametrize("command", ["app", "serve"])
def test_a_folder_of_people_has_one_service(tmp_path, capsys, command):
    """Bug: page and service could run on one folder. Who was deleted in one was drawn by the other until it ended."""
    one, other = People(Place(str(tmp_path))), People(Place(str(tmp_path)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ann = one.put_code("acme", "ann", CODE, **OWN)
    assert other.find("acme", "ann") is None, "none knows what another one changes"
    with one.place.alone():
        with pytest.raises(ConfigError, match="expected people whom nobody else serves"), other.place.alone():
            pass
        assert main([command, "--demo", "--people", str(tmp_path), "--port", str(port)]) == 2
        one.remove(ann)
    assert "found a service or a page at work on" in capsys.readouterr().err
    with other.place.alone(), Place("memory://people").alone(), Place("memory://people").alone():
        pass


def test_a_place_with_a_history_is_read_only(monkeypatch):
    """The Hub: a deleted file stays in its history."""

    class Hub(MemoryFileSystem):
        protocol = "hf"

    monkeypatch.setitem(_registry, "hf", Hub)
    place = Place("hf://datasets/me/people")
    assert place.read_only and not Place("memory://x").read_only


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a folder for people, found none"):
        Place(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="that fsspec knows, found 'nosuch://x'"):
        Place("nosuch://x")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 2, "people": []}',
        '{"format": 1, "people": [{"tenant": "acme"}]}',
        json.dumps(
            {
                "format": 1,
                "people": [
                    dict.fromkeys(("tenant", "name", "uid", "consent", "down", "space"), "../x")
                    | {"revision": 1, "enrolled": 0.0, "code": None}
                ],
            }
        ),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "00.json").write_text(content)
    with pytest.raises(CorruptFileError, match="expected a part of the index of people"):
        People(Place(str(tmp_path)))


def test_somebody_takes_little_memory():
    """A code of 128 numbers and all that is known of the person: about a kilobyte."""
    one = Person("acme", "person-12345", uuid4().hex, time.time_ns(), "said yes", time.time(), "d", "s", bytes(512))
    own = one.name, one.uid, one.revision, one.enrolled, one.code
    assert sys.getsizeof(one) + sum(map(sys.getsizeof, own)) + 100 < 1000  # and the entry of the dictionary
