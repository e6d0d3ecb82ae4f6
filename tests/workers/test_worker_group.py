"""Workers that die: real Ray actors, without engines. One message names the rank, its log and the likely cause."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import pytest

from rlhf_npu.config import compose_config
from rlhf_npu.errors import DeviceError, WorkerError
from rlhf_npu.garbage import SELDOM, USUAL
from rlhf_npu.platform import CPU
from rlhf_npu.run_id import new_run_id
from rlhf_npu.trainer.ray_session import ray_session
from rlhf_npu.workers.environment import Rank
from rlhf_npu.workers.hybrid_worker import HybridWorker
from rlhf_npu.workers.shared_memory import FOLDER
from rlhf_npu.workers.worker_group import WorkerGroup

pytestmark = pytest.mark.slow

CONFIG = compose_config()


class MortalWorker(HybridWorker):
    """Does to itself what a user's function, or the kernel, might do to it."""

    def leave_segment(self) -> str:
        self._segment = SharedMemory(create=True, size=100)
        return self._segment.name

    def garbage(self) -> tuple[int, ...]:
        return gc.get_threshold()

    def run(self, what: str) -> None:
        ends: dict[str, Any] = {
            "exit": lambda: sys.exit(3),
            "interrupt": lambda: signal.raise_signal(signal.SIGINT),
            "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "bug": lambda: os.environ["NO_SUCH_VARIABLE"],
        }
        if self._rank.rank == 1:
            ends[what]()


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    with ray_session(CONFIG):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("output")


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[WorkerGroup]:
    """Of all tests, of which the last one ends a worker."""
    run_id = new_run_id()
    with WorkerGroup(MortalWorker, CONFIG, CPU, run_id, folder) as workers:
        assert all(run_id in name for name in workers.call("leave_segment"))
        yield workers
    assert not list(FOLDER.glob(f"*{run_id}*"))


def test_workers_search_for_garbage_seldom_until_they_have_started(workers: WorkerGroup) -> None:
    assert workers.call("garbage") == [SELDOM] * 2
    workers.call("settle")
    assert workers.call("garbage") == [USUAL] * 2
    assert USUAL != SELDOM


def test_a_function_that_ends_the_process_is_an_error_and_the_worker_goes_on(
    workers: WorkerGroup, folder: Path
) -> None:
    log = folder / "logs" / "worker_1.log"
    for what, words in (("exit", r"SystemExit\(3\)"), ("interrupt", "KeyboardInterrupt"), ("bug", "KeyError")):
        with pytest.raises(WorkerError, match=f"rank 1: .*{words}.*{log}"):
            workers.call("run", what)
    printed = log.read_text()
    assert "Traceback" in printed
    assert "sys.exit(3)" in printed


def test_a_worker_that_is_gone_is_named_with_its_log(workers: WorkerGroup, folder: Path) -> None:
    with pytest.raises(WorkerError, match=r"rank 1 died: .*SIGKILL.*memory") as caught:
        workers.call("run", "kill")
    assert str(folder / "logs" / "worker_1.log") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_devices_than_a_node_has_are_refused(tmp_path: Path) -> None:
    run_id = new_run_id()
    config = compose_config(["trainer.nnodes=2"])
    with (
        pytest.raises(DeviceError, match=r"trainer\.nnodes=2"),
        WorkerGroup(MortalWorker, config, CPU, run_id, tmp_path),
    ):
        raise AssertionError("two nodes")
    assert not list(FOLDER.glob(f"*{run_id}*"))


def test_ranks_of_a_node_are_consecutive() -> None:
    places = [Rank.of(rank, world_size=6, per_node=2) for rank in range(6)]
    assert [(place.node, place.local_rank) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
