# SPDX-License-Identifier: Apache-2.0
"""Which subjects and images a batch of stage 1 holds: each subject equally often, whatever its number of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import ConfigError


class SubjectSampler:
    """Draws batches from a bucket of subjects.

    A bucket's subjects are dealt out to `shards`, slot by slot, and every batch takes the same number from each shard,
    so that each process of a run, owning whole shards, has equal work. Within a shard every subject comes once, in
    random order, before any comes again.

    Args:
        positions: for each subject of the run, where its images are among the examples.
        subjects_per_batch: of the whole batch.
        images_per_subject: drawn from a subject's images with replacement.

    Raises:
        ConfigError: the batch cannot be divided equally among the shards.
    """

    def __init__(
        self,
        positions: Sequence[Sequence[int]],
        subjects_per_batch: int,
        images_per_subject: int,
        shards: int,
        seed: int,
    ) -> None:
        if subjects_per_batch % shards:
            raise ConfigError(
                f"subjects_per_batch must be a multiple of the number of shards (by default that of the processes), "
                f"found {subjects_per_batch} and {shards}"
            )
        self.shards = shards
        self._positions, self._images, self._wanted = positions, images_per_subject, subjects_per_batch // shards
        self._generator = torch.Generator().manual_seed(seed)
        self.bucket = range(0)
        self._queues: list[list[int]] = [[] for _ in range(shards)]

    def start(self, bucket: range) -> None:
        """Draw from these subjects from now on; slot s is subject bucket[s].

        Raises:
            ConfigError: fewer subjects than shards.
        """
        if len(bucket) < self.shards:
            raise ConfigError(
                f"expected at least {self.shards} subjects in every bucket, one for each shard, found {len(bucket)}: "
                "choose another bucket_size or fewer processes"
            )
        self.bucket = bucket
        self._queues = [[] for _ in range(self.shards)]

    def draw(self) -> tuple[list[int], list[int]]:
        """One batch: for each sample its slot, and the position of its example."""
        rows, index = [], []
        for shard in range(self.shards):
            for slot in self._subjects(shard):
                positions = self._positions[self.bucket[slot]]
                picks = torch.randint(len(positions), (self._images,), generator=self._generator)
                index += [positions[pick] for pick in picks.tolist()]
                rows += [slot] * self._images
        return rows, index

    def _subjects(self, shard: int) -> list[int]:
        members = range(shard, len(self.bucket), self.shards)
        wanted = min(self._wanted, len(members))
        chosen: list[int] = []
        queue = self._queues[shard]
        while len(chosen) < wanted:
            if all(slot in chosen for slot in queue):
                queue += [members[place] for place in torch.randperm(len(members), generator=self._generator).tolist()]
            # A subject that a new round brings again waits until the next batch.
            slot = next(slot for slot in queue if slot not in chosen)
            queue.remove(slot)
            chosen.append(slot)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """For a resumed run; the bucket is the caller's."""
        return {"generator": self._generator.get_state(), "queues": [list(queue) for queue in self._queues]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict`, after `start`."""
        self._generator.set_state(state["generator"])
        self._queues = [list(queue) for queue in state["queues"]]
