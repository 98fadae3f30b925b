# SPDX-License-Identifier: Apache-2.0
"""Reads files that nobody vouches for: safetensors and JSON, every claim of theirs checked before it is used."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from ..errors import ArtefactNotFoundError, CorruptFileError, PickleRefusedError, TensorDtypeError, UnsafeNameError
from ..files import open_regular

# FLUX.1-dev on all attention layers needs about 130 kB of header; json of this size stays below 100 MB in memory.
MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_CONFIG_BYTES = 256 * 1024
# A tensor takes three; a million empty lists would take Python's parser seconds.
MAX_BRACKETS = 60_000
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 5
# Four times what a Down of rank 256 on every linear layer of FLUX.1-dev takes in float32.
MAX_FILE_BYTES = 8 * 2**30
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Of modules that PEFT saves along with an adapter: counters and masks, quantised weights.
FURTHER_DTYPES = DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
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


class TensorFile:
    """An open safetensors file whose header has passed every check; its tensors have not been read.

    What replaces the file meanwhile under its name does not matter: the open one is read.
    """

    def __init__(self, file: BinaryIO, path: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> None:
        self._file, self.path = file, path
        try:
            self.header = _parse_header(file, path, dtypes)
        except OSError as error:
            raise _unreadable(path, error) from error

    def read(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Tensors on the CPU, by default all; they share no memory with the file. Raises CorruptFileError."""
        entries = self.header.entries
        try:
            return {
                name: _read_tensor(self._file, entries[name], self.path)
                for name in (entries if names is None else names)
            }
        except OSError as error:
            raise _unreadable(self.path, error) from error


@contextmanager
def open_tensors(path: str | os.PathLike[str], dtypes: Mapping[str, torch.dtype] = DTYPES) -> Iterator[TensorFile]:
    """Open a safetensors file and check its header.

    Args:
        dtypes: those that its tensors may have, by their names in the format.

    Raises:
        ArtefactNotFoundError, PickleRefusedError, CorruptFileError, UnsafeNameError, TensorDtypeError.
    """
    with _open(path) as file:
        yield TensorFile(file, Path(path), dtypes)


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a safetensors file whose header has passed every check; raises as `open_tensors` and `TensorFile.read`."""
    with open_tensors(path) as file:
        return file.read()


def parse_json(text: str, path: Path, what: str) -> dict[str, Any]:
    """A JSON object out of a file's text, as strict as `read_json`; raises CorruptFileError."""
    return _parse_json_object(text.encode(errors="surrogatepass"), path, what)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a small JSON object (duplicate keys, NaN and anything that is not an object are refused).

    Raises:
        ArtefactNotFoundError: there is no such file.
        CorruptFileError: it is too large, or is no JSON object.
    """
    with _open(path) as file:
        try:
            raw = file.read(MAX_CONFIG_BYTES + 1)
        except OSError as error:
            raise _unreadable(Path(path), error) from error
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
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise CorruptFileError(f"{path}: expected an ordinary file, found a pipe or a device. Give a file.")
    try:
        file = open_regular(path)  # closed by the `with` below, whose errors are not this one
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise ArtefactNotFoundError(
            f"{path}: expected a file, found {'a folder' if os.path.isdir(path) else 'nothing'}. "
            "Check the path, or fetch the artefact again."
        ) from error
    except OSError as error:
        raise _unreadable(Path(path), error) from error
    with file:
        yield file


def _unreadable(path: Path, error: OSError) -> CorruptFileError:
    return CorruptFileError(f"{path}: expected a readable file, found: {error}. Check the disk and its rights.")


def _parse_header(file: BinaryIO, path: Path, dtypes: Mapping[str, torch.dtype]) -> Header:
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
    entries = {name: _parse_entry(name, value, 8 + length, path, dtypes) for name, value in table.items()}
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

    def finite(text: str) -> float:
        if math.isinf(value := float(text)):
            raise ValueError(f"{text[:20]} is too large")
        return value

    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        _corrupt(path, f"a {what} of at most {MAX_BRACKETS} lists and objects", "more")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        _corrupt(path, f"a {what} in JSON", str(error) if isinstance(error, ValueError) else "too deep a nesting")
    if not isinstance(value, dict):
        _corrupt(path, f"a {what} that is a JSON object", type(value).__name__)
    return value


def _parse_entry(name: str, value: Any, base: int, path: Path, dtypes: Mapping[str, torch.dtype]) -> TensorEntry:
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise UnsafeNameError(
            f"{path}: expected tensor names of letters, digits, '_', '-' and dots between them, found {name[:80]!r}. "
            "Do not use this file; fetch it again from its author."
        )
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _corrupt(path, f"dtype, shape and data_offsets for {name}", str(value)[:80])
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise TensorDtypeError(
            f"{path}: expected {name} in {', '.join(dtypes)}, found {str(dtype)[:40]!r}. Save it in one of those."
        )
    if not _is_counts(shape, low=1) or len(shape) > MAX_DIMENSIONS:
        _corrupt(path, f"a shape of at most {MAX_DIMENSIONS} positive sizes for {name}", str(shape)[:80])
    if not _is_counts(offsets, low=0) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _corrupt(path, f"two rising offsets for {name}", str(offsets)[:80])
    expected = math.prod(shape) * dtypes[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        _corrupt(path, f"{expected} bytes for {name} of shape {shape}", f"{offsets[1] - offsets[0]} bytes")
    return TensorEntry(name, dtypes[dtype], tuple(shape), base + offsets[0], base + offsets[1])


def _is_counts(value: Any, low: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and low <= item < 2**48 for item in value)


def _check_layout(entries: dict[str, TensorEntry], base: int, size: int, path: Path) -> None:
    if size > MAX_FILE_BYTES:
        _corrupt(path, f"a file of at most {MAX_FILE_BYTES} bytes", f"{size} bytes")
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
    try:
        data = bytearray(entry.stop - entry.start)
    except MemoryError:
        _corrupt(path, f"{entry.name} to fit into memory", f"{entry.stop - entry.start} bytes")
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        _corrupt(path, f"{len(data)} bytes for {entry.name}", "fewer: the file shrank while it was read")
    return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape)


def _corrupt(path: Path, expected: str, found: str) -> NoReturn:
    raise CorruptFileError(f"{path}: expected {expected}, found {found}. The file is damaged: fetch or save it again.")
