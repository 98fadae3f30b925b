# SPDX-License-Identifier: Apache-2.0
"""Processes for tests: a server that has imported everything forks them, so that none waits for its imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver as server
from multiprocessing.context import ForkServerContext
from typing import Any
from unittest import mock


def forkserver() -> ForkServerContext:
    """Where fresh processes come from; one server a test session, with what `preloaded` imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # by which alone it finds modules
        server.ensure_running()
    return context


def on_processes(count: int, work: Callable[..., None], *arguments: Any, seconds: float = 400) -> None:
    """Call `work(rank, *arguments)` in several processes that find each other as those of a launcher do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = range(count)
    started = [forkserver().Process(target=_join, args=(rank, count, port, work, arguments)) for rank in ranks]
    for process in started:
        process.start()
    try:
        for process in started:
            process.join(seconds)
        assert [process.exitcode for process in started] == [0] * count
    finally:
        for process in started:
            process.kill()


def _join(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    work(rank, *arguments)
