"""torch's MemPools: destroyed only when no thread is inside one, which torch's CUDA build ends the process over."""

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from allocator import HookError, RegionError, SleepPool, TagAsleepError
from tests.allocator.conftest import DEVICE, KEEPS_SEGMENTS, ON_NPU, torch_npu

pytestmark = pytest.mark.skipif(not ON_NPU, reason="the CPU has no MemPools")
MIB = 1 << 20


class Watch:
    """Counts the threads inside a MemPool, and those MemPools that are destroyed meanwhile."""

    def __init__(self) -> None:
        self.inside = 0
        self.destroyed = 0
        self.destroyed_while_inside = 0
        self._lock = threading.RLock()

    def move(self, threads: int) -> None:
        with self._lock:
            self.inside += threads

    def note_end(self) -> None:
        with self._lock:
            self.destroyed += 1
            self.destroyed_while_inside += self.inside > 0

    def saw_mem_pools_go(self) -> bool:
        """Whether some were destroyed, or none where torch would keep their segments for good."""
        return (self.destroyed > 0) != KEEPS_SEGMENTS


def _npu() -> Any:
    return torch_npu().npu


def _way_into_mem_pools() -> tuple[Any, str]:
    """Where the pool finds torch's way into a MemPool, and its name."""
    return (_npu().memory, "MemPoolContext") if KEEPS_SEGMENTS else (_npu(), "use_mem_pool")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """torch_npu 2.13 does not check what torch's CUDA build does: this does. The MemPools remain torch's own."""
    made = Watch()
    npu = _npu()
    use_mem_pool = npu.use_mem_pool

    @contextmanager
    def watched_use(pool: Any, device: int) -> Iterator[None]:
        with use_mem_pool(pool, device):
            made.move(1)
            try:
                yield
            finally:
                made.move(-1)

    class WatchedContext(getattr(npu.memory, "MemPoolContext", object)):  # type: ignore[misc]
        def __init__(self, pool: Any) -> None:
            super().__init__(pool)
            made.move(1)

        def __del__(self) -> None:
            made.move(-1)

    watched = type("WatchedMemPool", (npu.MemPool,), {"__del__": lambda _: made.note_end()})
    monkeypatch.setattr(npu, "MemPool", watched)
    monkeypatch.setattr(*_way_into_mem_pools(), WatchedContext if KEEPS_SEGMENTS else watched_use)
    yield made
    assert made.inside == 0
    assert made.destroyed_while_inside == 0


@contextmanager
def _another_thread_inside(pool: SleepPool, tag: str) -> Iterator[None]:
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with pool.region(tag):
            entered.set()
            assert leave.wait(timeout=60)

    thread = threading.Thread(target=stay)
    thread.start()
    assert entered.wait(timeout=60)
    yield
    leave.set()
    thread.join()


@pytest.mark.parametrize("namespace", ["same", "another"])
def test_mem_pools_outlive_another_threads_region(pool: SleepPool, watch: Watch, namespace: str) -> None:
    other = pool if namespace == "same" else SleepPool.get(DEVICE, namespace="beside")
    with pool.region("weights"):
        weights = [torch.full((MIB,), float(i)) for i in range(4)]
    with _another_thread_inside(other, "kv_cache"):
        del weights[1]
        pool.sleep(offload=["weights"])
        assert watch.destroyed == 0
        with pytest.raises(TagAsleepError), pool.region("weights"):
            pass
        pool.wake_up()
        with pool.region("weights"):
            weights.append(torch.full((MIB,), 4.0))
        pool.sleep(offload=["weights"])
        pool.wake_up()
        assert watch.destroyed == 0
    pool.sleep(offload=["weights"])
    assert watch.saw_mem_pools_go()
    pool.wake_up()
    assert [float(tensor.mean()) for tensor in weights] == [0, 2, 3, 4]


def test_what_was_freed_is_not_copied_even_when_torch_must_keep_it(pool: SleepPool, watch: Watch) -> None:
    with pool.region("weights"):
        kept, freed = torch.ones(1000), torch.ones(16 * MIB)
    with _another_thread_inside(pool, "kv_cache"):
        del freed
        pool.sleep(offload=["weights"])
        assert pool.stats()["weights"].sleep.copied == 4032
        pool.wake_up()
    assert float(kept.sum()) == 1000


def test_this_threads_own_regions_are_no_obstacle(pool: SleepPool, watch: Watch) -> None:
    other = SleepPool.get(DEVICE, namespace="around")
    with other.region("outer"), pool.region("weights"):
        weights = torch.ones(MIB)
        with other.region("inner"):
            pool.sleep(offload=["weights"])
            assert watch.saw_mem_pools_go()
            inner = torch.ones(MIB)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(10)  # what torch has left of the sleeping tag's memory is not given out
        pool.wake_up()
        weights.add_(torch.ones(MIB))
    outside = torch.ones(1)
    assert float((weights + inner).mean() + outside) == 4


