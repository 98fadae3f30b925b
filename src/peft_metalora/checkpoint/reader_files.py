# SPDX-License-Identifier: Apache-2.0
"""The files that a Down reads photos with, beside the Down's own: its subject space and an encoder.

The Down's configuration names both by their fingerprints. What the encoder is and does is `encoder`'s business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import FingerprintMismatchError
from ..tuner import DownSource, MetaLoraConfig
from ..tuner.down import digest_of
from .space import SPACE_FILE, load_space
from .untrusted import read_json, read_tensors

ENCODER_FILE = "subject_encoder.safetensors"
ENCODER_CONFIG_FILE = "encoder_config.json"
READER_FILES = (SPACE_FILE, ENCODER_FILE, ENCODER_CONFIG_FILE)
"""In the order in which they are written."""
_NO_SETTINGS = {"format_version", "space_fingerprint", "encoder_fingerprint"}


@dataclass(frozen=True)
class ReaderFiles:
    """What is to be written beside a Down.

    Attributes:
        space_fingerprint, encoder_fingerprint: what the Down's configuration says of them.
        write: lays `READER_FILES` into a folder.
    """

    space_fingerprint: str
    encoder_fingerprint: str
    write: Callable[[Path], object]


def encoder_fingerprint(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of an encoder's settings and of every weight's name, shape and bytes in float32."""
    text = json.dumps(dict(settings), sort_keys=True)
    exact = {name: tensor.detach().float() for name, tensor in weights.items()}
    return hashlib.sha256(f"{text}|{digest_of(exact)}".encode()).hexdigest()


def check_reader(folder: Path, config: MetaLoraConfig, down: DownSource) -> None:
    """Check that the files in a folder are those that a Down's configuration names, as far as it takes no base.

    Raises:
        FingerprintMismatchError: they are another Down's, or of another training.
        ArtefactNotFoundError, and all that `load_space` and `untrusted.read_tensors` raise.
    """
    load_space(folder, down, config.space_fingerprint)
    facts = read_json(folder / ENCODER_CONFIG_FILE)
    settings = {name: value for name, value in facts.items() if name not in _NO_SETTINGS}
    found = encoder_fingerprint(settings, read_tensors(folder / ENCODER_FILE))
    wanted = str(config.encoder_fingerprint)
    if found != wanted or facts.get("space_fingerprint") != config.space_fingerprint:
        raise FingerprintMismatchError(
            f"{folder}: expected the encoder {wanted[:16]}… of the space {str(config.space_fingerprint)[:16]}…, as the "
            f"Down's configuration says, found {found[:16]}… of {str(facts.get('space_fingerprint'))[:16]}…. Put the "
            "files of one training into a folder."
        )
