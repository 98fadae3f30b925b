# SPDX-License-Identifier: Apache-2.0
"""The subjects of a table that are codes: a line of numbers each in host memory, expanded as they come into a slot."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checkpoint.space import SubjectSpace

_BLOCK = 4096  # codes that are made room for at once


class CodeBook:
    """Codes by name, for one subject space.

    They lie in blocks, not in a tensor each: beside some hundred numbers a tensor of its own would be as much again.

    Args:
        space: its factors in the order of a slot's numbers, where the slots are.
    """

    def __init__(self, space: SubjectSpace) -> None:
        self.space = space
        self._blocks: list[Tensor] = []
        self._rows: dict[str, int] = {}
        self._free: list[int] = []

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, name: str, code: Tensor) -> None:
        """Keep a code (k,) that the space accepts; an older one of that name is replaced."""
        if name not in self._rows:
            self._rows[name] = self._free.pop() if self._free else len(self._rows)
        self._line(self._rows[name]).copy_(code)

    def code(self, name: str) -> Tensor:
        """The code of a name, (k,) float32."""
        return self._line(self._rows[name]).clone()

    def drop(self, name: str) -> None:
        """Forget a code, its numbers too."""
        row = self._rows.pop(name)
        self._line(row).zero_()
        self._free.append(row)

    def write(self, name: str, row: Tensor) -> None:
        """Expand a code into a slot's row (N,): one product over the basis."""
        if self.space.mean.device != row.device:
            self.space.to(row.device)
        self.space.expand_into(self._line(self._rows[name]), row)

    def _line(self, row: int) -> Tensor:
        block, line = divmod(row, _BLOCK)
        if block == len(self._blocks):
            self._blocks.append(torch.zeros(_BLOCK, self.space.code_size, dtype=torch.float32, device="cpu"))
        return self._blocks[block][line]
