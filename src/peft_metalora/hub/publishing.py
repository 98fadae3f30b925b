# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects to the Hugging Face Hub, with a card made for each; a person stays private unless asked otherwise.

What is pushed has passed every check first, the subject's Down on the Hub included, so that nobody publishes what
nobody can load.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors
from typing_extensions import Unpack

from ..checkpoint.base_model import REPO_ID
from ..checkpoint.config_file import CONFIG_FILE, config_json, read_config
from ..checkpoint.factors import WEIGHTS_FILE
from ..checkpoint.folded import FOLD_FILE
from ..errors import ArtefactNotFoundError, HubError, MissingDownError
from ..files import staged_folder
from ..tuner import MetaLoraConfig
from .cards import Picture, model_card
from .loading import HubOptions, fetch, fetch_beside, load, load_down, load_subject, locate


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
    load_down(folder)
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
    revision_of_down = down_revision or config.down_revision
    source = load_down(reference, revision=revision_of_down, token=token, expected_fingerprint=config.down_fingerprint)
    load_subject(folder, known_down=lambda _: source)
    revision_of_down = revision_of_down or _commit_of(reference, token)
    config = dataclasses.replace(config, down=reference, down_revision=revision_of_down)
    return _push(Path(folder), repo_id, config, private, gallery or {}, revision, commit_message, token)


def pull(repo_id: str, folder: str | os.PathLike[str] | None = None, **hub: Unpack[HubOptions]) -> Path:
    """Download a Down or a subject (its Down too) and check it; afterwards it loads offline.

    Args:
        repo_id: the repository.
        folder: a copy of the artefact's files is written here, all at once; None leaves it in the Hub's cache.
        hub: huggingface_hub's arguments, see `HubOptions`.

    Returns:
        The folder that holds it.

    Raises:
        As `load_subject`.
    """
    load(repo_id, **hub)
    at = locate(repo_id, **hub)
    found = fetch(at)
    if folder is None:
        return found
    beside = {name: fetch_beside(at, name) for name in (FOLD_FILE, "README.md")}
    with staged_folder(folder) as stage:
        for name, path in {WEIGHTS_FILE: found / WEIGHTS_FILE, CONFIG_FILE: found / CONFIG_FILE, **beside}.items():
            if path is not None:
                shutil.copyfile(path, stage / name)
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
    if config.base_model_name_or_path and not REPO_ID.fullmatch(config.base_model_name_or_path):
        # A path on this machine means nothing to others, and may say more about its owner than they like.
        nameless: dict[str, Any] = {"base_model_name_or_path": None}
        config = dataclasses.replace(config, **nameless)
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


def _commit_of(repo_id: str, token: str | bool | None) -> str | None:
    """The commit that a repository is at, so that a subject keeps the Down it was checked with."""
    if os.path.isdir(repo_id):
        return None
    try:
        return huggingface_hub.HfApi(token=token).repo_info(repo_id).sha
    except (hub_errors.HfHubHTTPError, hub_errors.OfflineModeIsEnabled, ConnectionError):
        return None
