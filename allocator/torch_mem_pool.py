"""Routes an accelerator's tensors to the pool: torch's pluggable allocator, and a ``MemPool`` for each tag.

torch cuts the segments it takes from the pool into tensors and keeps what is freed for later. So before a sleep

- the ``MemPool`` of each closed region is given up: torch then returns the segments in which nothing lives;
- this thread's open regions get new ones, so that no tensor is made in memory that sleeps;
- the pool is told which bytes of the other segments live, and copies only those.

torch_npu 2.10 never returns a segment (:func:`_keeps_segments`). There no ``MemPool`` is given up, since its free
memory could not be used again: a closed region's waits for the tag's next region, an open one's until its tag is awake.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
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
        self.set_aside: Any = None  # the MemPool that an empty one stands in for while the tag sleeps
        self._context: AbstractContextManager[None] | None = None

    def resume(self) -> None:
        if self._context is not None:
            return
        context = self.hook.use(self.mem_pool)
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
    or destroys holds the lock, which is one for all devices.
    """

    # A thread may come in twice: the garbage collector closes what was left open, at any moment.
    lock = threading.RLock()

    def __init__(self) -> None:
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

    def any_open(self) -> bool:
        """Whether any thread is inside one, this one included."""
        return bool(self._by_thread)

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


def _renew_lock() -> None:
    """In a forked child: a thread that held it is the parent's."""
    OpenRoutes.lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


class MemPoolHook:
    """The route from torch's allocator of one device to one pool.

    Raises:
        HookError: torch has no such device, cannot use it in this process, or cannot route one thread's tensors.
    """

    def __init__(self, kind: str, index: int) -> None:
        self.kind = kind
        self.index = index
        self.torch_device = _initialised(kind)
        self._keeps_segments = _keeps_segments(self.torch_device)
        if self._keeps_segments:
            _thread_routing()
        self._routes = _open_routes.setdefault((kind, index), OpenRoutes())
        # All that changes a list of MemPools holds the lock of the routes.
        self._idle: dict[str, list[Any]] = {}
        self._stand_ins: list[Any] = []  # MemPools without a segment
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
            try:
                self._routes.close(route)
            finally:
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

    def use(self, mem_pool: Any) -> AbstractContextManager[None]:
        """Within it, this thread's allocations on the device go to the MemPool."""
        if self._keeps_segments:
            return _use_in_this_thread(mem_pool, self.index)
        context: AbstractContextManager[None] = self.torch_device.use_mem_pool(mem_pool, self.index)
        return context

    def settle(self) -> None:
        """Finishes queued work and makes torch return the segments in which nothing lives, where it ever does.

        While another thread is in a region of the device, what torch keeps stays with it until a later call.
        This thread's open regions make no tensors until :meth:`resume`.
        """
        self.torch_device.synchronize(self.index)  # also launches what torch has queued on the host
        with self._routes.outside() as nobody_is_inside:
            for route in self._own_routes():
                self._renew(route)
            if nobody_is_inside and not self._keeps_segments:
                self._idle.clear()
                self._spoiled.clear()
            if not self._keeps_segments or (nobody_is_inside and self._no_other_device_has_routes()):
                self.torch_device.empty_cache()  # with any thread inside a MemPool, torch_npu 2.10 asserts here

    def resume(self, sleeping_tags: Callable[[], Collection[str]]) -> None:
        """After a sleep or a wake-up: this thread's open regions of tags that are awake make tensors again."""
        if all(route.set_aside is None for route in self._own_routes()):
            return
        asleep = sleeping_tags()
        with self._routes.outside():
            for route in self._own_routes():
                if route.tag not in asleep:
                    self._restore(route)

    def take_back(self, route: Route) -> None:
        """Keeps a closed route's MemPool for the tag's next region, which cannot open while the tag sleeps."""
        with self._routes.lock:
            self._restore(route)
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

    def _own_routes(self) -> list[Route]:
        return [route for route in self._routes.of_this_thread() if route.hook is self]

    def _renew(self, route: Route) -> None:
        """Gives an open route a MemPool in which nothing is free."""
        self._restore(route)
        new = self._stand_ins.pop() if self._stand_ins else self._new_mem_pool()
        if self._keeps_segments:
            route.set_aside = route.mem_pool
        else:
            self.take_back(route)
        route.mem_pool = new

    def _restore(self, route: Route) -> None:
        """Ends what :meth:`_renew` began, where a MemPool was set aside."""
        if route.set_aside is None:
            return
        stand_in, route.mem_pool, route.set_aside = route.mem_pool, route.set_aside, None
        # Another thread may have woken the tag, and this one made tensors since.
        is_empty = not self._segments_of(stand_in)
        (self._stand_ins if is_empty else self._idle.setdefault(route.tag, [])).append(stand_in)

    def _no_other_device_has_routes(self) -> bool:
        return not any(routes.any_open() for routes in _open_routes.values() if routes is not self._routes)

    def _spoil(self, route: Route) -> None:
        """Keeps a MemPool, which no tensor may be made in again, until it can be destroyed."""
        with self._routes.lock:
            self._restore(route)
            self._spoiled.append(route.mem_pool)
            route.mem_pool = None

    def _try(self, route: Route) -> None:
        """Makes a small tensor in the first region, to see where it ends up before anything of value is made."""
        import torch

        torch.empty(1, device=f"{self.kind}:{self.index}", dtype=torch.uint8)
        self._check_segments(route)
        self._tried = True

    def _segments_of(self, mem_pool: Any) -> list[dict[str, Any]]:
        # Asked for one MemPool's, torch_npu 2.13 frees the numbers in its id although they are in use: the
        # process crashes at any later moment. So all are asked for.
        segments = self.torch_device.memory_snapshot()
        return [segment for segment in segments if tuple(segment["segment_pool_id"]) == mem_pool.id]

    def _check_segments(self, route: Route) -> None:
        mem_pools = [mem_pool for mem_pool in (route.mem_pool, route.set_aside) if mem_pool is not None]
        if any(segment["is_expandable"] for mem_pool in mem_pools for segment in self._segments_of(mem_pool)):
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


