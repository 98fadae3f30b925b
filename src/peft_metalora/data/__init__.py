# SPDX-License-Identifier: Apache-2.0
"""Photos of people: `folders` reads them from disk with captions, masks and tags, `images` decodes and cuts them.

No model is known here, and nothing is written.
"""

from .folders import (
    IMAGE_SUFFIXES,
    METADATA_FILE,
    PEOPLE_FILE,
    TRIGGER_MARK,
    Photo,
    Subject,
    read_photos,
    read_subjects,
    read_tags,
)
from .images import augment, cut, cut_mask, decode_image, decode_mask, flip_caption, load_image, random_box, read_file

__all__ = [
    "IMAGE_SUFFIXES",
    "METADATA_FILE",
    "PEOPLE_FILE",
    "TRIGGER_MARK",
    "Photo",
    "Subject",
    "augment",
    "cut",
    "cut_mask",
    "decode_image",
    "decode_mask",
    "flip_caption",
    "load_image",
    "random_box",
    "read_file",
    "read_photos",
    "read_subjects",
    "read_tags",
]
