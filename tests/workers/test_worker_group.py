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

    def garbage(self) -> tuple[Any, int]:
        return gc.get_threshold(), gc.get_freeze_count()

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
    # A group's devices are free again when the driver leaves Ray: enough for two groups.
    with ray_session(compose_config(["trainer.n_devices_per_node=4", "data.train_batch_size=64"])):
        yield


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[WorkerGroup]:
    run_id = new_run_id()
    with WorkerGroup(MortalWorker, CONFIG, CPU, run_id, tmp_path) as workers:
        assert all(run_id in name for name in workers.call("leave_segment"))
        yield workers
    assert not list(FOLDER.glob(f"*{run_id}*"))


def test_a_function_that_ends_the_process_is_an_error_and_the_worker_goes_on(
    workers: WorkerGroup, tmp_path: Path
) -> None:
    log = tmp_path / "logs" / "worker_1.log"
    for what, words in (("exit", r"SystemExit\(3\)"), ("interrupt", "KeyboardInterrupt"), ("bug", "KeyError")):
        with pytest.raises(WorkerError, match=f"rank 1: .*{words}.*{log}"):
            workers.call("run", what)
    printed = log.read_text()
    assert "Traceback" in printed
    assert "sys.exit(3)" in printed


def test_a_worker_that_is_gone_is_named_with_its_log(workers: WorkerGroup, tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"rank 1 died: .*SIGKILL.*memory") as caught:
        workers.call("run", "kill")
    assert str(tmp_path / "logs" / "worker_1.log") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_workers_search_for_garbage_seldom_until_they_have_started(workers: WorkerGroup) -> None:
    assert workers.call("garbage") == [(SELDOM, 0)] * 2
    workers.call("settle")
    for threshold, frozen in workers.call("garbage"):
        assert threshold == USUAL != SELDOM
        assert frozen > 100_000


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
