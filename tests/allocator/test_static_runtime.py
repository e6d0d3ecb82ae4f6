"""Some compilers put a C++ runtime of its own into each library: the pool works beside torch's all the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.allocator.conftest import cpu_only

PACKAGE = Path(__file__).parents[2] / "allocator"
PROGRAM = "import torch; from allocator import SleepPool; print(SleepPool.get('cpu').memory_info().total)"


@cpu_only("about reading the machine's memory")
@pytest.mark.slow
def test_memory_is_read_without_the_processes_own_runtime(tmp_path: Path) -> None:
    copy = tmp_path / "allocator"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "csrc", "__pycache__"))
    sources = sorted(path for path in (PACKAGE / "csrc").glob("*.cpp") if path.name != "torch_cpu.cpp")
    library = copy / f"_sleep_pool{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O0", "-fPIC", "-shared", "-pthread", "-static-libstdc++"]
    subprocess.run([*command, *map(str, sources), "-ldl", "-o", str(library)], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert 1 << 28 < int(result.stdout) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
