# SPDX-License-Identifier: Apache-2.0
"""Hostile Downs and subjects, each made from a number: the same number makes the same bytes, on every machine.

`run_case(seed, lab)` copies a good pair, spoils one of the two folders, loads it into a model through the pipeline's
loader, and says what came of it: a refusal by an error of ours, a load (some damage is none: a flipped bit in a number
of a subject makes another subject), another exception, and whether the model is what it was.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save

from artefacts_tiny import TinyModel, write_pair
from peft_metalora import MetaLoraError, enable_meta_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAMES = (
    "../../etc/passwd",
    "/dev/zero",
    "a" * 5000,
    "",
    ".",
    "..",
    "blocks.0.to_q.metalora_up\0x",
    "blocks..to_q.metalora_up",
    "__class__.__init__.metalora_up",
    "\ud800",
    "базовая.metalora_up",
    "base_model.model.base_model.model.blocks.0.to_q.metalora_up",
    "blocks.0.norm.metalora_up",
    "C:\\windows\\system32",
    "blocks.0.to_q.metalora_down",
    "$(touch x)",
    "%s%n",
)
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.0,
    0.5,
    "",
    "meta",
    "subject",
    "mean",
    "x" * 10_000,
    "(a+)+$",
    [],
    [1, [2, [3]]],
    {},
    {"a": 1},
    {"(a+)+$": 2},
    {"to_q": "x"},
    {"to_q": 10**9},
    {"[": 1},
    ["to_q"],
    [None],
    *NAMES,
)


class TinyPipeline(DiffusionPipeline):
    """A pipeline of one small model, for the loader to load into."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    @property
    def components(self) -> dict[str, object]:
        """What diffusers looks through for offloading."""
        return {"transformer": self.transformer}


@dataclass(frozen=True)
class Outcome:
    """What came of a case. `result` is "refused", "loaded" or the name of an exception that is not ours."""

    seed: int
    mutation: str
    result: str
    error: str
    harmed: bool
    seconds: float


