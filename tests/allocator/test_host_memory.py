"""Backups on the host: exact in size, live bytes only, used again, returned on demand."""

from collections.abc import Callable

import torch

from allocator import SleepPool
from tests.allocator.conftest import ON_NPU, cpu_only, rounded

MIB = 1 << 20


@cpu_only("tests/aclsim counts the device's memory")
def test_a_backup_has_the_size_of_the_live_bytes(pool: SleepPool, resident: Callable[[], int]) -> None:
    with pool.region("weights"):
        layers = [torch.ones(33 * MIB // 4), torch.ones(66 * MIB // 4), torch.ones(1000)]
        temporary = torch.ones(64 * MIB)
        small = [torch.ones(64) for _ in range(1000)]
    del temporary, small[::2]
    before = resident()
    pool.sleep()
    stats = pool.stats()["weights"]
    assert stats.host == 99 * MIB + 4032 + 500 * 256  # each rounded to 64 bytes
    assert stats.sleep.copied == stats.host
    assert abs(resident() - before) < 2 * MIB
    pool.wake_up()
    assert float(layers[1].sum()) == 66 * MIB // 4


def test_backups_are_used_again_and_returned(
    pool: SleepPool, resident: Callable[[], int], held: Callable[[], dict[str, int]]
) -> None:
    with pool.region("weights"):
        weights = torch.ones(32 * MIB)
    pool.sleep()
    pool.wake_up()
    made = held()["arenas"]  # 1, or more where a large one is made in parts
    assert made > 0
    for _ in range(2):
        pool.sleep()
        pool.wake_up()
    assert held()["arenas"] == made
    before = resident()
    assert pool.release_host() == 128 * MIB
    assert before - resident() > 127 * MIB
    assert pool.release_host() == 0
    pool.sleep()
    assert pool.release_host() == 0  # it holds the weights now
    pool.wake_up()
    assert float(weights.sum()) == 32 * MIB


def test_an_arena_that_became_too_small_or_too_large_is_replaced(
    pool: SleepPool, held: Callable[[], dict[str, int]]
) -> None:
    with pool.region("weights"):
        tensors = [torch.full((MIB,), float(i)) for i in range(2)]
    pool.sleep()
    pool.wake_up()
    with pool.region("weights"):
        tensors += [torch.full((MIB,), float(i)) for i in range(2, 8)]
    pool.sleep()
    assert pool.stats()["weights"].host == 32 * MIB
    pool.wake_up()
    del tensors[3:]
    pool.sleep()
    assert pool.stats()["weights"].host == 12 * MIB
    pool.wake_up()
    assert [int(tensor[-1]) for tensor in tensors] == [0, 1, 2]
    assert held()["arenas"] == 1


def test_prepare_host_makes_the_memory_before_the_first_sleep(
    pool: SleepPool, held: Callable[[], dict[str, int]]
) -> None:
    with pool.region("weights"):
        weights = torch.ones(MIB)
    pool.prepare_host().result()
    assert held()["arenas"] == 1
    pool.sleep()
    assert held()["arenas"] == 1
    pool.wake_up()
    assert float(weights.sum()) == MIB


def test_a_sleeping_tags_later_backup_does_not_touch_the_first(pool: SleepPool) -> None:
    with pool.region("weights"):
        weights = torch.arange(MIB)
    with pool.region("other"):
        other = torch.arange(MIB) * 2
    pool.sleep(offload=["weights"])
    pool.sleep(offload=["other"])
    pool.wake_up(["weights"])
    pool.sleep(offload=["weights"])
    pool.wake_up()
    assert torch.equal(weights * 2, other)


def test_statistics_add_up(pool: SleepPool) -> None:
    with pool.region("weights"):
        weights = [torch.ones(1000), torch.ones(3 * MIB // 4), torch.ones(10)]
    del weights[2]
    stats = pool.stats()["weights"]
    content, mapped = rounded(4000, 3 * MIB), stats.mapped
    assert stats.allocations == 2
    if not ON_NPU:  # there they are torch's, and for more than one tensor
        assert (stats.live, mapped) == (4000 + 3 * MIB, 5 * MIB)
    assert (stats.asleep, stats.host) == (0, 0)
    assert stats.dead == mapped - content
    assert (stats.sleep.bytes, stats.wake.bytes, stats.sleep.gib_per_s) == (0, 0, 0.0)
    pool.sleep()
    stats = pool.stats()["weights"]
    assert (stats.mapped, stats.asleep, stats.dead, stats.is_asleep) == (0, mapped, 0, True)
    assert (stats.sleep.bytes, stats.sleep.copied) == (mapped, content)
    assert 0 < stats.sleep.seconds < 5
    assert stats.sleep.gib_per_s == mapped / (1 << 30) / stats.sleep.seconds
    pool.wake_up()
    stats = pool.stats()["weights"]
    assert (stats.wake.bytes, stats.wake.copied) == (mapped, content)
