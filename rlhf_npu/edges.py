"""Foreign code raises what it likes; at the program's edges that becomes one line of ours."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_npu.errors import RlhfNpuError

_LONGEST = 300


@contextmanager
def within_seconds(seconds: float, failure: RlhfNpuError) -> Iterator[None]:
    """Raises `failure` if Python code inside takes longer; in the main thread, which alone gets signals.

    A single call into C, such as multiplying a text, is not cut short.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise failure

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def errors_as(kind: type[RlhfNpuError], what: str) -> Iterator[None]:
    """Turns whatever is raised inside into `kind`.

    Args:
        what: what failed; names the key or the file. The first line of the foreign error follows it.
    """
    try:
        yield
    except (RlhfNpuError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # Rust's panics are no Exceptions, and some code ends the process by SystemExit
        raise kind(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """An error in one line of at most 300 characters; its type where the words alone would not say much."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = [line.strip() for line in _words(error).splitlines() if line.strip()]
    if not words:
        return type(error).__name__
    text = " ".join(words[:2]) if words[0].endswith(":") else words[0]
    shown = text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
    return f"{type(error).__name__}: {shown}"


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # an error whose own words cannot be had
        return ""
