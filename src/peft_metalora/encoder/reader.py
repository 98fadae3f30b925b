# SPDX-License-Identifier: Apache-2.0
"""What makes a Down able to read: its subject space and the encoder, kept in the Down's own folder.

A Down without them is a Down as ever: it learns people by stage 2 alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..checkpoint.artefacts import load_down
from ..checkpoint.config_file import read_config
from ..checkpoint.reader_files import ENCODER_CONFIG_FILE, ReaderFiles
from ..checkpoint.space import CodeSource, SubjectSpace, load_space
from ..checkpoint.writing import write_artefact
from ..data import Photo
from ..errors import (
    ArtefactNotFoundError,
    FingerprintMismatchError,
    NoFaceError,
    NoImagesError,
    UnreadableImageError,
)
from ..tuner import DownSource
from ..tuner.down import subject_config
from .networks import SubjectEncoder, load_encoder
from .sight import Sight
from .sources import EncodeImages

_BATCH = 8  # photos that are encoded together: as decoded, a camera's take 36 MB each


@dataclass(frozen=True)
class Reader:
    """A Down's space and encoder."""

    space: SubjectSpace
    encoder: SubjectEncoder

    def read(
        self, photos: Sequence[Photo | Image.Image], source: DownSource, sight: Sight | None = None, **config: Any
    ) -> CodeSource:
        """A person from one photo or several, in zero steps.

        Args:
            source: the Down that the space belongs to.
            sight: as `codes`.
            config: further fields of the subject's configuration, such as `down` and `subject_name`.

        Raises:
            FingerprintMismatchError: the space belongs to another Down. As `codes`.
        """
        codes, _ = self.codes([photos], sight)
        return self.subject(codes[0], source, **config)

    def subject(self, code: Tensor, source: DownSource, **config: Any) -> CodeSource:
        """The person of a code (k,); arguments and errors are those of `read`."""
        _require_its_down(self.space, source, "this reader")
        return CodeSource(subject_config(source, **config), self.space.coded(code), self.space, source)

    def codes(
        self,
        people: Sequence[Sequence[Photo | Image.Image]],
        sight: Sight | None = None,
        *,
        skip_unusable: bool = False,
        progress: bool = False,
    ) -> tuple[Tensor, list[int]]:
        """The code of each of many people, the mean over their photos: (n, k); and over how many it is.

        Args:
            sight: what is seen of a photo; None: as the encoder was trained.
            skip_unusable: go on without photos that are gone, cannot be decoded or show no face where one is needed,
                as long as each person has another, and warn with their names and number.

        Raises:
            NoImagesError: somebody without a photo. NoImagesError, UnreadableImageError, NoFaceError: a photo that
                cannot be used, or, with `skip_unusable`, the only one of somebody.
            NonFiniteError: as `SubjectEncoder.codes`.
        """
        sight = self.encoder.sight() if sight is None else sight
        photos = [(person, number, photo) for person, own in enumerate(people) for number, photo in enumerate(own)]
        unusable: list[tuple[int, Exception]] = []

        def leave_out(person: int, error: Exception) -> None:
            if not skip_unusable:
                raise error
            unusable.append((person, error))

        total = torch.zeros(len(people), self.space.code_size, dtype=torch.float32, device="cpu")
        count = total.new_zeros(len(people), 1)
        shown = tqdm(photos, desc="reading", unit="photo", disable=not progress)
        for batch in _in_batches(_seen(shown, sight, leave_out)):
            for person, code in _codes_of(self.encoder, batch, leave_out):
                total[person] += code
                count[person] += 1
        for person, own in enumerate(count[:, 0].tolist()):
            if not own:
                errors = [error for owner, error in unusable if owner == person]
                raise (
                    errors[0]
                    if errors
                    else NoImagesError("expected at least one photo of the person, found none: give one")
                )
        if unusable:
            text = "; ".join(str(error) for _, error in unusable)
            warnings.warn(f"skipped {len(unusable)} of {len(photos)} photos: {text}", stacklevel=2)
        return total / count, count[:, 0].int().tolist()


_LeaveOut = Callable[[int, Exception], None]
_Seen = tuple[int, str, Image.Image]  # whose photo, what it is called, and what an encoder sees of it


def _seen(
    photos: Iterable[tuple[int, int, Photo | Image.Image]], sight: Sight, leave_out: _LeaveOut
) -> Iterator[_Seen]:
    for person, number, photo in photos:
        name = str(photo.path) if isinstance(photo, Photo) else f"photo {number + 1}"
        try:
            yield person, name, sight(photo, name)
        except (NoImagesError, UnreadableImageError, NoFaceError) as error:
            leave_out(person, error)


def _in_batches(seen: Iterator[_Seen]) -> Iterator[list[_Seen]]:
    while batch := list(itertools.islice(seen, _BATCH)):
        yield batch


def _codes_of(encoder: SubjectEncoder, batch: list[_Seen], leave_out: _LeaveOut) -> Iterator[tuple[int, Tensor]]:
    try:
        codes = encoder.codes([image for _, _, image in batch])
    except NoFaceError:
        if len(batch) == 1:
            person, name, _ = batch[0]
            leave_out(person, NoFaceError(f"expected a face in {name}, found none: give a photo that shows it"))
        else:
            for one in batch:
                yield from _codes_of(encoder, [one], leave_out)
        return
    yield from zip([person for person, _, _ in batch], codes, strict=True)


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


def no_encoder(name: str | os.PathLike[str]) -> ArtefactNotFoundError:
    """What to raise of a Down that cannot read."""
    return ArtefactNotFoundError(
        f"{os.fspath(name)}: expected a Down with an encoder ({ENCODER_CONFIG_FILE}), found none. Learn the person "
        "with stage 2 from another start (metalora personalize --start stored), or take a Down that was trained to "
        "read photos."
    )


def load_reader(
    folder: str | os.PathLike[str],
    down: DownSource,
    encode_images: EncodeImages | None = None,
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
        raise no_encoder(path)
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
