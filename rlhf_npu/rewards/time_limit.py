"""A limit on the time that calls of foreign Python code may take in the main thread.

A thread cannot be ended, and another process has neither the model's devices nor Ray, so a call is interrupted where it
stands, by a signal from a timer of the kernel's: a thread would not run while a regular expression does, for example.
That works wherever Python runs, sleeps or waits. A call into C that neither returns nor looks at signals is beyond it:
the process is then ended, with the stacks of all threads on stderr.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE_SECONDS = 30.0
_AGAIN_SECONDS = 1  # foreign code may catch everything, in a loop
_SIGNAL = signal.SIGRTMIN + 9  # SIGALRM is what such code uses for limits of its own
_CLOCK_MONOTONIC, _TO_THREAD = 1, 4  # SIGEV_THREAD_ID


class _Event(ctypes.Structure):
    """`struct sigevent` of 64-bit Linux."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("padding", ctypes.c_int * 11),
    )


class _Times(ctypes.Structure):
    """`struct itimerspec`: seconds and nanoseconds of the interval, and of the first time."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("again", "again_ns", "first", "first_ns"))


class _Timer:
    """A timer of the kernel's that signals the calling thread."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._libc = libc if hasattr(libc, "timer_create") else ctypes.CDLL("librt.so.1", use_errno=True)
        self._id = ctypes.c_void_p()
        event = _Event(signal=_SIGNAL, notify=_TO_THREAD, thread=threading.get_native_id())
        self._check(self._libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._id)))

    def set(self, seconds: float) -> None:
        """Signal after so many seconds, and again and again; 0 = never."""
        rest, whole = math.modf(min(seconds, 1e9))
        times = _Times(again=_AGAIN_SECONDS, first=int(whole), first_ns=int(rest * 1e9))
        self._check(self._libc.timer_settime(self._id, 0, ctypes.byref(times), None))

    def close(self) -> None:
        """Give the timer back."""
        self._check(self._libc.timer_delete(self._id))

    def _check(self, status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class TimeUp(BaseException):
    """The time is up; no Exception, since reward functions catch those and return 0."""


class TimeKeeper:
    """Interrupts calls that take too long; use it as a context manager in the main thread.

    Elsewhere, where no signal arrives, it limits nothing.
    """

    def __init__(self, grace_seconds: float = GRACE_SECONDS) -> None:
        self.is_over = False  # whether the time of the last call was up
        self._grace = grace_seconds
        self._deadline = math.inf
        self._guarded = math.inf
        self._timer: _Timer | None = None

    def __enter__(self) -> TimeKeeper:
        if threading.current_thread() is threading.main_thread():
            signal.signal(_SIGNAL, self._interrupt)
            self._timer = _Timer()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.close()
            self._guard(math.inf)

    @contextmanager
    def call(self, seconds: float | None) -> Iterator[None]:
        """Limits the code inside; None is no limit.

        Raises:
            TimeUp: it took longer; even if it caught what interrupted it.
        """
        self.is_over = False
        if seconds is None or self._timer is None:
            yield
            return
        self._guard(seconds)
        try:
            try:
                self._deadline = time.monotonic() + seconds
                self._timer.set(seconds)
                yield
            finally:
                self._deadline = math.inf
        finally:
            self._deadline = math.inf  # the line before is Python as well, and may have been interrupted
            self._timer.set(0)
        if self.is_over:
            raise TimeUp

    def _interrupt(self, *_: object) -> None:
        if time.monotonic() >= self._deadline:
            self.is_over = True
            raise TimeUp

    def _guard(self, seconds: float) -> None:
        """End the process where a call ends neither in time nor within the grace: that thread needs no Python.

        Setting it takes longer than a short call does, so it is left as it is while it is right to a quarter.
        """
        least = time.monotonic() + seconds + self._grace
        if least <= self._guarded <= least + seconds / 4:
            return
        faulthandler.cancel_dump_traceback_later()
        self._guarded = math.inf
        if seconds < math.inf:
            self._guarded = least + seconds / 4
            stderr = sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback_later(seconds * 1.25 + self._grace, exit=True, file=stderr)
