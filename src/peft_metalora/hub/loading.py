# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects from the Hugging Face Hub: fetched into its cache and read with every check.

Everything goes through `huggingface_hub`, so its environment (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN) and its
cache hold here too. What is fetched is read by `checkpoint`, with all its checks.
"""

from __future__ import annotations

import inspect
import os
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from ..checkpoint.artefacts import check_files, down_reference
from ..checkpoint.artefacts import load_down as load_local_down
from ..checkpoint.artefacts import load_subject as load_local_subject
from ..checkpoint.base_model import REPO_ID
from ..checkpoint.config_file import CONFIG_FILE
from ..checkpoint.factors import WEIGHTS_FILE, SubjectSource
from ..errors import ArtefactNotFoundError, HubError, MissingDownError, UnsafeNameError
from ..tuner import DownSource, MetaLoraConfig
from ..tuner.down import _given


@dataclass(frozen=True)
class Location:
    """Where an artefact lies: a local folder, or a repository with what it takes to fetch from it.

    Attributes:
        name: a folder or a repository id.
        subfolder: a folder inside it.
        options: `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, as huggingface_hub takes them.
    """

    name: str
    subfolder: str | None
    options: Mapping[str, Any]


def load_down(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    expected_fingerprint: str | None = None,
) -> DownSource:
    """Read a Down from a local folder or a Hub repository; the arguments are huggingface_hub's.

    Raises:
        HubError: the repository, its revision or its files cannot be had.
        Everything that `checkpoint.load_down` raises.
    """
    at = locate(
        path_or_repo,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    return load_local_down(fetch(at), expected_fingerprint=expected_fingerprint)


def load_subject(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    known_down: Callable[[MetaLoraConfig], DownSource | None] | None = None,
) -> SubjectSource:
    """Read a subject, and the Down it names, from local folders or the Hub; the arguments are huggingface_hub's.

    Args:
        known_down: asked first for the Down of a subject's configuration; None where it has none.

    Raises:
        HubError: a repository, its revision or its files cannot be had.
        Everything that `checkpoint.load_subject` raises.
    """
    at = locate(
        path_or_repo,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )

    def find(config: MetaLoraConfig, folder: Path) -> DownSource:
        return (known_down(config) if known_down is not None else None) or find_down(config, at, folder)

    return load_local_subject(fetch(at), find_down=find)


def find_down(config: MetaLoraConfig, at: Location, folder: Path) -> DownSource:
    """Read the Down that a subject's configuration names, starting from where the subject lies.

    Args:
        config: the subject's.
        at: where the subject was asked for; a relative path in a repository means another folder of that repository.
        folder: the local folder that holds the subject.

    Raises:
        As `load_down`, and MissingDownError when nothing is named or found.
    """
    name = config.down or ""
    is_path = name.startswith(".") or not REPO_ID.fullmatch(name)
    if name and is_path and not os.path.isabs(name) and not os.path.isdir(at.name):
        inside = posixpath.normpath(posixpath.join(at.subfolder or ".", name))
        if inside.startswith("..") or "\\" in inside or inside == ".":
            raise UnsafeNameError(
                f"{at.name}: expected a Down inside the repository, found the path {name[:80]!r}. "
                "Ask its author to name the Down's repository."
            )
        where = Location(at.name, inside, at.options)
    else:
        reference = down_reference(config, folder)
        if isinstance(reference, Path):
            return load_local_down(reference, expected_fingerprint=config.down_fingerprint)
        where = Location(reference, None, {**at.options, "revision": config.down_revision})
    return load_local_down(fetch(where), expected_fingerprint=config.down_fingerprint)


def fetch(at: Location) -> Path:
    """Return the local folder of an artefact, its two files downloaded into the Hub's cache if need be.

    Raises:
        HubError: the repository, its revision or its files cannot be had.
        ArtefactNotFoundError: a local path that is not there.
    """
    local = Path(at.name, *([at.subfolder] if at.subfolder else []))
    if os.path.isdir(local):
        return local
    if not REPO_ID.fullmatch(at.name) or ".." in at.name:
        raise ArtefactNotFoundError(
            f"{at.name}: expected a local folder or a repository id such as ann/faces, found neither. Check it."
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = _download(at, name)
    return path.parent


def fetch_beside(at: Location, name: str) -> Path | None:
    """A further file of an artefact, None where there is none; raises HubError as `fetch` does."""
    local = Path(at.name, at.subfolder or "", name)
    if os.path.isdir(at.name):
        return local if local.is_file() else None
    try:
        return _download(at, name)
    except HubError as error:
        if isinstance(error.__cause__, hub_errors.EntryNotFoundError):
            return None
        raise


def _download(at: Location, name: str) -> Path:
    revision = at.options.get("revision")
    where = f"{at.name}{f'/{at.subfolder}' if at.subfolder else ''}{f' at {revision}' if revision else ''}"
    try:
        return Path(huggingface_hub.hf_hub_download(at.name, name, subfolder=at.subfolder, **at.options))
    except hub_errors.GatedRepoError as error:
        raise HubError(
            f"{where}: expected access, found a gated repository. Accept its terms on the Hub first."
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{where}: expected a repository that you may read, found none. Check the name; if it is private, log in "
            "(hf auth login) or give token=."
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise HubError(f"{where}: expected this revision, found none. Name a branch, tag or commit of it.") from error
    except hub_errors.LocalEntryNotFoundError as error:
        raise HubError(
            f"{where}: expected {name} in the cache, as the Hub was not to be reached, found none. "
            "Download it once while online (metalora pull), or give a local folder."
        ) from error
    except hub_errors.EntryNotFoundError as error:
        raise HubError(f"{where}: expected the file {name}, found none. Check the name, or give subfolder=.") from error
    except (hub_errors.HfHubHTTPError, OSError, ValueError) as error:
        raise HubError(
            f"{where}: expected {name} from the Hub, found: {error}. Check the network and try again."
        ) from error


def resolve_down(config: MetaLoraConfig) -> DownSource:
    """The tuner's way to the Down that a configuration names (see `tuner.set_down_loader`).

    Raises:
        As `load_down`.
    """
    down = _given.get()
    if down is not None and down.fingerprint == config.down_fingerprint:
        return down
    by_name: dict[str, Any] = {"revision": config.down_revision, "expected_fingerprint": config.down_fingerprint}
    if config.origin is None:
        return load_down(config.down or "", **by_name)
    at = _origin(config)
    try:
        return find_down(config, at, Path(at.name, at.subfolder or ""))
    except (HubError, MissingDownError):
        # Somebody may have put a folder of their own into the configuration since it was read.
        if not os.path.isdir(config.down or ""):
            raise
        return load_down(config.down or "", **by_name)


def check_origin(config: MetaLoraConfig) -> None:
    """Check the file of an adapter that PEFT's own verbs load, before they touch the model.

    Raises:
        As `load_down`.
    """
    if config.origin is not None:
        at = _origin(config)
        check_files(fetch(at), config)


def _origin(config: MetaLoraConfig) -> Location:
    known = inspect.signature(locate).parameters
    origin = config.origin or {}
    return locate(origin["name"], **{key: value for key, value in origin.items() if key in known and key != "name"})


def locate(
    path_or_repo: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Location:
    """Name a place without looking there yet; raises UnsafeNameError for a subfolder that leads out of it."""
    if subfolder is not None and (posixpath.normpath(subfolder).startswith(("..", "/")) or "\\" in subfolder):
        raise UnsafeNameError(
            f"expected a folder inside {path_or_repo}, found subfolder={subfolder!r}. Give one inside it."
        )
    options = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    return Location(os.fspath(path_or_repo), subfolder, options)
