# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects from the Hugging Face Hub: fetched into its cache and read with every check.

Everything goes through `huggingface_hub`, so its environment (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN) and its
cache hold here too. What is fetched is read by `checkpoint`, with all its checks.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import get_session, httpx
from torch import nn
from typing_extensions import Unpack

from .. import checkpoint
from ..checkpoint.artefacts import Artefact, check_files, down_reference, main_file, open_artefact, space_for
from ..checkpoint.base_model import REPO_ID, check_fits
from ..checkpoint.config_file import CONFIG_FILE, read_config
from ..checkpoint.factors import SubjectSource
from ..checkpoint.space import SPACE_FILE, SubjectSpace
from ..errors import ArtefactNotFoundError, HubError, MissingDownError, UnsafeNameError, WrongKindError
from ..files import EMBEDDED
from ..tuner import DownSource, MetaLoraConfig


class HubOptions(TypedDict, total=False):
    """huggingface_hub's arguments of these names; all may be left out, and a local folder needs but `subfolder`."""

    subfolder: str | None
    revision: str | None
    token: str | bool | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    force_download: bool


@dataclass(frozen=True)
class Location:
    """Where an artefact lies: a local folder, or a repository with what it takes to fetch from it.

    Attributes:
        name: a folder or a repository id.
        subfolder: a folder inside it.
        options: the rest of `HubOptions`.
        folder: the local folder, None for a repository: what a file or a push calls a repository never turns into a
            folder that happens to lie in the working directory.
    """

    name: str
    subfolder: str | None
    options: Mapping[str, Any]
    folder: Path | None = None


KnownDown = Callable[[str], DownSource | None]
KnownSpace = Callable[[str], SubjectSpace | None]


def load(
    path_or_repo: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    known_down: KnownDown | None = None,
    known_space: KnownSpace | None = None,
    **hub: Unpack[HubOptions],
) -> DownSource | SubjectSource:
    """Read a Down, or a subject and the Down it names, from local folders or the Hub: the one way in.

    Args:
        model: a base model that it must fit, compared before a tensor is read.
        known_down: asked first for a subject's Down, by its fingerprint; None where it has none.
        known_space: the same for the subject space of a subject that is a code.
        hub: huggingface_hub's arguments, see `HubOptions`.

    Raises:
        HubError: a repository, its revision or its files cannot be had.
        BaseModelMismatchError: it does not fit `model`.
        MissingDownError: a subject names no Down that can be found.
        Everything that `checkpoint.load_down` raises.
    """
    at = locate(path_or_repo, **hub)
    with open_artefact(fetch(at)) as found:
        if not found.is_down:
            return subject_of(found, at, model, known_down, known_space)
        if model is not None:
            check_fits(model, found, name=str(path_or_repo))
        return found.down()


def subject_of(
    found: Artefact,
    at: Location,
    model: nn.Module | None = None,
    known_down: KnownDown | None = None,
    known_space: KnownSpace | None = None,
) -> SubjectSource:
    """Read what was opened as a subject, with the Down it names; arguments and errors are those of `load`."""
    down = known_down(found.config.down_fingerprint or "") if known_down is not None else None
    down = down or find_down(found.config, at, found.folder)
    if model is not None:
        check_fits(model, down, name=str(at.folder or at.name))

    def find_space() -> SubjectSpace:
        known = known_space(found.config.space_fingerprint or "") if known_space is not None else None
        return known or find_space_of(found.config, at, found.folder, down)

    source = found.subject(down, find_space)
    if at.folder is None:
        source.config.read_from(at.name, folder=str(found.folder), subfolder=at.subfolder, **at.options)
    return source


def load_down(
    path_or_repo: str | os.PathLike[str], *, expected_fingerprint: str | None = None, **hub: Unpack[HubOptions]
) -> DownSource:
    """Read a Down from a local folder or a Hub repository; raises WrongKindError for a subject, and as `load`.

    Args:
        expected_fingerprint: what a subject says its Down is; FingerprintMismatchError for another.
        hub: huggingface_hub's arguments, see `HubOptions`.
    """
    with open_artefact(fetch(locate(path_or_repo, **hub))) as found:
        return found.down(expected_fingerprint)


