# SPDX-License-Identifier: Apache-2.0
"""Photos of people: `folders` reads them from disk with captions, masks and tags, `images` decodes and cuts them.

No model is known here, and nothing is written.
"""

from .folders import (
    CONDITIONS_FOLDER,
    MAX_CAPTION,
    METADATA_FILE,
    PEOPLE_FILE,
    TRIGGER_MARK,
    Photo,
    Subject,
    caption_beside,
    first_copies,
    not_among,
    read_photos,
    read_subjects,
    read_tags,
    require_distinct,
    usable_caption,
)
from .images import (
    IMAGE_SUFFIXES,
    MAX_MEGAPIXELS,
    cut,
    cut_mask,
    decode_image,
    decode_mask,
    flip_caption,
    load_image,
    random_box,
    read_file,
)

__all__ = [
    "CONDITIONS_FOLDER",
    "IMAGE_SUFFIXES",
    "MAX_CAPTION",
    "MAX_MEGAPIXELS",
    "METADATA_FILE",
    "PEOPLE_FILE",
    "TRIGGER_MARK",
    "Photo",
    "Subject",
    "caption_beside",
    "cut",
    "cut_mask",
    "decode_image",
    "decode_mask",
    "first_copies",
    "flip_caption",
    "load_image",
    "not_among",
    "random_box",
    "read_file",
    "read_photos",
    "read_subjects",
    "read_tags",
    "require_distinct",
    "usable_caption",
]
