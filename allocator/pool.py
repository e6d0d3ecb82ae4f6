"""SleepPool: what Python sees of the pool. Sizes are bytes, times are seconds."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from allocator import native, torch_hooks
from allocator.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

_CPU_INDEX = -1
_GIB = 1 << 30


@dataclass(frozen=True)
class PhaseStats:
    """A tag's part of the last sleep or wake-up that moved something of it; zeros before there was one.

    Its phases run beside each other, so their seconds do not add up to ``seconds``.

    Attributes:
        seconds: from the operation's begin until the tag was done.
        host_seconds: spent waiting for host memory to be made.
        copy_seconds: from the first copy that was queued to the last that was waited for.
        map_seconds: spent in the driver's calls that take and give back physical memory.
        bytes: of physical memory given back or taken.
        copied: bytes between the device and the host.
    """

    seconds: float
    host_seconds: float
    copy_seconds: float
    map_seconds: float
    bytes: int
    copied: int

    @property
    def gib_per_s(self) -> float:
        """GiB of physical memory given back or taken in a second, copies included; 0 when nothing moved."""
        return _rate(self.bytes, self.seconds)

    @property
    def copy_gib_per_s(self) -> float:
        """GiB copied in a second of copying; 0 when nothing was copied."""
        return _rate(self.copied, self.copy_seconds)

    @property
    def map_gib_per_s(self) -> float:
        """GiB of physical memory that the driver took or gave back in a second of its calls."""
        return _rate(self.bytes, self.map_seconds)


@dataclass(frozen=True)
class TagStats:
    """What a tag holds, in bytes.

    Attributes:
        mapped: physical memory held on the device.
        asleep: addresses held without physical memory behind them.
        host: host memory held: backups, and arenas kept for the next ones (``release_host`` returns those).
        dead: the part of ``mapped`` in no live allocation; it is never copied.
        live: live allocations, as they were asked for.
        allocations: how many live allocations there are.
        is_asleep: whether the tag sleeps, or sleeps in part after a failure.
        persistent: whether the tag was declared never to sleep.
        sleep, wake: the last of each.
    """

    mapped: int
    asleep: int
    host: int
    dead: int
    live: int
    allocations: int
    is_asleep: bool
    persistent: bool
    sleep: PhaseStats
    wake: PhaseStats


@dataclass(frozen=True)
class MemoryInfo:
    """Free and total bytes of the device, as its driver (for the CPU: the operating system) counts them."""

    free: int
    total: int


class Backup:
    """What was offloaded of a tag that sleeps, for reading; get it with :meth:`SleepPool.backup`."""

    def __init__(self, pool: SleepPool, tag: str) -> None:
        self._pool = pool
        self.tag = tag

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the CPU of a tensor that sleeps; same shape, strides and type.

        Raises:
            InvalidArgumentError: the backup does not hold the tensor: it is awake, was discarded, or is not the tag's.
        """
        import torch

        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        flat = torch.empty(reach + 1 if tensor.numel() else 0, dtype=tensor.dtype, device="cpu")
        self._pool.read_backup(self.tag, tensor.data_ptr(), flat.nbytes, flat.data_ptr())
        return flat.as_strided(tensor.shape, tensor.stride())


