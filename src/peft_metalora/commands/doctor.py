# SPDX-License-Identifier: Apache-2.0
"""What `metalora doctor` does: look at versions, devices, memory, extras, the Hub and disks, and say what is amiss."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from .. import __version__
from ..hub.loading import HUB_FAILURES, what_failed
from ..settings import setting
from . import Done

DISTRIBUTION = "peft-metalora"
EXTRAS = {
    "app": "the page in a browser (metalora app)",
    "data": "data sets of the Hub (--dataset_name)",
    "face": "R-FaceSim of photos of people, --face_crop insightface",
    "heic": "photos of iPhones",
    "dlib": "likeness by a recogniser with free weights, --embedder dlib",
    "lpips": "diversity in evaluate (--lpips)",
    "serve": "the service on Ray",
    "video": "clips as MP4 (generate --clip_format mp4)",
}
"""What each extra of the package is for."""
OTHERS = {
    "bitsandbytes": "bases of 4 and 8 bit, --optimizer adamw8bit",
    "deepspeed": "a base divided over GPUs by ZeRO 3",
    "prodigyopt": "--optimizer prodigy",
    "tensorboard": "--report_to tensorboard",
    "torchao": "bases that torchao quantises",
    "triton": "fast kernels on a GPU",
}
"""What other packages are for, that no extra brings."""
_GIB = 1 << 30
_LEAST_DISK = 5 * _GIB


@dataclass(kw_only=True)
class DoctorConfig:
    """Say what this machine has, lacks and can do; exit code 1 where something needed is amiss."""

    local_files_only: bool = setting("Do not ask the Hub whether it knows you.", False)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        state: 'ok', 'note' (something is missing that not everybody needs) or 'bad'.
    """

    about: str
    state: str
    found: str


def run_doctor(config: DoctorConfig) -> Done:
    """Look at everything; what is 'bad' makes the exit code 1."""
    findings = [*_versions(), *_machine(), *_extras(), _hub(config.local_files_only), *_disks()]
    bad = [one for one in findings if one.state == "bad"]
    width = max(len(one.about) for one in findings)
    lines = [f"metalora {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{one.state:<4}  {one.about:<{width}}  {one.found}" for one in findings]
    lines.append(f"{len(bad)} thing(s) to mend" if bad else "nothing to mend")
    values = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "findings": [asdict(one) for one in findings],
    }
    return Done("\n".join(lines), values, int(bool(bad)))


def _requirements() -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    requirements = _requirements()
    if not requirements:
        yield Finding(DISTRIBUTION, "note", "is not installed but run from its source: versions cannot be compared")
    for one in requirements:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        found, wanted = _version(one.name), f" (needs {one.specifier})" if one.specifier else ""
        fits = found is not None and one.specifier.contains(found, prereleases=True)
        advice = "" if fits else f": pip install '{one.name}{one.specifier}'"
        yield Finding(one.name, "ok" if fits else "bad", f"{found or 'missing'}{wanted}{advice}")


def _machine() -> Iterator[Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for number in range(count):
        free, total = torch.cuda.mem_get_info(number)
        properties = torch.cuda.get_device_properties(number)
        bf16 = "bf16" if properties.major >= 8 else "no bf16: --mixed_precision fp16"
        told = f"{properties.name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free, {bf16}"
        yield Finding(f"device cuda:{number}", "ok", told)
    if torch.backends.mps.is_available():
        yield Finding("device mps", "note", "Apple GPU: not tried by the authors; --device mps")
    if count == 0:
        built = torch.version.cuda or torch.version.hip
        why = "torch finds none" if built else "this torch is built without"
        yield Finding("device", "note", f"no GPU ({why}): the demo runs, a large base wants one")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("processors", "ok", str(cores))
    if (memory := _memory()) is not None:
        yield Finding("memory", "ok", f"{memory[0] / _GIB:.1f} of {memory[1] / _GIB:.1f} GiB free")


def _memory() -> tuple[int, int] | None:
    """Free and whole main memory in bytes, where the system says so."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free, whole = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
        return free, whole
    except (OSError, KeyError, ValueError):
        return None


def _extras() -> Iterator[Finding]:
    for extra, what in EXTRAS.items():
        wanted = [one for one in _requirements() if one.marker and _is_of(one, extra)]
        missing = [one.name for one in wanted if _version(one.name) is None]
        told = f"missing ({', '.join(missing)}): pip install '{DISTRIBUTION}[{extra}]'" if missing else "there"
        yield Finding(f"[{extra}]", "note" if missing else "ok", f"{told}; for {what}")
    for name, what in OTHERS.items():
        found = _version(name)
        yield Finding(name, "note" if found is None else "ok", f"{found or f'missing: pip install {name}'}; for {what}")


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _hub(local_files_only: bool) -> Finding:
    if huggingface_hub.get_token() is None:
        return Finding("Hub", "note", "not logged in: hf auth login, for private and gated repositories")
    if local_files_only or constants.HF_HUB_OFFLINE:
        return Finding("Hub", "ok", "a token is there; not asked whether it is good")
    try:
        return Finding("Hub", "ok", f"logged in as {huggingface_hub.whoami()['name']}")
    except HUB_FAILURES as error:
        return Finding("Hub", "note", f"a token is there; asked about it, found {what_failed(error)}")


def _disks() -> Iterator[Finding]:
    cache = Path(constants.HF_HUB_CACHE)
    yield _disk("cache of the Hub", cache, "set HF_HOME to a folder with room")
    yield _disk("working folder", Path.cwd(), "work in another")


def _disk(about: str, folder: Path, advice: str) -> Finding:
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    told = f"{folder}, {free / _GIB:.1f} GiB free"
    if not os.access(place, os.W_OK):
        return Finding(about, "bad", f"{told}, closed to you: {advice}")
    if free < _LEAST_DISK:
        return Finding(about, "note", f"{told}, less than {_LEAST_DISK / _GIB:.0f}: {advice}")
    return Finding(about, "ok", told)
