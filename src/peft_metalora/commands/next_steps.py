# SPDX-License-Identifier: Apache-2.0
"""What can be done next with a subject that was just written, as commands to copy."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from ..checkpoint.config_file import read_config
from ..checkpoint.folded import model_class
from ..files import EMBEDDED
from ..lora.original_names import is_elsewhere


def next_steps(
    folder: str | os.PathLike[str], prompt: str | None = None, down: str | None = None, generic: str | None = None
) -> str:
    """Commands to draw, export and push the subject in a folder.

    Args:
        prompt: words that the subject is known by.
        down: its Down; a folder has to be in a repository, too, before others can load the subject.
        generic: the class of its base.
    """
    place, name = shlex.quote(os.fspath(folder)), Path(folder).resolve().name
    drawn = shlex.quote(f"{prompt or 'a photo of a person'}, laughing, on a beach")
    drawn += " --resolution 64" if down in EMBEDDED else ""  # the embedded base knows no other
    own = "" if generic is None else f" --generic {shlex.quote(generic)}"
    # Of a base that other tools do not know, there is the file that diffusers takes.
    by_name = is_elsewhere(model_class(read_config(folder)))
    kind, lora = ("comfyui", f"ComfyUI/models/loras/{name}") if by_name else ("diffusers", name)
    file, whom = shlex.quote(f"{lora}.safetensors"), "for ComfyUI:" if by_name else "as a LoRA:  "
    local = (
        f" --down {shlex.quote(f'me/{Path(down).resolve().name}')}" if down is not None and os.path.isdir(down) else ""
    )
    steps = [
        f"draw:        metalora generate --subject {place}{own} --prompt {drawn} --output_dir images",
        f"{whom} metalora export --subject {place} --format {kind} --output {file}",
    ]
    if down not in EMBEDDED:  # whose Down is in no repository
        steps.append(f"publish:     metalora push --folder {place} --repo_id {shlex.quote(f'me/{name}')}{local}")
    return "\n".join(steps)


def in_words(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size} bytes" if size < 1000 else f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


def size_of(folder: str | os.PathLike[str]) -> int:
    """Bytes of the files that lie in a folder."""
    return sum(path.stat().st_size for path in Path(folder).iterdir() if path.is_file())
