# SPDX-License-Identifier: Apache-2.0
"""The subject encoder: photos of a person to a code of the Down's subject space.

A source (see `sources`) turns photos into features, a small network reads a code from them. All codes have one length,
so that an unusual photo cannot lead far away from everybody; several photos give the mean of their codes, which is
the shorter the less they agree.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..checkpoint.factors import require_finite
from ..checkpoint.reader_files import ENCODER_CONFIG_FILE, ENCODER_FILE, encoder_fingerprint
from ..checkpoint.space import CODE_SIZE, SubjectSpace
from ..checkpoint.untrusted import read_json, read_tensors
from ..errors import (
    ConfigError,
    ConfigFormatError,
    FingerprintMismatchError,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
)
from ..files import write_bytes, write_tensors
from ..tuner.folding import without_autocast
from .sight import Sight
from .sources import EncodeImages, Source, make_source, source_kinds

FORMAT_VERSION = 1
# A configuration may come from anybody. A photo of more pixels than these would take a VAE minutes.
_MOST = {"resolution": 2048, "code_size": 2**16, "width": 2**12, "hidden": 2**16}


@dataclass(frozen=True)
class EncoderConfig:
    """What an encoder is made of; `encoder_config.json` holds it.

    Attributes:
        source: as `sources.make_source` takes it. resolution: side in pixels to which photos are brought.
        code_size: numbers of a code. width: channels of the trunk's first layer. hidden: width of the head.
        dropout: share of the head's inputs that are dropped in training.
        face_crop, face_margin, face_align: what of a photo it was trained to read, as `sight.Sight` takes it.

    Raises:
        ConfigError: a value that cannot be.
    """

    source: str = "latents"
    resolution: int = 512
    code_size: int = CODE_SIZE
    width: int = 64
    hidden: int = 512
    dropout: float = 0.1
    face_crop: str = ""
    face_margin: float = 0.5
    face_align: bool = False

    def __post_init__(self) -> None:
        if self.source.partition(":")[0] not in source_kinds():
            raise ConfigError(f"encoder must be one of {', '.join(source_kinds())}, found {self.source!r}")
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} must be from 1 to {most}, found {str(getattr(self, name))[:60]}")
        if self.width % 8:
            raise ConfigError(f"width must be a multiple of 8 (the groups of its norms), found {self.width}")
        if not self.face_margin >= 0:
            raise ConfigError(f"face_margin must be 0 or more, found {self.face_margin}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, found {self.dropout}")


class SubjectEncoder(nn.Module):
    """Features (n, ...) to codes (n, k).

    Args:
        config: see `EncoderConfig`. source: the one that `config` names.
    """

    def __init__(self, config: EncoderConfig, source: Source) -> None:
        super().__init__()
        self.config, self.source = config, source
        self._sights: dict[tuple[str | None, float | None, bool | None], Sight] = {}
        self.trunk = source.trunk(config.width)
        with torch.no_grad():
            size = self.trunk(torch.zeros(1, *source.feature_shape)).shape[1]
        self.head = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(size, config.hidden),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.code_size),
        )

    def forward(self, features: Tensor, among: tuple[int, int] | None = None) -> Tensor:
        """Codes (n, k) of features (n, *feature_shape), each of mean 0 and length sqrt(k).

        Args:
            among: (first, count): these are rows `first` and following of a batch of `count` that several processes
                share. Dropout is drawn for the whole batch, so that it is the same however many they are.

        Raises:
            ShapeMismatchError: features of another source.
        """
        if features.shape[1:] != self.source.feature_shape:
            raise ShapeMismatchError(
                f"expected features (n, {', '.join(map(str, self.source.feature_shape))}) of the source "
                f"{self.source.name!r}, found {tuple(features.shape)}. Encode the photos with this encoder's source."
            )
        seen = self.trunk(features)
        if among is None:
            codes = self.head(seen)
        else:
            first, count = among
            end = first + len(seen)
            codes = self.head(F.pad(seen, (0, 0, first, count - end)))[first:end]
        return F.layer_norm(codes, codes.shape[1:])

    def codes(self, photos: Sequence[Image.Image]) -> Tensor:
        """The code (n, k) that is read from each photo; on the CPU, float32.

        Raises:
            NoFaceError: a photo without the face that the source needs.
            NonFiniteError: a code that is no number, from an encoder that diverged.
        """
        device, was_training = next(self.parameters()).device, self.training
        self.eval()
        try:
            with torch.no_grad(), without_autocast(device):
                codes = self(self.source.features(photos).to(device)).float().cpu()
        finally:
            self.train(was_training)
        if not torch.isfinite(codes).all():
            raise NonFiniteError("expected a code of finite numbers, found NaN or infinity: train the encoder again")
        return codes

    def sight(
        self, face_crop: str | None = None, face_margin: float | None = None, face_align: bool | None = None
    ) -> Sight:
        """How it sees photos: as it was trained to, or around the faces that `face_crop` finds.

        Args:
            face_margin, face_align: with `face_crop` alone; None: as it was trained.

        Raises:
            ConfigError: it was trained with a face detector of somebody's own, code that no file starts by itself, and
                none is given. ConfigError, EmbedderUnavailableError: as `Sight`.
        """
        own, wanted = self.config, (face_crop, face_margin, face_align)
        if face_crop is not None:
            margin = own.face_margin if face_margin is None else face_margin
            wanted = face_crop, margin, own.face_align if face_align is None else face_align
        elif ":" in own.face_crop:
            raise ConfigError(
                f"expected face_crop for an encoder of photos that were cut by {own.face_crop!r}, code that a file "
                f"must not start by itself, found none: give face_crop={own.face_crop!r} if you trust it"
            )
        elif own.face_crop and wanted == (None, None, None):
            wanted = own.face_crop, own.face_margin, own.face_align
        if wanted not in self._sights:  # a detector takes a second to load
            self._sights[wanted] = Sight(*wanted)
        return self._sights[wanted]

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the configuration and of every weight's name, shape and bytes in float32."""
        return encoder_fingerprint(dataclasses.asdict(self.config), self.state_dict())

    def save(self, folder: str | os.PathLike[str], space: SubjectSpace) -> None:
        """Write `subject_encoder.safetensors` and `encoder_config.json` for the space that its codes belong to.

        Raises:
            ConfigError: codes of another size than the space's. WriteFailedError: the disk refuses.
        """
        if self.config.code_size != space.code_size:
            raise ConfigError(
                f"expected an encoder of codes ({space.code_size},), as the space has, found ({self.config.code_size},)"
            )
        weights = self.state_dict()
        require_finite(weights, "the encoder")
        write_tensors(Path(folder) / ENCODER_FILE, weights)
        facts: dict[str, Any] = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self.config)}
        facts |= {"space_fingerprint": space.fingerprint, "encoder_fingerprint": self.fingerprint}
        # Last: what has a configuration is whole.
        write_bytes(Path(folder) / ENCODER_CONFIG_FILE, (json.dumps(facts, indent=2) + "\n").encode())


