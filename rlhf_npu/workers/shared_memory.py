"""A run's shared memory: named after the run, so that it can be removed when nobody is left who knows of it.

Every process of a run holds a shared lock on the run's file in /dev/shm for as long as it lives. Who gets that lock
for itself knows that all of them have ended, that none can join any more, and that what is named after the run is
nobody's. The kernel frees the locks of killed processes, so this holds for a run of which nothing is left.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import psutil

from rlhf_npu.errors import WorkerError
from rlhf_npu.run_id import PREFIX

FOLDER = Path("/dev/shm")
SUFFIX = ".lock"
GRACE_SECONDS = 0.5
END_SECONDS = 10
POLL_SECONDS = 0.02


@contextmanager
def shared_memory_of(run_id: str) -> Iterator[None]:
    """On leaving, what processes of the run on this machine left in shared memory is gone, and so are they.

    On entering, what earlier runs left here when all their processes were killed is removed.
    """
    remove_leftovers()
    lock = None
    try:
        lock = _open(run_id, os.O_CREAT)
        yield
    finally:
        if lock is not None:
            _end_the_others(lock, run_id)
            os.close(lock)
        _remove(run_id)


def end_run(run_id: str) -> None:
    """On a machine that is not the driver's: wait for the run's processes to end, and remove what they left."""
    try:
        lock = _open(run_id, create=0)
    except (FileNotFoundError, BlockingIOError):
        return  # none was here, or somebody is removing it
    _end_the_others(lock, run_id)
    os.close(lock)
    _remove(run_id)


def join_run(run_id: str, may_be_first: bool) -> None:
    """Hold the run's lock until this process ends, and name after the run what Python makes in shared memory.

    Args:
        may_be_first: whether this machine is not the driver's, on which the run's file is there until the run ends.

    Raises:
        WorkerError: the run has ended.
    """
    try:
        _open(run_id, os.O_CREAT if may_be_first else 0)
    except (FileNotFoundError, BlockingIOError):
        raise WorkerError(f"run {run_id} has ended before this process could join it") from None
    _name_segments_after(run_id)


def remove_leftovers() -> None:
    """Remove what runs left in this machine's shared memory of which no process is alive."""
    for path in FOLDER.glob(f"{PREFIX}*{SUFFIX}"):
        try:
            lock = os.open(path, os.O_RDWR)
        except (FileNotFoundError, PermissionError):
            continue  # removed just now, or another user's
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path.name.removesuffix(SUFFIX))
        except BlockingIOError:
            continue  # that run is alive
        finally:
            os.close(lock)


def _open(run_id: str, create: int) -> int:
    """The run's file, locked with others."""
    path = FOLDER / f"{run_id}{SUFFIX}"
    while True:
        lock = os.open(path, os.O_RDWR | create, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        except BlockingIOError:
            if not create:
                os.close(lock)
                raise
        os.close(lock)  # somebody looked for leftovers between our two calls, and has removed the file
        time.sleep(POLL_SECONDS)


def _remove(run_id: str) -> None:
    lock = FOLDER / f"{run_id}{SUFFIX}"
    for path in sorted(FOLDER.glob(f"*{run_id}*"), key=lock.__eq__):  # the lock last: leftovers are found by it
        path.unlink(missing_ok=True)


def _end_the_others(lock: int, run_id: str) -> None:
    """Wait for the run's other processes, which somebody has told to end, and kill those that linger."""
    if _alone(lock, within=GRACE_SECONDS):
        return
    for process in _holders(run_id):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _alone(lock, within=END_SECONDS)


def _alone(lock: int, within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(POLL_SECONDS)
        else:
            return True
    return False


def _holders(run_id: str) -> Iterator[psutil.Process]:
    path = str(FOLDER / f"{run_id}{SUFFIX}")
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(file.path == path for file in process.open_files()):
                yield process
        except psutil.Error:
            continue  # it has ended, or is another user's


def _name_segments_after(run_id: str) -> None:
    initialise = SharedMemory.__init__

    @wraps(initialise)
    def named(self: SharedMemory, name: str | None = None, create: bool = False, *args: Any, **kwargs: Any) -> None:
        if create and name is None:
            name = f"{run_id}_{secrets.token_hex(6)}"
        initialise(self, name, create, *args, **kwargs)

    SharedMemory.__init__ = named  # type: ignore[method-assign]
