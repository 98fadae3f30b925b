# SPDX-License-Identifier: Apache-2.0
"""A person in zero steps: the subject space of a Down, and the encoder that reads a person's code from photos."""

from __future__ import annotations

from ..checkpoint.space import SubjectCode, SubjectSpace, load_code, load_space, save_code
from .networks import EncoderConfig, SubjectEncoder, load_encoder, make_encoder
from .reader import Reader, load_reader, save_reader
from .sight import Sight

__all__ = [
    "EncoderConfig",
    "Reader",
    "Sight",
    "SubjectCode",
    "SubjectEncoder",
    "SubjectSpace",
    "load_code",
    "load_encoder",
    "load_reader",
    "load_space",
    "make_encoder",
    "save_code",
    "save_reader",
]
