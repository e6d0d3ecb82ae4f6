"""Each AscendCL call of a sleep and of a wake-up fails in turn: a typed error, and a retry that is exact."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch_npu

from allocator import DriverError, SleepPool
from tests.aclsim import control

MIB = 1 << 20
SLEEP_CALLS = [
    "aclrtMallocHost",
    "aclrtMemcpyAsync",
    "memcpy",
    "aclrtRecordEvent",
    "aclrtSynchronizeEvent",
    "aclrtUnmapMem",
    "aclrtFreePhysical",
]
WAKE_CALLS = [
    "aclrtMallocPhysical",
    "aclrtMapMem",
    "aclrtMemcpyAsync",
    "memcpy",
    "aclrtRecordEvent",
    "aclrtSynchronizeEvent",
]


class Tenants:
    """Weights in four segments."""

    def __init__(self, pool: SleepPool) -> None:
        self.pool = pool
        with pool.region("weights"):
            self.weights = [torch.randn(size, device="npu") for size in (100, MIB, 8 * MIB, 9 * MIB)]
        self.copies = [tensor.cpu() for tensor in self.weights]

    def intact(self) -> bool:
        pairs = zip(self.weights, self.copies, strict=True)
        return all(torch.equal(tensor.cpu(), copy) for tensor, copy in pairs)

    def mapped(self) -> int:
        return self.pool.stats()["weights"].mapped


def _held() -> tuple[int, int, int]:
    """Without what torch keeps of a region's memory although nothing lives in it."""
    stats = control.stats()
    segments = torch_npu.npu.memory_snapshot()
    kept = sum(each["total_size"] for each in segments if any(each["segment_pool_id"]) and not each["active_size"])
    return stats.used_physical - kept, stats.mapped - kept, stats.host


@pytest.fixture
def tenants(request: pytest.FixtureRequest) -> Iterator[Tenants]:
    before = _held()
    made = Tenants(SleepPool.get("npu:0", namespace=request.node.name))
    yield made
    made.weights.clear()
    torch_npu.npu.empty_cache()  # torch returns what it keeps, so that no later test meets it
    made.pool.release_host()
    assert control.stats().undefined == 0
    assert _held() == before


def _failure(operation: Callable[[], object]) -> DriverError | None:
    try:
        operation()
    except DriverError as error:
        return error
    return None


def _fails_once(operation: Callable[[], object], call: str, nth: int) -> bool:
    """Whether the operation failed at its nth call of the function."""
    control.fail(call, nth)
    error = _failure(operation)
    control.fail(call, 0)
    if error is None:
        return False
    assert "injected failure" in error.reason
    assert error.tag == "weights"
    assert error.size > 0
    return True


@pytest.mark.parametrize("call", SLEEP_CALLS)
def test_sleep(tenants: Tenants, call: str) -> None:
    pool = tenants.pool
    nth = 1
    while _fails_once(pool.sleep, call, nth):
        pool.sleep()
        assert tenants.mapped() == 0
        pool.wake_up()
        assert tenants.intact()
        pool.release_host()
        nth += 1
    assert nth > 1
    pool.wake_up()
    assert tenants.intact()


@pytest.mark.parametrize("call", WAKE_CALLS)
def test_wake_up(tenants: Tenants, call: str) -> None:
    pool = tenants.pool
    pool.sleep()
    nth = 1
    while _fails_once(pool.wake_up, call, nth):
        pool.wake_up()
        assert tenants.intact()
        pool.sleep()
        assert tenants.mapped() == 0
        nth += 1
    assert nth > 1
    assert tenants.intact()
