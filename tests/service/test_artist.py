# SPDX-License-Identifier: Apache-2.0
"""One copy of the base: who is drawn with whom, as whom, and what is left of somebody who was deleted."""

from __future__ import annotations

import asyncio

import numpy as np

from service_tiny import Service


def test_people_of_one_batch_are_drawn_as_alone(home, tmp_path, run):
    async def work():
        service = Service(home, tmp_path)
        for number, name in enumerate(("ann", "bob", "cleo")):
            assert (await service.enrol(name, number)).status == 201
        names = ["ann", "bob", "cleo", None]
        together = await asyncio.gather(*(service.draw(name, 7) for name in names))
        counts = service.pool.artists[0].statistics()
        alone = [await service.draw(name, 7) for name in names]
        return together, alone, counts

    together, alone, counts = run(work())
    assert [answer.status for answer in together] == [200] * 4
    assert counts["images"] == 4 and counts["batches"] <= 2
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one.pixels - other.pixels).max() <= 1
    for number, one in enumerate(alone):
        for other in alone[number + 1 :]:
            assert np.abs(one.pixels - other.pixels).max() > 2
