# SPDX-License-Identifier: Apache-2.0
"""What other libraries log and warn of while a command runs: kept from the terminal, unless somebody asks for it."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the logs and warnings of other libraries, show ours in a line each, and say at the end that some are hidden.

    Errors that are logged stay. Progress bars stay as well, except those of single weights.
    """
    from transformers.utils.logging import disable_progress_bar

    hidden = 0

    def show(message: Warning | str, *_: object, **__: object) -> None:
        nonlocal hidden
        if _is_ours():
            print(f"metalora: warning: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            hidden += 1

    disable_progress_bar()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logging.disable(level)
        if hidden:
            print(f"metalora: {hidden} warning(s) of other libraries are not shown; -v shows them", file=sys.stderr)


def _is_ours() -> bool:
    """Whether our code asked for the warning that is being shown, whosever line it names."""
    frames = iter(inspect.stack(context=0)[2:])
    asked = next(one.frame.f_globals.get("__name__") for one in frames if one.frame.f_globals["__name__"] != "warnings")
    return str(asked).startswith(f"{__package__.partition('.')[0]}.")
