"""A limit on the time of calls, where even a call into C does not get past it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from rlhf_npu.rewards.time_limit import TimeKeeper, TimeUp

NEVER_RETURNS = """
import ctypes, sys
from rlhf_npu.rewards.time_limit import TimeKeeper

with TimeKeeper(grace_seconds=0.5) as keeper, keeper.call(0.3):
    {call}
"""


@pytest.mark.parametrize(
    "call",
    ["while True: ctypes.CDLL(None).sleep(3)", "while True: ctypes.PyDLL(None).sleep(3600)"],
    ids=["other threads run", "no Python runs"],
)
def test_a_call_into_c_that_does_not_return_ends_the_process_and_shows_where_it_stands(call: str) -> None:
    source = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + 9])\n" + NEVER_RETURNS
    start = time.monotonic()
    command = [sys.executable, "-c", source.format(call=call)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert time.monotonic() - start < 30
    assert "Timeout" in result.stderr
    assert 'File "<string>", line' in result.stderr


def test_nothing_rings_after_a_call_has_ended() -> None:
    with TimeKeeper() as keeper:
        with keeper.call(0.2):
            pass
        time.sleep(0.5)
        with pytest.raises(TimeUp), keeper.call(0.1):
            time.sleep(30)
        with keeper.call(5):
            time.sleep(0.3)


def test_what_catches_it_again_and_again_is_interrupted_again_and_again() -> None:
    caught: list[TimeUp] = []

    def stubborn() -> None:
        while len(caught) < 2:
            try:
                time.sleep(30)
            except TimeUp as error:
                caught.append(error)

    with TimeKeeper() as keeper, pytest.raises(TimeUp), keeper.call(0.1):
        stubborn()
    assert len(caught) == 2


def test_outside_the_main_thread_nothing_is_limited() -> None:
    done = []

    def work() -> None:
        with TimeKeeper() as keeper, keeper.call(0.1):
            time.sleep(0.4)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
