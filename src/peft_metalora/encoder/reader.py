# SPDX-License-Identifier: Apache-2.0
"""What makes a Down able to read: its subject space and the encoder, kept in the Down's own folder.

A Down without them is a Down as ever: it learns people by stage 2 alone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..checkpoint.artefacts import load_down, write_artefact
from ..checkpoint.config_file import read_config
from ..checkpoint.reader_files import ENCODER_CONFIG_FILE, ReaderFiles
from ..checkpoint.space import CodeSource, SubjectSpace, load_space
from ..errors import ArtefactNotFoundError, FingerprintMismatchError
from ..tuner import DownSource
from ..tuner.down import subject_config
from .networks import SubjectEncoder, load_encoder


@dataclass(frozen=True)
class Reader:
    """A Down's space and encoder."""

    space: SubjectSpace
    encoder: SubjectEncoder

    def read(self, photos: Sequence[Image.Image], source: DownSource, **config: Any) -> CodeSource:
        """A person from one photo or several, in zero steps.

        Args:
            source: the Down that the space belongs to.
            config: further fields of the subject's configuration, such as `down` and `subject_name`.

        Raises:
            FingerprintMismatchError: the space belongs to another Down.
            NoImagesError, NoFaceError, NonFiniteError: as `SubjectEncoder.read`.
        """
        _require_its_down(self.space, source, "this reader")
        code = self.space.coded(self.encoder.read(photos))
        return CodeSource(subject_config(source, **config), code, self.space, source)


def save_reader(
    folder: str | os.PathLike[str],
    space: SubjectSpace,
    encoder: SubjectEncoder,
    down: DownSource | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a Down with its space and encoder; its configuration names both, its fingerprint stays what it is.

    Args:
        down: the Down; by default the one that lies in the folder.
        overwrite: whether it may replace what is no Down.

    Returns:
        The folder.

    Raises:
        ArtefactNotFoundError: there is no Down. FingerprintMismatchError: it is another one.
        OutputExistsError: something else lies there.
        ConfigError, NonFiniteError, WriteFailedError: as `SubjectSpace.save` and `SubjectEncoder.save`.
        Everything else that `checkpoint.load_down` raises.
    """
    path = Path(folder)
    down = load_down(path) if down is None else down
    _require_its_down(space, down, str(path))
    config = dataclasses.replace(down.config, down_fingerprint=down.fingerprint)

    def write(stage: Path) -> None:
        space.save(stage)
        encoder.save(stage, space)

    files = ReaderFiles(space.fingerprint, encoder.fingerprint, write)
    return write_artefact(path, config, down.tensors, reader=files, overwrite=overwrite)


def load_reader(
    folder: str | os.PathLike[str],
    down: DownSource,
    encode_images: Callable[[Tensor], Tensor] | None = None,
    face_model: str | None = None,
    space: SubjectSpace | None = None,
) -> Reader:
    """Read the space and the encoder that lie in the folder of a Down.

    Args:
        encode_images: the base's VAE, for encoders of the source `latents`. face_model: as `load_encoder`.
        space: the Down's, where it has been read already.

    Raises:
        ArtefactNotFoundError: this Down cannot read.
        FingerprintMismatchError: they are not those that the Down's configuration names.
        Everything that `load_space` and `load_encoder` raise.
    """
    path = Path(folder)
    config = read_config(path)
    if config.encoder_fingerprint is None or not (path / ENCODER_CONFIG_FILE).is_file():
        raise ArtefactNotFoundError(
            f"{path}: expected a Down with an encoder ({ENCODER_CONFIG_FILE}), found none. Learn the person with "
            "stage 2 (metalora personalize), or take a Down that was trained to read photos."
        )
    if space is None:
        space = load_space(path, down, config.space_fingerprint)
    encoder = load_encoder(path, space, encode_images, face_model)
    if encoder.fingerprint != config.encoder_fingerprint:
        raise FingerprintMismatchError(
            f"{path}: expected the encoder {config.encoder_fingerprint[:16]}… that the Down names, found "
            f"{encoder.fingerprint[:16]}…. Put the files of one training into a folder."
        )
    return Reader(space, encoder)


def _require_its_down(space: SubjectSpace, down: DownSource, where: str) -> None:
    if space.down_fingerprint != down.fingerprint:
        raise FingerprintMismatchError(
            f"{where}: expected the Down {space.down_fingerprint[:16]}… that the space was trained on, found "
            f"{down.fingerprint[:16]}…. Give that one."
        )
