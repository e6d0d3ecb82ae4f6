"""Too little memory is an error that torch and Python programs can catch, and nothing is lost by it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator import OutOfMemoryError, SleepPool
from tests.allocator.conftest import ON_NPU, cpu_only

MIB = 1 << 20


def _mebibytes(count: int) -> torch.Tensor:
    return torch.full((count * MIB,), 1, dtype=torch.uint8)


def test_torch_sees_an_out_of_memory_error_and_goes_on(
    pool: SleepPool, held: Callable[[], dict[str, int]], leave_free: Callable[[SleepPool, int], None]
) -> None:
    leave_free(pool, 72 * MIB)
    why = "NPU out of memory" if ON_NPU else f"'weights'.*needed {36 * MIB}, free {32 * MIB}"
    with pool.region("weights"):
        first = _mebibytes(40)
        with pytest.raises(torch.OutOfMemoryError, match=why):
            _mebibytes(36)
        second = _mebibytes(16)
    assert int(first.sum() + second.sum()) == 56 * MIB
    pool.trim()
    assert held()["handles"] == held()["addresses"] == 2
    del first
    with pool.region("weights"):
        third = _mebibytes(36)
    assert int(third.sum()) == 36 * MIB
    del second


def test_sleeping_makes_room_for_another_tag(pool: SleepPool, leave_free: Callable[[SleepPool, int], None]) -> None:
    leave_free(pool, 64 * MIB)
    with pool.region("weights"):
        weights = _mebibytes(48)
    pool.sleep()
    needed = pool.stats()["weights"].asleep
    assert pool.memory_info().free > 62 * MIB
    with pool.region("trainer"):
        trainer = _mebibytes(30)
    free = pool.memory_info().free
    with pytest.raises(OutOfMemoryError) as error:
        pool.wake_up()
    assert (error.value.needed, error.value.free) == (needed, free)
    assert isinstance(error.value, MemoryError)
    pool.sleep(offload=["trainer"])
    pool.wake_up(["weights"])
    assert int(weights.sum()) == 48 * MIB
    pool.sleep(offload=["weights"])
    pool.wake_up(["trainer"])
    assert int(trainer.sum()) == 30 * MIB


def test_more_than_the_machine_has_is_refused(pool: SleepPool) -> None:
    with pool.region("weights"):
        for elements in (1 << 38, 1 << 60):
            with pytest.raises(RuntimeError):
                torch.empty(elements)
        assert float(torch.ones(10).sum()) == 10


@cpu_only("the simulated device has as much as it is told to")
def test_memory_info_is_the_operating_systems(pool: SleepPool) -> None:
    info = pool.memory_info()
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < info.free < info.total <= total
