# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects on the Hugging Face Hub: fetched into its cache, pushed with a card; people are private.

Everything goes through `huggingface_hub`, so its environment (HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN) and its
cache hold here too. What is fetched is read by `checkpoint`, with all its checks.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from .base_model import REPO_ID
from .cards import Picture, model_card
from .checkpoint import FOLD_FILE, SubjectSource, down_reference
from .checkpoint import load_down as load_local_down
from .checkpoint import load_subject as load_local_subject
from .config_file import CONFIG_FILE, config_json, read_config
from .errors import ArtefactNotFoundError, HubError, MissingDownError, UnsafeNameError
from .factors import WEIGHTS_FILE
from .files import staged_folder
from .tuner import DownSource, MetaLoraConfig


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
) -> SubjectSource:
    """Read a subject, and the Down it names, from local folders or the Hub; the arguments are huggingface_hub's.

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
    return load_local_subject(fetch(at), find_down=lambda config, folder: find_down(config, at, folder))


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
    if local.is_dir():
        return local
    if not REPO_ID.fullmatch(at.name) or ".." in at.name:
        raise ArtefactNotFoundError(
            f"{at.name}: expected a local folder or a repository id such as ann/faces, found neither. Check it."
        )
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        path = _download(at, name)
    return path.parent


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
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError) as error:
        raise HubError(
            f"{where}: expected {name} from the Hub, found: {error}. Check the network and try again."
        ) from error


_given: ContextVar[DownSource | None] = ContextVar("_given", default=None)


@contextmanager
def given(down: DownSource) -> Iterator[None]:
    """Within the block, a subject that names this Down gets it as it was read, from wherever that was."""
    token = _given.set(down)
    try:
        yield
    finally:
        _given.reset(token)


def resolve_down(config: MetaLoraConfig) -> DownSource:
    """The tuner's way to the Down that a configuration names (see `tuner.set_down_loader`).

    Raises:
        As `load_down`.
    """
    down = _given.get()
    if down is not None and down.fingerprint == config.down_fingerprint:
        return down
    if config.origin is None or os.path.isdir(config.down or ""):
        return load_down(config.down or "", revision=config.down_revision, expected_fingerprint=config.down_fingerprint)
    known = inspect.signature(locate).parameters
    at = locate(config.origin["name"], **{key: value for key, value in config.origin.items() if key in known})
    return find_down(config, at, Path(at.name, at.subfolder or ""))


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


def push_down(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    gallery: Mapping[str, str] | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Publish a Down: its two files and a card made from its facts.

    Args:
        folder: what `save_down` wrote; it is checked in full before anything is sent.
        repo_id: `owner/name`; made if it does not exist.
        private: whether a new repository is private.
        gallery: pictures for the card, file to prompt.
        revision: the branch to push to.

    Returns:
        The id of the commit: give it to subjects as `down_revision`.

    Raises:
        HubError: the Hub refuses.
        Everything that `checkpoint.load_down` raises.
    """
    load_local_down(folder)
    return _push(Path(folder), repo_id, read_config(folder), private, gallery or {}, revision, commit_message, token)


