# SPDX-License-Identifier: Apache-2.0
"""The people of a service where they are kept: codes in an index, files of those who were tuned, consent of each.

    index/00.json ... ff.json       everybody, by a hash of tenant and name; of those who are codes, all there is
    people/<tenant>/<name>/         the subject folder of somebody who was tuned, or whom the operator put there

A place is a folder or anything that fsspec knows; one service writes to it. A change rewrites one small file of the
index, so that nothing of a deleted person stays in it. A start reads the index and walks no folders.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import json
import os
import posixpath
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.cached import CachingFileSystem
from fsspec.implementations.local import LocalFileSystem

from ..checkpoint.artefacts import MAIN_FILES, SIDE_FILES
from ..checkpoint.card_file import CARD_FILE
from ..checkpoint.config_file import CONFIG_FILE, read_config
from ..errors import (
    ConfigError,
    CorruptFileError,
    MetaLoraError,
    OutputExistsError,
    UnsafeNameError,
    WriteFailedError,
)
from ..files import held, staged_folder, sweep, temporary_folder, write_bytes
from .tenants import NAME

FORMAT = 1
LOOK_EVERY = 0.5
"""Seconds for which nobody looks again whether a person's files are as they were."""
UNRECORDED = "none on record: the operator put the files here"
_SHARDS = 256
_HISTORY = {"hf", "git", "github", "dvc"}  # what is deleted there can be had all the same
_SECOND = ".new"  # ends the name of a second copy of what is being written
_MOST_FORGOTTEN = 10_000  # names that are remembered as nobody's
_OF_A_SUBJECT = {CONFIG_FILE, *MAIN_FILES, *SIDE_FILES, CARD_FILE}


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody of a tenant.

    Attributes:
        uid: random, of this person and never again of another one of the name.
        revision: nanoseconds; grows with each change of what they look like, also where the clock was set back.
        consent, enrolled: how they agreed, and when that was recorded (seconds since 1970).
        down, space: fingerprints that the code belongs to; empty for somebody with files.
        code: float32 numbers; None for somebody with files.
    """

    tenant: str
    name: str
    uid: str
    revision: int
    consent: str
    enrolled: float
    down: str = ""
    space: str = ""
    code: bytes | None = None


class Place:
    """Where people are kept.

    Args:
        url: a folder, or a URL of fsspec.

    Raises:
        ConfigError: a folder that is not there, what fsspec does not know, or what keeps copies of files.
    """

    def __init__(self, url: str) -> None:
        try:
            self.fs, self.root = fsspec.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"expected a place for people that fsspec knows, found {url!r} ({error})") from error
        if isinstance(self.fs, CachingFileSystem):
            raise ConfigError(
                f"expected a place for people of which no copies are kept, found {url!r}: whoever is deleted would "
                "stay in its cache. Name the place itself"
            )
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else {*self.fs.protocol}
        self.read_only = bool(protocols & _HISTORY)
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if self.is_local and not self.fs.isdir(self.root):
            raise ConfigError(f"expected a folder for people, found none at {url}: make it, or name another one")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the one who serves these people, for as long as the block lasts; of what is no folder nobody can tell.

        Raises:
            ConfigError: another service or page has them, which would go on to show whoever is deleted here.
        """
        with held(self.root, alone=True) if self.is_local else nullcontext(True) as is_alone:
            if not is_alone:
                raise ConfigError(
                    f"expected people whom nobody else serves, found a service or a page at work on {self.root}: end "
                    "that one, or give another folder"
                )
            yield

    def ignores_case(self) -> bool:
        """Whether two names that differ in capitals alone are one file here, as on most disks of Macs and Windows."""
        if not self.is_local:
            return False
        with suppress(OSError):
            os.makedirs(f"{self.root}/index", exist_ok=True)
        return os.path.exists(f"{self.root}/INDEX")

    def folder(self, person: Person) -> str:
        """Where the files of somebody are."""
        return f"{self.root}/people/{person.tenant}/{person.name}"

    def photos(self, person: Person) -> str:
        """Where photos of somebody are, if it was asked that they be kept."""
        return f"{self.root}/photos/{person.tenant}/{person.name}"

    @contextmanager
    def files(self, person: Person) -> Iterator[Path]:
        """A local folder with the files of somebody, for as long as the block lasts."""
        if self.is_local:
            yield Path(self.folder(person))
            return
        with temporary_folder() as here:
            self.fs.invalidate_cache(self.folder(person))
            for path in self.fs.ls(self.folder(person), detail=False):
                self.fs.get_file(path, str(here / posixpath.basename(path)))
            yield here

    def stamp(self, person: Person) -> str:
        """What changes when a file of somebody does."""
        self.fs.invalidate_cache(self.folder(person))
        try:
            found = self.fs.ls(self.folder(person), detail=True)
        except FileNotFoundError:
            return ""
        return hashlib.sha256(repr(sorted(map(repr, found))).encode()).hexdigest()

    def write(self, path: str, content: bytes) -> None:
        """Write a file; where the place can do that, as a local folder and object stores can, whole or not at all."""
        if self.is_local:
            write_bytes(path, content)
            return
        try:
            self.fs.pipe_file(path, content)
        except FileNotFoundError:  # sftp, say, makes no folder by itself
            self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
            self.fs.pipe_file(path, content)

    def write_safely(self, path: str, content: bytes) -> None:
        """Write a file of which a second copy is whole for as long as it may not be: sftp and others leave half of it
        where they are killed, and a rename that replaces a file is not had everywhere."""
        if not self.is_local:
            self.write(path + _SECOND, content)
        self.write(path, content)
        if not self.is_local:
            self.fs.rm(path + _SECOND)

    def write_files(self, person: Person, files: Mapping[str, bytes]) -> None:
        """Write the files of somebody; what else was in their folder goes. Raises as `require_own`."""
        folder = self.folder(person)
        self.require_own(folder)
        if not self.is_local:
            for name in sorted(files, key=lambda name: name.endswith(".json")):  # which names the tensors
                self.write(f"{folder}/{name}", files[name])
            for path in self.fs.ls(folder, detail=False):
                if posixpath.basename(path) not in files:
                    self.fs.rm(path)
            return
        others = [path.name for path in Path(folder).iterdir()] if Path(folder).is_dir() else []
        with staged_folder(folder, replaced=others) as stage:
            for name, content in files.items():
                (stage / name).write_bytes(content)

    def move(self, person: Person, to: Person) -> None:
        """Move files and photos of somebody, if there are any, to where those of somebody else are."""
        for folder in (self.folder, self.photos):
            if self._is_there(folder(person)):
                try:
                    self.fs.mv(folder(person), folder(to), recursive=True)
                except TypeError:  # sftp renames a folder at once, and does not know the word
                    self.fs.mv(folder(person), folder(to))

    def _is_there(self, folder: str) -> bool:
        """Whether there is a folder; fsspec's `exists` says no also where it could not look."""
        self.fs.invalidate_cache(folder)
        try:
            self.fs.info(folder)
        except FileNotFoundError:
            return False
        return True

    def require_own(self, folder: str) -> None:
        """Refuse to take away a folder with links of the operator, of which more would stay, or go, than one person.

        Raises:
            UnsafeNameError: it holds links, or is one to something else than the files of a subject under one name.
        """
        if not self.is_local:
            return
        there = Path(os.path.realpath(folder))
        is_linked = os.path.islink(folder)
        if any(path.is_symlink() for path in there.rglob("*")) or (is_linked and not self._is_of_one_person(there)):
            raise UnsafeNameError(
                f"expected {os.path.relpath(folder, self.root)} to hold the files of one person alone, found a link to "
                "what may be others' too, or is not there: whoever runs this place has to remove it and what it points "
                "to; then ask again"
            )

    def _is_of_one_person(self, folder: Path) -> bool:
        """Whether what somebody's link points to is a subject's files, nothing else, and nobody else's."""
        try:
            is_subject = read_config(folder).stage == "subject"
        except MetaLoraError:
            return False
        names = [path for path in Path(self.root).glob("people/*/*") if Path(os.path.realpath(path)) == folder]
        return is_subject and len(names) == 1 and all(path.name in _OF_A_SUBJECT for path in folder.iterdir())

    def remove(self, *folders: str) -> None:
        """Remove folders that are there; of one that is a link what it points to as well. All or, as `require_own`
        raises, none."""
        for folder in folders:
            self.require_own(folder)
        for folder in folders:
            self._remove(folder)

    def _remove(self, folder: str) -> None:
        if self.is_local and os.path.islink(folder):
            there = Path(os.path.realpath(folder))
            # What tells whose they are goes last, so that a removal that ends in the middle can be done again.
            for path in sorted(there.iterdir(), key=lambda path: path.name == CONFIG_FILE):
                path.unlink()
            os.unlink(folder)
            with suppress(OSError):  # a disk may be mounted there
                there.rmdir()
        elif self._is_there(folder):
            self.fs.rm(folder, recursive=True)

    def sweep(self, folder: str) -> None:
        """Remove what writes into a folder that were killed left there: somebody may be in it who is deleted."""
        if self.is_local:
            sweep(folder, older_than=0)


