"""Every driver call of an operation fails in turn: a typed error, nothing lost, and a retry that is exact."""

from collections.abc import Callable, Iterator

import pytest
import torch

from allocator import DriverError, SleepPool
from tests.allocator.conftest import KEEPS_SEGMENTS, ON_NPU, cpu_only
from tests.allocator.injected_faults import fails

MIB = 1 << 20
SLEEP_CALLS = ["synchronize", "host_alloc", "copy_out", "mark", "wait", "unmap", "release"]
WAKE_CALLS = ["memory_info", "create", "map", "copy_in", "fill", "mark", "wait"]


# torch_npu takes 20 MiB at once for a tensor of more than 1 MiB: too much to fail at each piece of in turn.
LARGE = 250_000 if ON_NPU else 700_000


class Tenants:
    """Weights in several segments with holes, and a cache."""

    def __init__(self, pool: SleepPool) -> None:
        self.pool = pool
        with pool.region("weights"):
            self.weights = [torch.randn(size) for size in (LARGE // 2, LARGE, 600, 500, 400, 240_000)]
        with pool.region("kv_cache"):
            self.cache = [torch.ones(LARGE), torch.ones(100)]
        del self.weights[3]
        self.copies = [tensor.clone() for tensor in self.weights]
        pool.trim()  # so that a sleep's own calls are the only ones to fail

    def intact(self) -> bool:
        same = (torch.equal(*pair) for pair in zip(self.weights, self.copies, strict=True))
        return all(same) and all(float(tensor.fill_(1).mean()) == 1 for tensor in self.cache)

    def mapped(self) -> int:
        return sum(stats.mapped for stats in self.pool.stats().values())

    def asleep(self) -> int:
        return sum(stats.asleep for stats in self.pool.stats().values())


@pytest.fixture
def tenants(small_handles: SleepPool, held: Callable[[], dict[str, int]]) -> Iterator[Tenants]:
    pool = small_handles  # some tensors are made of two
    pool.set_poison(True)
    made = Tenants(pool)
    yield made
    made.weights.clear()
    made.cache.clear()
    pool.trim()
    pool.release_host()
    assert set(held().values()) == {0}


def _faults(pool: SleepPool, call: str, operation: Callable[[], object]) -> Iterator[int]:
    """Runs the operation with its first, second, ... driver call of a kind failing, until none is left."""
    nth = 1
    while fails(pool, call, nth, operation):
        yield nth
        nth += 1
    assert nth > 1


def _calls_of(pool: SleepPool, operation: Callable[[], object]) -> set[str]:
    before = pool.driver_calls()
    operation()
    return {call for call, count in pool.driver_calls().items() if count > before[call]}


def test_the_calls_that_fail_below_are_all_there_are(tenants: Tenants) -> None:
    assert _calls_of(tenants.pool, tenants.pool.sleep) == set(SLEEP_CALLS)
    assert _calls_of(tenants.pool, tenants.pool.wake_up) == set(WAKE_CALLS)


@pytest.mark.parametrize("call", SLEEP_CALLS)
def test_sleep_is_finished_by_a_retry(tenants: Tenants, call: str) -> None:
    pool = tenants.pool
    for _ in _faults(pool, call, pool.sleep):
        pool.sleep()
        assert tenants.mapped() == 0
        pool.wake_up()
        assert tenants.intact()
        assert tenants.asleep() == 0
        pool.release_host()
    pool.wake_up()
    assert tenants.intact()


@pytest.mark.parametrize("call", SLEEP_CALLS)
def test_a_failed_sleep_is_undone_by_waking(tenants: Tenants, call: str) -> None:
    pool = tenants.pool
    before = tenants.mapped()
    for _ in _faults(pool, call, pool.sleep):
        pool.wake_up()
        assert tenants.intact()
        assert tenants.mapped() == before
        pool.release_host()
    pool.wake_up()


@pytest.mark.parametrize("call", SLEEP_CALLS)
def test_what_a_failed_sleep_left_awake_is_used_and_sleeps_with_its_new_content(tenants: Tenants, call: str) -> None:
    pool = tenants.pool
    for _ in _faults(pool, call, pool.sleep):
        if not pool.stats()["weights"].is_asleep:
            for tensor, copy in zip(tenants.weights, tenants.copies, strict=True):
                assert torch.equal(tensor, copy)
                torch.add(tensor, 1, out=copy)
                tensor.copy_(copy)
        pool.sleep()
        pool.wake_up()
        assert tenants.intact()
        pool.release_host()
    pool.wake_up()


@pytest.mark.parametrize("call", WAKE_CALLS)
def test_waking_is_finished_by_a_retry(tenants: Tenants, call: str) -> None:
    pool = tenants.pool
    pool.sleep()
    for _ in _faults(pool, call, pool.wake_up):
        pool.wake_up()
        assert tenants.intact()
        pool.sleep()
        assert tenants.mapped() == 0
    assert tenants.intact()


@pytest.mark.parametrize("call", WAKE_CALLS)
def test_a_failed_wake_up_is_undone_by_sleeping(tenants: Tenants, call: str) -> None:
    pool = tenants.pool
    pool.sleep()
    for _ in _faults(pool, call, pool.wake_up):
        pool.sleep()
        assert tenants.mapped() == 0
        pool.wake_up()
        assert tenants.intact()
        pool.sleep()
    assert tenants.intact()


@pytest.mark.parametrize("call", WAKE_CALLS)
def test_a_failed_wake_up_holds_no_memory_for_what_still_sleeps(tenants: Tenants, call: str) -> None:
    pool = tenants.pool
    everything = tenants.mapped()
    pool.sleep()
    for _ in _faults(pool, call, pool.wake_up):
        assert tenants.mapped() + tenants.asleep() == everything
        calls = pool.driver_calls()
        assert calls["create"] - calls["release"] == calls["map"] - calls["unmap"]
        for tag, stats in pool.stats().items():
            assert stats.asleep > 0 or not stats.is_asleep, tag
        pool.wake_up()
        pool.sleep()


def test_host_memory_that_could_not_be_freed_is_freed_later(tenants: Tenants) -> None:
    pool = tenants.pool
    pool.sleep()
    pool.wake_up()
    pool.inject_fault("host_free", 1)
    with pytest.raises(DriverError, match="host_free of tag 'weights'"):
        pool.release_host()
    assert pool.release_host() > 0
    pool.sleep()
    pool.wake_up()
    del tenants.weights[1:], tenants.copies[1:]  # the next backup is too small for the arena
    pool.inject_fault("host_free", 1)
    with pytest.raises(DriverError):
        pool.sleep()
    assert not pool.stats()["weights"].is_asleep
    pool.sleep()
    pool.wake_up()
    assert tenants.intact()


def test_what_a_failed_wake_up_could_not_return_is_returned_later(tenants: Tenants) -> None:
    pool = tenants.pool
    for broken in ("unmap", "release"):
        pool.sleep()
        pool.inject_fault("copy_in", 3)
        pool.inject_fault(broken, 1)  # met by the wake-up's own clearing up
        with pytest.raises(DriverError):
            pool.wake_up()
        pool.sleep()
        assert tenants.mapped() == 0
        pool.wake_up()
        assert tenants.intact()


def test_a_fault_names_tag_address_and_bytes(tenants: Tenants) -> None:
    pool = tenants.pool
    pool.inject_fault("unmap", 1)
    with pytest.raises(DriverError) as error:
        pool.sleep(offload=["weights"])
    assert error.value.tag == "weights"
    pages = [tensor.data_ptr() // 4096 * 4096 for tensor in tenants.weights]
    assert error.value.pointer in pages
    assert error.value.size > 0
    for part in ("unmap", "'weights'", f"{error.value.pointer:#x}", str(error.value.size), "same call again"):
        assert part in str(error.value)


@cpu_only("torch tries a failed allocation again there: the next test")
@pytest.mark.parametrize("call", ["reserve", "create", "map"])
def test_a_failed_allocation_is_an_error_in_torch_and_leaves_nothing(
    pool: SleepPool, held: Callable[[], dict[str, int]], call: str
) -> None:
    pool.inject_fault(call, 1)
    with pool.region("weights"):
        with pytest.raises(RuntimeError, match=f"'weights' \\({call}\\): injected fault"):
            torch.ones(MIB)
        assert set(held().values()) == {0}
        assert float(torch.ones(MIB).sum()) == MIB


@pytest.mark.skipif(not ON_NPU, reason="on the CPU torch does not try again")
@pytest.mark.parametrize("call", ["reserve", "create", "map"])
def test_after_a_failed_allocation_torch_tries_again_or_the_program_can(
    pool: SleepPool, held: Callable[[], dict[str, int]], call: str
) -> None:
    with pool.region("weights"):
        pass
    pool.trim()
    pool.inject_fault(call, 1)
    with pool.region("weights"):
        if KEEPS_SEGMENTS:  # torch_npu 2.10 does not try again with a region open
            with pytest.raises(torch.OutOfMemoryError):
                torch.ones(MIB)
            assert set(held().values()) == {0}
        made = torch.ones(MIB)
    assert float(made.sum()) == MIB
    assert held() == {"addresses": 1, "handles": 1, "mappings": 1, "arenas": 0}


@pytest.mark.skipif(KEEPS_SEGMENTS, reason="torch returns nothing to the pool, so that cannot fail")
@pytest.mark.parametrize("call", ["unmap", "release", "unreserve", "synchronize"])
@pytest.mark.parametrize("elements", [10, MIB])
def test_a_failed_free_is_tried_again(
    pool: SleepPool, held: Callable[[], dict[str, int]], call: str, elements: int
) -> None:
    with pool.region("weights"):
        kept, freed = torch.ones(MIB), torch.ones(elements)
    pool.inject_fault(call, 1)
    del freed  # torch's memory comes back with the sleep
    assert held()["addresses"] == 2
    pool.sleep()
    assert held()["handles"] == 0
    assert held()["addresses"] == 1
    pool.wake_up()
    assert float(kept.sum()) == MIB


def test_faults_by_environment(run_python: Callable) -> None:
    program = """
from allocator import DriverError, InvalidArgumentError, SleepPool
import torch
pool = SleepPool.get(DEVICE)
with pool.region("weights"):
    weights = torch.ones(10, device=DEVICE)
try:
    pool.sleep()
except DriverError as error:
    print(error.phase)
pool.sleep()
"""
    assert run_python(program, SLEEP_POOL_FAULT="copy_out:1").stdout == "copy_out\n"
    assert "SLEEP_POOL_FAULT holds 'sink:1'" in run_python(program, SLEEP_POOL_FAULT="sink:1").stderr
