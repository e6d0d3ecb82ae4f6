"""What Ctrl-C and SIGTERM do: end at once while there is nothing to clean up, raise KeyboardInterrupt afterwards."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130

# Python writes the numbers of the signals that arrive to it, whoever has set their handler.
_arrivals: socket.socket | None = None
_requested = False


def exit_at_once() -> None:
    """Until something is to be cleaned up: a signal prints one line and ends the process with status 130.

    An exception would not do: libraries that are interrupted while they are imported raise errors of their own.
    """

    def stop(*_: object) -> None:
        os.write(1, b"interrupted\n")
        os._exit(INTERRUPTED)

    _handle_with(stop)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first signal raises KeyboardInterrupt; further ones would cut the clean-up short and are ignored."""
    global _arrivals, _requested
    _arrivals, sender = socket.socketpair()
    for end in (_arrivals, sender):
        end.setblocking(False)
    _requested = False
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    raise_once()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        sender.close()
        _arrivals.close()
        _arrivals = None


def raise_once() -> None:
    """Make the first signal raise KeyboardInterrupt; to be called again after a library has set its own handlers."""
    if _requested:
        _ignore()
        return

    def stop(*_: object) -> None:
        global _requested
        _requested = True
        _ignore()
        raise KeyboardInterrupt

    _handle_with(stop)


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt if a signal has come.

    The exception that it raised may have been lost, in a finalizer or because a library had set its own handler.
    """
    global _requested
    _requested = _requested or _has_arrived()
    if _requested:
        _ignore()
        raise KeyboardInterrupt


def _has_arrived() -> bool:
    try:
        return _arrivals is not None and any(number in STOP_SIGNALS for number in _arrivals.recv(4096))
    except BlockingIOError:
        return False


def _handle_with(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, handler)


def _ignore() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
