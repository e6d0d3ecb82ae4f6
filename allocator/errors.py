"""The pool's errors: each names tag, phase, address and bytes where it has them, and says what to do."""

from __future__ import annotations


class SleepPoolError(Exception):
    """Base of all errors of the pool.

    Attributes:
        tag: the tag the failed call was for ("" where there is none).
        phase: the driver's call ("create", "copy_out", ...) or the pool's operation ("region", "sleep", ...).
        pointer: address of the segment the failed driver call was for (0 where there is none).
        size: bytes the failed driver call was for (0 where there is none).
        reason: what the driver or the pool said.
    """

    def __init__(
        self,
        message: str,
        *,
        tag: str = "",
        phase: str = "",
        pointer: int = 0,
        size: int = 0,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.tag = tag
        self.phase = phase
        self.pointer = pointer
        self.size = size
        self.reason = reason


class InvalidArgumentError(SleepPoolError, ValueError):
    """A level, a name, a device or a combination of arguments that means nothing. Nothing was changed."""


class UnknownTagError(SleepPoolError, ValueError):
    """A tag that no region and no declaration has named yet. Nothing was changed."""


class TagAsleepError(SleepPoolError, ValueError):
    """The tag sleeps (or sleeps in part, after a failure): wake it up first. Nothing was changed."""


class PersistentTagError(SleepPoolError, ValueError):
    """A tag that was declared persistent was told to sleep. Nothing was changed."""


class RegionError(SleepPoolError, RuntimeError):
    """A region was left on a thread on which it is not open."""


class OutOfMemoryError(SleepPoolError, MemoryError):
    """The device has too little free memory.

    ``needed`` and ``free`` are bytes. A wake-up that finds too little memory beforehand changes nothing; one
    that runs out on the way leaves the rest asleep with its backup: free memory and call it again.
    """

    def __init__(
        self,
        message: str,
        *,
        needed: int = 0,
        free: int = 0,
        tag: str = "",
        phase: str = "",
        pointer: int = 0,
        size: int = 0,
        reason: str = "",
    ) -> None:
        super().__init__(message, tag=tag, phase=phase, pointer=pointer, size=size, reason=reason)
        self.needed = needed
        self.free = free


class DriverError(SleepPoolError, RuntimeError):
    """A call of the device's driver failed. The same pool call again does exactly what is left of it."""


class ForkedProcessError(SleepPoolError, RuntimeError):
    """The pool belongs to the parent of this forked process. ``SleepPool.get`` gives the child its own."""


class InternalError(SleepPoolError, RuntimeError):
    """The pool broke a promise of its own: a bug to report."""


class HookError(SleepPoolError, RuntimeError):
    """torch's allocations cannot be routed to the pool."""


class HookBuildError(HookError):
    """The CPU hook, which is compiled for the installed torch at its first use, could not be compiled."""
