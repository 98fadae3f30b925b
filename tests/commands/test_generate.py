# SPDX-License-Identifier: Apache-2.0
"""What `metalora generate` calls the files of its images."""

from __future__ import annotations

from peft_metalora.commands.generate import _file_names


def test_files_of_generated_images_have_names_of_their_own() -> None:
    """Bug: of the subjects a_2, x/a and y/a the last overwrote the images of the first."""
    for subjects in (["a_2", "x/a", "y/a"], ["x/Ann", "y/ann"], ["x/..", "y/.."], ["a b", "a:b", "a_b"]):
        names = _file_names(subjects)
        assert len({name.casefold() for name in names}) == len(subjects)
        assert all("/" not in name and not name.startswith(".") for name in names)
