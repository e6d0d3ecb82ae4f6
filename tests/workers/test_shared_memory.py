"""What processes of a run leave in shared memory goes with the run, however they and the driver end."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import pytest

from rlhf_npu.errors import WorkerError
from rlhf_npu.run_id import new_run_id
from rlhf_npu.workers.shared_memory import FOLDER, join_run, remove_leftovers, shared_memory_of

SPAWN = multiprocessing.get_context("spawn")


def left(run_id: str) -> list[str]:
    return sorted(path.name for path in FOLDER.glob(f"*{run_id}*"))


def work(run_id: str, ready: Any) -> None:
    join_run(run_id, may_be_first=False)
    segment = SharedMemory(create=True, size=100)
    (FOLDER / f"vllm_{run_id}_0").touch()
    ready.send(segment.name)
    signal.pause()


def drive(run_id: str, ready: Any) -> None:
    with shared_memory_of(run_id):
        work(run_id, ready)


@contextmanager
def process(function: Callable[..., None], run_id: str) -> Iterator[Any]:
    """A process that has made two segments; killed in the end."""
    here, there = SPAWN.Pipe()
    child = SPAWN.Process(target=function, args=(run_id, there))
    child.start()
    try:
        assert here.poll(60)
        child.segment = here.recv()  # type: ignore[attr-defined]
        yield child
    finally:
        child.kill()
        child.join()


def test_segments_are_named_after_the_run_and_go_with_it_though_their_process_was_killed() -> None:
    run_id = new_run_id()
    with shared_memory_of(run_id), process(work, run_id) as worker:
        assert run_id in worker.segment
        assert len(left(run_id)) == 3
        os.kill(worker.pid, signal.SIGKILL)
    assert left(run_id) == []


def test_a_process_that_lingers_is_ended_before_its_segments_are_removed() -> None:
    run_id = new_run_id()
    with ExitStack() as run:
        run.enter_context(shared_memory_of(run_id))
        with process(work, run_id) as worker:
            run.close()
            worker.join(timeout=10)
            assert worker.exitcode == -signal.SIGKILL
    assert left(run_id) == []


def test_no_process_joins_a_run_that_has_ended() -> None:
    run_id = new_run_id()
    with shared_memory_of(run_id):
        pass
    with pytest.raises(WorkerError, match=run_id):
        join_run(run_id, may_be_first=False)
    assert left(run_id) == []


def test_leftovers_of_a_killed_driver_go_when_the_next_run_starts_and_those_of_living_runs_stay() -> None:
    killed, living, following = new_run_id(), new_run_id(), new_run_id()
    with process(drive, living), process(drive, killed) as driver:
        os.kill(driver.pid, signal.SIGKILL)
        driver.join()
        assert len(left(killed)) >= 2
        with shared_memory_of(following):
            assert left(killed) == []
            assert len(left(living)) == 3
    remove_leftovers()
    assert left(living) == []
