"""Shared memory that workers would leave behind when they are stopped in the middle of a call.

vLLM names some of its segments after the run; others it makes through Python's `multiprocessing.shared_memory`,
which calls them `psm_` and a random number.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("/dev/shm")


@dataclass(frozen=True)
class WorkerProcess:
    """A process and the machine it runs on."""

    host: str
    pid: int


def segments_of(processes: Iterable[WorkerProcess]) -> set[Path]:
    """The `psm_` segments that those of `processes` that run on this machine have mapped."""
    here = socket.gethostname()
    return {segment for process in processes if process.host == here for segment in _mapped(process.pid)}


def remove_segments(run_id: str, segments: Iterable[Path] = ()) -> None:
    """Remove `segments`, and all that are named after the run, from this machine."""
    for segment in {*segments, *FOLDER.glob(f"*{run_id}*")}:
        segment.unlink(missing_ok=True)


def _mapped(pid: int) -> set[Path]:
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return set()  # it has ended, and cleaned up after itself
    paths = {Path(fields[5]) for line in lines if len(fields := line.split()) == 6}
    return {path for path in paths if path.parent == FOLDER and path.name.startswith("psm_")}
