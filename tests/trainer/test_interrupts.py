"""Ctrl-C before there is anything to clean up: one line, at whatever moment."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.2, 1.0, 3.0])
def test_a_signal_while_libraries_are_imported_is_one_line(
    tmp_path: Path, seconds: float, stop: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_npu.main_ppo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    )
    _wait_for_imports(process.pid)
    time.sleep(seconds)
    process.send_signal(stop)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert printed.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def _wait_for_imports(pid: int) -> None:
    """Until the first module of this project has run: what comes before it is Python's own start."""
    caught = 1 << (signal.SIGTERM - 1)
    while not int(_status(pid)["SigCgt"], 16) & caught:
        time.sleep(0.01)


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)
