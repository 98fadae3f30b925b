# SPDX-License-Identifier: Apache-2.0
"""Damage to what else is read: photos and what is said of them, states of a run, the cache of encodings, settings.

Each takes the folder that holds them and a source of random numbers, as those of `mutations`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import zlib
from pathlib import Path

from mutations import NAMES, VALUES, Mutation, cut, flip, insert, not_a_file, raw_value, shuffle, tree
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_metalora.tuner.down import digest_of

BYTES: dict[str, Mutation] = {"flipped bits": flip, "cut off": cut, "bytes inserted": insert, "bytes moved": shuffle}


def _any(pattern: str, change: Mutation) -> Mutation:
    """Change one of the files that match."""

    def changed(folder: Path, rng: random.Random) -> None:
        change(rng.choice(sorted(folder.glob(pattern))), rng)

    return changed


def of_bytes(pattern: str) -> dict[str, Mutation]:
    """Damage to the bytes of one of the files that match, or a pipe or a link in its place."""
    what = pattern.rpartition("/")[2]
    return {f"{name} in {what}": _any(pattern, change) for name, change in {**BYTES, "no file": not_a_file}.items()}


# Photos


def _bomb(path: Path, rng: random.Random) -> None:
    """A PNG that says it is of a size that no photo has."""
    side = rng.choice((0, 1, 9000, 2**16, 2**31 - 1))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, rng.choice((side, 1)), 8, rng.choice((0, 2, 6)), 0, 0, 0))
    text = chunk(b"zTXt", b"k\\0\\0" + zlib.compress(bytes(2**22))) if rng.random() < 0.5 else b""
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + head + text + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def _huge(path: Path, rng: random.Random) -> None:
    with open(path, "r+b") as file:
        file.truncate(rng.choice((2**20, 2**24, 2**34, 2**40)))


def _line(folder: Path, rng: random.Random) -> None:
    """Lines of metadata.jsonl as nobody writes them."""
    files = ["0.png", "1.png", "./0.png", "../other/0.png", "/etc/passwd", "0.PNG", "a/0.png", *NAMES]
    keys = ("text", "caption", "subject", "reference", "mask", "sex", "age", "x")
    lines = []
    for _ in range(rng.choice((1, 2, 20))):
        kind = rng.random()
        if kind < 0.4:
            row = {"file_name": rng.choice(files), **{rng.choice(keys): tree(rng) for _ in range(rng.randrange(4))}}
            lines.append(json.dumps(row, ensure_ascii=rng.random() < 0.5))
        elif kind < 0.8:
            lines.append(f'{{"file_name": "0.png", "{rng.choice(keys)}": {raw_value(rng)}}}')
        else:
            lines.append(rng.choice((raw_value(rng), "", "{", "null", "\ufeff{}", "\u2028", "[1]", "x" * 100_000)))
    place = rng.choice((folder, *(path for path in folder.iterdir() if path.is_dir()))) / "metadata.jsonl"
    place.write_bytes(rng.choice(("\n", "\r\n", "\r", "\n\n")).join(lines).encode("utf-8", "surrogatepass"))


def _people(folder: Path, rng: random.Random) -> None:
    kind = rng.random()
    names = ("person-0", "person-1", "nobody", *NAMES)
    if kind < 0.4:
        text = json.dumps({rng.choice(names): {rng.choice(("sex", "age", "")): tree(rng)} for _ in range(3)})
    elif kind < 0.8:
        text = f'{{"person-0": {rng.choice((raw_value(rng), f"{{{json.dumps(names[0])}: {raw_value(rng)}}}"))}}}'
    else:
        text = json.dumps(tree(rng)) if rng.random() < 0.5 else raw_value(rng)
    (folder / "people.json").write_bytes(text.encode("utf-8", "surrogatepass"))


def _caption(folder: Path, rng: random.Random) -> None:
    texts = (
        b"", b" \n", b"\xef\xbb\xbfa man", "a man".encode("utf-16"), b"\xff\xfe\x00", b"x" * 20_000, b"x" * 2**24,
        b"\0" * 100, b"\xed\xa0\x80", "\u2028\u202e".encode(), b"{trigger}" * 2000, b"%s {0} {x!r}", b"\x1b[2J",
    )  # fmt: skip
    path = rng.choice(sorted(folder.glob("*/*.png"))).with_suffix(".txt")
    if rng.random() < 0.3:
        not_a_file(path, rng)
    else:
        path.write_bytes(rng.choice(texts))
    for meta in folder.glob("*/metadata.jsonl"):
        meta.unlink()


def _names_of_files(folder: Path, rng: random.Random) -> None:
    """Photos and people of names that few systems take."""
    place = rng.choice((folder, folder / "person-0"))
    for name in rng.sample([*NAMES, "con", "a ", "x.png.", "\u202egnp.x", "é", "e\u0301", "Person-0", "person_0"], 3):
        try:
            target = place / os.fsdecode(name.encode("utf-8", "surrogatepass")).replace("/", "_")
            if rng.random() < 0.5:
                target.mkdir()
                (target / "0.png").write_bytes((folder / "person-0" / "0.png").read_bytes())
            else:
                (target.with_name(target.name + ".png")).write_bytes(b"x")
        except (OSError, ValueError):
            continue


def _mask(folder: Path, rng: random.Random) -> None:
    path = folder / "person-0" / "0.mask.png"
    path.write_bytes((folder / "person-0" / "1.png").read_bytes())
    rng.choice((flip, cut, _bomb, not_a_file))(path, rng)


PHOTOS: dict[str, Mutation] = {
    **of_bytes("*/*.png"),
    "image that claims a size": _any("*/*.png", _bomb),
    "sparse photo": _any("*/*.png", _huge),
    "metadata.jsonl": _line,
    "people.json": _people,
    "captions": _caption,
    "names of photos and people": _names_of_files,
    "mask": _mask,
    **of_bytes("*/metadata.jsonl"),
}


# States of a run, the cache, settings


def _state(path: Path, rng: random.Random) -> None:
    """A state of other content, as somebody would write it who knows the format."""
    with safe_open(path, "pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    content = json.loads(header["training_state"])
    for _ in range(rng.choice((1, 1, 3))):
        _graft(content, rng)
    if rng.random() < 0.3:
        name = rng.choice(list(tensors))
        tensors[name] = rng.choice((tensors[name].flatten()[:1].clone(), tensors[name].double(), tensors[name].bool()))
    text = json.dumps(content)
    if rng.random() < 0.2:
        text = raw_value(rng)
    digest = hashlib.sha256(f"{text}|{digest_of(tensors)}".encode()).hexdigest()
    save_file(tensors, path, {"training_state": text, "training_state_sha256": digest})


def _graft(value: list, rng: random.Random) -> None:
    """Replace some part of nested lists by something else."""
    while True:
        index = rng.randrange(len(value))
        if isinstance(value[index], list) and value[index] and rng.random() < 0.85:
            value = value[index]
            continue
        value[index] = tree(rng) if rng.random() < 0.5 else rng.choice((*VALUES, ["tensor", "0"], ["tuple", []]))
        return


STATES: dict[str, Mutation] = {
    **of_bytes("checkpoint-1/*.safetensors"),
    "content of the state": _any("checkpoint-1/training_state.safetensors", _state),
}


def _other_tensors(path: Path, rng: random.Random) -> None:
    tensors = load_file(path)
    name = rng.choice(list(tensors))
    kind = rng.choice(("rename", "cut", "cast", "empty", "more"))
    if kind == "rename":
        tensors["other"] = tensors.pop(name)
    elif kind == "cut":
        tensors[name] = tensors[name].flatten()[:1].clone()
    elif kind == "cast":
        tensors[name] = tensors[name].bool()
    elif kind == "empty":
        tensors = {}
    else:
        tensors["more"] = tensors[name].clone()
    save_file(tensors, path)


CACHE: dict[str, Mutation] = {**of_bytes("*/*.safetensors"), "other tensors": _any("*/*.safetensors", _other_tensors)}


def _yaml(folder: Path, rng: random.Random) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]\n" for one, two in zip("abcdefgh", "bcdefghi", strict=True)
    )
    names = ("seed", "down", "output_dir", "learning_rate", "prompt", "resolution", "trigger", "validation_prompt", "x")
    values = (
        "1e400", ".nan", ".inf", "-1", "[" * 2000 + "]" * 2000, "[1, [2]]", "{a: 1}", "!!python/object:os.system x",
        "!!binary x", "2001-01-01", "0x" + "f" * 5000, "9" * 5000, "1" + "_1" * 100, "yes", "null", "~", "*x", "&x y",
        '"\\ud800"', "|\n  x", "x: y: z", "%s", "12:30:45", "&r [*r]", "&r {a: *r}", "? x", "1e-3", "on", "!!set {a}",
        "!!float x", "!!int x", "!!timestamp x", "!!int 1:99:99", "2001-99-99", "\t", "@", "`", "\u2028", "\x00",
        "\ud800",
    )  # fmt: skip
    lines = [f"{rng.choice(names)}: {rng.choice(values)}" for _ in range(rng.choice((1, 1, 3)))]
    text = rng.choice(
        ("\n".join(lines),) * 8 + (bomb + "down: *i", bomb, "[" * 1000, "- a", "", "? " * 300, "a: 1\na: 2")
    )
    (folder / "settings.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))


SETTINGS: dict[str, Mutation] = {**of_bytes("settings.yaml"), "text of the settings": _yaml, "settings again": _yaml}
