"""Routes an accelerator's tensors to the pool: torch's pluggable allocator, and a ``MemPool`` for each tag.

torch cuts the segments it takes from the pool into tensors and keeps what is freed for later. So before a sleep

- the ``MemPool`` of each closed region is given up: torch then returns the segments in which nothing lives, and a
  region that opens later gets a new one, so no tensor is ever made in memory that sleeps;
- the pool is told which bytes of the other segments live, and copies only those.
"""

from __future__ import annotations

import importlib
import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

from allocator import native
from allocator.errors import HookError

_SETTINGS = {
    "npu": ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
    "cuda": ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
}
_LIVE = ("active_allocated", "active_pending_free", "active_awaiting_free")


@dataclass(frozen=True)
class LiveRange:
    """Bytes of a segment that a tensor holds."""

    address: int
    size: int


class Route:
    """This thread's allocations go to a ``MemPool`` between :meth:`resume` and :meth:`pause`."""

    def __init__(self, hook: MemPoolHook, tag: str, mem_pool: Any) -> None:
        self.hook = hook
        self.tag = tag
        self.mem_pool = mem_pool
        self._context: AbstractContextManager[None] | None = None

    def resume(self) -> None:
        self._context = self.hook.torch_device.use_mem_pool(self.mem_pool, self.hook.index)
        self._context.__enter__()

    def pause(self) -> None:
        if self._context is not None:
            self._context.__exit__(None, None, None)
            self._context = None


# This thread's open routes by device, of all namespaces: torch allows one MemPool at a time.
_threads = threading.local()


def _open_routes(device: tuple[str, int]) -> list[Route]:
    if not hasattr(_threads, "routes"):
        _threads.routes = {}
    return _threads.routes.setdefault(device, [])


class MemPoolHook:
    """The route from torch's allocator of one device to one pool.

    Raises:
        HookError: torch has no such device, or uses expandable segments.
    """

    def __init__(self, kind: str, index: int) -> None:
        self.kind = kind
        self.index = index
        self.torch_device = _torch_device(kind)
        self._idle: dict[str, list[Any]] = {}
        self._tried = False
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raises when torch would pass the pool by."""
        refuse_expandable_segments(self.kind)

    def enter(self, tag: str) -> Route:
        """Routes this thread's allocations to the tag, whose region the pool has opened already."""
        with self._lock:
            idle = self._idle.get(tag, [])
            mem_pool = idle.pop() if idle else None
        route = Route(self, tag, mem_pool or self._new_mem_pool())
        routes = _open_routes((self.kind, self.index))
        if routes:
            routes[-1].pause()
        route.resume()
        routes.append(route)
        if not self._tried:
            self._try(route)
        return route

    def leave(self, route: Route) -> None:
        """Ends what :meth:`enter` began; the region around it, if there is one, goes on.

        Raises:
            HookError: expandable segments were switched on inside, so tensors were made past the pool.
        """
        route.pause()
        routes = _open_routes((self.kind, self.index))
        routes.remove(route)
        if routes:
            routes[-1].pause()
            routes[-1].resume()
        with self._lock:
            self._idle.setdefault(route.tag, []).append(route.mem_pool)
        self._check_segments(route)

    def settle(self) -> None:
        """Finishes queued work and makes torch return the segments in which nothing lives."""
        self.torch_device.synchronize(self.index)  # also launches what torch has queued on the host
        with self._lock:
            self._idle.clear()
        routes = _open_routes((self.kind, self.index))
        for route in routes:
            if route.hook is self:
                self._renew(route, is_innermost=route is routes[-1])
        self.torch_device.empty_cache()

    def live_ranges(self) -> list[LiveRange]:
        """What lives in the segments that torch holds of the device, the pool's and others."""
        segments = self.torch_device.memory_snapshot()
        return [
            LiveRange(block["address"], block["requested_size"])
            for segment in segments
            if segment["device"] == self.index
            for block in segment["blocks"]
            if block["state"] in _LIVE
        ]

    def _new_mem_pool(self) -> Any:
        return self.torch_device.MemPool(_pluggable_allocator(self.kind).allocator())

    def _renew(self, route: Route, is_innermost: bool) -> None:
        route.pause()
        route.mem_pool = self._new_mem_pool()
        if is_innermost:
            route.resume()

    def _try(self, route: Route) -> None:
        """Makes a small tensor in the first region, to see where it ends up before anything of value is made."""
        import torch

        try:
            probe = torch.empty(1, device=f"{self.kind}:{self.index}", dtype=torch.uint8)
            self._check_segments(route)
        except BaseException:
            self._abandon(route)
            raise
        del probe
        self._tried = True

    def _abandon(self, route: Route) -> None:
        route.pause()
        routes = _open_routes((self.kind, self.index))
        routes.remove(route)
        if routes:
            routes[-1].resume()

    def _check_segments(self, route: Route) -> None:
        segments = self.torch_device.memory_snapshot(route.mem_pool.id)
        if any(segment["is_expandable"] for segment in segments):
            raise HookError(_EXPANDABLE.format(where="torch's allocator settings"), tag=route.tag, phase="region")


_EXPANDABLE = (
    "expandable segments are switched on by {where}: torch would pass the pool by, and sleep would free nothing. "
    "Set expandable_segments:False in the process that sleeps"
)


def refuse_expandable_segments(kind: str) -> None:
    """Raises when an environment variable switches expandable segments on for this kind of device.

    Raises:
        HookError: names the variable.
    """
    for variable in _SETTINGS[kind]:
        value = os.environ.get(variable, "").replace(" ", "")
        if "expandable_segments:true" in value.lower():
            raise HookError(_EXPANDABLE.format(where=f"{variable}={value}"), phase="region")


def _torch_device(kind: str) -> Any:
    import torch

    if kind == "npu":
        try:
            importlib.import_module("torch_npu")
        except ImportError as error:
            raise HookError(f"torch_npu cannot be imported: {error}") from error
    module = getattr(torch, kind)
    if not module.is_available():
        raise HookError(f"torch sees no {kind} device")
    return module


@cache
def _pluggable_allocator(kind: str) -> Any:
    """Never destroyed: torch calls its free for as long as a tensor lives."""
    memory = _torch_device(kind).memory
    names = {"npu": "NPUPluggableAllocator", "cuda": "CUDAPluggableAllocator"}
    return getattr(memory, names[kind])(str(native.library_path()), "sleep_pool_malloc", "sleep_pool_free")