class People:
    """Everybody at a place; what is asked of it by name is answered from memory. Methods may be called in any thread.

    Raises:
        ConfigError: the place cannot be reached. CorruptFileError: a damaged index. WriteFailedError: a write of the
            index that was killed cannot be ended.
        OutputExistsError, of `put_code` and `rename`: the place takes the name for another one that somebody has.
    """

    def __init__(self, place: Place) -> None:
        self.place, self.index = place, f"{place.root}/index"
        self._tenants: dict[str, dict[str, Person]] = {}
        self._locks = [threading.Lock() for _ in range(_SHARDS)]
        self._looked: dict[str, tuple[float, str]] = {}  # uid -> when, and what the files were
        self._nobody: dict[tuple[str, str], float] = {}
        self._ignores_case = place.ignores_case()
        self._read_index()

    def __len__(self) -> int:
        return sum(len(people) for people in self._tenants.values())

    def entry(self, tenant: str, name: str) -> Person | None:
        """Somebody as the index has them."""
        return self._tenants.get(tenant, {}).get(name)

    def find(self, tenant: str, name: str) -> Person | None:
        """Somebody as they are now: files that were rewritten, or put there, are seen within `LOOK_EVERY`."""
        person = self.entry(tenant, name)
        if person is None:
            return self._adopted(tenant, name)
        return person if person.code is not None else self._as_files_are(person)

    def needs_to_look(self, tenant: str, name: str) -> bool:
        """Whether `find` will ask the place, which may take a while."""
        person = self.entry(tenant, name)
        if person is None:
            return not self._was_nobody(tenant, name)
        return person.code is None and not self._was_seen(person)

    def page(self, tenant: str, after: str = "", limit: int = 100) -> list[Person]:
        """The tenant's people in order of their names, from the one after `after` on."""
        people = self._tenants.get(tenant, {})
        return [people[name] for name in heapq.nsmallest(limit, (name for name in [*people] if name > after))]

    def put_code(
        self, tenant: str, name: str, code: bytes, *, down: str, space: str, consent: str, before: Person | None = None
    ) -> Person:
        """Keep somebody as a code, in the place of who they were `before`.

        Raises:
            UnsafeNameError: they are who they were, because of links among their files.
            WriteFailedError: they are who they were, without the photos that were kept, or have come and old files lie
                there still.
        """
        person = self._next(tenant, name, consent, before, down=sys.intern(down), space=sys.intern(space), code=code)
        if before is not None:
            with self._writing():
                self.place.require_own(self.place.folder(before))
        self._make_room(person)
        self._write(person)
        if before is not None:
            # Of a code, too: tuning that ended in the middle, or another replacement, leaves files beside it.
            with self._writing():
                self.place.remove(self.place.folder(before))
            self._sweep(before)
        return person

    def put_files(self, before: Person, files: Mapping[str, bytes]) -> Person:
        """Keep somebody as the files of a subject; WriteFailedError, UnsafeNameError: they are who they were."""
        person = replace(self._next(before.tenant, before.name, before.consent, before), enrolled=before.enrolled)
        with self._writing():
            self.place.write_files(person, files)
        self._looked[person.uid] = time.monotonic(), self.place.stamp(person)
        self._write(person)
        return person

    def rename(self, before: Person, name: str) -> Person:
        """Call somebody by a name that nobody has; WriteFailedError: they are who they were, or are under both names.

        The new name is entered first: of a rename that ends in the middle nothing is without a name to delete it by.
        It has a uid of its own until the old one is gone, because by its uid a copy tells who was replaced or deleted.
        """
        person = replace(before, name=name)
        self._make_room(person)
        self._write(replace(person, uid=_new_uid()))
        with self._writing():
            self.place.move(before, person)
        self._looked.pop(person.uid, None)
        self._write(before, gone=True)
        self._write(person)
        return person

    def remove(self, person: Person) -> None:
        """Take somebody away, photos and files first: a removal that ends in the middle can be done again.

        Raises:
            UnsafeNameError: nothing is taken away, because of links among their files. WriteFailedError
        """
        with self._writing():
            self.place.remove(self.place.photos(person), self.place.folder(person))
        self._sweep(person)
        self._write(person, gone=True)
        self._looked.pop(person.uid, None)

    def _sweep(self, person: Person) -> None:
        """Remove what may be left of somebody in files that were never finished."""
        for folder in (self.index, posixpath.dirname(self.place.folder(person))):
            self.place.sweep(folder)

    # Files

    def _adopted(self, tenant: str, name: str) -> Person | None:
        """Somebody whose files the operator has put there."""
        if self._was_nobody(tenant, name) or not re.fullmatch(NAME, name) or self._namesake(tenant, name):
            return None
        person = self._next(tenant, name, UNRECORDED, None)
        if not self.place.fs.isdir(self.place.folder(person)):
            if len(self._nobody) >= _MOST_FORGOTTEN:
                self._nobody.clear()
            self._nobody[tenant, name] = time.monotonic()
            return None
        self._looked[person.uid] = time.monotonic(), self.place.stamp(person)
        self._write(person, anew=True)
        return self._tenants[tenant][name]

    def _was_nobody(self, tenant: str, name: str) -> bool:
        return time.monotonic() - self._nobody.get((tenant, name), float("-inf")) < LOOK_EVERY

    def _was_seen(self, person: Person) -> bool:
        return time.monotonic() - self._looked.get(person.uid, (float("-inf"), ""))[0] < LOOK_EVERY

    def _as_files_are(self, person: Person) -> Person | None:
        """Somebody with files, looked at if that is due. Who is entered comes before when they were looked at, so that
        another thread that finds them looked at finds who was entered, too."""
        if not self._was_seen(person):
            stamp, now = self.place.stamp(person), time.monotonic()
            before = self._looked.get(person.uid)
            is_new = stamp and (before is None or before[1] != stamp)
            if is_new:
                with self._locks[_shard(person)]:  # nobody comes in their place, or goes, between look and entry
                    if self.entry(person.tenant, person.name) is person:
                        self._tenants[person.tenant][person.name] = replace(person, revision=_next_revision(person))
            self._looked[person.uid] = now, stamp
            if not stamp:
                return None
        return self.entry(person.tenant, person.name)

    # Index

    def _make_room(self, person: Person) -> None:
        """Before somebody is entered: nobody else has their files, and no photos of another one lie there."""
        if namesake := self._namesake(person.tenant, person.name):
            raise OutputExistsError(
                f"expected a name that differs by more than capitals from those that are taken, found {person.name} "
                f"beside {namesake}, whose files it would share where they are kept: give another name"
            )
        with self._writing():
            self.place.remove(self.place.photos(person))

    def _namesake(self, tenant: str, name: str) -> str | None:
        """Another name of the tenant, whose files the place takes for those of this one."""
        if not self._ignores_case:
            return None
        names = [*self._tenants.get(tenant, {})]
        return next((one for one in names if one != name and one.casefold() == name.casefold()), None)

    def _next(self, tenant: str, name: str, consent: str, before: Person | None, **own: Any) -> Person:
        uid = _new_uid() if before is None else before.uid
        return Person(sys.intern(tenant), name, uid, _next_revision(before), sys.intern(consent), time.time(), **own)

    def _read_index(self) -> None:
        self.place.sweep(self.index)
        try:
            listed = self.place.fs.ls(self.index, detail=False)
            paths = [path for path in listed if path.endswith((".json", f".json{_SECOND}"))]
            contents = self.place.fs.cat(paths) if paths else {}
        except FileNotFoundError:
            return
        except OSError as error:
            raise ConfigError(f"expected to be able to read the index of people, found: {error}") from error
        unfinished = {}
        for path in dict.fromkeys(path.removesuffix(_SECOND) for path in contents):
            people, unfinished[path] = _whole(path, contents.get)
            for person in people.values():
                self._tenants.setdefault(person.tenant, {})[person.name] = person
        if not self.place.read_only:
            with self._writing():
                for path, content in unfinished.items():
                    if content is not None:
                        self.place.write(path, content)
                # None outlives the write it was made for: somebody may be in it who is deleted.
                for path in [path for path in contents if path.endswith(_SECOND)]:
                    self.place.fs.rm(path)

    def _write(self, person: Person, *, gone: bool = False, anew: bool = False) -> None:
        """Enter somebody, or take them out.

        Args:
            anew: leave who is there already as they are.
        """
        key, shard = (person.tenant, person.name), _shard(person)
        path = f"{self.index}/{shard:02x}.json"
        with self._locks[shard], self._writing():
            if anew and self.entry(*key) is not None:
                return
            if not self.place.read_only:
                people = self._people_at(path)
                people.pop(key, None)
                if not gone:
                    people[key] = person
                content = json.dumps({"format": FORMAT, "people": [_record(one) for one in people.values()]}).encode()
                self.place.write_safely(path, content)
            if gone:
                self._tenants.get(person.tenant, {}).pop(person.name, None)
            else:
                self._tenants.setdefault(person.tenant, {})[person.name] = person

    def _people_at(self, path: str) -> dict[tuple[str, str], Person]:
        """The people of a file of the index as it is now, a write of which may have failed."""

        def content_of(name: str) -> bytes | None:
            with suppress(FileNotFoundError):
                return self.place.fs.cat_file(name)
            return None

        people, unfinished = _whole(path, content_of)
        if unfinished is not None:  # its second copy is the only whole one, which the next write begins with
            self.place.write(path, unfinished)
        return people

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except WriteFailedError:
            raise
        except OSError as error:
            raise WriteFailedError(f"expected to be able to write where the people are kept, found: {error}") from error


