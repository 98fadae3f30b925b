# SPDX-License-Identifier: Apache-2.0
"""Photos from a data set of the Hub, or from a local one, through the datasets library (the extra `[data]`).

Images stay encoded, in the data set's memory-mapped files, until a view is cut.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...data import Photo, Subject, read_file, require_distinct, usable_caption
from ...errors import DataError, DatasetUnavailableError, MetadataError, NoImagesError, UnreadableImageError
from ..stage_settings import TrainingConfig

_SPLIT = "train"


def read_dataset(config: TrainingConfig, *, one_subject: bool = False) -> list[Subject]:
    """The subjects of `config.dataset_name`, in the order of their first images.

    Columns of strings, whole numbers and class labels that are alike on all images of a subject are its tags.

    Args:
        one_subject: a data set without `subject_column` shows one subject.

    Raises:
        DatasetUnavailableError: the datasets library is not installed.
        NoImagesError: no such data set, or nothing in it.
        MetadataError: a column is missing, or is not what it should be; a name cannot be a folder's.
    """
    name = str(config.dataset_name)
    table = _load(config, name)
    features = table.features
    # What somebody named has to be there: without it captions would be another's, and several people one.
    optional = {"text", "subject"} if one_subject else {"text"}
    required = [config.image_column, config.subject_column, config.caption_column]
    missing = [column for column in required if column not in features and column not in optional]
    if missing:
        raise MetadataError(
            f"expected the column(s) {', '.join(map(repr, missing))} in {name}, found {', '.join(features)}: name them "
            "with image_column, caption_column and subject_column"
        )
    from datasets import Image

    if not isinstance(features[config.image_column], Image):
        raise MetadataError(
            f"expected images in the column {config.image_column!r} of {name}, found {features[config.image_column]}: "
            "name another image_column"
        )
    images = table.select_columns([config.image_column]).cast_column(config.image_column, Image(decode=False))
    others = [column for column in features if column != config.image_column]
    texts = {column: values for column in others if (values := _as_text(table, column)) is not None}
    if config.subject_column in features and config.subject_column not in texts:
        raise MetadataError(
            f"expected names or labels in the column {config.subject_column!r} of {name}, found "
            f"{features[config.subject_column]}: name another subject_column"
        )
    if config.caption_column in features and config.caption_column not in texts:
        raise MetadataError(
            f"expected texts in the column {config.caption_column!r} of {name}, found "
            f"{features[config.caption_column]}: name another caption_column, or leave this column out"
        )
    captions = _captions(config, name, texts)
    owners = texts.pop(config.subject_column, None) or ["subject"] * len(table)
    people: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        people.setdefault(owner or "", []).append(row)
    if not people or "" in people:
        what = f"a row without {config.subject_column!r}" if people else "no row"
        raise NoImagesError(f"expected images of named subjects in {name}, found {what}: correct the data set")
    subjects = [
        Subject(
            owner,
            [
                Photo(
                    Path(f"{name}[{_SPLIT}][{row}]"),
                    captions[row] if captions else None,
                    content=_content(images, config.image_column, row, f"{name}[{_SPLIT}][{row}]"),
                )
                for row in rows
            ],
            {
                column: value
                for column, values in texts.items()
                if len(found := {values[row] for row in rows}) == 1 and (value := found.pop()) is not None
            },
        )
        for owner, rows in people.items()
    ]
    require_distinct(subjects)
    return subjects


def _load(config: TrainingConfig, name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DatasetUnavailableError(
            f"expected the datasets library for dataset_name, found none ({error}): pip install 'peft-metalora[data]'"
        ) from error
    cache = None if config.cache_dir is None else str(Path(config.cache_dir) / "datasets")
    options: dict[str, Any] = {"cache_dir": cache, "split": _SPLIT}
    try:
        if os.path.isfile(name):
            kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(name).suffix.lower(), "json")
            return datasets.load_dataset(kind, data_files=name, **options)
        if os.path.isfile(os.path.join(name, "state.json")):
            return datasets.load_from_disk(name)
        if config.local_files_only:
            options["download_config"] = datasets.DownloadConfig(local_files_only=True)
        return datasets.load_dataset(name, config.dataset_config_name, **options)
    except Exception as error:  # whatever a builder, pyarrow or the network raises
        raise NoImagesError(
            f"expected a data set with a split {_SPLIT!r} at {name!r}, found none that loads ({error}): give a "
            "repository id, a folder or a parquet file"
        ) from error


def _captions(config: TrainingConfig, name: str, texts: dict[str, list[str | None]]) -> list[str | None] | None:
    """The column of captions, taken out of `texts`; where nobody chose one, 'caption' serves as 'text' does."""
    column = config.caption_column
    if column not in texts and column == "text" and config.subject_column != "caption":
        column = "caption"
    captions = texts.pop(column, None)
    if captions is None:
        return None
    usable = []
    for row, caption in enumerate(captions):
        try:
            usable.append(usable_caption(caption))
        except ValueError as error:
            raise MetadataError(f"{name}[{_SPLIT}][{row}]: expected a caption, found {error}: shorten it") from error
    return usable


def _as_text(table: Any, column: str) -> list[str | None] | None:
    """A column of strings, whole numbers or labels as strings; None for any other."""
    feature = table.features[column]
    if not str(getattr(feature, "dtype", "")).startswith(("string", "large_string", "int", "uint", "bool")):
        return None
    name = getattr(feature, "int2str", str)  # of a class label; -1 is none
    return [None if value is None or (name is not str and value < 0) else name(value) for value in table[column]]


def _content(images: Any, column: str, row: int, name: str) -> Callable[[], bytes]:
    """Gives the bytes of an image, which the data set holds or has as a file."""

    def read() -> bytes:
        image = images[row][column]
        if image and image.get("bytes"):
            return bytes(image["bytes"])
        try:
            return read_file(image["path"])
        except (DataError, TypeError, KeyError) as error:
            raise UnreadableImageError(f"expected an image, found none in {name} ({error}): correct it") from error

    return read
