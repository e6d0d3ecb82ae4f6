"""Too little memory is an error that torch and Python programs can catch, and nothing is lost by it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from allocator import OutOfMemoryError, SleepPool

MIB = 1 << 20


def test_torch_sees_an_out_of_memory_error_and_goes_on(pool: SleepPool, held: Callable[[], dict[str, int]]) -> None:
    pool.set_capacity(16 * MIB)
    with pool.region("weights"):
        first = torch.ones(3 * MIB)
        with pytest.raises(torch.OutOfMemoryError, match=f"'weights'.*needed {8 * MIB}, free {4 * MIB}"):
            torch.ones(2 * MIB)
        second = torch.ones(MIB)
    assert float(first.sum() + second.sum()) == 4 * MIB
    assert held()["handles"] == held()["addresses"] == 2
    del first
    with pool.region("weights"):
        assert float(torch.ones(2 * MIB).sum()) == 2 * MIB
    del second


def test_sleeping_makes_room_for_another_tag(pool: SleepPool) -> None:
    pool.set_capacity(16 * MIB)
    with pool.region("weights"):
        weights = torch.ones(3 * MIB)
    pool.sleep()
    assert pool.memory_info().free == pool.memory_info().total == 16 * MIB
    with pool.region("trainer"):
        trainer = torch.ones(2 * MIB)
    with pytest.raises(OutOfMemoryError) as error:
        pool.wake_up()
    assert (error.value.needed, error.value.free) == (12 * MIB, 8 * MIB)
    assert isinstance(error.value, MemoryError)
    pool.sleep(offload=["trainer"])
    pool.wake_up(["weights"])
    assert float(weights.sum()) == 3 * MIB
    pool.sleep(offload=["weights"])
    pool.wake_up(["trainer"])
    assert float(trainer.sum()) == 2 * MIB


def test_more_than_the_machine_has_is_refused(pool: SleepPool) -> None:
    with pool.region("weights"):
        for elements in (1 << 38, 1 << 60):
            with pytest.raises(RuntimeError):
                torch.empty(elements)
        assert float(torch.ones(10).sum()) == 10


def test_memory_info_is_the_operating_systems(pool: SleepPool) -> None:
    info = pool.memory_info()
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < info.free < info.total <= total