def _initialised(kind: str) -> Any:
    module = _torch_device(kind)
    try:
        module.init()  # torch_npu 2.10 takes no MemPool before
    except RuntimeError as error:
        raise HookError(f"torch cannot use its {kind} device in this process: {error}", phase="region") from error
    return module


def _keeps_segments(torch_device: Any) -> bool:
    """Whether torch never returns the segments of a MemPool, not even when it is destroyed.

    torch returns them when nothing uses the MemPool any more, by a count that ``MemPool.use_count`` tells.
    torch_npu 2.10 counts up at each use and never down; a MemPool has no ``use_count`` there. To release one by
    hand is no way out: its segments would go to aclrtFree, which knows nothing of them, instead of the pool.
    """
    return not hasattr(torch_device.MemPool, "use_count")


@cache
def _thread_routing() -> tuple[Callable[[int, tuple[int, int]], None], Callable[[int, tuple[int, int]], None]]:
    """torch_npu's functions that begin and end to route one thread's allocations to a MemPool, by device and its id."""
    functions = importlib.import_module("torch_npu._C")
    names = ("_npu_beginAllocateCurrentThreadToPool", "_npu_endAllocateCurrentStreamToPool")
    begin, end = (getattr(functions, name, None) for name in names)
    if begin is None or end is None:
        raise HookError(
            "this torch_npu routes the tensors of all threads to a MemPool, so that others' would sleep with a tag: "
            "install torch_npu 2.10.0.post4 or a later one",
            phase="region",
        )
    return begin, end


@contextmanager
def _use_in_this_thread(mem_pool: Any, index: int) -> Iterator[None]:
    """What use_mem_pool of torch_npu 2.10 should do: that one routes the allocations of all threads to the MemPool."""
    begin, end = _thread_routing()
    context = importlib.import_module("torch_npu").npu.memory.MemPoolContext(mem_pool)
    begin(index, mem_pool.id)
    try:
        yield
    finally:
        end(index, mem_pool.id)
        del context  # makes active what was


@cache
def _pluggable_allocator(kind: str) -> Any:
    """Never destroyed: torch calls its free for as long as a tensor lives."""
    memory = _torch_device(kind).memory
    names = {"npu": "NPUPluggableAllocator", "cuda": "CUDAPluggableAllocator"}
    return getattr(memory, names[kind])(str(native.library_path()), "sleep_pool_malloc", "sleep_pool_free")
