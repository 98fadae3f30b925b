# SPDX-License-Identifier: Apache-2.0
"""Downs and subjects to the Hugging Face Hub, with a card made for each; a person stays private unless asked otherwise.

What is pushed has passed every check first, the subject's Down on the Hub included, so that nobody publishes what
nobody can load.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from typing_extensions import Unpack

from ..checkpoint import load_down as load_local_down
from ..checkpoint.artefacts import MAIN_FILES, SIDE_FILES, open_artefact
from ..checkpoint.base_model import REPO_ID
from ..checkpoint.card_file import CARD_FILE, renewed, sealed
from ..checkpoint.config_file import CONFIG_FILE
from ..checkpoint.factors import SubjectSource
from ..checkpoint.folded import FOLD_FILE, LoraPair, check_fold, component_name, fold_subject
from ..checkpoint.reader_files import ENCODER_CONFIG_FILE, READER_FILES, ReaderFiles, check_reader
from ..checkpoint.space import CodeSource, SubjectCode
from ..checkpoint.untrusted import read_json
from ..checkpoint.writing import bare_weights, what_else, write_artefact
from ..data import load_image
from ..data.images import png
from ..errors import (
    ArtefactNotFoundError,
    HubError,
    MetaLoraError,
    MissingDownError,
    OutputExistsError,
    UnsafeNameError,
    WrongKindError,
)
from ..files import EMBEDDED, temporary_folder
from ..tuner import DownSource, MetaLoraConfig
from ..tuner.config import reference_to_write
from .cards import Picture, model_card
from .loading import (
    HUB_FAILURES,
    HubOptions,
    Location,
    fetch,
    fetch_beside,
    locate,
    repository,
    space_at,
    subject_of,
    what_failed,
)

_IN_GALLERY = re.compile(r"images/\d+\.png")


class Pushed(str):
    """The id of a commit, as text.

    Attributes:
        private: whether the repository is; one that was there before stays what it was.
    """

    private: bool


def push_down(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    gallery: Mapping[str, str] | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
) -> Pushed:
    """Publish a Down: its two files, a card made from its facts, and what it reads photos with, if it does.

    Args:
        folder: what `save_down` wrote; it is checked in full before anything is sent.
        repo_id: `owner/name`; made if it does not exist.
        private: whether a new repository is private. True refuses one that exists and is public.
        gallery: pictures for the card, file to prompt.
        revision: the branch to push to.
        overwrite: whether it may replace what is no Down.

    Returns:
        The id of the commit: give it to subjects as `down_revision`.

    Raises:
        HubError: the Hub refuses, or the repository is public and `private` is True.
        OutputExistsError: something else lies there, or somebody else, and `overwrite` is not set.
        Everything that `checkpoint.load_down` raises.
    """
    with open_artefact(_local(folder)) as found:
        source = found.down()
    config = dataclasses.replace(found.config, num_slots=1, down_fingerprint=source.fingerprint)
    reader = _reader_of(Location(str(folder), None, {}, Path(folder)), config, source)
    return _push(
        config, source.tensors, {}, repo_id, private, gallery or {}, revision, commit_message, token, overwrite, reader
    )


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
    overwrite: bool = False,
) -> Pushed:
    """Publish a subject: its two files, the exact fold and a card. Private unless the caller says otherwise.

    Args:
        folder: what `save_subject` wrote; it is checked in full, with its Down, before anything is sent.
        repo_id: `owner/name`; made if it does not exist.
        private: False to show a person to everybody. True refuses a repository that exists and is public.
        down: the Down's repository id, needed when the subject names a local folder.
        down_revision: its revision; by default the commit that its repository is at now.
        gallery: pictures for the card, file to prompt.
        revision: the branch to push to.
        overwrite: whether it may replace another kind, or another person.

    Returns:
        The id of the commit.

    Raises:
        MissingDownError: the subject names no repository and `down` was not given.
        FingerprintMismatchError: `down` holds another Down.
        HubError: the Hub refuses, or the repository is public and `private` is True.
        OutputExistsError: something else lies there, or somebody else, and `overwrite` is not set.
        Everything that `hub.load` raises.
    """
    with open_artefact(_local(folder)) as found:
        config = found.config
        reference = down or config.down or ""
        if reference in EMBEDDED:
            raise MissingDownError(
                f"{folder}: expected the Down in a repository, found {reference}, which is none: it comes with the "
                f"package. Push a copy (metalora pull --repo_id {reference} --output_dir DIR, then metalora push "
                "--folder DIR), and give its repository as `down`."
            )
        if not REPO_ID.fullmatch(reference) or (down is None and os.path.isdir(found.folder / reference)):
            raise MissingDownError(
                f"{folder}: expected the Down in a repository, so that others can load the subject, found "
                f"{reference!r}. Push the Down first (push_down) and give its repository as `down`."
            )
        if config.num_slots > 1:
            raise WrongKindError(
                f"{folder}: expected one subject, found {config.num_slots} in one file. Save the one that is "
                "meant with save_subject(..., slot=<its number>)."
            )
        at = Location(reference, None, {"revision": down_revision or config.down_revision, "token": token})
        place = fetch(at)
        its_down = load_local_down(place, expected_fingerprint=config.down_fingerprint)
        source = found.subject(its_down, lambda: space_at(at, config, its_down))
    # The Hub's cache calls a folder by the commit that it holds: the subject keeps the Down that it was checked with.
    config = dataclasses.replace(config, down=reference, down_revision=at.options["revision"] or place.name)
    pairs = fold_subject(config, source.down.tensors, source.tensors)
    content = source.code if isinstance(source, CodeSource) else source.tensors
    return _push(config, content, pairs, repo_id, private, gallery or {}, revision, commit_message, token, overwrite)


def _local(folder: str | os.PathLike[str]) -> Path:
    """What is pushed lies here; raises ArtefactNotFoundError."""
    if not os.path.isdir(folder):
        raise ArtefactNotFoundError(f"{folder}: expected a local folder to push, found none. Check the path.")
    return Path(folder)


def pull(
    repo_id: str,
    folder: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    **hub: Unpack[HubOptions],
) -> Path:
    """Download a Down or a subject (its Down too) and check it; afterwards it loads offline.

    Args:
        repo_id: the repository.
        folder: a copy of the artefact's files is written here, all at once; None leaves it in the Hub's cache.
        overwrite: whether the copy may replace another kind, or another person.
        hub: huggingface_hub's arguments, see `HubOptions`.

    Returns:
        The folder that holds it.

    Raises:
        CorruptFileError: the fold beside a subject is not its fold.
        OutputExistsError: something else lies in the folder.
        As `load_subject`.
    """
    at = locate(repo_id, **hub) if repo_id in EMBEDDED else repository(repo_id, **hub)
    with open_artefact(fetch(at)) as found:
        config = found.config
        source = found.down() if found.is_down else subject_of(found, at)
    reader = None
    if isinstance(source, DownSource):
        reader = _reader_of(at, config, source)
        if reader is not None and folder is None:
            check_reader(found.folder, config, source)
    pairs: dict[str, LoraPair] = {}
    if isinstance(source, SubjectSource) and (fold := fetch_beside(at, FOLD_FILE)) is not None:
        pairs = fold_subject(config, source.down.tensors, source.tensors)
        check_fold(fold, pairs, component_name(config))
    if folder is None:
        return found.folder
    if not found.is_down:  # which may lie in another folder of the repository
        config = dataclasses.replace(config, down=reference_to_write(source.config.located_down(), folder))
    card = fetch_beside(at, CARD_FILE)
    text = card.read_bytes() if card is not None else None
    content = source.code if isinstance(source, CodeSource) else source.tensors
    return write_artefact(Path(folder), config, content, pairs, reader=reader, card=text, overwrite=overwrite)


def _reader_of(at: Location, config: MetaLoraConfig, down: DownSource) -> ReaderFiles | None:
    """What a Down reads photos with, to be copied and checked as far as it takes no base; None where it does not read.

    Raises:
        ArtefactNotFoundError: a file that its configuration names is not there.
        UnsafeNameError: the encoder looks through a model that only this machine has.
    """
    if config.space_fingerprint is None or config.encoder_fingerprint is None:
        return None
    paths: list[Path] = []
    for name in READER_FILES:
        path = fetch_beside(at, name)
        if path is None:
            raise ArtefactNotFoundError(
                f"{at.folder or at.name}: expected {name}, as the Down's configuration says that it reads photos, "
                "found none. Train its encoder again, or save the Down without."
            )
        paths.append(path)
    kind, _, model = str(read_json(paths[READER_FILES.index(ENCODER_CONFIG_FILE)]).get("source")).partition(":")
    if kind == "transformers" and not REPO_ID.fullmatch(model):
        raise UnsafeNameError(
            f"{paths[-1]}: expected an encoder that looks through a model of the Hub, found {model[:80]!r}, which only "
            "this machine has. Train it on a repository's model."
        )

    def write(stage: Path) -> None:
        for path in paths:
            shutil.copyfile(path, stage / path.name)
        check_reader(stage, config, down)

    return ReaderFiles(config.space_fingerprint, config.encoder_fingerprint, write)


def _push(
    config: MetaLoraConfig,
    content: Mapping[str, torch.Tensor] | SubjectCode,
    fold: Mapping[str, LoraPair],
    repo_id: str,
    private: bool,
    gallery: Mapping[str, str],
    revision: str | None,
    commit_message: str | None,
    token: str | bool | None,
    overwrite: bool,
    reader: ReaderFiles | None = None,
) -> Pushed:
    """Send what a fresh save of this would hold: nothing is taken from a file by its name.

    What an older push left and this one does not write goes in the same commit.
    """
    if not REPO_ID.fullmatch(repo_id) or ".." in repo_id:
        raise HubError(f"{repo_id!r}: expected a repository id such as ann/faces-down. Give owner and name.")
    pictures = {f"images/{index}.png": _picture(path) for index, path in enumerate(gallery)}
    if config.base_model_name_or_path and not REPO_ID.fullmatch(config.base_model_name_or_path):
        # A path on this machine means nothing to others, and may say more about its owner than they like.
        nameless: dict[str, Any] = {"base_model_name_or_path": None}
        config = dataclasses.replace(config, **nameless)
    shown = tuple(Picture(name, prompt) for name, prompt in zip(pictures, gallery.values(), strict=True))
    with temporary_folder() as made:
        saved = write_artefact(made / "artefact", config, content, fold, reader=reader)
        contents = {path.name: path.read_bytes() for path in sorted(saved.iterdir())}
        card = model_card(config, repo_id, saved, shown, has_fold=bool(fold))
    contents |= pictures
    api = huggingface_hub.HfApi(token=token)
    kind = "Down" if config.stage == "meta" else "subject"
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        there = api.model_info(repo_id)
        is_private = bool(there.private)
        if private and not is_private:
            raise HubError(
                f"{repo_id}: expected a private repository for this {kind}, found a public one. Give private=False "
                "(--public) if everybody may see it, or choose another repository. Nothing was sent."
            )
        if revision is not None:
            with suppress(hub_errors.RevisionNotFoundError):  # a new branch begins at the main one
                there = api.model_info(repo_id, revision=revision)
        at = repository(repo_id, revision=there.sha, token=token)
        names = {file.rfilename for file in there.siblings or ()}
        older, found = _older(names, at, config)
        if found is not None and not overwrite:
            raise OutputExistsError(
                f"{repo_id}: expected a new repository, or an older push of the same, found {found}. Choose another "
                "repository, or give overwrite=True (--overwrite) to replace it. Nothing was sent."
            )
        if CARD_FILE in names and found is None:
            card = renewed(fetch(at, (CARD_FILE,)).joinpath(CARD_FILE).read_bytes(), card, f"{repo_id}/{CARD_FILE}")
        else:
            card = sealed(card)
        contents[CARD_FILE] = card.encode()
        older -= {*_IN_GALLERY.findall(card)}  # which somebody's words still show
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [
                *(huggingface_hub.CommitOperationAdd(name, content) for name, content in contents.items()),
                *(huggingface_hub.CommitOperationDelete(name) for name in sorted(older - contents.keys())),
            ],
            commit_message=commit_message or f"Upload a Meta-LoRA {kind}",
            revision=revision,
            parent_commit=there.sha,
        )
    except MetaLoraError:
        raise
    except HUB_FAILURES as error:
        raise HubError(f"{repo_id}: expected to push this {kind}, found {what_failed(error)}") from error
    pushed = Pushed(done.oid)
    pushed.private = is_private
    return pushed


def _older(names: Set[str], at: Location, config: MetaLoraConfig) -> tuple[set[str], str | None]:
    """The files that an older push left, and what it is, in words, if it is not of the same."""
    if CONFIG_FILE in names:
        found = what_else(fetch(at, (CONFIG_FILE,)), config.stage, config.subject_name)
    elif (found := bare_weights(names)) is None:
        return set(), None
    return {name for name in names if name in (*MAIN_FILES, *SIDE_FILES) or _IN_GALLERY.fullmatch(name)}, found


def _picture(path: str) -> bytes:
    """A picture for the gallery, drawn anew: nothing but its pixels goes out.

    Raises:
        ArtefactNotFoundError, UnreadableImageError: there is none, or it is no picture.
    """
    if not Path(path).is_file():
        raise ArtefactNotFoundError(f"{path}: expected a picture for the gallery, found none. Check the path.")
    return png(load_image(path))
