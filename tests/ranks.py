"""Run a function on several ranks, each in a process of its own, as the Ray workers do.

They are forked off a process that has imported the engines and done nothing else, since importing them takes each rank
ten seconds of a core. On an NPU it has imported those that do not look for devices yet.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import traceback
from collections.abc import Callable
from typing import Any

from rlhf_npu.engines.process_group import join_process_group
from rlhf_npu.run_id import RUN_ID_VARIABLE, new_run_id
from rlhf_npu.workers.environment import Rank, free_port, static_environment
from rlhf_npu.workers.shared_memory import join_run, shared_memory_of
from tests.devices import PLATFORM
from tests.first_variables import call_with

LIBRARIES = ["torch", "transformers"]
ENGINES = [*LIBRARIES, "deepspeed", "vllm", "vllm.entrypoints.llm", "rlhf_npu.engines.rollout"]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, seconds: int = 280) -> list[Any]:
    """`function(*args)` on each rank; results by rank, or the first rank's error."""
    context = multiprocessing.get_context("forkserver")
    on_cpu = PLATFORM.name == "cpu"
    context.set_forkserver_preload(ENGINES if on_cpu else LIBRARIES)
    run_id, port = new_run_id(), free_port()
    results: Any = context.Queue()
    places = [Rank(rank, world_size, rank, world_size) for rank in range(world_size)]
    with shared_memory_of(run_id):
        processes = []
        for place in places:
            environment = static_environment(place, PLATFORM, run_id) | PLATFORM.only_visible(place.rank)
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            environment |= {"OMP_NUM_THREADS": "1"}  # as Ray has it in its workers
            call = (pickle.dumps(_run), results, place.rank, pickle.dumps((function, args)))
            process = context.Process(target=call_with, args=(environment, *call))
            with _Environment(environment if on_cpu else {}):  # the engines are imported with it
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


def _run(results: Any, rank: int, call: bytes) -> None:
    join_run(os.environ[RUN_ID_VARIABLE], may_be_first=False)
    try:
        PLATFORM.activate()
        join_process_group(PLATFORM)
        function, args = pickle.loads(call)
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
