# SPDX-License-Identifier: Apache-2.0
"""Logs of a service: a line of JSON for each event, with no name and no prompt in it.

What an error says stays out: it may quote a person's name, the path of their files or a prompt.
"""

from __future__ import annotations

import json
import logging
import os
import traceback
from datetime import datetime, timezone
from pathlib import Path

log = logging.getLogger("peft_metalora.service")


class JsonLines(logging.Formatter):
    """A record as a line: time, level, event, what its `fields` say, and of an error its kind and where it was."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= {key: value for key, value in getattr(record, "fields", {}).items() if value is not None}
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = _kinds_and_places(record.exc_info[1])
        return json.dumps(line, default=str)


def _kinds_and_places(error: BaseException) -> str:
    """A traceback without what the error and its causes say."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    before = "" if cause is None else f"{_kinds_and_places(cause)}\n"
    number = getattr(error, "errno", None)
    kind = type(error).__qualname__ if number is None else f"{type(error).__qualname__} (errno {number})"
    return before + "".join(traceback.format_tb(error.__traceback__)) + kind


def log_to(folder: str | None, who: str) -> None:
    """Have this process log: to a file of its own in `folder`, or to its standard error."""
    handler: logging.Handler = logging.StreamHandler()
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(Path(folder) / f"{who}-{os.getpid()}.jsonl", encoding="utf-8")
    handler.setFormatter(JsonLines())
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