def load_subject(
    path_or_repo: str | os.PathLike[str],
    *,
    known_down: KnownDown | None = None,
    known_space: KnownSpace | None = None,
    **hub: Unpack[HubOptions],
) -> SubjectSource:
    """Read a subject, and the Down it names, from local folders or the Hub; arguments and errors are those of `load`.

    Raises:
        WrongKindError: it is a Down.
    """
    at = locate(path_or_repo, **hub)
    with open_artefact(fetch(at)) as found:
        if found.is_down:
            raise WrongKindError(
                f"{path_or_repo}: expected a subject (stage 'subject'), found a Down (stage 'meta'). Use load_down."
            )
        return subject_of(found, at, known_down=known_down, known_space=known_space)


def folder_of(path_or_repo: str | os.PathLike[str], also: Sequence[str] = (), **hub: Unpack[HubOptions]) -> Path:
    """The local folder of an artefact, fetched if need be, with those further files beside it that there are.

    Args:
        also: names of further files, such as `checkpoint.reader_files.READER_FILES`.
        hub: huggingface_hub's arguments, see `HubOptions`.

    Raises:
        HubError: the repository or a file of it cannot be had. ArtefactNotFoundError: a local path that is not there.
    """
    at = locate(path_or_repo, **hub)
    folder = fetch(at)
    for name in also if at.folder is None else ():
        fetch_beside(at, name)
    return folder


def find_down(config: MetaLoraConfig, at: Location, folder: Path) -> DownSource:
    """Read the Down that a subject's configuration names, starting from where the subject lies.

    Args:
        config: the subject's.
        at: where the subject was asked for; a relative path in a repository means another folder of that repository.
        folder: the local folder that holds the subject.

    Raises:
        As `load_down`, and MissingDownError when nothing is named or found.
    """
    return checkpoint.load_down(fetch(_place_of_down(config, at, folder)), expected_fingerprint=config.down_fingerprint)


def find_space_of(config: MetaLoraConfig, at: Location, folder: Path, down: DownSource) -> SubjectSpace:
    """Read the subject space that a code needs, beside the Down that its configuration names.

    Args:
        config, at, folder: as `find_down` takes them.
        down: the Down, read already or on a model.

    Raises:
        As `find_down` and `checkpoint.artefacts.space_for`.
    """
    return space_at(_place_of_down(config, at, folder), config, down)


def space_at(place: Location, config: MetaLoraConfig, down: DownSource) -> SubjectSpace:
    """Read the subject space that a code needs from where its Down lies; raises as `find_space_of`."""
    folder = fetch(place, (CONFIG_FILE,))
    fetch_beside(place, SPACE_FILE)
    return space_for(config, folder, down)


def _place_of_down(config: MetaLoraConfig, at: Location, folder: Path) -> Location:
    name = config.down or ""
    is_path = name.startswith(".") or not REPO_ID.fullmatch(name)
    if name and is_path and not os.path.isabs(name) and at.folder is None:
        inside = posixpath.normpath(posixpath.join(at.subfolder or ".", name))
        if inside.startswith("..") or "\\" in inside or inside == ".":
            raise UnsafeNameError(
                f"{at.name}: expected a Down inside the repository, found the path {name[:80]!r}. "
                "Ask its author to name the Down's repository."
            )
        return Location(at.name, inside, at.options)
    named = down_reference(config, folder)
    if isinstance(named, Path):
        return Location(str(named), None, {}, named)
    return Location(named, None, {**at.options, "revision": config.down_revision})


def fetch(at: Location, names: Sequence[str] | None = None) -> Path:
    """Return the local folder of an artefact, its two files downloaded into the Hub's cache if need be.

    Args:
        names: other files than these.

    Raises:
        HubError: the repository, its revision or its files cannot be had.
        ArtefactNotFoundError: a local path that is not there.
    """
    if at.folder is not None:
        if not at.folder.is_dir():
            raise ArtefactNotFoundError(f"{at.folder}: expected a folder, found none. Check the path and subfolder=.")
        return at.folder
    if not REPO_ID.fullmatch(at.name) or ".." in at.name:
        raise ArtefactNotFoundError(
            f"{at.name}: expected a local folder or a repository id such as ann/faces, found neither. Check it."
        )
    at = _within_reach(at)
    if names is None:
        folder = _download(at, CONFIG_FILE).parent
        names = (main_file(read_config(folder)),)
    return [_download(at, name) for name in names][-1].parent


def _within_reach(at: Location) -> Location:
    """The place itself, or its cache alone where the Hub is not to be reached: each download would try for 23 s."""
    if at.options.get("local_files_only") or constants.HF_HUB_OFFLINE:
        return at
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (httpx.ConnectError, httpx.ProxyError):
        return replace(at, options={**at.options, "local_files_only": True})
    except httpx.HTTPError:
        pass  # slow or odd: the download itself knows better
    return at


