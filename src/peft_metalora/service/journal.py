# SPDX-License-Identifier: Apache-2.0
"""Logs of a service: a line of JSON for each event, with no name and no prompt in it."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone
from pathlib import Path

log = logging.getLogger("peft_metalora.service")


class JsonLines(logging.Formatter):
    """A record as a line: time, level, event, and what its `fields` say."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= {key: value for key, value in getattr(record, "fields", {}).items() if value is not None}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


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
