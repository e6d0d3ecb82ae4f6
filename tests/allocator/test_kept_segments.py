"""Memory that was freed in regions: over many rounds of region, sleep, wake-up and trim it does not pile up.

torch_npu 2.10 keeps it for the tag's next regions; later ones return it. Counted by the simulated device.
"""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from allocator import HookError, SleepPool
from tests.aclsim import control
from tests.allocator.conftest import DEVICE, KEEPS_SEGMENTS, ON_NPU, torch_npu

pytestmark = pytest.mark.skipif(not ON_NPU, reason="a CPU tensor is returned when it is freed")
MIB = 1 << 20
TENSOR = 2 * MIB
SEGMENT = 22 * MIB  # what torch takes for it
ROUNDS = 100


def _make(number: int) -> torch.Tensor:
    return torch.full((TENSOR,), number % 100, dtype=torch.uint8, device=DEVICE)


def _in_thread(action: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failures


@contextmanager
def _thread_inside(pool: SleepPool, tag: str) -> Iterator[None]:
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with pool.region(tag):
            made = _make(1)
            entered.set()
            assert leave.wait(timeout=60)
            assert int(made[-1]) == 1

    thread = threading.Thread(target=stay)
    thread.start()
    try:
        assert entered.wait(timeout=60)
        yield
    finally:
        leave.set()
        thread.join()


def _cycle(pool: SleepPool) -> None:
    pool.sleep()
    pool.wake_up()


def _one_region(pool: SleepPool, number: int) -> None:
    with pool.region("weights"):
        made = _make(number)
    _cycle(pool)
    assert int(made[-1]) == number % 100


def _several_tags(pool: SleepPool, number: int) -> None:
    made = []
    for tag in ("weights", "optimizer", "kv_cache"):
        with pool.region(tag):
            made.append(_make(number))
    _cycle(pool)


def _nested(pool: SleepPool, number: int) -> None:
    made = []
    with pool.region("weights"), pool.region("optimizer"), pool.region("weights"):
        made += [_make(number), _make(number)]
        with pool.region("kv_cache"):
            made.append(_make(number))
    _cycle(pool)


def _sleep_inside(pool: SleepPool, number: int) -> None:
    with pool.region("weights"), pool.region("optimizer"):
        before = _make(number)
        del before
        pool.trim()
        _cycle(pool)
        after = _make(number)
        pool.sleep(offload=["weights"])
        again = _make(number)  # the region's own tag is awake
        pool.wake_up()
    assert int(after[-1]) == int(again[-1]) == number % 100


def _threads_beside(pool: SleepPool, number: int) -> None:
    def work() -> None:
        with pool.region("weights"):
            made = _make(number)
            assert int(made[-1]) == number % 100

    with pool.region("weights"):
        made = _make(number)
        _in_thread(work)
    _cycle(pool)
    assert int(made[-1]) == number % 100


def _threads_inside(pool: SleepPool, number: int) -> None:
    with _thread_inside(pool, "kv_cache"):
        with pool.region("weights"):
            made = _make(number)
        pool.sleep(offload=["weights"])
        pool.wake_up()
        pool.trim()
    assert int(made[-1]) == number % 100


def _region_that_fails(pool: SleepPool, number: int) -> None:
    def fail() -> None:
        with pool.region("weights"):
            _make(number)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    _cycle(pool)


@pytest.mark.parametrize(
    ("use", "tags"),
    [
        (_one_region, 1),
        (_several_tags, 3),
        (_nested, 3),
        (_sleep_inside, 2),
        (_threads_beside, 1),
        (_threads_inside, 2),
        (_region_that_fails, 1),
    ],
)
def test_a_hundred_rounds_take_at_most_one_segment_a_tag_more(
    pool: SleepPool, use: Callable[[SleepPool, int], None], tags: int
) -> None:
    def a_round(number: int) -> int:
        use(pool, number)
        gc.collect()
        pool.trim()
        return int(control.stats().used_physical)

    first = a_round(0)
    most = max(a_round(number) for number in range(1, ROUNDS))
    assert most - first <= tags * SEGMENT


def test_one_region_open_for_a_hundred_rounds(pool: SleepPool) -> None:
    used = []
    with pool.region("weights"):
        for number in range(ROUNDS):
            made = _make(number)
            _cycle(pool)
            assert int(made[-1]) == number % 100
            del made
            pool.trim()
            used.append(control.stats().used_physical)
    assert max(used) - used[0] <= SEGMENT


def test_what_is_freed_is_returned_or_used_again(pool: SleepPool) -> None:
    before = control.stats().used_physical
    with pool.region("weights"):
        made = _make(1)
    held = control.stats().used_physical
    address = made.data_ptr()
    del made
    pool.trim()
    assert control.stats().used_physical == (held if KEEPS_SEGMENTS else before)
    with pool.region("weights"):
        made = _make(2)
    assert control.stats().used_physical <= held
    assert not KEEPS_SEGMENTS or made.data_ptr() == address


def test_what_is_freed_sleeps_with_its_tag(pool: SleepPool) -> None:
    before = control.stats().used_physical
    with pool.region("weights"):
        made = _make(1)
    del made
    pool.sleep()
    assert control.stats().used_physical == before
    pool.wake_up()


def test_a_region_that_another_thread_woke_goes_on(pool: SleepPool) -> None:
    with pool.region("weights"):
        first = _make(1)
        pool.sleep()
        with pytest.raises(torch.OutOfMemoryError):
            _make(2)
        _in_thread(pool.wake_up)
        second = _make(2)
        pool.sleep()
        pool.wake_up()
        third = _make(3)
    assert [int(made[-1]) for made in (first, second, third)] == [1, 2, 3]
    pool.sleep()
    assert pool.stats()["weights"].sleep.copied == 3 * TENSOR
    pool.wake_up()


def test_another_threads_tensors_are_not_made_in_what_a_region_freed(pool: SleepPool) -> None:
    outside = []
    with pool.region("weights"):
        freed = _make(1)
        address = freed.data_ptr()
        del freed
        _in_thread(lambda: outside.append(_make(2)))
        assert outside[0].data_ptr() not in range(address, address + SEGMENT)
    pool.sleep(level=2)
    assert int(outside[0][-1]) == 2
    pool.wake_up()


def test_a_torch_that_cannot_route_one_thread_alone_is_refused(
    pool: SleepPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not KEEPS_SEGMENTS:
        pytest.skip("torch routes one thread by itself")
    from allocator import torch_mem_pool

    torch_mem_pool._thread_routing.cache_clear()
    with monkeypatch.context() as older:
        older.delattr(torch_npu()._C, "_npu_beginAllocateCurrentThreadToPool")
        with pytest.raises(HookError, match="install torch_npu"), pool.region("weights"):
            raise AssertionError("the region opened")
    with pool.region("weights"):
        assert int(_make(1)[-1]) == 1


@pytest.mark.parametrize("index", [0, 1])
def test_a_region_may_be_the_first_use_of_the_device(run_python: Callable, index: int) -> None:
    program = f"""
import torch
from allocator import SleepPool
pool = SleepPool.get("npu:{index}")
with pool.region("weights"):
    weights = torch.ones(10, device="npu:{index}")
pool.sleep()
pool.wake_up()
print(float(weights.sum()))
"""
    result = run_python(program, ACLSIM_DEVICES="2")
    assert (result.stdout, result.returncode) == ("10.0\n", 0), result.stderr


def test_a_forked_child_of_who_used_the_device_is_told_to_spawn(run_python: Callable) -> None:
    program = """
import multiprocessing, torch
from allocator import HookError, SleepPool
with SleepPool.get(DEVICE).region("weights"):
    weights = torch.ones(10, device=DEVICE)

def work():
    try:
        with SleepPool.get(DEVICE).region("weights"):
            print("opened")
    except HookError as error:
        print("spawn" in str(error), flush=True)

child = multiprocessing.get_context("fork").Process(target=work)
child.start()
child.join()
"""
    result = run_python(program, PYTHONWARNINGS="ignore")
    assert (result.stdout, result.returncode) == ("True\n", 0), result.stderr


def test_a_region_open_on_another_device_is_no_obstacle_to_a_sleep(run_python: Callable) -> None:
    program = """
import torch
from allocator import SleepPool
first, second = SleepPool.get("npu:0"), SleepPool.get("npu:1")
with first.region("weights"):
    weights = torch.ones(10, device="npu:0")
with second.region("weights"):
    first.sleep()
    others = torch.ones(20, device="npu:1")
    first.wake_up()
second.sleep()
second.wake_up()
print(float(weights.sum()), float(others.sum()))
"""
    result = run_python(program, ACLSIM_DEVICES="2")
    assert (result.stdout, result.returncode) == ("10.0 20.0\n", 0), result.stderr
