# SPDX-License-Identifier: Apache-2.0
"""Which subjects and images a batch of stage 1 holds: each subject equally often, whatever its number of images.

If subjects are of groups, each group is seen equally often instead, and within a group each subject.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from ...errors import ConfigError

Visit = tuple[int, list[int]]  # a slot, and the positions of its images


def balanced_buckets(groups: Sequence[Hashable], size: int, shards: int) -> list[list[int]]:
    """Buckets of at most `size` subjects, each with its share of every group, for each shard too.

    Args:
        groups: of each subject.

    Raises:
        ConfigError: a bucket or a shard would lack a group.
    """
    order = sorted(range(len(groups)), key=lambda subject: str(groups[subject]))
    count = -(-len(groups) // size)
    # Groups lie side by side, so that every count-th subject is a fair sample of them; so are a bucket's shards.
    buckets = [order[number::count] for number in range(count)]
    for bucket in buckets:
        for group in sorted(set(groups), key=str):
            found = sum(groups[subject] == group for subject in bucket)
            if found < shards:
                raise ConfigError(
                    f"expected at least {shards} subject(s) of the group {group!r} in every bucket, one for each "
                    f"shard, found {found}: choose a larger bucket_size or fewer shards, or leave balance_by out"
                )
    return buckets


def _of_each(visits: list[Visit]) -> list[Visit]:
    """The first visit of each subject."""
    return list({slot: visit for visit in reversed(visits) for slot in [visit[0]]}.values())[::-1]


class SubjectSampler:
    """Draws batches from a bucket of subjects.

    A bucket's subjects are dealt out to `shards`, slot by slot, and every batch takes the same number from each shard,
    so that each process of a run, owning whole shards, has equal work. Within a shard every subject comes once, in
    random order, before any comes again; of groups the next subject is taken in turn.

    If images have several shapes, what a shard gives to a batch is of one shape, and of different subjects. Subjects
    are drawn as ever; those whose image has another shape wait until there are enough of theirs. When many wait, some
    show another image of theirs, and a subject comes twice into a batch only where too few have its shape.

    Args:
        positions: for each subject of the run, where its images are among the examples.
        subjects_per_batch: of the whole batch.
        images_per_subject: drawn from a subject's images with replacement; all of one shape.
        shapes: of each example, by position; None: all are alike.
        groups: of each subject; None: all are of one. Every shard of a bucket must have some of each.

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
        *,
        shapes: Sequence[int] | None = None,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        if subjects_per_batch % shards:
            raise ConfigError(
                f"subjects_per_batch must be a multiple of the number of shards (by default that of the processes), "
                f"found {subjects_per_batch} and {shards}"
            )
        self.shards = shards
        self._positions, self._images, self._wanted = positions, images_per_subject, subjects_per_batch // shards
        self._shapes, self._groups = shapes, groups if groups is not None else [0] * len(positions)
        self._names = sorted(set(self._groups), key=str)
        self._generator = torch.Generator().manual_seed(seed)
        self.bucket: Sequence[int] = range(0)
        self._forget()

    def _forget(self) -> None:
        # Of each shard: for each group the subjects to come, the number of turns taken, what waits by shape.
        self._queues: list[list[list[int]]] = [[[] for _ in self._names] for _ in range(self.shards)]
        self._turns = [0] * self.shards
        self._waiting: list[dict[int, list[Visit]]] = [{} for _ in range(self.shards)]

    def start(self, bucket: Sequence[int]) -> None:
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
        self._forget()

    def draw(self) -> tuple[list[int], list[int]]:
        """One batch, shard after shard: for each sample its slot, and the position of its example."""
        rows, index = [], []
        for shard in range(self.shards):
            for slot, picks in self._visits(shard) if self._shapes is None else self._alike(shard, self._shapes):
                index += picks
                rows += [slot] * len(picks)
        return rows, index

    def _alike(self, shard: int, shapes: Sequence[int]) -> list[Visit]:
        """As many visits as ever, of one shape, and of different subjects wherever there are enough who have it."""
        waiting, wanted = self._waiting[shard], self._per_batch(shard)
        while True:
            by_length = sorted(waiting, key=lambda shape: (-len(waiting[shape]), shape))
            for shape in by_length:
                if len(chosen := _of_each(waiting[shape])) >= wanted:
                    return self._take(shard, chosen[:wanted])
            if sum(map(len, waiting.values())) > wanted * len(waiting):  # rather than let ever more of them wait
                return self._filled_up(shard, by_length[0], wanted)
            for slot, picks in self._visits(shard):
                waiting.setdefault(shapes[picks[0]], []).append((slot, picks))

    def _filled_up(self, shard: int, shape: int, wanted: int) -> list[Visit]:
        """The different subjects who wait with a shape, others who wait with an image of theirs that has it, and last
        the same ones again."""
        waiting = self._waiting[shard]
        chosen = self._take(shard, _of_each(waiting[shape]))
        elsewhere = [visit for visits in waiting.values() for visit in visits]
        for visit in elsewhere:
            slot = visit[0]
            if len(chosen) < wanted and slot not in {one for one, _ in chosen} and self._positions_of(slot, shape):
                self._take(shard, [visit])
                chosen.append((slot, self._images_of(slot, shape)))
        return chosen + self._take(shard, waiting[shape][: wanted - len(chosen)])

    def _take(self, shard: int, visits: list[Visit]) -> list[Visit]:
        """These visits, which wait no longer."""
        gone = {id(visit) for visit in visits}
        for shape, own in self._waiting[shard].items():
            self._waiting[shard][shape] = [visit for visit in own if id(visit) not in gone]
        return visits

    def _visits(self, shard: int) -> list[Visit]:
        return [(slot, self._images_of(slot)) for slot in self._subjects(shard)]

    def _images_of(self, slot: int, shape: int | None = None) -> list[int]:
        positions = self._positions_of(slot, shape)
        if shape is None and self._shapes is not None:
            first = positions[int(torch.randint(len(positions), (), generator=self._generator))]
            positions = self._positions_of(slot, self._shapes[first])
        picks = torch.randint(len(positions), (self._images,), generator=self._generator)
        return [positions[pick] for pick in picks.tolist()]

    def _positions_of(self, slot: int, shape: int | None) -> Sequence[int]:
        """Of a subject's images, or of those that have a shape."""
        positions = self._positions[self.bucket[slot]]
        if shape is None or self._shapes is None:
            return positions
        return [position for position in positions if self._shapes[position] == shape]

    def _members(self, shard: int) -> range:
        return range(shard, len(self.bucket), self.shards)

    def _per_batch(self, shard: int) -> int:
        return min(self._wanted, len(self._members(shard)))

    def _subjects(self, shard: int) -> list[int]:
        chosen: list[int] = []
        for _ in range(self._per_batch(shard)):
            turn = self._turns[shard] % len(self._names)
            self._turns[shard] += 1
            queue = self._queues[shard][turn]
            if all(slot in chosen for slot in queue):
                group = [slot for slot in self._members(shard) if self._groups[self.bucket[slot]] == self._names[turn]]
                if not queue or not set(group) <= set(chosen):
                    queue += [group[place] for place in torch.randperm(len(group), generator=self._generator).tolist()]
            # A subject that a new round brings again waits until the next batch, if its group has another one.
            slot = next((slot for slot in queue if slot not in chosen), queue[0])
            queue.remove(slot)
            chosen.append(slot)
        return chosen

    def state_dict(self) -> dict[str, Any]:
        """For a resumed run; the bucket is the caller's."""
        return {
            "generator": self._generator.get_state(),
            "queues": [[list(queue) for queue in queues] for queues in self._queues],
            "turns": list(self._turns),
            "waiting": [{shape: list(visits) for shape, visits in one.items()} for one in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a `state_dict`, after `start`."""
        self._generator.set_state(state["generator"])
        self._queues = [[list(queue) for queue in queues] for queues in state["queues"]]
        self._turns = list(state["turns"])
        self._waiting = [{shape: list(visits) for shape, visits in one.items()} for one in state["waiting"]]
