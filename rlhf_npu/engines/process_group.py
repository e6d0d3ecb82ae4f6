"""Joining DeepSpeed's process group.

On a CPU DeepSpeed loads shared-memory collectives at that, through torch's just-in-time builder. Whoever loads
them creates a file `lock` beside them for the moment, compiled before or not, and all others wait for its end
without limit: after a process that was killed in that moment, every later start would wait for ever. Here only
who holds a lock of the kernel's loads them, and that one ends with its process; a `lock` found then is of a dead
one. The folder is this project's alone, and the environment's: a build for another would replace this one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf_npu.errors import ExtensionBuildError
from rlhf_npu.platform import Platform

_ROOT = "TORCH_EXTENSIONS_DIR"


def join_process_group(platform: Platform) -> None:
    """Meet the other ranks, as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

    Raises:
        ExtensionBuildError: DeepSpeed's collectives of the CPU cannot be compiled or written.
    """
    import deepspeed

    _load_shared_memory_collectives()
    deepspeed.init_distributed(dist_backend=platform.dist_backend)


def extension_folder() -> Path:
    """Where DeepSpeed's collectives for this environment are built: under TORCH_EXTENSIONS_DIR, else ~/.cache."""
    root = os.environ.get(_ROOT) or Path.home() / ".cache" / "torch_extensions"
    environment = f"{sys.version}{sys.prefix}{torch.__version__}{torch.version.git_version}"
    return Path(root) / "rlhf_npu" / hashlib.sha256(environment.encode()).hexdigest()[:16]


def _load_shared_memory_collectives() -> None:
    """What DeepSpeed's process group does next, so that it finds them loaded."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = extension_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "building").open("w") as lock, _extensions_in(folder):
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / builder.NAME / "lock").unlink(missing_ok=True)
            _build(builder)
    except OSError as error:
        raise ExtensionBuildError(
            f"{folder}, for DeepSpeed's collectives of the CPU: {error}; set {_ROOT} to a folder that can be written"
        ) from error


def _build(builder: Any) -> None:
    try:
        builder.load(verbose=False)
    except RuntimeError as error:
        raise ExtensionBuildError(
            f"compiling DeepSpeed's {builder.NAME} failed; it takes a C++ compiler (CXX names one) and ninja: {error}"
        ) from error


@contextmanager
def _extensions_in(folder: Path) -> Iterator[None]:
    before = os.environ.get(_ROOT)
    os.environ[_ROOT] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ROOT]
        else:
            os.environ[_ROOT] = before
