"""Foreign code raises what it likes, and takes as long; at the program's edges that becomes one line of ours."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        what: what failed; names the key or the file. What the foreign error says follows it.
    """
    try:
        yield
    except (RlhfNpuError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:  # Rust's panics are no Exceptions, and some code ends the process by SystemExit
        said = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
        raise kind(f"{what}: {said}") from error


def one_line(error: BaseException) -> str:
    """An error's type and words, in one line that any terminal can print."""
    words = words_of(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def words_of(error: BaseException) -> str:
    """The first 300 characters of what an error says, as one line that any terminal can print; may be empty."""
    try:
        text = " ".join(str(error).split())
    except Exception as second:  # noqa: BLE001  # the class is a user's
        text = f"(its text raises {type(second).__name__})"
    return printable(text) if len(text) <= _LONGEST else printable(text[:_LONGEST]) + "..."


def printable(text: str) -> str:
    """`text` with control characters, halves of surrogate pairs and the like as Python escapes them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def repr_of(value: Any) -> str:
    """The `repr` of something of a user's, whose `repr` may fail as well."""
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001  # the class is a user's
        return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
