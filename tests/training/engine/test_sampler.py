# SPDX-License-Identifier: Apache-2.0
"""Batches of stage 1 are fair to subjects and to processes."""

from __future__ import annotations

from collections import Counter

import pytest

from peft_metalora.errors import ConfigError
from peft_metalora.training.engine.sampler import SubjectSampler, balanced_buckets

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


# Position p has shape SHAPES[p]: subject 0 and 5 have one image of shape 1 only, the others have both kinds.
SHAPES = {position: int(position in (0, 50, 55) or position % 3 == 1) for one in POSITIONS for position in one}


@pytest.mark.parametrize(("per_batch", "shards", "images"), [(4, 1, 1), (4, 2, 2), (6, 3, 1), (1, 1, 2)])
def test_with_shapes_a_shard_s_batch_has_one_and_subjects_are_still_equally_often_seen(per_batch, shards, images):
    sampler = SubjectSampler(POSITIONS, per_batch, images, shards, seed=0, shapes=SHAPES)
    sampler.start(range(6))
    seen, shapes = Counter(), Counter()
    for _ in range(300):
        rows, index = sampler.draw()
        assert len(rows) == len(index) == images * per_batch
        for shard in range(shards):
            found = {SHAPES[position] for slot, position in zip(rows, index, strict=True) if slot % shards == shard}
            assert len(found) == 1
            shapes.update(found)
        assert Counter(slot % shards for slot in rows) == dict.fromkeys(range(shards), images * per_batch // shards)
        assert all(position in POSITIONS[slot] for slot, position in zip(rows, index, strict=True))
        seen.update(rows)
    assert shapes[0] > 60 and shapes[1] > 60
    # What waits at the end is all that they differ by: less than a batch of each shape and shard.
    share = 300 * images * per_batch / 6
    assert all(abs(count - share) <= 2 * images * per_batch for count in seen.values())
    # What waits is nobody's business but must not grow.
    assert sum(len(visits) for waiting in sampler._waiting for visits in waiting.values()) <= 2 * per_batch


@pytest.mark.parametrize(("subjects", "per_batch", "shapes"), [(3, 2, 2), (6, 4, 2), (8, 8, 2), (10, 4, 5)])
@pytest.mark.parametrize("seed", range(3))
def test_with_shapes_no_batch_holds_a_subject_twice(subjects, per_batch, shapes, seed):
    """Bug: 45 of 300 batches of two of three subjects, each with images of two shapes, held one subject twice."""
    positions = [list(range(subject * shapes, (subject + 1) * shapes)) for subject in range(subjects)]
    kinds = [position % shapes for position in range(subjects * shapes)]
    sampler = SubjectSampler(positions, per_batch, 1, 1, seed, shapes=kinds)
    sampler.start(range(subjects))
    seen = Counter()
    for _ in range(300):
        rows, index = sampler.draw()
        assert len(set(rows)) == per_batch and len({kinds[position] for position in index}) == 1
        assert all(position in positions[slot] for slot, position in zip(rows, index, strict=True))
        seen.update(index)
    # Every image of a subject, and so every shape, is still drawn equally often, give or take five deviations.
    share = 300 * per_batch / (subjects * shapes)
    assert all(abs(seen[position] - share) < 5 * (share * (1 - 1 / shapes)) ** 0.5 for position in range(len(kinds)))


def test_who_alone_has_a_shape_comes_twice_rather_than_never():
    sampler = SubjectSampler([[0], [1], [2], [3]], 2, 1, 1, 0, shapes=[1, 0, 0, 0])
    sampler.start(range(4))
    seen = Counter(slot for _ in range(300) for slot in sampler.draw()[0])
    assert all(abs(seen[slot] - 150) <= 4 for slot in range(4))


# Subject 5 and 6 are alone in their group with seven others.
GROUPS = ["f", "f", "m", "f", "f", "f", "m", "f", "f"]
NINE = [[subject] for subject in range(9)]


@pytest.mark.parametrize(("per_batch", "shards"), [(4, 1), (4, 2), (2, 2), (6, 1), (3, 1)])
def test_groups_are_seen_equally_often_and_subjects_within_them(per_batch, shards):
    (bucket,) = balanced_buckets(GROUPS, 9, shards)
    assert sorted(bucket) == list(range(9))
    sampler = SubjectSampler(NINE, per_batch, 1, shards, seed=0, groups=GROUPS)
    sampler.start(bucket)
    seen = Counter()
    for _ in range(84):
        rows, index = sampler.draw()
        assert [[bucket[slot]] for slot in rows] == [[position] for position in index]
        seen.update(index)
    groups = Counter()
    for subject, count in seen.items():
        groups[GROUPS[subject]] += count
    assert groups["f"] == groups["m"] == 84 * per_batch / 2
    if shards == 1:
        assert len({seen[2], seen[6]}) == 1
        women = [count for subject, count in seen.items() if GROUPS[subject] == "f"]
        assert max(women) - min(women) <= 1


def test_buckets_hold_their_share_of_every_group():
    groups = ["m" if subject % 5 == 0 else "f" for subject in range(50)]
    buckets = balanced_buckets(groups, 12, 2)
    assert sorted(subject for bucket in buckets for subject in bucket) == list(range(50))
    assert all(len(bucket) <= 12 for bucket in buckets)
    for bucket in buckets:
        assert sum(groups[subject] == "m" for subject in bucket) == 2
        for shard in range(2):
            assert {groups[bucket[slot]] for slot in range(shard, len(bucket), 2)} == {"f", "m"}
    with pytest.raises(ConfigError, match="at least 4 subject\\(s\\) of the group 'm' in every bucket"):
        balanced_buckets(groups, 12, 4)


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_state_with_groups_and_shapes(draws):
    shapes = {position: position % 2 for position in range(9)}
    first, second = (SubjectSampler(NINE, 6, 1, 2, seed=seed, shapes=shapes, groups=GROUPS) for seed in (0, 1))
    (bucket,) = balanced_buckets(GROUPS, 9, 2)
    for sampler in (first, second):
        sampler.start(bucket)
    for _ in range(draws):
        first.draw()
    second.load_state_dict(first.state_dict())
    assert [first.draw() for _ in range(9)] == [second.draw() for _ in range(9)]
