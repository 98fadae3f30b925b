# SPDX-License-Identifier: Apache-2.0
"""The page of `metalora app` as a Space of the Hugging Face Hub starts it: `python app.py`, settings from outside.

Secret TOKENS: a line `user: token` for everybody who may log in. Variable DOWN: a Down that reads photos; without it,
the embedded base. Variable FLAGS: any other flags of `metalora app`. People are kept where the Space has a disk.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

from peft_metalora.cli import main

DISK = Path("/data")  # a Space's persistent storage, if it has been given one


def arguments() -> list[str]:
    """What `metalora` is called with; the tokens leave the environment for a file that nobody else can read."""
    tokens = os.environ.pop("TOKENS", "")
    if not tokens.strip():
        sys.exit(
            "expected the secret TOKENS, 'user: token' for everybody who may log in, found none: set it in Settings"
        )
    file = Path(tempfile.mkdtemp()) / "tokens.yaml"
    file.touch(mode=0o600)
    file.write_text(tokens)
    down = os.environ.get("DOWN")
    base = ["--down", down] if down else ["--demo"]
    people = (DISK if os.access(DISK, os.W_OK) else Path.cwd()) / "people"
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    where = ["--host", "0.0.0.0", "--port", port, "--people", str(people), "--tokens", str(file)]
    return ["app", *base, *where, *shlex.split(os.environ.get("FLAGS", ""))]


if __name__ == "__main__":
    sys.exit(main(arguments()))
