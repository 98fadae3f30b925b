# SPDX-License-Identifier: Apache-2.0
"""Damage to what lies in a folder of weights: a Down, a subject, an ordinary LoRA.

Each takes a folder and a source of random numbers: the same numbers make the same damage, on every machine.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

WEIGHTS, CONFIG, FOLD = "adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"
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

Mutation = Callable[[Path, random.Random], None]


# Bytes, header, configuration, files


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def insert(path: Path, rng: random.Random) -> None:
    data, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(data[:at] + rng.randbytes(rng.choice((1, 8, 100, 10_000))) + data[at:])


def shuffle(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    length = rng.randrange(1, len(data) // 2)
    one, other = rng.randrange(len(data) - length), rng.randrange(len(data) - length)
    data[one : one + length], data[other : other + length] = data[other : other + length], data[one : one + length]
    path.write_bytes(data)


def _on(name: str, change: Mutation) -> Mutation:
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
    path = folder.parent / ("ann" if (folder.parent / "ann").is_dir() else folder.name) / CONFIG
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
    other = other if other.exists() else folder.parent / "bob" / path.name
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


# Whole folders: what is no file, what an older save left, what two saves mixed


def _sparse(folder: Path, rng: random.Random) -> None:
    """A file that claims what it has no bytes for: its header and its size agree."""
    table, _ = _split(folder)
    names = [key for key in table if key != "__metadata__"]
    table[rng.choice(names)]["shape"][rng.choice((0, -1))] = rng.choice((2**20, 2**22, 2**34, 2**40, 2**47))
    start = 0
    for name in names:
        length = 4
        for size in table[name]["shape"]:
            length *= size
        table[name]["data_offsets"], start = [start, start + length], start + length
    _join(folder, table, b"")
    with open(folder / WEIGHTS, "r+b") as file:
        file.seek(0, os.SEEK_END)
        # As far as the file system goes: one that cannot be so large is one that is cut off.
        file.truncate(file.tell() + min(start, 2**42))


def _many(folder: Path, rng: random.Random) -> None:
    """Thousands of keys in the configuration or in the header."""
    count = rng.choice((1000, 3000, 12_000))
    what = rng.choice(
        ("rank_pattern", "alpha_pattern", "meta_rank_pattern", "target_modules", "facts", "unknown", "header")
    )
    keys = [rng.choice(("layer{}", "^blocks\\.{}\\.to_q$", "blocks.{}.to_q", "a.*b{}")).format(n) for n in range(count)]
    if what == "header":
        table, body = _split(folder)
        table |= {f"{key}.metalora_up": table[next(k for k in table if k != "__metadata__")] for key in keys}
        _join(folder, table, body)
    elif what == "target_modules":
        edit(folder, target_modules=keys)
    elif what == "unknown":
        edit(folder, **dict.fromkeys(keys, 1))
    else:
        edit(folder, **{what: {key: rng.choice((1, 2, 3)) for key in keys}})


def not_a_file(path: Path, rng: random.Random) -> None:
    """Put a pipe, a folder, a device or a link in the place of a file."""
    kind = rng.choice(
        ("pipe", "folder", "to nothing", "to itself", "to a folder", "to a device", "to another", "chain")
    )
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "to a device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/full", "/dev/stdin")))
    elif kind == "to another":
        path.symlink_to(
            rng.choice((path.parent.parent / "faces" / path.name, Path("/etc/hostname"), Path("/proc/self/mem")))
        )
    elif kind == "chain":
        (path.parent / "one").symlink_to("other")
        (path.parent / "other").symlink_to("one")
        path.symlink_to("one")
    else:
        path.symlink_to({"to nothing": "nowhere", "to itself": path.name, "to a folder": ".."}[kind])


def _special(folder: Path, rng: random.Random) -> None:
    not_a_file(folder / rng.choice((WEIGHTS, CONFIG, FOLD, "README.md")), rng)


def _special_folder(folder: Path, rng: random.Random) -> None:
    """The folder itself is a pipe, a file or a link."""
    kept = folder.with_name(f"{folder.name}-kept")
    folder.rename(kept)
    kind = rng.choice(("pipe", "file", "to itself", "to nothing", "to it", "to a device"))
    if kind == "pipe":
        os.mkfifo(folder)
    elif kind == "file":
        folder.write_bytes(b"x")
    else:
        folder.symlink_to(
            {"to itself": folder.name, "to nothing": "nowhere", "to it": kept.name, "to a device": "/dev/zero"}[kind]
        )


def _raw(folder: Path, rng: random.Random) -> None:
    """Numbers, texts and depths that JSON can write and that few readers expect."""
    path = folder / CONFIG
    config = json.loads(path.read_text())
    name = rng.choice((*config, "facts", "facts", "subject_name", "lora_alpha"))
    value = raw_value(rng)
    if rng.random() < 0.5 and "facts" in config:
        name, value = "facts", f'{{"{rng.choice(FACTS)}": {value}}}'
    config[name] = "@"
    text = json.dumps(config).replace('"@"', value)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def raw_value(rng: random.Random) -> str:
    """A value of JSON as text: numbers without end, lone surrogates, depths, nothing that is a number."""
    if rng.random() < 0.4:
        levels = rng.choice((50, 400, 900, 990, 1100, 5000, 20_000))
        before, after = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")))
        return before * levels + "1" + after * levels
    return rng.choice(
        (
            "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "9" * 4300, "9" * 4301, "1e-400", "0e999999999", "-0",
            '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"' + "x" * 100_000 + '"', '{"\\ud800": 1}', '"\\u202e"',
            "{}", "[[]]", '{"": null}', '"\\u2028\\u0085"',
        )
    )  # fmt: skip


FACTS = (
    "domain", "subjects", "steps", "recipe", "evaluation", "evaluation_data", "trigger", "license", "consent",
    "projected from", "x",
)  # fmt: skip


def tree(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON: what a fact, a tag or a line of metadata may hold that nobody expects there."""
    kind = rng.random()
    if depth < 4 and kind < 0.25:
        return [tree(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 4 and kind < 0.5:
        return {str(rng.choice((*NAMES, *FACTS)))[:300]: tree(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(
        (*VALUES, "](javascript:x)", "---\n# x", "```", "{{x}}", "<script>", "\u2028", "1e400", "\x1b[2J")
    )


def _facts(folder: Path, rng: random.Random) -> None:
    facts: Any = {name: tree(rng) for name in rng.sample(FACTS, rng.randrange(1, 6))}
    edit(folder, facts=rng.choice((facts, facts, facts, tree(rng))))


def _mapping(folder: Path, rng: random.Random) -> None:
    """Of what class the base is, and its name: fields of PEFT's."""
    values: tuple[Any, ...] = (5, [], {}, None, "UNet2DConditionModel", "\ud800", {"a": 1}, True, 1.5, "x" * 10_000)
    mapping: Any = {"base_model_class": rng.choice(values), "parent_library": rng.choice(values)}
    changes = {"auto_mapping": rng.choice((mapping, mapping, *values))}
    if rng.random() < 0.3:
        changes = {rng.choice(("base_model_name_or_path", "task_type", "revision", "peft_version")): rng.choice(values)}
    edit(folder, **changes)


def _stale(folder: Path, rng: random.Random) -> None:
    """What an older save, another tool or another person left in the folder."""
    other = folder.parent / "bob"
    kinds = {
        "fold of another": lambda: shutil.copyfile(other / FOLD, folder / FOLD),
        "fold that is none": lambda: (folder / FOLD).write_bytes(rng.randbytes(100)),
        "link to a key": lambda: ((folder / FOLD).unlink(missing_ok=True), (folder / FOLD).symlink_to(other / FOLD)),
        "card": lambda: (folder / "README.md").write_bytes(rng.choice((b"by hand", b"\xff\xfe", b"---\nx: [\n---"))),
        "card of another": lambda: (folder / "README.md").write_text(f"{other}"),
        "pickle": lambda: (folder / "adapter_model.bin").write_bytes(pickle.dumps({})),
        "other weights": lambda: (folder / "model.safetensors").write_bytes(b"x"),
        "temporary": lambda: (folder.parent / f".{folder.name}.123-0badf00d.tmp").mkdir(),
    }
    for kind in rng.sample(list(kinds), rng.choice((1, 2, 4))):
        if (folder / FOLD).is_symlink():
            (folder / FOLD).unlink()
        kinds[kind]()


def _torn(folder: Path, rng: random.Random) -> None:
    """The configuration of one save and the tensors of another."""
    newer = folder.with_name(f"{folder.name}-newer")
    shutil.copyfile(newer / (name := rng.choice((WEIGHTS, CONFIG))), folder / name)
    if rng.random() < 0.3:  # and the copy of the configuration in the header is spoilt
        table, body = _split(folder)
        said = table.setdefault("__metadata__", {})
        copy = json.loads(said.get("adapter_config", "{}"))
        copy[rng.choice((*copy, "facts"))] = tree(rng)
        said["adapter_config"] = json.dumps(copy) if rng.random() < 0.7 else raw_value(rng)
        _join(folder, table, body)


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of adapter_config.json, whatever they are."""
    path = folder / CONFIG
    config = {**json.loads(path.read_text()), **changes}
    path.write_bytes(json.dumps(config).encode("utf-8", "surrogatepass"))


MUTATIONS: dict[str, Mutation] = {
    "flipped bits in the tensors' file": _on(WEIGHTS, flip),
    "tensors' file cut off": _on(WEIGHTS, cut),
    "bytes inserted into the tensors' file": _on(WEIGHTS, insert),
    "bytes of the tensors' file moved": _on(WEIGHTS, shuffle),
    "header length": _header_length,
    "huge or deep header": _huge_header,
    "huge file": _huge_file,
    "entry of the header": _entry,
    "names in the header": _names,
    "numbers": _numbers,
    "well-formed file of wrong tensors": _tensors,
    "flipped bits in the configuration": _on(CONFIG, flip),
    "configuration cut off": _on(CONFIG, cut),
    "configuration of wrong values": _settings,
    "configuration of other text": _settings_text,
    "name of the Down": _down_name,
    "files exchanged": _files,
    "sparse file": _sparse,
    "thousands of keys": _many,
    "pipes and links": _special,
    "folder that is none": _special_folder,
    "numbers and depths of JSON": _raw,
    "hostile facts": _facts,
    "base of a wrong kind": _mapping,
    "stale files": _stale,
    "torn pair": _torn,
}