class Lab:
    """A good pair, a model, and what the model is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good = folder / "good"
        write_pair(self.good)
        self.pipe = enable_meta_lora(TinyPipeline(TinyModel()))
        self.x = torch.linspace(-1, 1, 16).view(2, 8)
        self.before = self._state()
        # The first load of a process imports; no case should pay for that.
        self.pipe.load_meta_lora(self.good / "ann", "case")
        self.pipe.unload_meta_lora()

    def _state(self) -> tuple:
        model = self.pipe.transformer
        with torch.no_grad():
            output = model(self.x)
        modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        flags = [parameter.requires_grad for parameter in model.parameters()]
        return modules, flags, sorted(vars(model)), self.pipe.get_list_adapters(), weights, output

    def is_harmed(self) -> bool:
        """Whether module tree, flags, adapters, weights or output differ from those at the start, to the bit."""
        now = self._state()
        same_weights = now[4].keys() == self.before[4].keys() and all(
            torch.equal(now[4][name], self.before[4][name]) for name in now[4]
        )
        return now[:4] != self.before[:4] or not same_weights or not torch.equal(now[5], self.before[5])


def run_case(seed: int, lab: Lab) -> Outcome:
    """Make case number `seed`, load it, and look at the model."""
    rng = random.Random(seed)
    place = lab.folder / f"case-{seed}"
    shutil.copytree(lab.good, place)
    target = place / rng.choice(("ann", "faces"))
    mutation = rng.choice(list(MUTATIONS))
    started = time.perf_counter()
    try:
        MUTATIONS[mutation](target, rng)
        started = time.perf_counter()
        # A spoilt Down is met on its own, or through the subject that stands on it.
        lab.pipe.load_meta_lora(target if rng.random() < 0.7 else place / "ann", "case")
        result, error = "loaded", ""
    except MetaLoraError as caught:
        result, error = "refused", type(caught).__name__
    except Exception as caught:
        result, error = type(caught).__name__, str(caught)[:200]
    seconds = time.perf_counter() - started
    if result == "loaded":
        lab.pipe.unload_meta_lora()
    shutil.rmtree(place, ignore_errors=True)
    return Outcome(seed, mutation, result, error, lab.is_harmed(), seconds)


# Mutations: of bytes, of the header, of the configuration, of the files themselves


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def _insert(path: Path, rng: random.Random) -> None:
    data, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(data[:at] + rng.randbytes(rng.choice((1, 8, 100, 10_000))) + data[at:])


def _shuffle(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    length = rng.randrange(1, len(data) // 2)
    one, other = rng.randrange(len(data) - length), rng.randrange(len(data) - length)
    data[one : one + length], data[other : other + length] = data[other : other + length], data[one : one + length]
    path.write_bytes(data)


def _on(name: str, change: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    return lambda folder, rng: change(folder / name, rng)


def _split(folder: Path) -> tuple[dict, bytes]:
    data = (folder / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _join(folder: Path, header: bytes | dict, body: bytes, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + body)


def _header_length(folder: Path, rng: random.Random) -> None:
    table, body = _split(folder)
    _join(folder, table, body, rng.choice((0, 1, 7, 2**20, 2**21, 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(4000))))


def _huge_header(folder: Path, rng: random.Random) -> None:
    _, body = _split(folder)
    size = rng.choice((2**20, 2**21 - 100, 2**21 + 1, 2**23))
    raw = rng.choice(
        (b"[" * size, b'{"a":' * (size // 5), b"[" + b"[]," * (size // 3) + b"0]", b" " * size, b"9" * size)
    )
    _join(folder, raw, body)


def _huge_file(folder: Path, rng: random.Random) -> None:
    with open(folder / WEIGHTS, "r+b") as file:
        if rng.random() < 0.5:
            file.write(struct.pack("<Q", rng.choice((2**21, 2**30, 2**33))))
        file.truncate(rng.choice((2**28, 2**34, 2**40)))


def _entry(folder: Path, rng: random.Random) -> None:
    table, body = _split(folder)
    name = rng.choice([key for key in table if key != "__metadata__"])
    numbers = (-1, 0, 1, 2, 3, 2**31, 2**62, 2**64, 1.5, "2", None, True, [1])
    what = rng.choice(("dtype", "shape", "shape order", "offsets", "drop", "extra", "copy", "value"))
    entry = table[name]
    if what == "dtype":
        entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I8", "I64", "BOOL", "F8_E4M3", "f32", 3, None, [], "F32\0"))
    elif what == "shape":
        entry["shape"] = [rng.choice(numbers) for _ in range(rng.randrange(9))]
    elif what == "shape order":
        rng.shuffle(entry["shape"])
    elif what == "offsets":
        entry["data_offsets"] = [
            rng.choice((*numbers, *entry["data_offsets"])) for _ in range(rng.choice((1, 2, 2, 2, 3)))
        ]
    elif what == "drop":
        entry.pop(rng.choice(list(entry)))
    elif what == "extra":
        entry[rng.choice(NAMES)] = rng.choice(VALUES)
    elif what == "copy":
        table[name] = table[rng.choice([key for key in table if key != "__metadata__"])]
    else:
        table[name] = rng.choice(VALUES)
    _join(folder, table, body)


def _names(folder: Path, rng: random.Random) -> None:
    table, body = _split(folder)
    names = [key for key in table if key != "__metadata__"]
    action = rng.choice(("rename", "swap", "remove", "add", "metadata"))
    if action == "rename":
        table[rng.choice(NAMES)] = table.pop(rng.choice(names))
    elif action == "swap":
        one, other = rng.sample(names, 2)
        table[one], table[other] = table[other], table[one]
    elif action == "remove":
        table.pop(rng.choice(names))
    elif action == "add":
        table[rng.choice(NAMES)] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += b"\0\0\0\0"
    else:
        table["__metadata__"] = rng.choice((*VALUES, {"a": None}, {"a": {"b": 1}}))
    _join(folder, table, body)


def _numbers(folder: Path, rng: random.Random) -> None:
    table, body = _split(folder)
    data = bytearray(body)
    for _ in range(rng.choice((1, 4, 100))):
        value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, 1e-45, 0.0))
        struct.pack_into("<f", data, 4 * rng.randrange(len(data) // 4), value)
    _join(folder, table, bytes(data))


def _tensors(folder: Path, rng: random.Random) -> None:
    """A well-formed file of the wrong tensors."""
    tensors = load_file(folder / WEIGHTS)
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(list(tensors))
        tensor = tensors[name]
        action = rng.choice(
            ("rename", "drop", "transpose", "flat", "cut", "grow", "cast", "slots", "swap", "drop layer")
        )
        if action == "rename":
            tensors[rng.choice((*NAMES, name[:-1], name + "x", name.replace("0", "7"), name.upper()))] = tensors.pop(
                name
            )
        elif action == "drop" and len(tensors) > 1:
            tensors.pop(name)
        elif action == "transpose":
            tensors[name] = tensor.transpose(0, -1).contiguous()
        elif action == "flat":
            tensors[name] = tensor.reshape(rng.choice(((-1,), (1, -1), (1, 1, 1, -1), tensor.shape)))
        elif action == "cut":
            tensors[name] = tensor[: max(1, tensor.shape[0] - 1)].clone()
        elif action == "grow":
            tensors[name] = torch.cat([tensor, tensor], dim=rng.randrange(tensor.ndim))
        elif action == "cast":
            kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn)
            tensors[name] = tensor.to(rng.choice(kinds))
        elif action == "slots":
            tensors[name] = tensor.unsqueeze(0)
        elif action == "swap":
            other = rng.choice(list(tensors))
            tensors[name], tensors[other] = tensors[other], tensors[name]
        else:
            layer = name.rpartition(".")[0]
            tensors = {key: value for key, value in tensors.items() if not key.startswith(layer)} or tensors
    # A Rust string cannot hold a lone surrogate, and the header cannot hold every name.
    tensors = {name.encode("utf-8", "replace").decode(): tensor.contiguous() for name, tensor in tensors.items()}
    (folder / WEIGHTS).write_bytes(save(tensors))


def _settings(folder: Path, rng: random.Random) -> None:
    path = folder / CONFIG
    config = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 2, 5))):
        name = rng.choice((*config, "unknown", "runtime_config", "__class__"))
        if rng.random() < 0.2:
            config.pop(name, None)
        else:
            config[name] = rng.choice((*VALUES, rng.randrange(-5, 70), rng.random() * 10))
    path.write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))


def _settings_text(folder: Path, rng: random.Random) -> None:
    text = rng.choice(
        (
            b"",
            b"null",
            b"[]",
            b'"text"',
            b"1e999",
            b"{" * 5000,
            b"[" * 200_000,
            b'{"r": NaN}',
            b'{"peft_type": "META_LORA", "peft_type": "LORA"}',
            b'{"peft_type": "META_LORA"}',
            b"\xff\xfe" * 100,
            b"\0" * 1000,
            b" " * 300_000,
            b'{"r": ' + b"9" * 5000 + b"}",
            b'{"peft_type": ' + b'["a",' * 2000 + b"1" + b"]" * 2000 + b"}",
        )
    )
    (folder / CONFIG).write_bytes(text)


def _down_name(folder: Path, rng: random.Random) -> None:
    path = folder.parent / "ann" / CONFIG
    config = json.loads(path.read_text())
    config["down"] = rng.choice(
        (*NAMES, "../ann", "../../", "/", "/etc", "~", "a/b/c", "../faces/../faces", ".", "./", "x" * 300)
    )
    if rng.random() < 0.3:
        config["down_fingerprint"] = rng.choice(("0" * 64, "", "../faces", 0, None, "G" * 64))
    path.write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))


def _files(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice((WEIGHTS, CONFIG))
    other = folder.parent / ("faces" if folder.name == "ann" else "ann") / path.name
    action = rng.choice(("gone", "folder", "loop", "other's", "pickle", "zip", "both", "device", "bin"))
    if action == "other's":
        shutil.copyfile(other, path)
        return
    if action == "both":
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(other.parent / name, folder / name)
        return
    path.unlink()
    if action == "folder":
        path.mkdir()
    elif action == "loop":
        path.symlink_to(path.name)
    elif action == "pickle":
        path.write_bytes(pickle.dumps({"a": os.getcwd}, protocol=rng.choice((2, 3, 4, 5))))
    elif action == "zip":
        path.write_bytes(b"PK\x03\x04" + rng.randbytes(200))
    elif action == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null")))
    elif action == "bin":
        (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


MUTATIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "flipped bits in the tensors' file": _on(WEIGHTS, _flip),
    "tensors' file cut off": _on(WEIGHTS, _cut),
    "bytes inserted into the tensors' file": _on(WEIGHTS, _insert),
    "bytes of the tensors' file moved": _on(WEIGHTS, _shuffle),
    "header length": _header_length,
    "huge or deep header": _huge_header,
    "huge file": _huge_file,
    "entry of the header": _entry,
    "names in the header": _names,
    "numbers": _numbers,
    "well-formed file of wrong tensors": _tensors,
    "flipped bits in the configuration": _on(CONFIG, _flip),
    "configuration cut off": _on(CONFIG, _cut),
    "configuration of wrong values": _settings,
    "configuration of other text": _settings_text,
    "name of the Down": _down_name,
    "files exchanged": _files,
}
