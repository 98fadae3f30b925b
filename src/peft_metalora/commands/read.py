# SPDX-License-Identifier: Apache-2.0
"""What `metalora read` does: subjects' folders from photos, in zero steps, with a Down that has an encoder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..settings import (
    BASE_OF_DOWN,
    DEVICE,
    DOWN_REVISION,
    FACE_MODEL,
    GENERIC,
    LOCAL_FILES_ONLY,
    OFFLOAD,
    OVERWRITE,
    PRECISION,
    QUANTIZE,
    READ_FACE_ALIGN,
    READ_FACE_CROP,
    READ_FACE_MARGIN,
    REVISION,
    setting,
)
from . import Done
from .next_steps import in_words, next_steps, size_of

_NEITHER = "Reading loads the VAE alone, so that this is as if it were none."


@dataclass(kw_only=True)
class ReadConfig:
    """Bring a person in from photos, or everybody in a folder, without training.

    Raises:
        ConfigError: a value that cannot be.
    """

    down: str = setting("Folder or repository of a Down with an encoder.")
    output_dir: str = setting("Folder for the subject; with data, for a folder of each.")
    photos: list[str] = setting(
        "One photo of the person or several, or a folder of them: then the mean of what they say.", []
    )
    data: str | None = setting("Read everybody in a folder of people: DIR/<person>/*.jpg.", None)
    pretrained_model_name_or_path: str | None = setting(BASE_OF_DOWN, None)
    generic: str | None = setting(*GENERIC)
    subject_name: str | None = setting("Who it is. Default: the name of output_dir; with data, of the folders.", None)
    face_crop: str | None = setting(*READ_FACE_CROP)
    face_margin: float | None = setting(*READ_FACE_MARGIN)
    face_align: bool | None = setting(*READ_FACE_ALIGN)
    face_model: str | None = setting(*FACE_MODEL)
    revision: str | None = setting(*REVISION)
    down_revision: str | None = setting(*DOWN_REVISION)
    mixed_precision: str = setting(*PRECISION)
    quantize: str = setting(f"{QUANTIZE[0]} {_NEITHER}", *QUANTIZE[1:])
    offload: str = setting(f"{OFFLOAD[0]} {_NEITHER}", *OFFLOAD[1:])
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)
    device: str | None = setting(*DEVICE)
    whole: bool = setting("Write Mid and Up with their fold, not the code alone that they are expanded from.", False)
    overwrite: bool = setting(*OVERWRITE)

    def __post_init__(self) -> None:
        if bool(self.photos) == (self.data is not None):
            raise ConfigError(
                f"expected `photos` of one person, or `data`, a folder of people, found "
                f"{'both' if self.photos else 'none'}: give one of them"
            )
        if self.data is not None and self.subject_name is not None:
            raise ConfigError(
                "subject_name is one person's, found `data` beside it: people are called as their folders"
            )


def run_read(config: ReadConfig) -> Done:
    """Read, write a subject for each person, and say where to and what can be done next.

    Photos of a folder that cannot be used are left out, with a warning that names them, as long as the person has
    another. Nothing is written before everybody is read.

    Raises:
        NoImagesError, UnreadableImageError, MetadataError, NoFaceError: photos that cannot be used.
        ArtefactNotFoundError: the Down has no encoder.
        BaseModelMismatchError, ConfigError: the base or the settings cannot be used.
        OutputExistsError, WriteFailedError: a folder cannot be written.
        Everything that `hub.load_down` and `encoder.load_reader` raise.
    """
    from ..bases import open_base
    from ..bases.generic import named_class
    from ..bases.memory import CPU, require_supported
    from ..bases.precision import choose_device, choose_dtype
    from ..checkpoint.base_model import base_to_load, check_fits
    from ..checkpoint.reader_files import READER_FILES
    from ..checkpoint.writing import require_replaceable, save_read_subject
    from ..data import Subject, read_photos, read_subjects
    from ..encoder.reader import load_reader, no_encoder
    from ..encoder.sight import Sight
    from ..files import require_apart, require_writable
    from ..hub.loading import HubOptions, folder_of, load_down
    from ..training.leftovers import remove_run

    device = choose_device(config.device)
    require_supported(config, "read", *([CPU] if device.type == "cpu" else []))
    inputs = {f"photos[{number}]": path for number, path in enumerate(config.photos)}
    require_apart(config.output_dir, down=config.down, data=config.data, **inputs)
    require_writable(Path(config.output_dir))
    if config.data is None:
        name = config.subject_name or Path(config.output_dir).resolve().name
        people = [Subject(name, [photo for path in config.photos for photo in read_photos(path)])]
        places = [Path(config.output_dir)]
    else:
        people = read_subjects(config.data)
        places = [Path(config.output_dir, person.name) for person in people]
    for person, place in zip(people, places, strict=True):
        require_replaceable(place, "subject", person.name, overwrite=config.overwrite)
    options: HubOptions = {"revision": config.down_revision, "local_files_only": config.local_files_only}
    down = load_down(config.down, **options)
    if down.config.encoder_fingerprint is None:
        raise no_encoder(config.down)
    chosen = config.data is None and not any(map(os.path.isdir, config.photos))
    # What is wrong with photos, reader or detector is noticed before the base is opened.
    for photo in people[0].photos if chosen else ():
        photo.load()
    Sight(config.face_crop, config.face_margin, config.face_align)
    reading = folder_of(config.down, READER_FILES, **options)
    asked = config.pretrained_model_name_or_path
    base_name, revision = base_to_load(asked, config.revision, down.config, config.down, config.generic)
    require_apart(config.output_dir, pretrained_model_name_or_path=base_name)
    base = open_base(
        base_name,
        revision=revision,
        dtype=choose_dtype(config.mixed_precision, device),
        local_files_only=config.local_files_only,
        memory=config,
        generic=config.generic,
    )
    check_fits(base.denoiser, down, name=config.down)
    base.place(device, encoders=False, denoiser=False, vae=True)
    reader = load_reader(reading, down, base.encode_images, config.face_model)
    reader.encoder.to(device)
    sight = reader.encoder.sight(config.face_crop, config.face_margin, config.face_align)
    photos = [person.photos for person in people]
    codes, counts = reader.codes(photos, sight, skip_unusable=not chosen, progress=len(people) > 1)
    named = {
        "down": os.path.abspath(config.down) if os.path.isdir(config.down) else config.down,
        "down_revision": config.down_revision,
        "base_model_name_or_path": base_name,
        "revision": revision,
    }
    for person, place, code, read in zip(people, places, codes, counts, strict=True):
        subject = reader.subject(code, down, subject_name=person.name, **named)
        facts = {"photos_read": read, **named_class(base)}
        save_read_subject(place, subject, facts=facts, whole=config.whole, overwrite=config.overwrite)
        remove_run(place)
    count = sum(counts)
    size = size_of(places[0])
    if config.data is None:
        told = f"read {count} photo(s) and wrote the subject {people[0].name!r} to {places[0]} ({in_words(size)})"
        values = {"subject": people[0].name, "folder": places[0]}
    else:
        told = f"read {count} photo(s) of {len(people)} people and wrote a folder of {in_words(size)} for each to "
        told += f"{config.output_dir}; with the first of them:"
        values = {"subjects": {person.name: place for person, place in zip(people, places, strict=True)}}
    return Done(
        f"{told}\n{next_steps(places[0], down=config.down, generic=config.generic)}",
        {**values, "photos": count, "bytes": size},
    )
