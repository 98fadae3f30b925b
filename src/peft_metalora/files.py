# SPDX-License-Identifier: Apache-2.0
"""Writing files that nobody finds half done: in a temporary folder beside, flushed to the disk, renamed.

What a write that was killed left goes with the next one into the same folder. Reading opens only what is a file. What
the files mean is not known here: that is `checkpoint`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import inspect
import json
import linecache
import math
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .errors import ConfigError, MetaLoraError, WriteFailedError

if sys.platform != "win32":
    import fcntl

EMBEDDED = {f"peft_metalora/demo-{part}": Path(__file__).parent / "demo" / "assets" / part for part in ("base", "down")}
"""What comes with the package, by the names that files call it: nobody is asked for a repository of such a name."""
STALE_SECONDS = 600
"""Age from which a temporary folder that no process holds is what a killed one left."""
_UNSEEN_SECONDS = 24 * 3600  # the same where the system cannot say whether a process holds it
_MOST_SWEPT = 10_000  # folders that are remembered
_YAML_BYTES = 1_000_000
_NOT_OWN = {__package__, "torch", *sys.stdlib_module_names}  # packages


def written_in(*own: type | FunctionType) -> dict[str, str]:
    """What tells functions and classes of somebody's own from themselves after an edit: by name, a hash of each file,
    or cell of a notebook, that they, and the classes above them, are written in. There is nothing of ours."""
    found = {}
    for one in own:
        for above in (one,) if isinstance(one, FunctionType) else one.__mro__:
            if above.__module__.partition(".")[0] in _NOT_OWN:
                continue
            # By its functions, as two files of one name are one module to Python.
            for part in [above] if isinstance(above, FunctionType) else vars(above).values():
                function = getattr(part, "fget", None) or getattr(part, "func", None)
                function = function or getattr(part, "__func__", part)
                if isinstance(function, FunctionType):
                    place = inspect.unwrap(function).__code__.co_filename
                    linecache.checkcache(place)
                    text = "".join(linecache.getlines(place))
                    name = function.__name__ if above is function else f"{above.__qualname__}.{function.__name__}"
                    found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def require_apart(output: str | os.PathLike[str], **inputs: str | os.PathLike[str] | None) -> None:
    """Refuse an output that would fall on what it is made from; to be called before any work.

    Refused is an output that is an input, by whatever path, or lies inside of one; and the folder of a weights file,
    because a save there replaces weights. An input inside of the output is left alone by every save.

    Args:
        inputs: paths by the name of their setting; what is None or not there, such as a repository id, is no matter.

    Raises:
        ConfigError: they are not apart.
    """
    target = Path(os.path.realpath(output))
    places = [path for path in (target, *target.parents) if path.exists()]
    for name, source in inputs.items():
        if source is None or not os.path.exists(source):
            continue
        # By inode, because a file system may take two spellings for one name.
        inside = any(os.path.samefile(place, source) for place in places)
        beside = Path(source).suffix == ".safetensors" and places[0] == target and target.samefile(Path(source).parent)
        if inside or beside:
            raise ConfigError(
                f"expected an output apart from {name}, found {os.fspath(output)!r} for {name} "
                f"{os.fspath(source)!r}: write to a folder of its own"
            )


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file to read its bytes, if it is one: of a pipe or a device a reader might wait for ever.

    Raises:
        OSError: as `open` does, and for anything but a regular file.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "expected a regular file, found a pipe or a device", os.fspath(path))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """What a YAML file holds, of up to a megabyte.

    Raises:
        ConfigError: it cannot be read, or is something else.
    """
    import yaml

    try:
        with open_regular(path) as file:
            content = file.read(_YAML_BYTES + 1)
        if len(content) > _YAML_BYTES:
            raise ConfigError(f"expected a YAML file of settings at {path}, found more than {_YAML_BYTES} bytes")
        return yaml.safe_load(content.decode("utf-8"))
    # Of a date, a truth value or a number that is none, yaml lets Python's own errors out.
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"expected a YAML file at {path}, found: {error}") from error


def require_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that could not be made or written to; to be called before the work whose result it shall hold.

    Raises:
        WriteFailedError
    """
    target = Path(os.path.abspath(folder))
    place = next(path for path in (target, *target.parents) if os.path.lexists(path))
    if not place.is_dir():
        raise _write_failed(target, NotADirectoryError(f"{place} is no folder"))
    if not os.access(place, os.W_OK | os.X_OK):
        raise _write_failed(target, PermissionError(f"{place} is closed to you"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader, or a killed process, leaves the old content or the new, never a mixture.

    Raises:
        WriteFailedError: the disk is full or refuses; the old file is as it was.
    """
    _write_file(Path(path), lambda temporary: temporary.write_bytes(data))


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically; raises as `write_bytes` does."""
    _write_file(Path(path), lambda temporary: save_tensors(temporary, tensors, metadata))


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file in place: for the inside of a `staged_folder`."""
    # A copy each: views of one storage, as slots are, would otherwise be refused or saved whole.
    flat = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    path.touch()
    rights = path.stat().st_mode
    save_file(flat, path, metadata={"format": "pt", **(metadata or {})})
    if metadata:
        _order_metadata(path)
    # safetensors makes files that only their owner may read, whatever the user's own default is.
    path.chmod(rights)


def _order_metadata(path: Path) -> None:
    """Sort the metadata in a header, which safetensors writes in another order each time: equal saves, equal files."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        ordered = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _write_file(path: Path, write: Callable[[Path], object]) -> None:
    try:
        # A folder, because safetensors has a temporary file of its own beside the one that it writes.
        with _stage_beside(path) as stage:
            temporary = stage / path.name
            write(temporary)
            _flush(temporary)
            if path.is_file():
                temporary.chmod(stat.S_IMODE(path.stat().st_mode))
            os.replace(temporary, path)
            _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise _write_failed(path, error) from error


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the system's place for temporary files that its user alone may read, gone after the block.

    Of a process that is killed in the block it goes with the next one that is made.
    """
    with _stage_beside(Path(tempfile.gettempdir(), "peft_metalora"), mode=stat.S_IRWXU) as folder:
        yield folder


@contextmanager
def staged_folder(
    folder: str | os.PathLike[str], stale: Collection[str] = (), replaced: Collection[str] = ()
) -> Iterator[Path]:
    """Give an empty folder to write into; when the block ends well, its files appear in `folder` together.

    A new folder, and one of which nothing stays, changes in one step (rename, or exchange where the system has it). A
    folder that holds files of others, that somebody works in, or that is a disk of its own, stays what it is: then each
    of our files is replaced in one step, in sorted order from last to first, so that `adapter_config.json` comes after
    the tensors. The rights of a folder and of files that are replaced stay, and new files of a folder that is closed to
    others are closed too.

    Args:
        stale: names of files made from the others: what an older save left of them goes before anything is replaced,
            and new ones come last, so that none ever lies beside files that it was not made from.
        replaced: names of files that new ones of other names may take the place of: what an older save left of them
            goes once the new ones are there.

    Raises:
        WriteFailedError: the disk is full or refuses; `folder` is as it was.
    """
    target = Path(os.path.abspath(folder))
    try:
        with _stage_beside(target / target.name if _is_apart(target) else target) as stage:
            yield stage
            for path in stage.iterdir():
                _flush(path)
            _flush(stage)
            _keep_rights(stage, target)
            _install(stage, target, set(stale), set(replaced))
            _flush(target.parent)
    except MetaLoraError:
        raise
    except (OSError, SafetensorError) as error:
        raise _write_failed(target, error) from error


def _is_apart(target: Path) -> bool:
    """Whether nothing beside a folder can be renamed into it: a mounted disk, a link to one, a parent closed to us."""
    if not target.is_dir():
        return False
    around = target.parent
    return target.stat().st_dev != around.stat().st_dev or not os.access(around, os.W_OK | os.X_OK)


def _keep_rights(stage: Path, target: Path) -> None:
    if not target.is_dir():
        return
    rights = stat.S_IMODE(target.stat().st_mode)
    for path in stage.iterdir():
        older = target / path.name
        path.chmod(stat.S_IMODE(older.stat().st_mode if older.is_file() else path.stat().st_mode & rights))
    stage.chmod(rights)


def _install(stage: Path, target: Path, stale: set[str], replaced: set[str]) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file")
    written = {path.name for path in stage.iterdir()}
    present = {path.name for path in target.iterdir()} if target.exists() else set()
    for name in present & (written | stale | replaced):
        if (target / name).is_dir():  # somebody's, and no file can take its place
            raise IsADirectoryError(f"{target / name} is a folder")
    if not target.exists() and not target.is_symlink():
        os.replace(stage, target)
    elif not (
        present
        and present <= written | stale | replaced
        and not _is_working_directory(target)
        and _exchange(stage, target)
    ):
        for name in present & stale:
            (target / name).unlink()
        for name in [*sorted(written - stale, reverse=True), *sorted(written & stale)]:
            os.replace(stage / name, target / name)
        for name in present & replaced - written:
            (target / name).unlink()


def _is_working_directory(folder: Path) -> bool:
    """Whether this process, or one that the system shows (Linux), works in a folder: it must not go away under it."""
    for place in (Path(), *Path("/proc").glob("[0-9]*/cwd")):
        with suppress(OSError):  # ended by now, or another user's
            if os.path.samefile(place, folder):
                return True
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux renameat2, macOS renamex_np); False where the system cannot."""
    if other.is_symlink():
        return False
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(one), os.fsencode(other), 2) == 0
        return libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0
    except (AttributeError, OSError, TypeError):
        return False


@contextmanager
def going_on() -> Iterator[None]:
    """Context in which a run writes on its way what its result does not need: a warning says what the disk refuses."""
    try:
        yield
    except WriteFailedError as error:
        warnings.warn(f"{error} The run goes on without it.", stacklevel=3)


# In the name, because one who looks from another machine may not see a lock.
_HOST = f"{zlib.crc32(platform.node().encode()):08x}"
_STAGE = re.compile(r"\..+\.[0-9]+-[0-9a-f]{8}(?:[0-9a-f]{8})?\.tmp", re.DOTALL)
_live: set[str] = set()  # names of this process's own
_swept: dict[str, float] = {}  # folder -> when


@contextmanager
def _stage_beside(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """An empty folder beside a target, held and gone after the block; what killed processes left there goes before."""
    stage = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}{_HOST}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_at_times(target.parent)
    _live.add(stage.name)
    try:
        stage.mkdir(mode)
        with held(stage):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        _live.discard(stage.name)


def _sweep_at_times(folder: Path) -> None:
    """`sweep`, but not for each of many files that are written into a large folder."""
    now, key = time.monotonic(), os.path.abspath(folder)
    if now - _swept.get(key, -math.inf) > STALE_SECONDS:
        if len(_swept) >= _MOST_SWEPT:
            _swept.clear()
        _swept[key] = now
        sweep(folder)


def sweep(folder: str | os.PathLike[str], older_than: float = STALE_SECONDS) -> None:
    """Remove what writes into a folder that were killed left there, and nothing that a living process holds.

    Args:
        older_than: seconds since anything of it has changed. 0, where somebody is deleted, is for a folder that
            nobody else writes to: not every system says what other processes hold.
    """
    with suppress(OSError):
        for path in [path for path in Path(folder).iterdir() if _STAGE.fullmatch(path.name)]:
            with suppress(OSError):
                if path.name not in _live and stat.S_ISDIR(path.lstat().st_mode) and _is_left(path, older_than):
                    shutil.rmtree(path, ignore_errors=True)


def _is_left(stage: Path, older_than: float) -> bool:
    changed = max(path.lstat().st_mtime for path in (stage, *stage.rglob("*")))
    held = _is_held(stage)
    if held or not older_than:  # whatever the clock says: it may have been set back since
        return not held
    # Of a folder on NFS only the machine that holds it sees that it is held.
    if held is None or not stage.name.endswith(f"{_HOST}.tmp"):
        older_than = max(older_than, _UNSEEN_SECONDS)
    return time.time() - changed >= older_than


@contextmanager
def held(folder: str | os.PathLike[str], *, alone: bool = False) -> Iterator[bool]:
    """Hold a folder for as long as the block lasts; the system ends it with the process. Reading and writing go on.

    Gives whether it is held now, which is False where it was to be `alone` and is held already, as far as the system
    says; `_is_held` sees both kinds.
    """
    handle, is_free = None, True
    with suppress(OSError):  # closed to us, or a disk that knows no locks
        if sys.platform != "win32":
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
            except BlockingIOError:
                is_free = False
    try:
        yield is_free
    finally:
        if handle is not None:
            os.close(handle)


def _is_held(folder: Path) -> bool | None:
    """Whether a process holds a folder; None where the system does not say."""
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    # Windows flushes only a handle that may write.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_failed(path: Path, error: Exception) -> WriteFailedError:
    return WriteFailedError(
        f"{path}: expected to be able to write, found: {error}. What was there before is unchanged; "
        "free some space or choose another folder."
    )
