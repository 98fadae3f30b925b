# SPDX-License-Identifier: Apache-2.0
"""A few hundred hostile files on every run; `benchmarks/fuzz.py` tries many thousands, any of them by its number."""

import pytest
from mutations import MUTATIONS, Lab, run_case

CASES = 340


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def outcomes(lab):
    return [run_case(seed, lab) for seed in range(CASES)]


def test_nothing_but_our_errors_comes_out(outcomes):
    assert [outcome for outcome in outcomes if outcome.result not in ("refused", "loaded")] == []


def test_no_model_is_harmed(outcomes):
    assert [outcome for outcome in outcomes if outcome.harmed] == []


def test_each_case_is_short(outcomes):
    assert max(outcome.seconds for outcome in outcomes) < 2


def test_every_kind_of_damage_was_tried_and_most_was_refused(outcomes):
    assert {outcome.mutation for outcome in outcomes} == set(MUTATIONS)
    assert sum(outcome.result == "refused" for outcome in outcomes) > 0.7 * CASES
    assert len({outcome.error for outcome in outcomes}) > 10


def test_a_case_can_be_replayed(outcomes, lab):
    again = run_case(7, lab)
    assert (again.mutation, again.result, again.error) == (
        outcomes[7].mutation,
        outcomes[7].result,
        outcomes[7].error,
    )


def test_the_probe_sees_harm(lab):
    weight = lab.pipe.transformer.blocks[0].norm.weight
    kept = weight[0, 0].item()
    weight.data[0, 0] += 1
    assert lab.is_harmed()
    weight.data[0, 0] = kept
    assert not lab.is_harmed()
