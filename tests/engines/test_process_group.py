"""Joining DeepSpeed's process group on a CPU, where others were killed while they did."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_npu.engines.process_group import extension_folder
from rlhf_npu.workers.environment import free_port
from tests.devices import PLATFORM

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PLATFORM.name != "cpu", reason="DeepSpeed's shared-memory collectives are the CPU's"),
]
JOIN = """
from rlhf_npu.engines.process_group import join_process_group
from rlhf_npu.platform import detect_platform
join_process_group(detect_platform("cpu"))
import deepspeed.comm.comm
assert deepspeed.comm.comm.cdb.shm_comm_op is not None
"""
KILLED_WHILE_LOADING = """
import os, signal
import torch.utils.file_baton
torch.utils.file_baton.FileBaton.release = lambda self: os.kill(os.getpid(), signal.SIGKILL)
"""


def run(script: str, root: Path, **variables: str) -> tuple[int, str]:
    """The exit status and errors of a process with extensions in `root`; one that waits for ever fails the test."""
    own = {"TORCH_EXTENSIONS_DIR": str(root), "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=os.environ | own | variables, capture_output=True, text=True, check=False, timeout=150
    )
    return done.returncode, done.stderr


@pytest.fixture
def built(tmp_path: Path) -> Path:
    """A root with the collectives built as before this run, so that they are not compiled again."""
    folder = extension_folder()
    status, errors = run(JOIN, folder.parents[1])
    assert status == 0, errors
    shutil.copytree(folder, tmp_path / folder.relative_to(folder.parents[1]))
    return tmp_path


def test_a_process_killed_while_it_loaded_them_stops_nobody(built: Path) -> None:
    status, errors = run(KILLED_WHILE_LOADING + JOIN, built)
    assert status == -signal.SIGKILL, errors
    assert list(built.rglob("lock")), "it was not killed at that moment"
    status, errors = run(JOIN, built)
    assert status == 0, errors
    assert not list(built.rglob("lock"))


def test_without_a_compiler_it_says_what_is_missing(tmp_path: Path) -> None:
    status, errors = run(JOIN, tmp_path, CXX="/nowhere/g++")
    assert status == 1
    assert "ExtensionBuildError: compiling DeepSpeed's deepspeed_shm_comm failed; it takes a C++ compiler" in errors


def test_a_folder_that_cannot_be_written_is_named() -> None:
    status, errors = run(JOIN, Path("/proc/extensions"))
    assert status == 1
    assert "/proc/extensions" in errors
    assert "set TORCH_EXTENSIONS_DIR to a folder that can be written" in errors