class SleepPool:
    """The memory pool of one device and one namespace. Get it with :meth:`get`.

    All methods may be called from any thread. An operation that fails raises an error of
    :mod:`allocator.errors` and leaves a state from which the same call does exactly what is left to do.

    A forked child shares the pages of its parent's pooled CPU tensors: it may read and free them, what it
    writes the parent sees, and it cannot put them to sleep. Pages it shares stay in memory until it ends.
    """

    _pools: ClassVar[dict[tuple[str, int, str], SleepPool]] = {}
    _lock = threading.Lock()

    def __init__(self, kind: str, index: int, namespace: str) -> None:
        self.device = kind if index == _CPU_INDEX else f"{kind}:{index}"
        self.namespace = namespace
        self._kind, self._index = kind, index
        self._hook: torch_hooks.Hook | None = None
        self._preparations: list[Future[None]] = []
        self._library = native.library()
        self._pool = ctypes.c_void_p()
        native.check(self._library.sleep_pool_open(kind.encode(), index, namespace.encode(), ctypes.byref(self._pool)))

    @classmethod
    def get(cls, device: str | torch.device, namespace: str = "default") -> SleepPool:
        """The one pool of a device and a namespace; two namespaces know nothing of each other's tags.

        Raises:
            InvalidArgumentError: no such device, or no driver for it in this build.
        """
        key = (*_parse_device(str(device)), namespace)
        with cls._lock:
            if key not in cls._pools:
                cls._pools[key] = cls(*key)
            return cls._pools[key]

    @classmethod
    def forget_parent(cls) -> None:
        """Makes a forked child start without its parent's pools; Python calls it after each fork."""
        cls._pools = {}
        cls._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"SleepPool(device={self.device!r}, namespace={self.namespace!r})"

    @contextmanager
    def region(self, tag: str) -> Iterator[None]:
        """Within it, this thread's allocations on the pool's device belong to the tag.

        Regions nest (the innermost wins) and open again. They hold for the thread that opened them. Memory a
        tensor gets later, outside (``Tensor.resize_``), is not the tag's. Neither is what passes torch's CPU
        allocator by: ``torch.UntypedStorage`` (so ``copy.deepcopy`` of a tensor that is no parameter), mapped
        files (safetensors), numpy's arrays. Such tensors simply stay awake.

        Raises:
            TagAsleepError: the tag sleeps.
            InvalidArgumentError: not a name of 1 to 127 bytes.
            HookError: torch's allocations cannot be routed here.
        """
        hook = self._hook = self._hook or torch_hooks.make_hook(self._kind, self._index)
        hook.check()
        number = ctypes.c_uint64()
        native.check(self._library.sleep_pool_enter(self._pool, tag.encode(), ctypes.byref(number)))
        try:
            route = hook.enter(tag)
        except BaseException:
            native.check(self._library.sleep_pool_leave(self._pool, number))
            raise
        try:
            yield
        finally:
            native.check(self._library.sleep_pool_leave(self._pool, number))
            hook.leave(route)

    def sleep(
        self,
        level: int | None = None,
        *,
        offload: Sequence[str] | None = None,
        discard: Sequence[str] | None = None,
        droppable: Sequence[torch.Tensor] = (),
    ) -> None:
        """Gives back the physical memory of tags; the addresses stay.

        Either a level (1: the tag ``weights`` is offloaded to the host, every other discarded; 2: all
        discarded; persistent tags stay), or the tags by name. Without arguments: level 1. What sleeps already
        is left as it is.

        Args:
            level: 1 or 2.
            offload: tags that are copied to the host.
            discard: tags that are not.
            droppable: tensors of the tags to offload that need not be copied, because something overwrites them after
                the wake-up; until then they hold anything.

        Raises:
            InvalidArgumentError: bad level, level and tags or droppable tensors, a tag named twice.
            UnknownTagError, PersistentTagError: named tag.
            OutOfMemoryError: no host memory for the backup; nothing is lost.
            DriverError: a driver call failed; nothing that is to be offloaded is lost.
        """
        if offload is None and discard is None and not droppable:
            checked = _level(level)
            with self._settled(copies=checked == 1):
                native.check(self._library.sleep_pool_sleep_level(self._pool, checked))
        elif level is None:
            self._sleep_tags(_tag_list(offload or ()), _tag_list(discard or ()), droppable)
        else:
            raise InvalidArgumentError("sleep takes a level or tags, not both", phase="sleep")

    def _sleep_tags(self, offload: list[str], discard: list[str], droppable: Sequence[torch.Tensor]) -> None:
        arguments = (self._pool, native.names(offload), len(offload), native.names(discard), len(discard))
        native.check(self._library.sleep_pool_check_sleep(*arguments))
        dropped = native.ranges([(tensor.data_ptr(), tensor.nbytes) for tensor in droppable if tensor.is_contiguous()])
        with self._settled(copies=bool(offload)):
            native.check(self._library.sleep_pool_sleep(*arguments, *dropped))

    @contextmanager
    def _settled(self, copies: bool = True) -> Iterator[None]:
        """For a sleep: what torch freed comes back, and the pool knows what lives in the rest if it is copied."""
        futures.wait(self._preparations)
        self._preparations = []  # a failed one would keep alive what its caller's frames hold
        try:
            if self._hook is not None:
                self._hook.settle()
            if copies:
                self._refresh_live()
            yield
        finally:
            self._resume_regions()

    def _resume_regions(self) -> None:
        if self._hook is not None:
            self._hook.resume(self._sleeping_tags)

    def _refresh_live(self) -> None:
        ranges = None if self._hook is None else self._hook.live_ranges()
        if ranges is None:
            return
        arrays = native.ranges([(live.address, live.size) for live in ranges])
        native.check(self._library.sleep_pool_set_live(self._pool, *arrays))

    def trim(self) -> None:
        """Returns to the device what was made in regions and freed since, and torch has kept; a sleep does it too.

        torch_npu 2.10 keeps it for the tag's next regions instead: a tag holds there what it held at its largest.

        Raises:
            DriverError: a driver call failed; what could not be returned is returned later.
        """
        self.sleep(offload=[], discard=[])

    def wake_up(self, tags: Sequence[str] | None = None, *, all_or_nothing: bool = False) -> None:
        """Puts physical memory behind the tags' addresses again and restores what was offloaded.

        What was discarded holds anything (0xA5 in poison mode). What is awake is left as it is.

        Args:
            tags: which; all of them if None.
            all_or_nothing: a driver call that fails leaves each of the tags as it was, instead of awake in part.

        Raises:
            UnknownTagError: named tag.
            OutOfMemoryError: less memory is free than needed; then nothing was changed.
            DriverError: a driver call failed; what was not woken sleeps on with its backup.
        """
        try:
            if tags is None:
                native.check(self._library.sleep_pool_wake_up_all(self._pool, all_or_nothing))
                return
            named = _tag_list(tags)
            native.check(self._library.sleep_pool_wake_up(self._pool, native.names(named), len(named), all_or_nothing))
        finally:
            self._resume_regions()

    def set_persistent(self, tag: str, persistent: bool = True) -> None:
        """Declares that a tag never sleeps, or takes that back. Makes the tag if need be.

        Raises:
            TagAsleepError: it sleeps now.
        """
        native.check(self._library.sleep_pool_set_persistent(self._pool, tag.encode(), persistent))

    def require_resident(self, tag: str) -> None:
        """Raises when a tag must not be touched now.

        Raises:
            UnknownTagError: no such tag.
            TagAsleepError: it sleeps.
        """
        native.check(self._library.sleep_pool_require_resident(self._pool, tag.encode()))

    def stats(self) -> dict[str, TagStats]:
        """Each tag's memory and last phases, in the order the tags were made."""
        self._refresh_live()
        return {entry.tag.decode(): _tag_stats(entry) for entry in self._read_stats()}

    def _sleeping_tags(self) -> set[str]:
        return {entry.tag.decode() for entry in self._read_stats() if entry.is_asleep}

    def _read_stats(self) -> Sequence[native.NativeTagStats]:
        count = ctypes.c_size_t()
        native.check(self._library.sleep_pool_stats(self._pool, None, 0, ctypes.byref(count)))
        entries = (native.NativeTagStats * count.value)()
        native.check(self._library.sleep_pool_stats(self._pool, entries, len(entries), ctypes.byref(count)))
        return list(entries)

    def memory_info(self) -> MemoryInfo:
        """Free and total memory of the device."""
        free, total = ctypes.c_uint64(), ctypes.c_uint64()
        native.check(self._library.sleep_pool_memory_info(self._pool, ctypes.byref(free), ctypes.byref(total)))
        return MemoryInfo(free=free.value, total=total.value)

    def granularity(self) -> int:
        """What the device's physical memory comes in multiples of, in bytes."""
        granularity = ctypes.c_uint64()
        native.check(self._library.sleep_pool_granularity(self._pool, ctypes.byref(granularity)))
        return granularity.value

    def prepare_host(self, tag: str = "weights") -> Future[None]:
        """Begins to make the host memory that offloading the tag as it is now takes, so that its sleep need not.

        It is made in the background; a sleep that comes before it is there waits for it. ``.result()`` waits, and
        raises what went wrong.

        Raises:
            UnknownTagError: no such tag.
            OutOfMemoryError: no host memory; raised by the future.
        """
        native.check(self._library.sleep_pool_check_sleep(self._pool, native.names([tag]), 1, native.names([]), 0))
        executor = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare_host")
        with self._settled():
            preparation = executor.submit(self._make_host, tag)
        executor.shutdown(wait=False)
        self._preparations.append(preparation)
        return preparation

    def _make_host(self, tag: str) -> None:
        native.check(self._library.sleep_pool_prepare_host(self._pool, tag.encode()))

    def release_host(self) -> int:
        """Returns the host memory that holds no backup now; says how many bytes that was."""
        released = ctypes.c_uint64()
        native.check(self._library.sleep_pool_release_host(self._pool, ctypes.byref(released)))
        return released.value

    def backup(self, tag: str) -> Backup:
        """Reads what sleeps: the backup of a tag.

        Raises:
            UnknownTagError: no such tag.
        """
        native.check(self._library.sleep_pool_read_backup(self._pool, tag.encode(), 0, 0, None))
        return Backup(self, tag)

    def read_backup(self, tag: str, address: int, size: int, to: int) -> None:
        """Copies ``size`` bytes of a tag's backup, which belong at ``address``, to the host address ``to``.

        Raises:
            InvalidArgumentError: the backup does not hold all of them.
        """
        native.check(self._library.sleep_pool_read_backup(self._pool, tag.encode(), address, size, to))

    def set_handle_bytes(self, size: int) -> None:
        """The size of the physical handles of memory that is allocated from now on, on this device.

        At first 2 GiB, on the CPU 256 MiB.

        An allocation is cut into handles of like size, up to half more or less than this. One handle costs the
        driver two calls to sleep and two to wake, whatever its size; memory comes and goes by the handle.
        SLEEP_POOL_HANDLE_MIB=256 does the same from the device's first use on.

        Raises:
            InvalidArgumentError: not a multiple of the device's granularity.
        """
        native.check(self._library.sleep_pool_set_handle_bytes(self._pool, max(0, size)))

    def set_poison(self, poison: bool) -> None:
        """Fills what was discarded with 0xA5 when it wakes, so that tests see it read.

        SLEEP_POOL_POISON=1 does the same for each pool from its first use on.
        """
        native.check(self._library.sleep_pool_set_poison(self._pool, poison))

    def set_capacity(self, capacity: int | None) -> None:
        """Limits the physical memory of a simulated device (the CPU), for all its namespaces; None: no limit.

        Raises:
            DriverError: the device is a real one.
            InvalidArgumentError: not positive.
        """
        if capacity is not None and capacity <= 0:
            raise InvalidArgumentError(f"capacity is {capacity}, want bytes > 0 or None", phase="set_capacity")
        native.check(self._library.sleep_pool_set_capacity(self._pool, capacity or 0))

    def inject_fault(self, call: str, nth: int) -> None:
        """Makes the nth of the device's driver calls of a kind from now on fail, once; 0 takes that back.

        The kinds are the keys of :meth:`driver_calls`. SLEEP_POOL_FAULT="create:3,copy_out:1" does the same
        from the device's first use on.

        Raises:
            InvalidArgumentError: no such kind, or nth is negative.
        """
        calls = native.driver_calls()
        if call not in calls or nth < 0:
            raise InvalidArgumentError(f"fault {call!r} at {nth}: want one of {', '.join(calls)} at >= 0")
        native.check(self._library.sleep_pool_inject_fault(self._pool, calls.index(call), nth))

    def driver_calls(self) -> dict[str, int]:
        """How many of the device's driver calls of each kind went well so far, all namespaces together."""
        calls = native.driver_calls()
        counters = (ctypes.c_uint64 * len(calls))()
        native.check(self._library.sleep_pool_driver_calls(self._pool, counters))
        return dict(zip(calls, counters, strict=True))


