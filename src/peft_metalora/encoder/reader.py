# SPDX-License-Identifier: Apache-2.0
"""What makes a Down able to read: its subject space and the encoder, kept in the Down's own folder.

A Down without them is a Down as ever: it learns people by stage 2 alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..checkpoint.artefacts import load_down
from ..checkpoint.space import CodeSource, SubjectCode, SubjectSpace, load_space
from ..errors import ArtefactNotFoundError, FingerprintMismatchError
from ..tuner import DownSource
from ..tuner.down import subject_config
from .networks import ENCODER_CONFIG_FILE, SubjectEncoder, load_encoder


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
        code = SubjectCode(self.encoder.read(photos), self.space.down_fingerprint, self.space.fingerprint)
        return CodeSource(subject_config(source, **config), code, self.space, source)


def save_reader(folder: str | os.PathLike[str], space: SubjectSpace, encoder: SubjectEncoder) -> Path:
    """Write a space and its encoder into the folder of their Down; an older pair there is replaced.

    Returns:
        The folder.

    Raises:
        ArtefactNotFoundError: there is no Down. FingerprintMismatchError: it is another one.
        ConfigError, NonFiniteError, WriteFailedError: as `SubjectSpace.save` and `SubjectEncoder.save`.
        Everything else that `checkpoint.load_down` raises.
    """
    path = Path(folder)
    _require_its_down(space, load_down(path), str(path))
    # Without a configuration nothing is read: a save that ends in the middle leaves a Down that cannot read.
    (path / ENCODER_CONFIG_FILE).unlink(missing_ok=True)
    space.save(path)
    encoder.save(path, space)
    return path


def load_reader(
    folder: str | os.PathLike[str],
    down: DownSource,
    encode_images: Callable[[Tensor], Tensor] | None = None,
    face_model: str | None = None,
) -> Reader:
    """Read the space and the encoder that lie in the folder of a Down.

    Args:
        encode_images: the base's VAE, for encoders of the source `latents`. face_model: as `load_encoder`.

    Raises:
        ArtefactNotFoundError: this Down cannot read.
        Everything that `load_space` and `load_encoder` raise.
    """
    path = Path(folder)
    if not (path / ENCODER_CONFIG_FILE).is_file():
        raise ArtefactNotFoundError(
            f"{path}: expected a Down with an encoder ({ENCODER_CONFIG_FILE}), found none. Learn the person with "
            "stage 2 (metalora personalize), or take a Down that was trained to read photos."
        )
    space = load_space(path, down)
    return Reader(space, load_encoder(path, space, encode_images, face_model))


def _require_its_down(space: SubjectSpace, down: DownSource, where: str) -> None:
    if space.down_fingerprint != down.fingerprint:
        raise FingerprintMismatchError(
            f"{where}: expected the Down {space.down_fingerprint[:16]}… that the space was trained on, found "
            f"{down.fingerprint[:16]}…. Give that one."
        )
