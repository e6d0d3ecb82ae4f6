"""Reading what sleeps, and making its host memory in the background."""

import threading
from collections.abc import Callable

import pytest
import torch

from allocator import DriverError, InvalidArgumentError, SleepPool, UnknownTagError

MIB = 1 << 20


def test_what_sleeps_is_read_without_waking_it(pool: SleepPool) -> None:
    with pool.region("weights"):
        weights = [torch.arange(MIB), torch.randn(300, 7).bfloat16(), torch.tensor(3.0), torch.empty(0, 4)]
    copies = [tensor.cpu().clone() for tensor in weights]
    views = [weights[0][5::3], weights[1].T, weights[1][10:20, 2]]
    wanted = [copies[0][5::3], copies[1].T, copies[1][10:20, 2]]
    pool.sleep()
    backup = pool.backup("weights")
    for tensor, copy in zip([*weights, *views], [*copies, *wanted], strict=True):
        read = backup.read(tensor)
        assert read.device.type == "cpu"
        assert read.stride() == tensor.stride()
        assert torch.equal(read, copy)
    assert pool.stats()["weights"].is_asleep
    pool.wake_up()


def test_only_a_backup_can_be_read(pool: SleepPool) -> None:
    with pool.region("weights"):
        weights = torch.ones(MIB)
    with pool.region("kv_cache"):
        cache = torch.ones(MIB)
    backup = pool.backup("weights")
    with pytest.raises(InvalidArgumentError, match="it is awake, was discarded, or does not hold them"):
        backup.read(weights)
    pool.sleep()
    with pytest.raises(InvalidArgumentError, match="'kv_cache'"):
        pool.backup("kv_cache").read(cache)
    with pytest.raises(InvalidArgumentError, match="'weights'"):
        backup.read(cache)
    with pytest.raises(UnknownTagError, match="the pool has: weights, kv_cache"):
        pool.backup("wights")
    pool.wake_up()


def test_host_memory_is_made_in_the_background_and_used(pool: SleepPool, held: Callable[[], dict[str, int]]) -> None:
    with pool.region("weights"):
        weights = torch.arange(16 * MIB)
    preparation = pool.prepare_host()
    pool.sleep()  # waits for it rather than make its own
    assert preparation.done()
    made = held()["arenas"]
    assert made > 0
    assert pool.prepare_host().result() is None  # nothing to make
    assert held()["arenas"] == made
    pool.wake_up()
    assert torch.equal(weights, torch.arange(16 * MIB))


def test_preparing_waits_for_nothing_and_a_sleep_waits_for_it(pool: SleepPool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pool.region("weights"):
        weights = torch.arange(MIB)
    go_on = threading.Event()
    make_host = pool._make_host

    def make_host_late(tag: str) -> None:
        assert go_on.wait(timeout=60)
        make_host(tag)

    monkeypatch.setattr(pool, "_make_host", make_host_late)
    preparation = pool.prepare_host()
    assert not preparation.done()
    assert pool.stats()["weights"].host == 0  # and the pool can be used meanwhile
    threading.Timer(0.2, go_on.set).start()
    pool.sleep()
    assert preparation.done()
    pool.wake_up()
    assert torch.equal(weights, torch.arange(MIB))


def test_a_preparation_that_fails_says_so_and_sleep_makes_its_own(pool: SleepPool) -> None:
    with pool.region("weights"):
        weights = torch.arange(MIB)
    pool.inject_fault("host_alloc", 1)
    with pytest.raises(DriverError, match="host_alloc of tag 'weights'"):
        pool.prepare_host().result()
    assert pool.stats()["weights"].host == 0
    pool.sleep()
    pool.wake_up()
    assert torch.equal(weights, torch.arange(MIB))
    with pytest.raises(UnknownTagError):
        pool.prepare_host("wights")


def test_the_phases_of_a_sleep_and_a_wake_up_are_timed(pool: SleepPool) -> None:
    with pool.region("weights"):
        weights = torch.ones(64 * MIB // 4)
    pool.sleep()
    pool.wake_up()
    for phase in (pool.stats()["weights"].sleep, pool.stats()["weights"].wake):
        assert 0 < phase.copy_seconds <= phase.seconds
        assert 0 < phase.map_seconds <= phase.seconds
        assert phase.copy_gib_per_s == weights.nbytes / (1 << 30) / phase.copy_seconds
        assert phase.map_gib_per_s == phase.bytes / (1 << 30) / phase.map_seconds
    assert 0 < pool.stats()["weights"].sleep.host_seconds < 1
    assert pool.stats()["weights"].wake.host_seconds == 0
