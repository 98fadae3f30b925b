# SPDX-License-Identifier: Apache-2.0
"""Several processes of one run (`accelerate launch`, `torchrun`), or the one process that there is.

Only what the stages need: sums over processes, the main one's word, an agreement on where to go on from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: 0 for the main process, which alone writes results.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls, device: torch.device) -> Processes:
        """Join the run that the launcher described in the environment, if it described one."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        state = PartialState(cpu=device.type == "cpu")
        return cls(state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one exchange."""
        if self.count == 1 or not tensors:
            return
        flat = _flatten_dense_tensors(tensors)
        dist.all_reduce(flat)
        torch._foreach_copy_(list(tensors), list(_unflatten_dense_tensors(flat, tensors)))

    def later(self, part: Tensor) -> Callable[[], float]:
        """Sum a number over the processes and bring it to the host; what is returned waits for it and gives it.

        On a GPU this goes on beside what is queued next, such as a backward pass: to wait for a loss takes no longer
        than its forward pass, and the host has time to queue what comes after the backward pass.
        """
        total = part.detach().clone()
        if not total.is_cuda:
            if self.count > 1:
                dist.all_reduce(total)
            return total.item
        stream = _side_stream(total.device)
        stream.wait_stream(torch.cuda.current_stream(total.device))
        with torch.cuda.stream(stream):
            if self.count > 1:
                dist.all_reduce(total)
            box = torch.empty_like(total, device="cpu", pin_memory=True)
            box.copy_(total, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        total.record_stream(stream)

        def wait() -> float:
            arrived.synchronize()
            return box.item()

        return wait

    def of_main(self, number: float) -> float:
        """The main process's number, on every process."""
        if self.count == 1:
            return number
        box = [number]
        dist.broadcast_object_list(box)
        return box[0]

    def common(self, numbers: set[int]) -> set[int]:
        """The numbers that every process has."""
        if self.count == 1:
            return numbers
        everyone: list[set[int]] = [set() for _ in range(self.count)]
        dist.all_gather_object(everyone, numbers)
        return set.intersection(*everyone)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.count > 1:
            dist.barrier()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


ALONE = Processes()
