# SPDX-License-Identifier: Apache-2.0
"""What `metalora info` does: say what Downs and subjects are, and whether they fit each other and a base model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.artefacts import MAIN_FILES, Artefact, open_artefact
from ..checkpoint.base_model import check_fits
from ..checkpoint.folded import FOLD_FILE
from ..checkpoint.reader_files import ENCODER_CONFIG_FILE, READER_FILES, check_reader
from ..checkpoint.untrusted import read_json
from ..errors import BaseModelMismatchError, ConfigError, MetaLoraError
from ..files import EMBEDDED
from ..hub.loading import HubOptions, find_down, folder_of, locate, subject_of
from ..settings import LOCAL_FILES_ONLY, setting, shown
from ..tuner import DownSource
from ..tuner.down import modules_in
from . import Done

_ENCODER_FIELDS = "source", "resolution", "code_size"


@dataclass(kw_only=True)
class InfoConfig:
    """Say what Downs and subjects are, and whether they fit each other and a base model.

    Raises:
        ConfigError: nothing to look at.
    """

    paths: list[str] = setting("Folders or repositories of Downs and subjects.", positional="PATH_OR_REPO")
    pretrained_model_name_or_path: str | None = setting(
        "Also say whether they fit this base model, a folder or a repository id; only its configuration is read.", None
    )
    subfolder: str | None = setting("Folder inside each of them.", None)
    revision: str | None = setting("Branch, tag or commit of the repositories.", None)
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("expected a folder or a repository to look at, found none")


def run_info(config: InfoConfig) -> Done:
    """Describe each, and end with code 1 where one does not fit."""
    base = None
    if config.pretrained_model_name_or_path is not None:
        base = denoiser_of(config.pretrained_model_name_or_path, config.local_files_only)
    tables = [_table(path, config, base) for path in config.paths]
    downs = {table["path"]: table["fingerprint"] for table in tables if table["kind"] == "Down"}
    for table in tables:
        if table["kind"] == "subject":
            told = {path: table["down_fingerprint"] == fingerprint for path, fingerprint in downs.items()}
            table["fits"].update({path: fits or "it was learned on another Down" for path, fits in told.items()})
    code = int(any(found is not True for table in tables for found in table["fits"].values()))
    return Done("\n\n".join(map(_text, tables)), {"artefacts": tables}, code)


def _table(path: str, config: InfoConfig, base: Any) -> dict[str, Any]:
    """All that is said of an artefact, as plain values; `fits` has, by what it should fit, True or what is wrong."""
    options: HubOptions = {
        "subfolder": config.subfolder,
        "revision": config.revision,
        "local_files_only": config.local_files_only,
    }
    at, folder = locate(path, **options), folder_of(path, (FOLD_FILE, *READER_FILES), **options)
    with open_artefact(folder) as found:
        table = _common(path, found)
        fits = table["fits"] = {}
        try:
            down = found.down() if found.is_down else find_down(found.config, at, found.folder)
        except MetaLoraError as error:
            if found.is_down:
                raise
            fits["its Down"] = str(error)
            return table
        if found.is_down:
            table.update(fingerprint=down.fingerprint, **_reader(found, down, fits))
        else:
            fits["its Down"] = _said(subject_of, found, at, known_down=lambda _: down)
        if base is not None:
            name = str(config.pretrained_model_name_or_path)
            fits[name] = _said(check_fits, base, down, name=path)
    return table


def _common(path: str, found: Artefact) -> dict[str, Any]:
    own, folder = found.config, found.folder
    kind = {"kind": "Down"} if found.is_down else {"kind": "subject", "subject_name": own.subject_name}
    down = {} if found.is_down else {"down": own.down, "down_fingerprint": own.down_fingerprint}
    if found.code is not None:
        down["space_fingerprint"] = own.space_fingerprint
    return {
        "path": path,
        **kind,
        "base_model": own.base_model_name_or_path,
        "base_revision": own.revision,
        "base_class": (own.auto_mapping or {}).get("base_model_class"),
        "r": own.r,
        "meta_r": own.meta_r,
        "lora_alpha": own.lora_alpha,
        "other_ranks": len(own.rank_pattern) + len(own.meta_rank_pattern),
        "modules": len(modules_in(found.tensors)),
        "numbers": sum(math.prod(entry.shape) for entry in found.tensors.values()),
        "code_size": None if found.code is None else len(found.code.code),
        **down,
        "bytes": {
            name: (folder / name).stat().st_size
            for name in (*MAIN_FILES, FOLD_FILE, *READER_FILES)
            if (folder / name).is_file()
        },
        "format_version": own.format_version,
        "facts": own.facts or {},
    }


def _reader(found: Artefact, down: DownSource, fits: dict[str, bool | str]) -> dict[str, Any]:
    """What reads photos beside a Down, and whether its parts belong together."""
    if found.config.encoder_fingerprint is None:
        return {"reads_photos": False}
    told = fits["what reads photos"] = _said(check_reader, found.folder, found.config, down)
    if told is not True:
        return {"reads_photos": False}
    encoder = read_json(found.folder / ENCODER_CONFIG_FILE)
    return {
        "reads_photos": True,
        "space_fingerprint": found.config.space_fingerprint,
        "encoder_fingerprint": found.config.encoder_fingerprint,
        "encoder": {name: encoder.get(name) for name in _ENCODER_FIELDS},
    }


def _said(check: Any, *arguments: Any, **options: Any) -> bool | str:
    try:
        check(*arguments, **options)
    except MetaLoraError as error:
        return str(error)
    return True


def denoiser_of(name: str, local_files_only: bool, revision: str | None = None) -> Any:
    """The denoiser of a pipeline without its weights; raises BaseModelMismatchError where there is none."""
    import diffusers
    from accelerate import init_empty_weights

    place, options = str(EMBEDDED.get(name, name)), {"local_files_only": local_files_only, "revision": revision}
    try:
        try:
            parts = diffusers.DiffusionPipeline.load_config(place, **options)
        except OSError:
            parts = diffusers.ModularPipeline.load_config(place, **options)
        part = next(part for part in ("transformer", "unet", "prior") if part in parts)
        cls = getattr(diffusers, parts[part][1])
        settings = cls.load_config(place, subfolder=part, **options)
        with init_empty_weights():
            return cls.from_config(settings)
    except (OSError, ValueError, StopIteration, AttributeError, TypeError) as error:
        raise BaseModelMismatchError(
            f"expected a diffusers pipeline at {name!r}, found none whose configuration loads ({error}): give a folder "
            "or a repository id"
        ) from error


def _text(table: Mapping[str, Any]) -> str:
    who = f" {shown(table['subject_name'])}" if table.get("subject_name") else ""
    base = table["base_model"] or "not named"
    base += f" at {table['base_revision']}" if table["base_revision"] else ""
    base += f" ({table['base_class']})" if table["base_class"] else ""
    ranks = f"r {table['r']}, meta_r {table['meta_r']}, lora_alpha {table['lora_alpha']:g}"
    others = f" ({table['other_ranks']} patterns have others)" if table["other_ranks"] else ""
    size = f"{table['numbers']:,} numbers in {table['modules']} modules"
    size = size if table["code_size"] is None else f"a code of {table['code_size']} numbers"
    lines = [
        ("base model", base),
        ("ranks", ranks + others),
        ("size", size),
        *((f"  {name}", f"{size / 1e6:,.3f} MB") for name, size in table["bytes"].items()),
    ]
    if table["kind"] == "Down":
        encoder = table.get("encoder")
        reads = "no: it has no encoder, people are learned by stage 2"
        if encoder is not None:
            reads = f"codes of {encoder['code_size']} numbers, by the encoder {shown(encoder['source'])}"
        lines += [("fingerprint", table["fingerprint"]), ("reads photos", reads)]
    else:
        lines += [("its Down", f"{table['down'] or 'not named'}, {table['down_fingerprint']}")]
    for name, value in table["facts"].items():
        inside = value.items() if isinstance(value, dict) else [("", value)]
        lines += [(f"{name} {part}".rstrip(), shown(one)) for part, one in inside]
    lines += [("fits " + str(other), "yes" if told is True else f"NO: {told}") for other, told in table["fits"].items()]
    width = max(len(name) for name, _ in lines)
    title = f"{table['path']}: a {table['kind']}{who}"
    return "\n".join([title, *(f"  {name:<{width}}  {told}" for name, told in lines)])