@pytest.mark.parametrize("end", ["return", "raise", "enter only"])
def test_a_thread_that_ended_is_inside_nothing(pool: SleepPool, watch: Watch, end: str) -> None:
    left_open = []

    def work() -> None:
        region = pool.region("weights")
        if end == "enter only":
            left_open.append(region)
            region.__enter__()
            torch.ones(10, device=DEVICE)
            return
        with pytest.raises(ZeroDivisionError) if end == "raise" else region:
            if end == "raise":
                with region:
                    raise ZeroDivisionError

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    pool.sleep()
    assert watch.saw_mem_pools_go()
    pool.wake_up()
    with pool.region("weights"):
        assert float(torch.ones(10).sum()) == 10
    for region in left_open:
        with pytest.raises(RegionError):
            region.__exit__(None, None, None)


def test_a_region_that_did_not_open_is_not_open(pool: SleepPool, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    with pool.region("outer"):
        with monkeypatch.context() as broken:
            broken.setattr(*_way_into_mem_pools(), None)
            with pytest.raises(TypeError), pool.region("inner"):
                raise AssertionError("the region opened")
        broken.setenv("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True")
        with pytest.raises(HookError), pool.region("inner"):
            raise AssertionError("the region opened")
        broken.undo()
    outside = torch.ones(MIB)
    assert set(pool.stats()) == {"outer", "inner"}
    pool.sleep()
    assert watch.saw_mem_pools_go()
    pool.wake_up()
    assert float(outside.mean()) == 1


class User:
    """Makes tensors in nested regions of any of the pools, some of which end in an exception."""

    def __init__(self, pools: list[SleepPool], number: int) -> None:
        self.pools = pools
        self.number = number
        self.random = random.Random(number)
        self.kept: list[torch.Tensor] = []
        self.uses = 0

    def use_until(self, enough: threading.Event) -> None:
        while not enough.is_set():
            self._use()
            self.uses += 1

    def _use(self) -> None:
        outer, inner = self.random.choices(self.pools, k=2)
        size = self.random.choice([10, MIB])
        try:
            with outer.region(f"outer{self.number}"), inner.region(f"inner{self.number}"):
                self.kept.append(torch.full((size,), float(self.number), device=DEVICE))
                if size == 10:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            del self.kept[:-5]
        assert all(float(tensor.mean()) == self.number for tensor in self.kept)


def test_threads_open_regions_while_another_sleeps(pool: SleepPool, watch: Watch) -> None:
    pools = [pool, SleepPool.get(DEVICE, namespace="second")]
    for each in pools:
        with each.region("sleeper"):
            pass
    enough = threading.Event()
    users = [User(pools, number) for number in range(4)]
    with ThreadPoolExecutor(len(users)) as executor:
        futures = [executor.submit(user.use_until, enough) for user in users]
        sleeps = 0
        while sleeps < 30 or (min(user.uses for user in users) < 10 and not any(future.done() for future in futures)):
            for each in pools:
                each.sleep(offload=["sleeper"])
                each.wake_up(["sleeper"])
            sleeps += 1
        enough.set()
    for future in futures:
        future.result()
    for each in pools:
        each.sleep(level=2)
        assert all(stats.mapped == 0 for stats in each.stats().values())
    assert watch.saw_mem_pools_go()


def test_regions_by_the_thousand_do_not_damage_pythons_memory(run_python: Callable) -> None:
    program = """
import torch
from allocator import SleepPool
pool = SleepPool.get(DEVICE)
for number in range(1000):
    with pool.region("weights"):
        weights = torch.full((10,), float(number), device=DEVICE)
    if number % 2:
        pool.sleep()
        pool.wake_up()
print(float(weights.sum()))
"""
    result = run_python(program)
    assert (result.stdout, result.returncode) == ("9990.0\n", 0), result.stderr


def test_neither_a_forked_child_nor_the_end_of_a_process_destroys_mem_pools(run_python: Callable) -> None:
    program = """
import os, sys, threading, torch
from allocator import SleepPool
from tests.aclsim import control
pool = SleepPool.get(DEVICE)
with pool.region("weights"):
    weights = torch.ones(10, device=DEVICE)
with pool.region("idle"):
    pass
before = control.calls("aclrtSynchronizeDevice")
child = os.fork()
if child == 0:
    del pool
    os._exit(control.calls("aclrtSynchronizeDevice") - before)
print(os.waitpid(child, 0)[1])
entered = threading.Event()
def stay():
    with pool.region("weights"):
        entered.set()
        threading.Event().wait()
threading.Thread(target=stay, daemon=True).start()
entered.wait()
torch.npu.MemPool.__del__ = lambda self: os.write(1, b"destroyed")
"""
    result = run_python(program, PYTHONWARNINGS="ignore")  # Python 3.12 warns of every fork beside threads
    assert (result.stdout, result.returncode) == ("0\n", 0), result.stderr
