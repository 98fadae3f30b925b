# SPDX-License-Identifier: Apache-2.0
"""Reading files that nobody vouches for, and writing files that nobody finds half done.

A safetensors file is parsed here, byte for byte, before a single tensor exists: header size, JSON, names, dtypes,
shapes and offsets are all checked against the size of the file, so that a hostile or broken file costs neither
time nor memory (format: https://github.com/huggingface/safetensors#format). Pickle is never opened. Writing goes
to a temporary name in the same folder, is flushed to the disk and then renamed. What the tensors mean is not known
here: that is `checkpoint`.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .errors import (
    ArtefactNotFoundError,
    CorruptFileError,
    MetaLoraError,
    PickleRefusedError,
    TensorDtypeError,
    UnsafeNameError,
    WriteFailedError,
)

# FLUX.1-dev on all attention layers needs about 130 kB of header; json of this size stays below 100 MB in memory.
MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_CONFIG_BYTES = 256 * 1024
# A tensor takes three; a million empty lists would take Python's parser seconds.
MAX_BRACKETS = 60_000
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 5
STALE_SECONDS = 24 * 3600

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class TensorEntry:
    """One line of a safetensors header: where a tensor lies in the file, in bytes from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked safetensors header: the tensors in file order, and the free-text metadata."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_tensors(
    path: str | os.PathLike[str], check: Callable[[Header], None] | None = None
) -> dict[str, torch.Tensor]:
    """Read a safetensors file whose header has passed every check.

    Args:
        path: the file.
        check: called with the header before any tensor is read; raises what it does not like.

    Returns:
        Tensors on the CPU that share no memory with the file.

    Raises:
        ArtefactNotFoundError, PickleRefusedError, CorruptFileError, UnsafeNameError, TensorDtypeError.
    """
    with _open(path) as file:
        header = _parse_header(file, Path(path))
        if check is not None:
            check(header)
        return {name: _read_tensor(file, entry, Path(path)) for name, entry in header.entries.items()}


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header alone; raises as `read_tensors` does."""
    with _open(path) as file:
        return _parse_header(file, Path(path))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a small JSON object (duplicate keys, NaN and anything that is not an object are refused).

    Raises:
        ArtefactNotFoundError: there is no such file.
        CorruptFileError: it is too large, or is no JSON object.
    """
    with _open(path) as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    if len(raw) > MAX_CONFIG_BYTES:
        raise CorruptFileError(
            f"{path}: expected a configuration of at most {MAX_CONFIG_BYTES} bytes, found a larger file. "
            "Fetch the file again, or check that it is the right one."
        )
    return _parse_json_object(raw, Path(path), "configuration")


def require_safe_file(path: Path) -> None:
    """Refuse, by its name alone, a file that would have to be unpickled.

    Raises:
        PickleRefusedError
    """
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        raise PickleRefusedError(
            f"{path}: expected a .safetensors file, found {path.suffix} (pickle), which can run code when opened. "
            "Ask its author for safetensors, or convert it on a machine that may be lost."
        )


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    require_safe_file(Path(path))
    try:
        with open(path, "rb") as file:
            yield file
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ArtefactNotFoundError(
            f"{path}: expected a file, found {'a folder' if os.path.isdir(path) else 'nothing'}. "
            "Check the path, or fetch the artefact again."
        ) from error
    except OSError as error:
        raise CorruptFileError(
            f"{path}: expected a readable file, found: {error}. Check the disk and its rights."
        ) from error


