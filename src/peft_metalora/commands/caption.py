# SPDX-License-Identifier: Apache-2.0
"""What `metalora caption` does: captions of photos by a vision-language model, as the files that training reads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import ConfigError, EmbedderUnavailableError, NoImagesError, UnreadableImageError
from ..settings import DEVICE, LOCAL_FILES_ONLY, PRECISION, below_one, setting
from . import Done

_QUESTION = (
    "Say in one sentence what this photo shows: pose, expression, clothes, place and light. Say nothing of the face, "
    "and give no name."
)
_LONGEST = 5_000  # characters; what a prefix leaves is far below what is read


@dataclass(kw_only=True)
class CaptionConfig:
    """Write captions of photos with a vision-language model of your choice.

    Raises:
        ConfigError: a value that cannot be.
    """

    photos: str = setting("Folder of people (DIR/<person>/*.jpg), folder of photos, or a photo.", positional="DIR")
    model: str = setting("Vision-language model of transformers: a folder or a repository id.")
    question: str = setting("What the model is asked, if it takes a question.", _QUESTION)
    prefix: str = setting("Words that every caption starts with, such as 'a photo of {trigger}, '.", "")
    max_new_tokens: int = setting("Most tokens of an answer.", 64)
    overwrite: bool = setting("Write captions anew that are in a .txt; those of metadata.jsonl stay.", False)
    revision: str | None = setting("Revision of the model's repository.", None)
    mixed_precision: str = setting(*PRECISION)
    local_files_only: bool = setting(*LOCAL_FILES_ONLY)
    device: str | None = setting(*DEVICE)

    def __post_init__(self) -> None:
        if fault := below_one(self, "max_new_tokens"):
            raise ConfigError(fault)


def run_caption(config: CaptionConfig) -> Done:
    """Write `<name>.txt` beside each photo that has no caption yet, one after another, each whole or not at all.

    Photos that cannot be decoded, and those of which the model says nothing, are left out with a warning.

    Raises:
        NoImagesError, MetadataError, UnreadableImageError: the photos cannot be used.
        ConfigError: two photos would share a caption.
        WriteFailedError: a folder cannot be written.
        EmbedderUnavailableError: there is no such model.
    """
    from tqdm.auto import tqdm

    from ..data import usable_caption
    from ..files import require_writable, write_bytes

    photos = _photos_in(config.photos)
    todo = [photo for photo in photos if photo.caption is None or (config.overwrite and _is_in_a_text(photo))]
    kept = len(photos) - len(todo)
    files = _files_of([photo.path for photo in todo])
    for folder in sorted({file.parent for file in files}):
        require_writable(folder)
    told = f"; {kept} had one" if kept else ""
    if not todo:
        return Done(f"wrote no caption{told}", {"captions": {}, "kept": kept, "left_out": []})
    ask = _asker(config)
    written: dict[str, str] = {}
    left: list[str] = []
    for photo, file in tqdm(list(zip(todo, files, strict=True)), desc="captioning", unit="photo"):
        try:
            answer = usable_caption(" ".join(ask(photo.load()).split())[:_LONGEST])
        except (NoImagesError, UnreadableImageError) as error:
            if len(todo) == 1:
                raise
            left.append(str(error))
            continue
        if answer is None:
            left.append(f"the model says nothing of {photo.path}")
            continue
        written[str(photo.path)] = f"{config.prefix}{answer}"
        write_bytes(file, f"{written[str(photo.path)]}\n".encode())
    if left:
        warnings.warn(f"left out {len(left)} of {len(todo)} photos: {'; '.join(left[:3])}", stacklevel=2)
    values = {"captions": written, "kept": kept, "left_out": left}
    return Done(f"wrote the captions of {len(written)} photo(s){told}", values)


def _photos_in(given: str) -> list[Any]:
    from ..data import read_photos, read_subjects

    inside = Path(given).iterdir() if os.path.isdir(given) else []
    if any(path.is_dir() and not path.name.startswith(".") for path in inside):
        return [photo for person in read_subjects(given) for photo in person.photos]
    return list(read_photos(given))


def _is_in_a_text(photo: Any) -> bool:
    """Whether a photo's caption is that of the .txt beside it; a line of metadata.jsonl counts before."""
    from ..data import caption_beside

    return bool(caption_beside(photo.path) == photo.caption)


def _files_of(photos: Sequence[Path]) -> list[Path]:
    """Where the captions go."""
    owners: dict[Path, Path] = {}
    for photo in photos:
        file = photo.with_suffix(".txt")
        if file in owners:
            raise ConfigError(
                f"expected photos whose names differ before the dot, found {owners[file]} and {photo.name}, which "
                f"would share {file.name}: rename one"
            )
        owners[file] = photo
    return list(owners)


def _asker(config: CaptionConfig) -> Callable[[Image.Image], str]:
    """What a model answers to the question about a photo; one that takes none says what it sees."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..bases.precision import choose_device, choose_dtype

    device = choose_device(config.device)
    dtype = choose_dtype(config.mixed_precision, device)
    source: dict[str, Any] = {"revision": config.revision, "local_files_only": config.local_files_only}
    try:
        processor: Any = AutoProcessor.from_pretrained(config.model, **source)
        model: Any = AutoModelForImageTextToText.from_pretrained(config.model, dtype=dtype, **source)
    except (OSError, ValueError, ImportError) as error:
        raise EmbedderUnavailableError(
            f"expected a vision-language model of transformers, found {config.model!r}: {error}"
        ) from error
    model.to(device).eval()

    @torch.inference_mode()
    def ask(photo: Image.Image) -> str:
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": photo}, {"type": "text", "text": config.question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        else:
            inputs = processor(images=[photo], return_tensors="pt")
        inputs = inputs.to(device, dtype)
        tokens = model.generate(**inputs, max_new_tokens=config.max_new_tokens, do_sample=False)[0]
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(tokens[: asked.shape[1]], asked[0]):  # not every model says it again
            tokens = tokens[asked.shape[1] :]
        return str(processor.decode(tokens, skip_special_tokens=True))

    return ask
