# SPDX-License-Identifier: Apache-2.0
"""Six kills, one of each job, while its result is put in place; `benchmarks/kills.py` makes sixty, at any moment."""

from itertools import count

import pytest
from killing import JOBS, Killer, moment_of


@pytest.fixture(scope="module")
def killer(tmp_path_factory):
    with Killer(tmp_path_factory.mktemp("kills")) as killer:
        yield killer


@pytest.mark.parametrize("job", JOBS)
def test_what_is_there_after_a_kill_is_whole_and_the_next_run_ends_as_if_nothing_had_happened(killer, job):
    seed = next(seed for seed in count() if moment_of(seed)[:2] == (job, "last changes"))
    found = killer.kill(seed)
    assert found.killed
    assert found.harm == ""
