# SPDX-License-Identifier: Apache-2.0
"""Batches of stage 1 are fair to subjects and to processes."""

from __future__ import annotations

from collections import Counter

import pytest

from peft_metalora.errors import ConfigError
from peft_metalora.training.sampler import SubjectSampler

# Subject s has s + 1 images.
POSITIONS = [list(range(10 * subject, 10 * subject + subject + 1)) for subject in range(6)]


@pytest.mark.parametrize(("per_batch", "shards"), [(4, 1), (4, 2), (6, 3), (2, 1), (1, 1)])
def test_each_subject_is_seen_equally_often_whatever_its_number_of_images(per_batch, shards):
    sampler = SubjectSampler(POSITIONS, per_batch, 2, shards, seed=0)
    sampler.start(range(6))
    seen = Counter()
    for _ in range(12):
        rows, index = sampler.draw()
        assert len(rows) == len(index) == 2 * per_batch
        assert set(Counter(rows).values()) == {2}
        assert Counter(slot % shards for slot in set(rows)) == dict.fromkeys(range(shards), per_batch // shards)
        assert all(position in POSITIONS[slot] for slot, position in zip(rows, index, strict=True))
        seen.update(rows)
    assert set(seen.values()) == {12 * 2 * per_batch // 6}


def test_slots_are_those_of_the_bucket():
    sampler = SubjectSampler(POSITIONS, 2, 1, 1, seed=0)
    sampler.start(range(4, 6))
    rows, index = sampler.draw()
    assert sorted(rows) == [0, 1]
    assert all(position in POSITIONS[4 + slot] for slot, position in zip(rows, index, strict=True))


def test_a_bucket_smaller_than_the_batch_gives_all_of_it_once():
    sampler = SubjectSampler(POSITIONS, 16, 1, 1, seed=0)
    sampler.start(range(3))
    assert sorted(sampler.draw()[0]) == [0, 1, 2]


def test_state():
    first, second = (SubjectSampler(POSITIONS, 4, 1, 2, seed=seed) for seed in (0, 1))
    for sampler in (first, second):
        sampler.start(range(6))
    first.draw()
    second.load_state_dict(first.state_dict())
    assert [first.draw() for _ in range(4)] == [second.draw() for _ in range(4)]


def test_shards_that_do_not_work_out():
    with pytest.raises(ConfigError, match="multiple of the number of shards"):
        SubjectSampler(POSITIONS, 5, 1, 2, seed=0)
    with pytest.raises(ConfigError, match="found 2"):
        SubjectSampler(POSITIONS, 3, 1, 3, seed=0).start(range(2))
