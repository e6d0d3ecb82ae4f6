"""Fixtures of the pool's tests: a namespace for each test, and the operating system's count of memory.

The tests run on the CPU, and where torch_npu is installed on an NPU, which may be a simulated one (tests/aclsim).
"""

import gc
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from allocator import SleepPool

MIB = 1 << 20
DEVICE = "npu:0" if importlib.util.find_spec("torch_npu") else "cpu"
_ROOT = Path(__file__).parents[2]
_numbers = itertools.count()


def _resident_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("smaps_rollup has no Rss")


@pytest.fixture
def resident() -> Callable[[], int]:
    """Resident memory of this process in bytes, as the kernel counts it: what the CPU's pool moves."""
    if DEVICE != "cpu":
        pytest.skip("an NPU's memory is not the process's: tests/aclsim counts it")
    return _resident_bytes


@pytest.fixture(autouse=True)
def _device() -> None:
    torch.set_num_threads(1)
    torch.set_default_device(DEVICE)


@pytest.fixture
def pool() -> Iterator[SleepPool]:
    """An empty pool. At the end no driver call may be left to fail and the device's limit is lifted."""
    made = SleepPool.get(DEVICE, namespace=f"test{next(_numbers)}")
    yield made
    gc.collect()  # what an expected error's traceback holds is no later test's memory
    made.set_capacity(None)
    made.set_poison(False)
    for call in made.driver_calls():
        made.inject_fault(call, 0)


@pytest.fixture
def held(pool: SleepPool) -> Callable[[], dict[str, int]]:
    """What the device holds since the test began, by the driver's own calls: all zero when nothing leaks."""
    gc.collect()  # no tensor of an earlier test may be freed during this one
    pairs = {
        "addresses": ("reserve", "unreserve"),
        "handles": ("create", "release"),
        "mappings": ("map", "unmap"),
        "arenas": ("host_alloc", "host_free"),
    }

    def count() -> dict[str, int]:
        calls = pool.driver_calls()
        return {name: calls[made] - calls[returned] for name, (made, returned) in pairs.items()}

    before = count()
    return lambda: {name: value - before[name] for name, value in count().items()}


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in a new Python, with ``environment`` over this one's."""

    def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            [sys.executable, "-c", program],
            env=variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run
