"""ctypes binding of the pool's C ABI (csrc/capi.h), and its error codes as exceptions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char, c_char_p, c_double, c_int, c_size_t, c_uint64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from allocator import errors

_NAME_BYTES = 128


class NativeError(Structure):
    _fields_ = [
        ("code", c_int),
        ("pointer", c_uint64),
        ("bytes", c_uint64),
        ("needed", c_uint64),
        ("free", c_uint64),
        ("phase", c_char * 32),
        ("tag", c_char * _NAME_BYTES),
        ("message", c_char * 512),
    ]


class NativePhase(Structure):
    _fields_ = [
        ("seconds", c_double),
        ("host_seconds", c_double),
        ("copy_seconds", c_double),
        ("map_seconds", c_double),
        ("bytes", c_uint64),
        ("copied", c_uint64),
    ]


class NativeTagStats(Structure):
    _fields_ = [
        ("tag", c_char * _NAME_BYTES),
        ("mapped", c_uint64),
        ("asleep", c_uint64),
        ("host", c_uint64),
        ("dead", c_uint64),
        ("live", c_uint64),
        ("allocations", c_uint64),
        ("is_asleep", c_int),
        ("persistent", c_int),
        ("sleep", NativePhase),
        ("wake", NativePhase),
    ]


_NAMES = POINTER(c_char_p)
_RANGES = (POINTER(c_uint64), POINTER(c_uint64), c_size_t)  # addresses, sizes, how many
_SIGNATURES: dict[str, list[type]] = {
    "sleep_pool_open": [c_char_p, c_int, c_char_p, POINTER(c_void_p)],
    "sleep_pool_enter": [c_void_p, c_char_p, POINTER(c_uint64)],
    "sleep_pool_leave": [c_void_p, c_uint64],
    "sleep_pool_sleep_level": [c_void_p, c_int],
    "sleep_pool_sleep": [c_void_p, _NAMES, c_size_t, _NAMES, c_size_t, *_RANGES],
    "sleep_pool_check_sleep": [c_void_p, _NAMES, c_size_t, _NAMES, c_size_t],
    "sleep_pool_set_live": [c_void_p, *_RANGES],
    "sleep_pool_wake_up": [c_void_p, _NAMES, c_size_t, c_int],
    "sleep_pool_wake_up_all": [c_void_p, c_int],
    "sleep_pool_set_persistent": [c_void_p, c_char_p, c_int],
    "sleep_pool_require_resident": [c_void_p, c_char_p],
    "sleep_pool_prepare_host": [c_void_p, c_char_p],
    "sleep_pool_release_host": [c_void_p, POINTER(c_uint64)],
    "sleep_pool_read_backup": [c_void_p, c_char_p, c_uint64, c_uint64, c_void_p],
    "sleep_pool_stats": [c_void_p, POINTER(NativeTagStats), c_size_t, POINTER(c_size_t)],
    "sleep_pool_memory_info": [c_void_p, POINTER(c_uint64), POINTER(c_uint64)],
    "sleep_pool_granularity": [c_void_p, POINTER(c_uint64)],
    "sleep_pool_set_poison": [c_void_p, c_int],
    "sleep_pool_set_capacity": [c_void_p, c_uint64],
    "sleep_pool_set_handle_bytes": [c_void_p, c_uint64],
    "sleep_pool_inject_fault": [c_void_p, c_int, c_uint64],
    "sleep_pool_driver_calls": [c_void_p, POINTER(c_uint64)],
}

# By sleep_pool_code.
_ERRORS: dict[int, type[errors.SleepPoolError]] = {
    1: errors.InvalidArgumentError,
    2: errors.UnknownTagError,
    3: errors.TagAsleepError,
    4: errors.PersistentTagError,
    5: errors.RegionError,
    6: errors.OutOfMemoryError,
    7: errors.DriverError,
    8: errors.ForkedProcessError,
    9: errors.InternalError,
}


def library_path() -> Path:
    """Where the compiled core lies.

    Raises:
        HookError: it was not built.
    """
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := folder / f"_sleep_pool{suffix}").is_file():
            return path
    raise errors.HookError(f"{folder} has no compiled _sleep_pool: install the package again, which compiles it")


@cache
def library() -> ctypes.CDLL:
    """The pool's C ABI. Calls release the GIL, so a long sleep stops no other Python thread."""
    loaded = ctypes.CDLL(str(library_path()))
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = arguments
        function.restype = c_int
    loaded.sleep_pool_call_name.argtypes = [c_int]
    loaded.sleep_pool_call_name.restype = c_char_p
    loaded.sleep_pool_last_error.argtypes = [POINTER(NativeError)]
    loaded.sleep_pool_last_error.restype = None
    return loaded


@cache
def driver_calls() -> tuple[str, ...]:
    """Names of the driver's calls, in the order of their numbers."""
    calls: list[str] = []
    while name := library().sleep_pool_call_name(len(calls)):
        calls.append(name.decode())
    return tuple(calls)


def check(code: int) -> None:
    """Raises the exception that a function's code stands for."""
    if code != 0:
        raise _last_error()


def names(tags: list[str]) -> ctypes.Array[c_char_p]:
    """A C array of tag names."""
    return (c_char_p * len(tags))(*(tag.encode() for tag in tags))


def ranges(pairs: Sequence[tuple[int, int]]) -> tuple[ctypes.Array[c_uint64], ctypes.Array[c_uint64], int]:
    """C arrays of addresses and sizes, and how many there are."""
    addresses = (c_uint64 * len(pairs))(*(address for address, _ in pairs))
    sizes = (c_uint64 * len(pairs))(*(size for _, size in pairs))
    return addresses, sizes, len(pairs)


def _last_error() -> errors.SleepPoolError:
    record = NativeError()
    library().sleep_pool_last_error(byref(record))
    tag, phase, reason = (field.decode(errors="replace") for field in (record.tag, record.phase, record.message))
    kind = _ERRORS[record.code]
    parts = {"tag": tag, "phase": phase, "pointer": record.pointer, "size": record.bytes, "reason": reason}
    message = _message(record, tag, phase, reason)
    if kind is errors.OutOfMemoryError:
        return errors.OutOfMemoryError(message, needed=record.needed, free=record.free, **parts)
    return kind(message, **parts)


def _message(record: NativeError, tag: str, phase: str, reason: str) -> str:
    text = f"{phase}: {reason}" if not tag else f"{phase} of tag {tag!r}: {reason}"
    if record.bytes:
        text += f" [{record.bytes} bytes" + (f" at {record.pointer:#x}]" if record.pointer else "]")
    if record.needed:
        text += f"; {record.needed} bytes needed, {record.free} free: put another tag to sleep, then call again"
    elif record.code == 7 and phase != "open":
        text += "; the pool is as the driver's calls left it: the same call again does what is left"
    return text