def _shard(person: Person) -> int:
    """The number of the file of the index that somebody stands in."""
    return hashlib.sha256(f"{person.tenant}/{person.name}".encode()).digest()[0]


def _new_uid() -> str:
    return secrets.token_hex(16)


def _next_revision(before: Person | None) -> int:
    now = time.time_ns()
    return now if before is None else max(now, before.revision + 1)


def _record(person: Person) -> dict[str, Any]:
    values = {name: getattr(person, name) for name in Person.__slots__}
    if person.code is not None:
        values["code"] = base64.b64encode(person.code).decode()
    return values


def _whole(path: str, content_of: Callable[[str], bytes | None]) -> tuple[dict[tuple[str, str], Person], bytes | None]:
    """The people of a file of the index; and where they stand in its second copy alone, what the file has to hold."""
    torn = None
    for name in (path, path + _SECOND):
        content = content_of(name)
        if content is None:
            continue
        try:
            return _people_of(content, name), None if name == path else content
        except CorruptFileError as error:
            torn = torn or (error if name == path else None)
    if torn is not None:
        raise torn
    return {}, None


def _people_of(content: bytes, path: str) -> dict[tuple[str, str], Person]:
    """The people of a file of the index."""
    try:
        table = json.loads(content)
        if table["format"] != FORMAT:
            raise ValueError(f"a format {table['format']!r}")
        people = {}
        for values in table["people"]:
            if values["code"] is not None:
                values["code"] = base64.b64decode(values["code"], validate=True)
            for name in ("tenant", "consent", "down", "space"):
                values[name] = sys.intern(values[name])
            person = Person(**values)
            if not (re.fullmatch(NAME, person.tenant) and re.fullmatch(NAME, person.name)):
                raise ValueError("a name that could be a path")
            people[person.tenant, person.name] = person
    except (ValueError, TypeError, LookupError) as error:
        raise CorruptFileError(f"{path}: expected a part of the index of people, found {error!r}") from error
    return people
