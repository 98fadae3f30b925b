# SPDX-License-Identifier: Apache-2.0
"""A few hundred damaged files on every run; `benchmarks/fuzz.py` tries many thousands, any of them by its number."""

import pytest
import torch
from mutations import MUTATIONS
from roads import ROADS, Case, Lab, Road, run_case, state_of

CASES = 540


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def outcomes(lab):
    return [run_case(seed, lab) for seed in range(CASES)]


def test_nothing_but_our_errors_comes_out(outcomes):
    typed = ("refused", "done", "refused by PEFT")
    assert [outcome for outcome in outcomes if outcome.result not in typed] == []


def test_nothing_is_harmed(outcomes):
    assert [outcome for outcome in outcomes if outcome.harm] == []


def test_each_case_is_short(outcomes):
    assert max(outcome.seconds for outcome in outcomes) < 2


def test_every_road_was_gone_and_most_was_refused(outcomes):
    assert {outcome.road for outcome in outcomes} == set(ROADS)
    assert {outcome.damage for outcome in outcomes} >= set(MUTATIONS)
    assert sum(outcome.result == "refused" for outcome in outcomes) > 0.6 * CASES
    assert len({outcome.error for outcome in outcomes}) > 10


def test_a_case_can_be_replayed(outcomes, lab):
    again = run_case(7, lab)
    assert (again.road, again.damage, again.result, again.error) == (
        outcomes[7].road,
        outcomes[7].damage,
        outcomes[7].result,
        outcomes[7].error,
    )


def test_the_judge_sees_harm(lab, monkeypatch):
    """What he is for: a weight, a file, an output that changed, and an error that is none of ours."""

    def breaks_a_weight(lab: Lab, case: Case) -> None:
        with torch.no_grad():
            case.watch(lab.pipe.transformer).blocks[0].norm.weight[0, 0] += 1
        raise KeyError("none of ours")

    def breaks_a_file(lab: Lab, case: Case) -> None:
        (case.place / "bob" / "adapter_config.json").write_text("{}")

    def left_something(lab: Lab, case: Case) -> None:
        (case.place / ".ann.tmp").mkdir()

    needs = ROADS["load_down"]
    before = state_of(lab.pipe.transformer)[4]
    found = []
    for go in (breaks_a_weight, breaks_a_file, left_something):
        monkeypatch.setattr("roads.ROADS", {"a road": Road(go, needs.needs, needs.damaged, needs.damage, 1)})
        found.append(run_case(0, lab))
    lab.pipe.transformer.load_state_dict(before)
    assert [outcome.harm.partition(":")[0] for outcome in found] == ["the model", "files", "files"]
    assert found[0].result == "KeyError"
