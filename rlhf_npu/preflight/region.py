"""A region of the pool, for allocations that may fail."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from allocator import SleepPool, SleepPoolError, native


@contextmanager
def region(pool: SleepPool, tag: str) -> Iterator[None]:
    """The pool's region, with the pool's own errors: torch says only that memory ran out, whatever the driver said.

    Raises:
        SleepPoolError: the pool could not serve an allocation, or the region did not open.
    """
    try:
        with pool.region(tag):
            yield
    except SleepPoolError:
        raise
    except RuntimeError:
        native.check(_code_of_last_error())
        raise


def _code_of_last_error() -> int:
    error = native.NativeError()
    native.library().sleep_pool_last_error(ctypes.byref(error))
    return int(error.code)
