"""The pool on a real GPU: what only real hardware, CUDA's driver and torch's CUDA allocator can show.

RLHF_NPU_STRESS_SECONDS says for how long threads allocate while a tag sleeps and wakes.
"""

import gc
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from allocator import HookError, OutOfMemoryError, SleepPool
from tests.allocator.injected_faults import fails

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

MIB = 1 << 20
GPU = "cuda:0"
STRESS_SECONDS = float(os.environ.get("RLHF_NPU_STRESS_SECONDS", "5"))
SLEEP_CALLS = ["synchronize", "host_alloc", "copy_out", "mark", "wait", "unmap", "release"]
WAKE_CALLS = ["memory_info", "create", "map", "copy_in", "mark", "wait"]


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[SleepPool]:
    pool = SleepPool.get(GPU, namespace=request.node.name)
    yield pool
    for call in pool.driver_calls():
        pool.inject_fault(call, 0)
    gc.collect()
    pool.trim()
    pool.release_host()
    assert all(stats.mapped + stats.asleep == 0 for stats in pool.stats().values())


def _free() -> int:
    """Free memory by the driver's own count, with nothing kept by torch."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _weights(pool: SleepPool, tag: str = "weights") -> list[torch.Tensor]:
    sizes = [100 * MIB, 3 * MIB, 700_000, 1000, 5]
    with pool.region(tag):
        return [torch.randn(size, device=GPU) for size in sizes]


def _same(tensors: list[torch.Tensor], copies: list[torch.Tensor]) -> bool:
    return all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_memory_comes_back_by_the_drivers_count_and_content_and_addresses_stay(gpu: SleepPool) -> None:
    weights = _weights(gpu)
    with gpu.region("kv_cache"):
        cache = torch.ones(512 * MIB, dtype=torch.uint8, device=GPU)
    copies, addresses = [tensor.clone() for tensor in weights], [tensor.data_ptr() for tensor in [*weights, cache]]
    awake, mapped = _free(), sum(stats.mapped for stats in gpu.stats().values())
    gpu.sleep()
    assert _free() - awake == mapped
    assert gpu.stats()["weights"].host <= 1.02 * sum(tensor.nbytes for tensor in weights)
    assert torch.equal(gpu.backup("weights").read(weights[1]), copies[1].cpu())
    gpu.wake_up()
    assert _free() == awake
    assert _same(weights, copies)
    assert [tensor.data_ptr() for tensor in [*weights, cache]] == addresses


def test_freed_memory_is_not_copied_and_goes_back(gpu: SleepPool) -> None:
    weights = _weights(gpu)
    with gpu.region("weights"):
        temporary = torch.ones(200 * MIB, device=GPU)
    mapped = gpu.stats()["weights"].mapped
    del temporary
    gpu.trim()
    assert mapped - gpu.stats()["weights"].mapped >= 800 * MIB
    gpu.sleep()
    assert gpu.stats()["weights"].sleep.copied <= 1.02 * sum(tensor.nbytes for tensor in weights)
    gpu.wake_up()


@pytest.mark.parametrize("call", SLEEP_CALLS)
def test_a_sleep_that_failed_at_any_call_is_finished_by_a_retry(gpu: SleepPool, call: str) -> None:
    weights = _weights(gpu)
    copies = [tensor.clone() for tensor in weights]
    gpu.trim()
    nth = 1
    while fails(gpu, call, nth, gpu.sleep):
        gpu.sleep()
        assert gpu.stats()["weights"].mapped == 0
        gpu.wake_up()
        assert _same(weights, copies)
        gpu.release_host()
        nth += 1
    assert nth > 1
    gpu.wake_up()
    assert _same(weights, copies)


@pytest.mark.parametrize("call", WAKE_CALLS)
@pytest.mark.parametrize("all_or_nothing", [True, False])
def test_a_wake_up_that_failed_at_any_call_is_finished_by_a_retry(
    gpu: SleepPool, call: str, all_or_nothing: bool
) -> None:
    weights = _weights(gpu)
    copies = [tensor.clone() for tensor in weights]
    gpu.sleep()
    nth = 1
    while fails(gpu, call, nth, lambda: gpu.wake_up(all_or_nothing=all_or_nothing)):
        gpu.wake_up()
        assert _same(weights, copies)
        gpu.sleep()
        nth += 1
    assert nth > 1
    assert _same(weights, copies)


def test_a_graph_is_replayed_without_a_new_capture(gpu: SleepPool) -> None:
    with gpu.region("weights"):
        matrix, given = torch.randn(1024, 1024, device=GPU), torch.randn(64, 1024, device=GPU)
    with gpu.region("kv_cache"):
        result = torch.empty(64, 1024, device=GPU)
    torch.mm(given, matrix, out=result)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.mm(given, matrix, out=result)
    graph.replay()
    wanted = result.clone()
    for _ in range(3):
        gpu.sleep()
        gpu.wake_up()
        result.zero_()
        graph.replay()
        assert torch.equal(result, wanted)


def test_waking_without_enough_memory_changes_nothing(gpu: SleepPool) -> None:
    weights = _weights(gpu)
    copies = [tensor.cpu() for tensor in weights]
    gpu.sleep()
    needed = gpu.stats()["weights"].asleep
    tenant = torch.empty(_free() - needed // 2, dtype=torch.uint8, device=GPU)
    before = gpu.stats()
    with pytest.raises(OutOfMemoryError) as error:
        gpu.wake_up()
    assert error.value.needed == needed
    assert needed // 4 < error.value.free < needed
    assert gpu.stats() == before
    del tenant
    torch.cuda.empty_cache()
    gpu.wake_up()
    assert _same([tensor.cpu() for tensor in weights], copies)


def test_an_allocation_for_which_there_is_no_memory_is_torchs_own_error_and_can_be_tried_again(gpu: SleepPool) -> None:
    kept_by_torch = torch.empty(_free() - 512 * MIB, dtype=torch.uint8, device=GPU)
    del kept_by_torch
    # For a MemPool torch does not give up what it keeps elsewhere.
    with gpu.region("weights"), pytest.raises(torch.OutOfMemoryError):
        torch.ones(2048 * MIB, dtype=torch.uint8, device=GPU)
    torch.cuda.empty_cache()
    with gpu.region("weights"):
        weights = torch.ones(2048 * MIB, dtype=torch.uint8, device=GPU)
    assert int(weights[::MIB].sum()) == 2048


def test_expandable_segments_are_refused(gpu: SleepPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(HookError, match="PYTORCH_CUDA_ALLOC_CONF"), gpu.region("weights"):
        pass


def test_a_hundred_cycles_leave_nothing_behind(gpu: SleepPool) -> None:
    dice = random.Random(0)
    tensors: list[tuple[int, torch.Tensor]] = []
    before = 0
    for cycle in range(110):
        if cycle == 10:
            tensors.clear()
            gpu.trim()
            before = _free()
        with gpu.region("weights"):
            for _ in range(10):
                size = dice.choice([10, 3000, 300_000, 4 * MIB])
                tensors.append((cycle, torch.full((size,), float(cycle), device=GPU)))
        dice.shuffle(tensors)
        del tensors[10:]
        gpu.sleep()
        del tensors[7:]
        gpu.wake_up()
        assert all(bool(torch.all(tensor == number)) for number, tensor in tensors)
    tensors.clear()
    gpu.trim()
    assert abs(_free() - before) <= 2 * MIB
    calls = gpu.driver_calls()
    assert calls["create"] == calls["release"]


def test_threads_allocate_while_a_tag_sleeps_and_wakes(gpu: SleepPool) -> None:
    sleeper = _weights(gpu, "sleeper")
    copies = [tensor.clone() for tensor in sleeper]
    end = threading.Event()
    failures: list[BaseException] = []
    rounds = [0] * 9
    longest = [0.0] * 9

    def work(number: int) -> None:
        try:
            while not end.is_set():
                start = time.perf_counter()
                with gpu.region(f"worker{number}"):
                    tensors = [torch.full((200_000,), float(number), device=GPU) for _ in range(5)]
                longest[number] = max(longest[number], time.perf_counter() - start)
                assert all(bool(torch.all(tensor == number)) for tensor in tensors)
                del tensors
                rounds[number] += 1
        except BaseException as error:  # noqa: BLE001 - a thread's failure is the test's
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    cycles, until = 0, time.monotonic() + STRESS_SECONDS
    while time.monotonic() < until:
        gpu.sleep(offload=["sleeper"])
        gpu.wake_up(["sleeper"])
        cycles += 1
    end.set()
    for thread in threads:
        thread.join()
    assert not failures
    print(f"{cycles} cycles, {sum(rounds)} rounds of 9 threads, longest allocation {max(longest):.3f} s")
    assert min(rounds) > 3
    assert max(longest) < 2
    assert _same(sleeper, copies)
