"""Fixtures of the pool's tests: a namespace for each test, and counts of memory that are not the pool's own.

The tests run on the CPU, and where torch_npu is installed on an NPU simulated by tests/aclsim. There torch keeps
what is freed, cuts its own segments, and tries a failed allocation again.
"""

import gc
import importlib.metadata
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator import SleepPool
from tests.aclsim import control

MIB = 1 << 20
ON_NPU = importlib.util.find_spec("torch_npu") is not None
DEVICE = "npu:0" if ON_NPU else "cpu"
# torch_npu 2.10 returns no segment in which a region's tensors were: it keeps what is freed for the tag's next regions.
KEEPS_SEGMENTS = ON_NPU and importlib.metadata.version("torch-npu").startswith("2.10.")
SMALL_HANDLE = 2 * MIB
_ROOT = Path(__file__).parents[2]
_TORCH_NPU_SAYS = re.compile(r".*(ASCEND_HOME_PATH environment|require processing for 32 padding size).*\n")
_numbers = itertools.count()
gc.freeze()  # the modules' objects need not be looked at each time a test collects


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """Skips a test on an NPU."""
    return pytest.mark.skipif(ON_NPU, reason=reason)


def torch_npu() -> Any:
    """The package, which only some of the environments have."""
    return importlib.import_module("torch_npu")


def _kept_segments() -> list[dict[str, Any]]:
    """The segments of regions that torch keeps although nothing lives in them; none where it returns them."""
    if not KEEPS_SEGMENTS:
        return []
    segments = torch_npu().npu.memory_snapshot()
    return [each for each in segments if any(each["segment_pool_id"]) and not each["active_size"]]


def content(pool: SleepPool) -> dict[str, int]:
    """Bytes of each tag's tensors, each rounded up to 64."""
    pool.trim()
    return {tag: stats.mapped - stats.dead for tag, stats in pool.stats().items()}


def rounded(*sizes: int) -> int:
    """The sum of sizes, each rounded up to 64."""
    return sum((size + 63) // 64 * 64 for size in sizes)


def _resident_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no Rss")


def _device_bytes() -> int:
    stats = control.stats()
    return stats.used_physical + stats.host


@pytest.fixture
def resident() -> Callable[[], int]:
    """Memory in bytes, as the kernel counts this process's, or the simulated device its own and the host's for it."""
    return _device_bytes if ON_NPU else _resident_bytes


def _end_unless_operators_run(test: str) -> None:
    """After an operator that failed torch_npu drops all later ones without a word, and tests would see stale bytes."""
    total = float(torch.full((3,), 2.0, device=DEVICE).sum())
    if total != 6:
        pytest.exit(f"{test}: an operator failed (is it in tests/aclsim/csrc/operators.cpp?)", returncode=1)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(1)
    torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
    if ON_NPU:
        _end_unless_operators_run(request.node.nodeid)
        assert control.stats().undefined == 0


@pytest.fixture
def leave_free() -> Iterator[Callable[[SleepPool, int], None]]:
    """Makes the device have so many bytes free now; what was limited is not at the end."""
    limited: list[SleepPool] = []

    def limit(pool: SleepPool, free: int) -> None:
        limited.append(pool)
        if ON_NPU:
            control.set_capacity(control.stats().used + free)
            return
        pool.set_capacity(1 << 46)  # so that the device counts what is used of it, not the machine
        info = pool.memory_info()
        pool.set_capacity(info.total - info.free + free)

    capacity = control.stats().capacity if ON_NPU else 0
    yield limit
    if ON_NPU:
        control.set_capacity(capacity)
    for pool in limited:
        pool.set_capacity(None)


@pytest.fixture
def pool() -> Iterator[SleepPool]:
    """An empty pool. At the end no driver call may be left to fail, and what no test holds is returned."""
    made = SleepPool.get(DEVICE, namespace=f"test{next(_numbers)}")
    yield made
    made.set_poison(False)
    for call in made.driver_calls():
        made.inject_fault(call, 0)
    gc.collect()  # what an expected error's traceback holds is no later test's memory
    made.trim()
    made.release_host()


@pytest.fixture
def small_handles(pool: SleepPool) -> Iterator[SleepPool]:
    """The pool, its memory made of handles of 2 MiB."""
    pool.set_handle_bytes(SMALL_HANDLE)
    yield pool
    pool.set_handle_bytes(256 * MIB)


@pytest.fixture
def held(pool: SleepPool, request: pytest.FixtureRequest) -> Callable[[], dict[str, int]]:
    """What the device holds since the test began, by the driver's own calls: all zero when nothing leaks.

    Without the segments that torch keeps although nothing lives in them, where it does.
    """
    gc.collect()  # no tensor of an earlier test may be freed during this one
    if ON_NPU:
        torch_npu().npu.empty_cache()  # what the fixtures of the one before held
    handle_bytes = SMALL_HANDLE if "small_handles" in request.fixturenames else 256 * MIB
    pairs = {
        "addresses": ("reserve", "unreserve"),
        "handles": ("create", "release"),
        "mappings": ("map", "unmap"),
        "arenas": ("host_alloc", "host_free"),
    }

    def count() -> dict[str, int]:
        calls = pool.driver_calls()
        kept = _kept_segments()
        awake = [segment for segment in kept if control.probe(segment["address"]) == 1]
        handles = sum(-(-segment["total_size"] // handle_bytes) for segment in awake)
        of_torch = {"addresses": len(kept), "handles": handles, "mappings": handles, "arenas": 0}
        return {name: calls[made] - calls[returned] - of_torch[name] for name, (made, returned) in pairs.items()}

    before = count()
    return lambda: {name: value - before[name] for name, value in count().items()}


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program, which finds ``DEVICE`` set, in a new Python, with ``environment`` over this one's."""

    python_path = os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])

    def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", **environment}
        result = subprocess.run(
            [sys.executable, "-c", f"DEVICE = {DEVICE!r}\n{program}"],
            env=variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        result.stdout, result.stderr = (_TORCH_NPU_SAYS.sub("", text) for text in (result.stdout, result.stderr))
        return result

    return run
