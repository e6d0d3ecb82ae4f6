"""Sleep and wake-up: what memory goes, what content stays, and what calling twice does."""

import signal
from collections.abc import Callable

import pytest
import torch

from allocator import OutOfMemoryError, SleepPool, TagAsleepError
from tests.allocator.conftest import DEVICE, KEEPS_SEGMENTS, ON_NPU, cpu_only

MIB = 1 << 20


def _weights(pool: SleepPool, tag: str = "weights") -> list[torch.Tensor]:
    """A large tensor, one a page and a bit, and small ones that share a segment: 24 MiB and a little."""
    with pool.region(tag):
        return [torch.randn(6 * MIB), torch.randn(300_001), *(torch.randn(100 + i) for i in range(20))]


def _bytes(pool: SleepPool, tag: str, mib: int) -> torch.Tensor:
    with pool.region(tag):
        return torch.full((mib * MIB,), 7, dtype=torch.uint8)


def _same(tensors: list[torch.Tensor], copies: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@cpu_only("pages that come with their first touch; tests/aclsim counts the device's memory")
def test_level_one_gives_memory_back_and_keeps_weights(pool: SleepPool, resident: Callable[[], int]) -> None:
    weights, cache = _weights(pool), _bytes(pool, "kv_cache", 128)
    copies = [tensor.clone() for tensor in weights]
    addresses = [tensor.data_ptr() for tensor in [*weights, cache]]
    awake = resident()
    pool.sleep(level=1)
    asleep = resident()
    assert 127 * MIB < awake - asleep < 130 * MIB  # the cache; the weights are in the backup
    pool.wake_up()
    assert resident() - asleep < 30 * MIB  # the cache's pages come with their first touch
    cache.fill_(1)
    assert 150 * MIB < resident() - asleep < 156 * MIB
    assert _same(weights, copies)
    assert [tensor.data_ptr() for tensor in [*weights, cache]] == addresses


def test_level_two_gives_everything_back(pool: SleepPool, resident: Callable[[], int]) -> None:
    weights, cache = _bytes(pool, "weights", 64), _bytes(pool, "kv_cache", 64)
    awake = resident()
    pool.sleep(level=2)
    assert awake - resident() > 127 * MIB
    assert pool.stats()["weights"].host == 0
    pool.wake_up()
    weights.fill_(3)
    cache.fill_(4)
    assert int(weights.sum()) == 3 * 64 * MIB


@pytest.mark.parametrize("level", [1, 2])
def test_discarded_memory_is_seen_in_poison_mode(pool: SleepPool, level: int) -> None:
    pool.set_poison(True)
    weights, cache = _bytes(pool, "weights", 3), _bytes(pool, "kv_cache", 3)
    pool.sleep(level=level)
    pool.wake_up()
    assert torch.all(cache == 0xA5)
    assert torch.all(weights == (7 if level == 1 else 0xA5))


def test_poison_mode_by_environment(run_python: Callable) -> None:
    program = """
import torch
from allocator import SleepPool
pool = SleepPool.get(DEVICE)
with pool.region("kv_cache"):
    cache = torch.ones(5000, dtype=torch.uint8, device=DEVICE)
pool.sleep()
pool.wake_up()
print(set(cache.tolist()))
"""
    assert run_python(program, SLEEP_POOL_POISON="1").stdout == "{165}\n"


def test_touching_sleeping_memory_is_a_fault(run_python: Callable) -> None:
    program = """
import torch
from allocator import SleepPool
pool = SleepPool.get(DEVICE)
with pool.region("weights"):
    weights = torch.ones(5000, device=DEVICE)
pool.sleep()
print("asleep", flush=True)
try:
    weights.sum().item()
except RuntimeError:
    print("device fault")
"""
    result = run_python(program)
    # On a simulated NPU it depends on whether the operator is AscendCL's own.
    outcomes = (
        {("asleep\n", -signal.SIGSEGV), ("asleep\ndevice fault\n", 0)} if ON_NPU else {("asleep\n", -signal.SIGSEGV)}
    )
    assert (result.stdout, result.returncode) in outcomes


def test_named_tags_sleep_and_the_rest_stays(pool: SleepPool) -> None:
    parameters, moments, other = (_bytes(pool, tag, 2) for tag in ("params", "optimizer", "other"))
    pool.sleep(offload=["params"], discard=["optimizer"])
    asleep = {tag for tag, stats in pool.stats().items() if stats.is_asleep}
    assert asleep == {"params", "optimizer"}
    assert int(other.sum()) == 7 * 2 * MIB
    pool.wake_up(["params"])
    assert int(parameters.sum()) == 7 * 2 * MIB
    pool.wake_up(["optimizer"])
    moments.fill_(0)


def test_no_tags_to_sleep_is_nothing_to_do(pool: SleepPool) -> None:
    weights = _bytes(pool, "weights", 2)
    pool.sleep(offload=[], discard=[])
    assert int(weights.sum()) == 7 * 2 * MIB


def test_sleeping_and_waking_twice_is_doing_it_once(pool: SleepPool) -> None:
    weights = _weights(pool)
    copies = [tensor.clone() for tensor in weights]
    pool.sleep(level=1)
    once = pool.stats()
    pool.sleep(level=1)
    pool.sleep(level=2)  # what sleeps keeps its backup
    assert pool.stats() == once
    pool.wake_up()
    awake = pool.stats()
    pool.wake_up()
    pool.wake_up(["weights"])
    assert pool.stats() == awake
    assert _same(weights, copies)


def test_waking_in_parts_then_all(pool: SleepPool) -> None:
    weights, cache = _weights(pool), _bytes(pool, "kv_cache", 4)
    copies = [tensor.clone() for tensor in weights]
    pool.sleep()
    pool.wake_up(["weights"])
    assert _same(weights, copies)
    weights[0].add_(1)
    pool.require_resident("weights")
    with pytest.raises(TagAsleepError):
        pool.require_resident("kv_cache")
    pool.wake_up()
    cache.fill_(1)
    assert torch.equal(weights[0], copies[0] + 1)  # not restored a second time


def test_sleeping_again_after_waking_in_part(pool: SleepPool) -> None:
    weights, cache = _weights(pool), _bytes(pool, "kv_cache", 4)
    copies = [tensor.clone() for tensor in weights]
    pool.sleep()
    pool.wake_up(["weights"])
    pool.sleep()
    assert all(stats.mapped == 0 for stats in pool.stats().values())
    pool.wake_up()
    cache.fill_(1)
    assert _same(weights, copies)


def test_freeing_while_asleep_returns_all(pool: SleepPool, held: Callable[[], dict[str, int]]) -> None:
    weights, cache = _weights(pool), _bytes(pool, "kv_cache", 4)
    copies = [tensor.clone() for tensor in weights]
    pool.sleep()
    del cache, weights[0], copies[0]
    del weights[5:9], copies[5:9]
    pool.wake_up()
    assert _same(weights, copies)
    pool.sleep()
    weights.clear()
    pool.trim()
    stats = pool.stats()["weights"]
    assert stats.mapped == 0
    assert KEEPS_SEGMENTS or (stats.asleep, stats.live) == (0, 0)
    if KEEPS_SEGMENTS:
        pool.wake_up()  # until then the backup of what is kept stays
    pool.release_host()
    assert set(held().values()) == {0}


@cpu_only("after a sleep torch makes a tag's tensors in a new MemPool")
def test_blocks_freed_while_asleep_are_given_out_again(pool: SleepPool) -> None:
    with pool.region("weights"):
        small = [torch.full((256,), float(i)) for i in range(8)]
    address = small[3].data_ptr()
    pool.sleep()
    del small[3]
    pool.wake_up()
    with pool.region("weights"):
        again = torch.zeros(256)
    assert again.data_ptr() == address
    assert [int(tensor[0]) for tensor in small] == [0, 1, 2, 4, 5, 6, 7]


def test_persistent_tags_never_sleep(pool: SleepPool) -> None:
    pool.set_persistent("runtime")
    runtime, weights = _bytes(pool, "runtime", 2), _bytes(pool, "weights", 2)
    pool.sleep(level=2)
    assert int(runtime.sum()) == 7 * 2 * MIB
    pool.wake_up()
    pool.set_persistent("runtime", False)
    pool.sleep(level=2)
    assert pool.stats()["runtime"].is_asleep
    pool.wake_up()
    weights.fill_(0)


def test_waking_without_enough_memory_changes_nothing(
    pool: SleepPool, leave_free: Callable[[SleepPool, int], None]
) -> None:
    weights, cache = _weights(pool), _bytes(pool, "kv_cache", 16)
    copies = [tensor.clone() for tensor in weights]
    pool.sleep()
    needed = sum(stats.asleep for stats in pool.stats().values())
    leave_free(pool, needed - 1)
    before, calls = pool.stats(), pool.driver_calls()
    with pytest.raises(OutOfMemoryError) as error:
        pool.wake_up()
    assert (error.value.needed, error.value.free) == (needed, needed - 1)
    assert str(needed) in str(error.value)
    assert "weights" in error.value.tag
    assert pool.stats() == before
    assert pool.driver_calls()["create"] == calls["create"]
    pool.wake_up(["weights"])  # that much there is
    assert _same(weights, copies)
    leave_free(pool, needed)
    pool.wake_up()
    cache.fill_(1)


def test_two_namespaces_do_not_touch_each_other(pool: SleepPool) -> None:
    other = SleepPool.get(DEVICE, namespace="other")
    mine, theirs = _bytes(pool, "weights", 2), _bytes(other, "weights", 2)
    pool.sleep(level=2)
    assert not other.stats()["weights"].is_asleep
    assert int(theirs.sum()) == 7 * 2 * MIB
    other.sleep(level=1)
    pool.wake_up()
    mine.fill_(1)
    assert other.stats()["weights"].is_asleep
    other.wake_up()
    assert int(theirs.sum()) == 7 * 2 * MIB


def test_get_returns_one_pool_a_device_and_namespace() -> None:
    assert SleepPool.get(DEVICE) is SleepPool.get(torch.device(DEVICE), namespace="default")
    assert SleepPool.get(DEVICE) is not SleepPool.get(DEVICE, namespace="other")
