"""Regions: which allocations are a tag's."""

import threading

import pytest
import torch

from allocator import RegionError, SleepPool
from tests.allocator.conftest import DEVICE, KEEPS_SEGMENTS, content, cpu_only, rounded


def test_only_what_is_made_inside_is_the_tags(pool: SleepPool) -> None:
    outside = torch.ones(1000)
    with pool.region("weights"):
        inside = torch.ones(1000)
    after = torch.ones(1000)
    assert content(pool) == {"weights": rounded(4000)}
    pool.sleep(level=2)
    assert float(outside.sum() + after.sum()) == 2000
    del inside


def test_the_innermost_region_wins_and_the_outer_comes_back(pool: SleepPool) -> None:
    with pool.region("outer"):
        kept = [torch.ones(10)]
        with pool.region("inner"):
            kept.append(torch.ones(100))
            with pool.region("outer"):
                kept.append(torch.ones(1000))
        kept.append(torch.ones(10))
    assert content(pool) == {"outer": rounded(40, 4000, 40), "inner": rounded(400)}


def test_a_region_opens_again(pool: SleepPool) -> None:
    kept = []
    for _ in range(3):
        with pool.region("weights"):
            kept.append(torch.ones(16))
    assert content(pool) == {"weights": rounded(64, 64, 64)}


def test_an_exception_closes_the_region(pool: SleepPool) -> None:
    with pytest.raises(ZeroDivisionError), pool.region("outer"), pool.region("inner"):
        raise ZeroDivisionError
    kept = torch.ones(1000)
    assert content(pool) == {"outer": 0, "inner": 0}
    del kept


def test_regions_of_two_pools_nest(pool: SleepPool) -> None:
    other = SleepPool.get(DEVICE, namespace="nested")
    with pool.region("weights"):
        with other.region("weights"):
            theirs = torch.ones(10)
        mine = torch.ones(20)
    assert (content(pool), content(other)) == ({"weights": rounded(80)}, {"weights": rounded(40)})
    del theirs, mine


def test_a_region_is_its_threads_alone(pool: SleepPool) -> None:
    made = []
    with pool.region("weights"):
        thread = threading.Thread(target=lambda: made.append(torch.ones(1000, device=DEVICE)))
        thread.start()
        thread.join()
    assert content(pool) == {"weights": 0}


def test_a_tensor_is_freed_by_any_thread_after_its_region(pool: SleepPool) -> None:
    with pool.region("weights"):
        made = [torch.ones(1000)]
    thread = threading.Thread(target=made.clear)
    thread.start()
    thread.join()
    pool.trim()
    stats = pool.stats()["weights"]
    assert stats.mapped == stats.dead
    assert KEEPS_SEGMENTS or (stats.live, stats.mapped, stats.allocations) == (0, 0, 0)


def test_a_region_left_on_another_thread_is_an_error_and_ends_with_its_thread(pool: SleepPool) -> None:
    region = pool.region("weights")
    opened, tried = threading.Event(), threading.Event()
    kept = []

    def stay_inside() -> None:
        region.__enter__()
        opened.set()
        tried.wait(timeout=60)
        kept.append(torch.ones(1000, device=DEVICE))

    thread = threading.Thread(target=stay_inside)
    thread.start()
    assert opened.wait(timeout=60)
    with pytest.raises(RegionError):
        region.__exit__(None, None, None)
    tried.set()
    thread.join()
    outside = torch.ones(1000)
    assert content(pool) == {"weights": rounded(4000)}
    pool.sleep()
    pool.wake_up()
    assert float((kept[0] + outside).sum()) == 2000


def test_a_region_left_on_another_thread_leaves_that_threads_own_region_open(pool: SleepPool) -> None:
    region = pool.region("weights")
    thread = threading.Thread(target=region.__enter__)
    thread.start()
    thread.join()
    with pool.region("weights"):
        with pytest.raises(RegionError):
            region.__exit__(None, None, None)
        made = torch.ones(1000)
    assert content(pool) == {"weights": rounded(4000)}
    del made


@cpu_only("torch_npu adds 32 bytes to each tensor and rounds it up to 512")
def test_many_small_tensors_waste_at_most_two_percent(pool: SleepPool) -> None:
    sizes = [16 * (1 + index % 256) for index in range(12_000)]  # up to 16 KB
    with pool.region("weights"):
        made = [torch.empty(size) for size in sizes]
    stats = pool.stats()["weights"]
    assert stats.mapped <= 1.02 * sum(tensor.nbytes for tensor in made)
    pool.sleep()
    assert pool.stats()["weights"].host <= 1.02 * sum(tensor.nbytes for tensor in made)
    pool.wake_up()


def test_more_regions_than_a_thread_can_have_open_is_an_error(pool: SleepPool) -> None:
    def nest(depth: int) -> None:
        with pool.region("weights"):
            nest(depth + 1)

    with pytest.raises(ValueError, match="64 regions"):
        nest(0)
    kept = torch.ones(1000)
    assert content(pool) == {"weights": 0}
    del kept