def fetch_beside(at: Location, name: str) -> Path | None:
    """A further file of an artefact, None where there is none; raises HubError as `fetch` does."""
    if at.folder is not None:
        return at.folder / name if (at.folder / name).is_file() else None
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
    except hub_errors.EntryNotFoundError as error:
        if isinstance(error, hub_errors.LocalEntryNotFoundError):
            raise HubError(
                f"{where}: expected {name} in the cache, as the Hub was not to be reached, found none. "
                "Download it once while online (metalora pull), or give a local folder."
            ) from error
        raise HubError(f"{where}: expected the file {name}, found none. Check the name, or give subfolder=.") from error
    except hub_errors.RevisionNotFoundError as error:
        raise HubError(f"{where}: expected this revision, found none. Name a branch, tag or commit of it.") from error
    except HUB_FAILURES as error:
        missing = isinstance(error, hub_errors.RepositoryNotFoundError)
        expected = "a repository" if missing else f"{name} from the Hub"
        raise HubError(f"{where}: expected {expected}, found {what_failed(error)}") from error


HUB_FAILURES = (hub_errors.HfHubHTTPError, httpx.HTTPError, OSError, ValueError, RuntimeError)
"""What huggingface_hub raises: its own errors, its client's (no ConnectionErrors), RuntimeErrors of its storage."""

_LOG_IN = "Log in (hf auth login), set HF_TOKEN, or give token=."


def what_failed(error: Exception) -> str:
    """What went wrong between here and the Hub, and what to do: the end of a sentence."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.GatedRepoError):
        return f"a gated repository. Accept its terms on its page first. {_LOG_IN}"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f"no repository that you may read. Check the name. Is it private? {_LOG_IN}"
    if isinstance(error, hub_errors.LocalTokenNotFoundError):
        return f"no token on this machine. {_LOG_IN}"
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "that the Hub is switched off (HF_HUB_OFFLINE). Unset it, or use what is in the cache."
    if status == 401:
        return f"that it does not know you. {_LOG_IN}"
    if status == 403:
        return f"that your token may not do this ({error}). Give it the right on the Hub's page for tokens, or another."
    if status == 429:
        return "too many requests. Wait a few minutes and try again."
    if isinstance(error, (httpx.TransportError, ConnectionError)):
        return f"no connection ({error}). Check the network or the proxy and try again."
    return f"{error}. Try again."


def resolve_down(config: MetaLoraConfig) -> DownSource:
    """The tuner's way to the Down that a configuration names (see `tuner.set_down_loader`); raises as `load_down`."""
    if config.origin is not None:
        at = _origin(config)
        try:
            return find_down(config, at, Path(at.name, at.subfolder or ""))
        except (HubError, MissingDownError):
            # Somebody may have put a folder of their own into the configuration since it was read.
            if not os.path.isdir(config.down or ""):
                raise
    return load_down(config.down or "", revision=config.down_revision, expected_fingerprint=config.down_fingerprint)


def check_origin(config: MetaLoraConfig, model: nn.Module) -> None:
    """Check the file of an adapter that PEFT's own verbs load, before they touch the model; raises as `load_down`."""
    if config.origin is not None:
        check_files(fetch(_origin(config)), config, model)


def _origin(config: MetaLoraConfig) -> Location:
    origin = config.origin or {}
    return locate(origin["name"], **{name: origin[name] for name in HubOptions.__annotations__ if name in origin})


def locate(path_or_repo: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Location:
    """Name a place: what comes with the package, a local folder if there is one of this path, or else a repository.

    Raises:
        UnsafeNameError: a subfolder that leads out of it.
    """
    at = repository(EMBEDDED.get(os.fspath(path_or_repo), path_or_repo), **hub)
    return replace(at, folder=Path(at.name, at.subfolder or "")) if os.path.isdir(at.name) else at


def repository(path_or_repo: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Location:
    """Name a repository without looking there yet; raises as `locate`."""
    unknown = sorted(set(hub) - set(HubOptions.__annotations__))
    if unknown:
        raise TypeError(f"expected the arguments {', '.join(HubOptions.__annotations__)}, found {', '.join(unknown)}")
    subfolder = hub.pop("subfolder", None)
    if subfolder is not None and (posixpath.normpath(subfolder).startswith(("..", "/")) or "\\" in subfolder):
        raise UnsafeNameError(
            f"expected a folder inside {path_or_repo}, found subfolder={subfolder!r}. Give one inside it."
        )
    return Location(os.fspath(path_or_repo), subfolder, hub)