def push_subject(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = True,
    down: str | None = None,
    down_revision: str | None = None,
    gallery: Mapping[str, str] | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Publish a subject: its two files, the exact fold and a card. Private unless the caller says otherwise.

    Args:
        folder: what `save_subject` wrote; it is checked in full, with its Down, before anything is sent.
        repo_id: `owner/name`; made if it does not exist.
        private: False to show a person to everybody. True refuses a repository that exists and is public.
        down: the Down's repository id, needed when the subject names a local folder.
        down_revision: its revision; by default the commit that its repository is at now.
        gallery: pictures for the card, file to prompt.
        revision: the branch to push to.

    Returns:
        The id of the commit.

    Raises:
        MissingDownError: the subject names no repository and `down` was not given.
        FingerprintMismatchError: `down` holds another Down.
        HubError: the Hub refuses, or the repository is public and `private` is True.
        Everything that `checkpoint.load_subject` raises.
    """
    config = read_config(folder)
    reference = down or config.down
    if (
        reference is None
        or not REPO_ID.fullmatch(reference)
        or (down is None and os.path.isdir(Path(folder, reference)))
    ):
        raise MissingDownError(
            f"{folder}: expected the Down in a repository, so that others can load the subject, found {reference!r}. "
            "Push the Down first (push_down) and give down=<its repository>."
        )
    at = Location(reference, None, {"revision": down_revision or config.down_revision, "token": token})
    source = load_local_down(fetch(at), expected_fingerprint=config.down_fingerprint)
    load_local_subject(folder, find_down=lambda *_: source)
    config = dataclasses.replace(config, down=reference, down_revision=at.options["revision"] or _commit_of(at))
    return _push(Path(folder), repo_id, config, private, gallery or {}, revision, commit_message, token)


def pull(
    repo_id: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
) -> Path:
    """Download a Down or a subject (its Down too) and check it; afterwards it loads offline.

    Args:
        repo_id: the repository.
        folder: a copy of the artefact's files is written here, all at once; None leaves it in the Hub's cache.

    Returns:
        The folder that holds it.

    Raises:
        As `load_subject`.
    """
    at = locate(
        repo_id,
        subfolder=subfolder,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
    )
    found = fetch(at)
    if read_config(found).stage == "meta":
        load_local_down(found)
    else:
        load_local_subject(found, find_down=lambda config, place: find_down(config, at, place))
    if folder is None:
        return found
    with staged_folder(folder) as stage:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            shutil.copyfile(found / name, stage / name)
    return Path(folder)


def _push(
    folder: Path,
    repo_id: str,
    config: MetaLoraConfig,
    private: bool,
    gallery: Mapping[str, str],
    revision: str | None,
    commit_message: str | None,
    token: str | bool | None,
) -> str:
    if not REPO_ID.fullmatch(repo_id) or ".." in repo_id:
        raise HubError(f"{repo_id!r}: expected a repository id such as ann/faces-down. Give owner and name.")
    pictures = {f"images/{index}{Path(path).suffix}": path for index, path in enumerate(gallery)}
    for path in pictures.values():
        if not Path(path).is_file():
            raise ArtefactNotFoundError(f"{path}: expected a picture for the gallery, found none. Check the path.")
    fold = folder / FOLD_FILE
    shown = tuple(Picture(name, gallery[path]) for name, path in pictures.items())
    card = model_card(config, repo_id, folder, shown, has_fold=fold.is_file())
    contents: dict[str, bytes | str] = {CONFIG_FILE: config_json(config), "README.md": card.encode()}
    contents |= {WEIGHTS_FILE: str(folder / WEIGHTS_FILE), **pictures}
    if fold.is_file():
        contents[FOLD_FILE] = str(fold)
    api = huggingface_hub.HfApi(token=token)
    kind = "Down" if config.stage == "meta" else "subject"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:
            raise HubError(
                f"{repo_id}: expected a private repository for this {kind}, found a public one. Give private=False "
                "(--public) if everybody may see it, or choose another repository. Nothing was sent."
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [huggingface_hub.CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=commit_message or f"Upload a Meta-LoRA {kind}",
            revision=revision,
        )
    except (hub_errors.HfHubHTTPError, hub_errors.OfflineModeIsEnabled, ConnectionError) as error:
        raise HubError(
            f"{repo_id}: expected to push this {kind}, found: {error}. Log in (hf auth login), with rights to write."
        ) from error
    return str(done.oid)


def _commit_of(at: Location) -> str | None:
    """The commit that a repository is at, so that a subject keeps the Down it was checked with."""
    if os.path.isdir(at.name):
        return None
    try:
        return huggingface_hub.HfApi(token=at.options.get("token")).repo_info(at.name).sha
    except (hub_errors.HfHubHTTPError, hub_errors.OfflineModeIsEnabled, ConnectionError):
        return None