def make_encoder(config: EncoderConfig, encode_images: EncodeImages | None = None, seed: int = 0) -> SubjectEncoder:
    """A new encoder with random weights of that seed; the global random state is left as it was.

    Args:
        encode_images: the base's VAE, for the source `latents`.

    Raises:
        ConfigError, EmbedderUnavailableError: as `sources.make_source`.
    """
    source = make_source(config.source, resolution=config.resolution, encode_images=encode_images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SubjectEncoder(config, source)


def load_encoder(
    folder: str | os.PathLike[str],
    space: SubjectSpace,
    encode_images: EncodeImages | None = None,
    face_model: str | None = None,
) -> SubjectEncoder:
    """Read an encoder that `SubjectEncoder.save` wrote, in evaluation mode.

    Args:
        space: the space that it has to read codes of.
        face_model: `module:function` of an encoder `face:module:function`: code that no file starts by itself.

    Raises:
        ConfigError: such an encoder, and another `face_model` or none.
        ArtefactNotFoundError, CorruptFileError, UnsafeNameError, TensorDtypeError: files that are not there or broken.
        ConfigFormatError: a configuration that cannot be.
        FingerprintMismatchError: an encoder of another space, or weights that are not the configuration's.
        MissingKeysError, ShapeMismatchError, NonFiniteError: weights that do not fit.
        ConfigError, EmbedderUnavailableError: a source that cannot be used here.
    """
    path = Path(folder) / ENCODER_CONFIG_FILE
    facts = read_json(path)
    if facts.get("format_version") != FORMAT_VERSION:
        raise ConfigFormatError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {str(facts.get('format_version'))[:60]!r}. "
            "Update peft_metalora, or fetch the file again."
        )
    config = _config(facts, path)
    if facts.get("space_fingerprint") != space.fingerprint:
        raise FingerprintMismatchError(
            f"{path}: expected an encoder of the space {space.fingerprint[:16]}…, found one of "
            f"{str(facts.get('space_fingerprint'))[:16]}…. Put the files of one training into a folder."
        )
    if config.code_size != space.code_size:
        raise ShapeMismatchError(f"{path}: expected codes of {space.code_size} numbers, found {config.code_size}.")
    kind, _, detail = config.source.partition(":")
    if kind == "face" and detail and detail != face_model:
        raise ConfigError(
            f"{path}: expected face_model to name the code that this encoder sees with, {detail!r}, which a file must "
            f"not start by itself, found {face_model!r}. Give face_model={detail!r} if you trust it."
        )
    weights = read_tensors(Path(folder) / ENCODER_FILE)
    require_finite(weights, Path(folder) / ENCODER_FILE)
    source = make_source(config.source, resolution=config.resolution, encode_images=encode_images)
    with torch.device("meta"):  # a configuration may ask for more than any memory holds: its weights are compared first
        encoder = SubjectEncoder(config, source)
    own = encoder.state_dict()
    if own.keys() != weights.keys():
        differ = sorted(own.keys() ^ weights.keys())
        raise MissingKeysError(
            f"{Path(folder) / ENCODER_FILE}: expected the weights of an encoder {config.source!r}, found a difference "
            f"in {', '.join(differ[:3])}. Fetch both files again, from one place."
        )
    wrong = sorted(name for name in own if own[name].shape != weights[name].shape)
    if wrong:
        raise ShapeMismatchError(
            f"{Path(folder) / ENCODER_FILE}: expected {wrong[0]} of shape {tuple(own[wrong[0]].shape)}, found "
            f"{tuple(weights[wrong[0]].shape)}. Fetch both files again, from one place."
        )
    encoder.load_state_dict(weights, assign=True)
    if facts.get("encoder_fingerprint") != encoder.fingerprint:
        raise FingerprintMismatchError(
            f"{path}: expected the encoder {str(facts.get('encoder_fingerprint'))[:16]}…, found "
            f"{encoder.fingerprint[:16]}… in {ENCODER_FILE}. Fetch both files again, from one place."
        )
    # Weights may be kept in half precision; photos are read in float32.
    return encoder.float().eval().requires_grad_(False)


_JSON: dict[type, Any] = {float: (int, float)}  # which writes 0.0 and 0 alike


def _config(facts: dict[str, Any], path: Path) -> EncoderConfig:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(EncoderConfig):
        wanted: Any = type(field.default)
        value: Any = facts.get(field.name)
        # True is an int to Python.
        if isinstance(value, bool) != (wanted is bool) or not isinstance(value, _JSON.get(wanted, wanted)):
            raise ConfigFormatError(f"{path}: expected {field.name} as {wanted.__name__}, found {str(value)[:60]!r}.")
        values[field.name] = wanted(value)
    try:
        return EncoderConfig(**values)
    except ConfigError as error:
        raise ConfigFormatError(f"{path}: {error}") from error