def _parse_header(file: BinaryIO, path: Path) -> Header:
    size = os.fstat(file.fileno()).st_size
    lead = file.read(8)
    length = int.from_bytes(lead, "little")
    if len(lead) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        # Only here: a header of 640 bytes begins as a pickle does.
        if lead[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise PickleRefusedError(
                f"{path}: expected safetensors, found a pickled file under that name, which can run code when opened. "
                "Ask its author for safetensors."
            )
        expected = f"a header of at most {min(MAX_HEADER_BYTES, max(size - 8, 0))} bytes"
        _corrupt(path, expected, f"one of {length} bytes in a file of {size}")
    raw = file.read(length)
    if len(raw) < length:
        _corrupt(path, f"a header of {length} bytes", f"{len(raw)} bytes")
    table = _parse_json_object(raw, path, "header")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _corrupt(path, "metadata that maps text to text", type(metadata).__name__)
    entries = {name: _parse_entry(name, value, 8 + length, path) for name, value in table.items()}
    _check_layout(entries, 8 + length, size, path)
    return Header(entries, metadata)


def _parse_json_object(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key is given twice")
        return table

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        _corrupt(path, f"a {what} of at most {MAX_BRACKETS} lists and objects", "more")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        _corrupt(path, f"a {what} in JSON", str(error) if isinstance(error, ValueError) else "too deep a nesting")
    if not isinstance(value, dict):
        _corrupt(path, f"a {what} that is a JSON object", type(value).__name__)
    return value


def _parse_entry(name: str, value: Any, base: int, path: Path) -> TensorEntry:
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise UnsafeNameError(
            f"{path}: expected tensor names of letters, digits, '_', '-' and dots between them, found {name[:80]!r}. "
            "Do not use this file; fetch it again from its author."
        )
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _corrupt(path, f"dtype, shape and data_offsets for {name}", str(value)[:80])
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise TensorDtypeError(
            f"{path}: expected {name} in {', '.join(DTYPES)}, found {str(dtype)[:40]!r}. Save it in one of those."
        )
    if not _is_counts(shape, low=1) or len(shape) > MAX_DIMENSIONS:
        _corrupt(path, f"a shape of at most {MAX_DIMENSIONS} positive sizes for {name}", str(shape)[:80])
    if not _is_counts(offsets, low=0) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _corrupt(path, f"two rising offsets for {name}", str(offsets)[:80])
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        _corrupt(path, f"{expected} bytes for {name} of shape {shape}", f"{offsets[1] - offsets[0]} bytes")
    return TensorEntry(name, DTYPES[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def _is_counts(value: Any, low: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and low <= item < 2**48 for item in value)


def _check_layout(entries: dict[str, TensorEntry], base: int, size: int, path: Path) -> None:
    position = base
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        if entry.start != position:
            _corrupt(
                path,
                f"{entry.name} to start at byte {position}",
                f"byte {entry.start}: tensors overlap or leave a hole",
            )
        position = entry.stop
    if position != size:
        _corrupt(path, f"a file of {position} bytes", f"{size} bytes: it is cut off or has something behind its end")


def _read_tensor(file: BinaryIO, entry: TensorEntry, path: Path) -> torch.Tensor:
    file.seek(entry.start)
    data = bytearray(entry.stop - entry.start)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        _corrupt(path, f"{len(data)} bytes for {entry.name}", "fewer: the file shrank while it was read")
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def _corrupt(path: Path, expected: str, found: str) -> NoReturn:
    raise CorruptFileError(f"{path}: expected {expected}, found {found}. The file is damaged: fetch or save it again.")


# Writing


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
    # safetensors makes files that only their owner may read, whatever the user's own default is.
    path.chmod(rights)


def _write_file(path: Path, write: Callable[[Path], object]) -> None:
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise _write_failed(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Give an empty folder to write into; when the block ends well, its files appear in `folder` together.

    A new folder, and one whose files are all replaced, changes in one step (rename, or exchange where the system
    has it). Files of others in an existing folder stay: then each of ours is replaced in one step, in sorted order
    from last to first, so that `adapter_config.json` comes after the tensors.

    Raises:
        WriteFailedError: the disk is full or refuses; `folder` is as it was.
    """
    target = Path(os.path.abspath(folder))
    stage = _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target)
        stage.mkdir()
        yield stage
        for path in stage.iterdir():
            _flush(path)
        _flush(stage)
        _install(stage, target)
        _flush(target.parent)
    except MetaLoraError:
        raise
    except (OSError, SafetensorError) as error:
        raise _write_failed(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _install(stage: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file")
    written = {path.name for path in stage.iterdir()}
    present = {path.name for path in target.iterdir()} if target.exists() else set()
    if not present and not target.is_symlink():
        if target.exists():
            target.rmdir()
        os.replace(stage, target)
    elif not (present <= written and Path.cwd() != target and _exchange(stage, target)):
        for name in sorted(written, reverse=True):
            os.replace(stage / name, target / name)


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


def _remove_stale(target: Path) -> None:
    """Remove what a save that was killed more than a day ago left beside the target."""
    for path in target.parent.glob(f".{target.name}.*.tmp"):
        if time.time() - path.lstat().st_mtime > STALE_SECONDS and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _write_failed(path: Path, error: Exception) -> WriteFailedError:
    return WriteFailedError(
        f"{path}: expected to be able to write, found: {error}. What was there before is unchanged; "
        "free some space or choose another folder."
    )
