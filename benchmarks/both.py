# SPDX-License-Identifier: Apache-2.0
"""Two domains as one: people of both are drawn, half of each, every one by their own domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peft_metalora.demo.domain import Drawn


@dataclass(frozen=True)
class Mixed:
    """Scenes of several domains: row n is row `place[n]` of the part of domain `whose[n]`."""

    whose: Tensor
    place: Tensor
    parts: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.whose)

    def __getitem__(self, index: slice | Tensor) -> Mixed:
        return replace(self, whose=self.whose[index], place=self.place[index])

    def to(self, device: torch.device | str) -> Mixed:
        """Copy to a device."""
        return Mixed(self.whose.to(device), self.place.to(device), tuple(part.to(device) for part in self.parts))

    def of(self, number: int) -> Any:
        """Its own scenes of a domain, in order."""
        return self.parts[number][self.place[self.whose == number]]


class Both(Drawn):
    """Domains in turn: identity n is one of domain n modulo their number.

    The first column of an identity is its domain's number; then come the domain's own columns, then zeros.
    """

    name = "both"

    def __init__(self, domains: Sequence[Drawn]) -> None:
        self.domains = tuple(domains)
        self.vocabulary = tuple(dict.fromkeys(word for domain in domains for word in domain.vocabulary))  # type: ignore[misc]
        self._widths = [domain.subject_identities("meta", 1).shape[1] for domain in domains]

    def sample_identities(self, n: int, generator: torch.Generator, split: str = "base") -> Tensor:
        count = len(self.domains)
        return self._in_turn(
            [
                domain.sample_identities((n - number + count - 1) // count, generator, split)
                for number, domain in enumerate(self.domains)
            ]
        )

    def subject_identities(self, split: str, count: int) -> Tensor:
        """As many of each domain as the domain with the fewest has."""
        found = [domain.subject_identities(split, -(-count // len(self.domains))) for domain in self.domains]
        fewest = min(map(len, found))
        return self._in_turn([own[:fewest] for own in found])[:count]

    def _in_turn(self, identities: Sequence[Tensor]) -> Tensor:
        n, first = sum(map(len, identities)), identities[0]
        mixed = first.new_zeros(n, 1 + max(self._widths))
        for number, own in enumerate(identities):
            mixed[number :: len(identities), 0] = number
            mixed[number :: len(identities), 1 : 1 + own.shape[1]] = own
        return mixed

    def _own(self, identities: Tensor, number: int) -> Tensor:
        """The identities of a domain, in order, as it knows them."""
        return identities[identities[:, 0] == number, 1 : 1 + self._widths[number]]

    def sample_scenes(self, identities: Tensor, generator: torch.Generator, reference: bool = False) -> Mixed:
        whose = identities[:, 0].long().to(generator.device)
        parts = [
            domain.sample_scenes(self._own(identities, number), generator, reference)
            for number, domain in enumerate(self.domains)
        ]
        place = torch.zeros_like(whose)
        for number, part in enumerate(parts):
            place[whose == number] = torch.arange(len(part), device=whose.device)
        return Mixed(whose, place, tuple(parts))

    def cat(self, scenes: Sequence[Mixed]) -> Mixed:
        places, before = [], [0] * len(self.domains)
        for one in scenes:
            places.append(one.place + torch.tensor(before, device=one.place.device)[one.whose])
            before = [count + len(part) for count, part in zip(before, one.parts, strict=True)]
        parts = (domain.cat([one.parts[number] for one in scenes]) for number, domain in enumerate(self.domains))
        return Mixed(torch.cat([one.whose for one in scenes]), torch.cat(places), tuple(parts))

    def render(self, identities: Tensor, scenes: Mixed) -> Tensor:
        drawn = [
            domain.render(self._own(identities, number), scenes.of(number))
            for number, domain in enumerate(self.domains)
        ]
        images = drawn[0].new_empty(len(scenes), *drawn[0].shape[1:])
        for number, own in enumerate(drawn):
            images[scenes.whose == number] = own
        return images

    def captions(self, scenes: Mixed, generator: torch.Generator | None = None, drop: float = 0.0) -> list[str]:
        own = [iter(domain.captions(scenes.of(number), generator, drop)) for number, domain in enumerate(self.domains)]
        return [next(own[number]) for number in scenes.whose.tolist()]
