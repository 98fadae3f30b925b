# SPDX-License-Identifier: Apache-2.0
"""Where the photos of a run come from: a folder, or a data set that the datasets library loads."""

from __future__ import annotations

import os
from pathlib import Path

from ...data import Subject, read_photos, read_subjects
from ...errors import ConfigError, MetadataError
from ..stage_settings import MetaTrainConfig, PersonalizeConfig, TrainEncoderConfig
from .hub_dataset import read_dataset


def training_subjects(config: MetaTrainConfig | TrainEncoderConfig) -> list[Subject]:
    """The subjects of a run over many.

    Raises:
        ConfigError: no source, or two. MetadataError: a subject without the tag that `balance_by` asks for.
        What `read_subjects` and `read_dataset` raise.
    """
    if (config.train_data_dir is None) == (config.dataset_name is None):
        raise ConfigError(
            f"expected train_data_dir or dataset_name, found {'none' if config.dataset_name is None else 'both'}: give "
            "a folder that holds a folder for each subject, or a data set"
        )
    subjects = read_dataset(config) if config.train_data_dir is None else read_subjects(config.train_data_dir)
    tag = config.balance_by if isinstance(config, MetaTrainConfig) else None
    if tag is not None and (missing := [subject.name for subject in subjects if tag not in subject.tags]):
        raise MetadataError(
            f"expected the tag {tag!r} of every subject, alike on all their photos, found none of "
            f"{', '.join(missing[:5])} ({len(missing)} of {len(subjects)}): add it to people.json, to metadata.jsonl "
            "or to the data set, or leave balance_by out"
        )
    return subjects


def check_instance_source(config: PersonalizeConfig) -> None:
    """Raise ConfigError unless stage 2 has one source of photos."""
    if (config.instance_data_dir is None) == (config.dataset_name is None):
        raise ConfigError(
            f"expected instance_data_dir or dataset_name, found {'none' if config.dataset_name is None else 'both'}: "
            "give an image, a folder of images or a data set of one subject"
        )


def instance_subject(config: PersonalizeConfig) -> Subject:
    """The subject of stage 2, from the source that `check_instance_source` found.

    Raises:
        ConfigError: a data set of several subjects. What `read_photos` and `read_dataset` raise.
    """
    if config.instance_data_dir is not None:
        return Subject("subject", read_photos(config.instance_data_dir))
    subjects = read_dataset(config, one_subject=True)
    if len(subjects) > 1:
        names = ", ".join(subject.name for subject in subjects[:5])
        raise ConfigError(
            f"expected a data set of one subject, found {len(subjects)} in column {config.subject_column!r} ({names}): "
            "give one that holds a single person, or name another subject_column"
        )
    return subjects[0]


def name_of(config: PersonalizeConfig, subject: Subject) -> str | None:
    """Who is learned: the name of the folder or in the data set; of one photo, as of one that is read, the output's."""
    if config.instance_data_dir is None:
        return subject.name
    folder = Path(os.path.abspath(config.instance_data_dir))
    return (folder if folder.is_dir() else Path(config.output_dir).resolve()).name or None
