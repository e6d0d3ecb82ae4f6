"""Run a function on several ranks, each in a process of its own, as the Ray workers do."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import traceback
from collections.abc import Callable
from typing import Any

from rlhf_npu.run_id import RUN_ID_VARIABLE, new_run_id
from rlhf_npu.workers.environment import Rank, free_port, static_environment
from rlhf_npu.workers.shared_memory import join_run, shared_memory_of
from tests.devices import PLATFORM


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, seconds: int = 280) -> list[Any]:
    """`function(*args)` on each rank; results by rank, or the first rank's error."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    run_id, port = new_run_id(), free_port()
    places = [Rank(rank, world_size, rank, world_size) for rank in range(world_size)]
    with shared_memory_of(run_id):
        processes = []
        for place in places:
            environment = static_environment(place, PLATFORM, run_id) | PLATFORM.only_visible(place.rank)
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with _Environment(environment):
                process = context.Process(target=_run, args=(results, place.rank, function, args))
                process.start()
            processes.append(process)
        try:
            return _collect(results, world_size, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


class _Environment:
    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables

    def __enter__(self) -> None:
        self._before = dict(os.environ)
        os.environ.update(self._variables)

    def __exit__(self, *_: object) -> None:
        os.environ.clear()
        os.environ.update(self._before)


def _run(results: Any, rank: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import deepspeed

    join_run(os.environ[RUN_ID_VARIABLE], may_be_first=False)
    try:
        PLATFORM.activate()
        deepspeed.init_distributed(dist_backend=PLATFORM.dist_backend)
        # As bytes: multiprocessing would share tensors' memory with a process that is about to end.
        results.put((rank, pickle.dumps(function(*args)), None))
    except Exception:  # noqa: BLE001  # whatever it is, the test shows it
        results.put((rank, None, traceback.format_exc()))


def _collect(results: Any, world_size: int, seconds: int) -> list[Any]:
    by_rank: dict[int, Any] = {}
    while len(by_rank) < world_size:
        try:
            rank, result, error = results.get(timeout=seconds)
        except queue.Empty:
            raise AssertionError(f"only ranks {sorted(by_rank)} answered within {seconds} s") from None
        assert error is None, f"rank {rank} failed:\n{error}"
        by_rank[rank] = pickle.loads(result)
    return [by_rank[rank] for rank in range(world_size)]
