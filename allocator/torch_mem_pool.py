"""Routes an accelerator's tensors to the pool: torch's pluggable allocator, and a ``MemPool`` for each tag.

torch cuts the segments it takes from the pool into tensors and keeps what is freed for later. So before a sleep

- the ``MemPool`` of each closed region is given up: torch then returns the segments in which nothing lives;
- this thread's open regions get new ones, so that no tensor is made in memory that sleeps;
- the pool is told which bytes of the other segments live, and copies only those.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
        if self._context is not None:
            return
        context = self.hook.torch_device.use_mem_pool(self.mem_pool, self.hook.index)
        context.__enter__()
        self._context = context

    def pause(self) -> None:
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)


class _Mark:
    """A thread, for as long as it runs: what a threading.local holds goes when its thread ends."""


_threads = threading.local()


def _mark_of_this_thread() -> weakref.ref[_Mark]:
    if not hasattr(_threads, "mark"):
        _threads.mark = _Mark()
    return weakref.ref(_threads.mark)


class OpenRoutes:
    """The open routes of one device: of all threads, and of all namespaces.

    torch allows a thread one MemPool at a time, so the innermost route of each is the one that is not paused.
    And torch ends the process when a MemPool is destroyed while any thread is inside one. So who enters, leaves
    or destroys holds the lock.
    """

    def __init__(self) -> None:
        # A thread may come in twice: the garbage collector closes what was left open, at any moment.
        self.lock = threading.RLock()
        self._by_thread: dict[weakref.ref[_Mark], list[Route]] = {}

    def open(self, route: Route) -> None:
        """Makes a route this thread's innermost."""
        with self.lock, self._innermost_paused():
            self._by_thread.setdefault(_mark_of_this_thread(), []).append(route)

    def close(self, route: Route) -> bool:
        """Ends a route; the one around it goes on. False when it had ended already, with its thread."""
        with self.lock, self._innermost_paused():
            route.pause()
            for mark, routes in self._by_thread.items():
                if route in routes:
                    routes.remove(route)
                    if not routes:
                        del self._by_thread[mark]
                    return True
            return False

    def of_this_thread(self) -> list[Route]:
        """Outermost first."""
        return self._by_thread.get(_mark_of_this_thread(), [])

    @contextmanager
    def outside(self) -> Iterator[bool]:
        """Within it, this thread is inside no route; says whether no other one is, which stays so."""
        with self.lock, self._innermost_paused():
            self._close_what_ended_threads_left_open()
            yield self._by_thread.keys() <= {_mark_of_this_thread()}

    @contextmanager
    def _innermost_paused(self) -> Iterator[None]:
        """Within it, this thread is inside no route; at the end it is inside what is its innermost then."""
        for route in self.of_this_thread()[-1:]:
            route.pause()
        try:
            yield
        finally:
            for route in self.of_this_thread()[-1:]:
                route.resume()

    def _close_what_ended_threads_left_open(self) -> None:
        for mark in [mark for mark in self._by_thread if mark() is None]:
            for route in self._by_thread.pop(mark):
                route.pause()
                route.hook.take_back(route)


_open_routes: dict[tuple[str, int], OpenRoutes] = {}
# Never destroyed, not even when Python ends or in a forked child: with a hook go its MemPools, at a moment when
# other threads may be inside one, or to a device that is the parent's.
_hooks: list[MemPoolHook] = []
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_hooks))


def _renew_locks() -> None:
    """In a forked child: a thread that held one is the parent's."""
    for routes in _open_routes.values():
        routes.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)


class MemPoolHook:
    """The route from torch's allocator of one device to one pool.

    Raises:
        HookError: torch has no such device, or uses expandable segments.
    """

    def __init__(self, kind: str, index: int) -> None:
        self.kind = kind
        self.index = index
        self.torch_device = _torch_device(kind)
        self._routes = _open_routes.setdefault((kind, index), OpenRoutes())
        # All that changes a list of MemPools holds the lock of the routes.
        self._idle: dict[str, list[Any]] = {}
        self._spoiled: list[Any] = []
        self._tried = False
        _hooks.append(self)

    def check(self) -> None:
        """Raises when torch would pass the pool by."""
        refuse_expandable_segments(self.kind)

    def enter(self, tag: str) -> Route:
        """Routes this thread's allocations to the tag, whose region the pool has opened already."""
        route = Route(self, tag, self._idle_or_new(tag))
        try:
            self._routes.open(route)
            if not self._tried:
                self._try(route)
        except BaseException:
            self._routes.close(route)
            self._spoil(route)
            raise
        return route

    def leave(self, route: Route) -> None:
        """Ends what :meth:`enter` began; the region around it, if there is one, goes on.

        Raises:
            HookError: expandable segments were switched on inside, so tensors were made past the pool.
        """
        if not self._routes.close(route):
            return
        try:
            self._check_segments(route)
        except BaseException:
            self._spoil(route)
            raise
        self.take_back(route)

    def settle(self) -> None:
        """Finishes queued work and makes torch return the segments in which nothing lives.

        While another thread is in a region of the device, what torch keeps stays with it until a later call.
        """
        self.torch_device.synchronize(self.index)  # also launches what torch has queued on the host
        with self._routes.outside() as nobody_is_inside:
            for route in self._routes.of_this_thread():
                if route.hook is self:
                    self._renew(route)
            if nobody_is_inside:
                self._idle.clear()
                self._spoiled.clear()
        self.torch_device.empty_cache()

    def take_back(self, route: Route) -> None:
        """Keeps a closed route's MemPool for the tag's next region, which cannot open while the tag sleeps."""
        with self._routes.lock:
            self._idle.setdefault(route.tag, []).append(route.mem_pool)
            route.mem_pool = None

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

    def _idle_or_new(self, tag: str) -> Any:
        with self._routes.lock:
            idle = self._idle.get(tag)
            return idle.pop() if idle else self._new_mem_pool()

    def _new_mem_pool(self) -> Any:
        return self.torch_device.MemPool(_pluggable_allocator(self.kind).allocator())

    def _renew(self, route: Route) -> None:
        new = self._new_mem_pool()
        self.take_back(route)
        route.mem_pool = new

    def _spoil(self, route: Route) -> None:
        """Keeps a MemPool, which no tensor may be made in again, until it can be destroyed."""
        with self._routes.lock:
            self._spoiled.append(route.mem_pool)
            route.mem_pool = None

    def _try(self, route: Route) -> None:
        """Makes a small tensor in the first region, to see where it ends up before anything of value is made."""
        import torch

        torch.empty(1, device=f"{self.kind}:{self.index}", dtype=torch.uint8)
        self._check_segments(route)
        self._tried = True

    def _check_segments(self, route: Route) -> None:
        # Asked for one MemPool's, torch_npu 2.13 frees the numbers in its id although they are in use: the
        # process crashes at any later moment. So all are asked for.
        segments = self.torch_device.memory_snapshot()
        of_route = [segment for segment in segments if tuple(segment["segment_pool_id"]) == route.mem_pool.id]
        if any(segment["is_expandable"] for segment in of_route):
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
