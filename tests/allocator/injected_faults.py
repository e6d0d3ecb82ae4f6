"""Driver calls that fail in turn."""

from collections.abc import Callable

from allocator import DriverError, SleepPool


def fails(pool: SleepPool, call: str, nth: int, operation: Callable[[], object]) -> bool:
    """Whether the operation failed at its nth driver call of the kind, as it was told to."""
    pool.inject_fault(call, nth)
    try:
        operation()
    except DriverError as error:
        if (error.phase, error.reason) != (call, "injected fault"):
            raise
        return True
    pool.inject_fault(call, 0)
    return False
