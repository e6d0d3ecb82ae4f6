"""Reads and steers the simulated AscendCL (csrc/control.h). Sizes are bytes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint64, c_void_p
from functools import cache

OUT_OF_MEMORY = 207001


class Stats(ctypes.Structure):
    """See aclsim_stats in csrc/control.h."""

    _fields_ = [
        (name, c_uint64)
        for name in (
            "capacity",
            "used",
            "used_physical",
            "used_malloc",
            "host",
            "reserved",
            "mapped",
            "errors",
            "faults",
            "undefined",
            "pending",
        )
    ]


@cache
def _library() -> ctypes.CDLL:
    # torch_npu has loaded it: the name finds the library that is there.
    library = ctypes.CDLL("libascendcl.so")
    library.aclsim_get_stats.argtypes = [c_int, POINTER(Stats)]
    library.aclsim_set_capacity.argtypes = [c_int, c_uint64]
    library.aclsim_fail.argtypes = [c_char_p, c_int, c_int]
    library.aclsim_calls.argtypes = [c_char_p]
    library.aclsim_calls.restype = c_uint64
    library.aclsim_probe.argtypes = [c_void_p, c_size_t]
    return library


def stats(device: int = 0) -> Stats:
    """The simulator's own count of a device's memory."""
    read = Stats()
    _library().aclsim_get_stats(device, ctypes.byref(read))
    return read


def set_capacity(capacity: int, device: int = 0) -> None:
    """How much memory the device has."""
    _library().aclsim_set_capacity(device, capacity)


def fail(call: str, nth: int = 1, code: int = 107000) -> None:
    """Makes the nth call of an AscendCL function from now fail, once; 0 takes that back."""
    _library().aclsim_fail(call.encode(), nth, code)


def calls(call: str) -> int:
    """How often an AscendCL function was called."""
    return int(_library().aclsim_calls(call.encode()))


def probe(address: int) -> int:
    """1: device memory; 0: a device address with nothing behind it; -1: no device address."""
    return int(_library().aclsim_probe(address, 1))