os.register_at_fork(after_in_child=SleepPool.forget_parent)


def _parse_device(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    if not kind or (index and not index.isdecimal()):
        raise InvalidArgumentError(f"device {device!r} is not a device such as 'cpu' or 'npu:0'", phase="open")
    return kind, _CPU_INDEX if kind == "cpu" else int(index or 0)


def _tag_list(tags: Sequence[str]) -> list[str]:
    if isinstance(tags, str):
        raise InvalidArgumentError(f"tags is the string {tags!r}, want a list such as [{tags!r}]")
    return list(tags)


def _level(level: int | None) -> int:
    if level is None:
        return 1
    if isinstance(level, bool) or level not in (1, 2):
        raise InvalidArgumentError(f"level is {level!r}, want 1 (offload weights) or 2 (discard all)", phase="sleep")
    return int(level)


def _tag_stats(entry: native.NativeTagStats) -> TagStats:
    return TagStats(
        mapped=entry.mapped,
        asleep=entry.asleep,
        host=entry.host,
        dead=entry.dead,
        live=entry.live,
        allocations=entry.allocations,
        is_asleep=bool(entry.is_asleep),
        persistent=bool(entry.persistent),
        sleep=_phase_stats(entry.sleep),
        wake=_phase_stats(entry.wake),
    )


def _phase_stats(phase: native.NativePhase) -> PhaseStats:
    return PhaseStats(
        seconds=phase.seconds,
        host_seconds=phase.host_seconds,
        copy_seconds=phase.copy_seconds,
        map_seconds=phase.map_seconds,
        bytes=phase.bytes,
        copied=phase.copied,
    )


def _rate(size: int, seconds: float) -> float:
    return size / _GIB / seconds if seconds > 0 else 0.0
