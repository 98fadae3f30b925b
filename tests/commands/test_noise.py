# SPDX-License-Identifier: Apache-2.0
"""What other libraries say while a command runs is hidden and counted; what this package says is not."""

import logging
import warnings

import pytest

from peft_metalora.commands import noise


def ours(text):
    """Warn as a module of the package does."""
    exec("import warnings; warnings.warn(text, stacklevel=1)", {"__name__": "peft_metalora.data.folders", "text": text})


def test_others_are_hidden_and_counted_in_a_line(capsys):
    theirs = logging.getLogger("somebody")
    theirs.addHandler(logging.StreamHandler())
    with noise.quiet():
        warnings.warn("theirs", stacklevel=1)
        theirs.warning("logged")
        theirs.error("broken")
        ours("left out 2 of 3 photos:\n  a.png")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == [
        "metalora: warning: left out 2 of 3 photos: a.png",
        "metalora: 1 warning(s) of other libraries are not shown; -v shows them",
    ]
    assert "logged" not in lines


def test_afterwards_all_is_as_it_was(capsys):
    level, show = logging.root.manager.disable, warnings.showwarning
    with pytest.raises(ValueError), noise.quiet():
        raise ValueError
    assert (logging.root.manager.disable, warnings.showwarning) == (level, show)
    assert capsys.readouterr().err == ""
