"""What bench_sleep.py measures: this pool and others behind one interface, each in a process of its own.

Used as `python sleep_contenders.py ORDER`, where ORDER is the JSON of a `Order`; the last line printed is the
measurement's JSON.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch

from allocator import SleepPool
from rlhf_npu.platform import resident_bytes

GIB = 1 << 30
WEIGHTS, KV_CACHE = "weights", "kv_cache"
LINK_BUFFER = 2 * GIB
LAYERS = 28
PAUSE_SECONDS = 1.0
SUMMED_AT_ONCE = 1 << 26

# Qwen2-7B: an embedding, 28 layers, an output head.
EMBEDDING = (152064, 3584)
LAYER = ((3584,), (4608, 3584), (4608,), (3584, 3584), (3584,), (37888, 3584), (3584, 18944))


@dataclass(frozen=True)
class Order:
    """What to measure: a contender, a device, bytes of bfloat16 weights and of cache, and how many later cycles."""

    contender: str
    device: str
    weights: int
    cache: int
    cycles: int


@dataclass
class Measurement:
    """Seconds, bytes, and bytes a second; None where the contender has no such thing.

    Attributes:
        link_out, link_in: plain copies between pinned host memory and the device, just before.
        first_sleep: with nothing prepared, of the process.
        unprepared_sleep: median of sleeps after all host memory was given back.
        prepare, prepared_sleep: medians of preparing host memory anew, and of the sleep after that.
        sleeps, wakes: of later cycles at level 1, all tags.
        sleep_level_2, wake_level_2: medians of later cycles, with a pause before each as training and generating are: a
            driver clears memory after it was given back, and whoever wants it at once waits for that.
        wake_weights, wake_cache: medians of waking in two steps.
        left_on_device: what the driver counts as used asleep, over what it counted before the tensors were made.
        host: resident memory that the first sleep added; on the CPU, what the pool holds.
        host_after_release: what of that is left after it was given back awake.
        intact: whether each byte of the weights was right after each wake-up at level 1.
    """

    link_out: float
    link_in: float
    first_sleep: float = 0.0
    unprepared_sleep: float | None = None
    prepare: float | None = None
    prepared_sleep: float | None = None
    sleeps: list[float] = field(default_factory=list)
    wakes: list[float] = field(default_factory=list)
    sleep_level_2: float | None = None
    wake_level_2: float | None = None
    wake_weights: float = 0.0
    wake_cache: float = 0.0
    left_on_device: int = 0
    host: int = 0
    host_after_release: int | None = None
    intact: bool = True


class Contender(Protocol):
    """A pool that can sleep."""

    def region(self, tag: str) -> Any:
        """Tensors made within belong to the tag."""

    def sleep(self, level: int) -> None:
        """Level 1 keeps the weights on the host; level 2 drops them."""

    def wake_up(self, tags: Sequence[str]) -> None:
        """Map the tags again."""


class OurPool:
    """The sleep pool."""

    levels = (1, 2)

    def __init__(self, device: str) -> None:
        self.pool = SleepPool.get(device)
        self.region = self.pool.region
        self.wake_up = self.pool.wake_up

    def sleep(self, level: int) -> None:
        self.pool.sleep(level=level)


class VllmPool:
    """vLLM's CuMemAllocator, as its GPU worker calls it."""

    levels = (1, 2)

    def __init__(self, device: str) -> None:
        from vllm.device_allocator.cumem import CuMemAllocator

        torch.cuda.set_device(device)
        self._allocator = CuMemAllocator.get_instance()
        self.region = self._allocator.use_memory_pool

    def sleep(self, level: int) -> None:
        self._allocator.sleep(offload_tags=(WEIGHTS,) if level == 1 else ())

    def wake_up(self, tags: Sequence[str]) -> None:
        self._allocator.wake_up(list(tags))


class TorchMemorySaverPool:
    """torch_memory_saver with its pluggable allocator; whether a tag is backed up is fixed when it is made.

    It keeps its pinned host memory here, which is its faster mode.
    """

    levels = (1,)

    def __init__(self, device: str) -> None:
        from torch_memory_saver import torch_memory_saver

        torch.cuda.set_device(device)
        torch_memory_saver.hook_mode = "torch"
        torch_memory_saver.retain_cpu_backup = True
        self._saver = torch_memory_saver

    def region(self, tag: str) -> Any:
        return self._saver.region(tag=tag, enable_cpu_backup=tag == WEIGHTS)

    def sleep(self, level: int) -> None:
        assert level == 1
        torch.cuda.synchronize()
        self._saver.pause()

    def wake_up(self, tags: Sequence[str]) -> None:
        for tag in tags:
            self._saver.resume(tag)


CONTENDERS: dict[str, tuple[str | None, Callable[[str], Any]]] = {
    "ours": (None, OurPool),
    "vllm": ("vllm", VllmPool),
    "torch_memory_saver": ("torch_memory_saver", TorchMemorySaverPool),
}


def missing(contender: str, device: str) -> str:
    """What keeps the contender from running on the device; nothing if empty."""
    package, _ = CONTENDERS[contender]
    if package is None:
        return ""
    if importlib.util.find_spec(package) is None:
        return "not installed"
    return "" if device.startswith("cuda") else "needs a GPU"


def weight_shapes(size: int) -> Iterator[tuple[int, ...]]:
    """Shapes of Qwen2-7B's tensors in bfloat16 until `size` bytes are full; the last one is cut."""
    left = size // 2
    shapes = iter([EMBEDDING, *LAYER * LAYERS, EMBEDDING, *LAYER * 1000])
    while left > 0:
        shape = next(shapes)
        numel = torch.Size(shape).numel()
        yield shape if numel <= left else (left,)
        left -= numel


class Bench:
    """One contender with its tensors."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.on_cpu = order.device == "cpu"
        self.torch_device = torch.cpu if self.on_cpu else getattr(torch, torch.device(order.device).type)

    def measure(self) -> Measurement:
        """Run the whole course."""
        result = Measurement(*self._link())
        self.contender = CONTENDERS[self.order.contender][1](self.order.device)
        numel = min(math.prod(EMBEDDING), self.order.weights // 2)
        self.noise = torch.randn(numel, generator=torch.Generator().manual_seed(0)).bfloat16()
        self._bits_sum(self.noise[: 1 << 20].to(self.order.device))  # loads what the device needs for it
        before = self._used()
        self._fill()
        self._first_cycle(result, before)
        for _ in range(self.order.cycles):
            self._cycle(result)
        self._wake_in_two_steps(result)
        if self.order.contender == "ours":
            self._prepared_cycle(result)
        if 2 in self.contender.levels:
            self._level_2(result)
        return result

    def _fill(self) -> None:
        device = self.order.device
        with self.contender.region(WEIGHTS):
            shapes = weight_shapes(self.order.weights)
            self.weights = [torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        with self.contender.region(KV_CACHE):
            size = self.order.cache // LAYERS  # vLLM makes it layer by layer
            self.cache = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(LAYERS)]
        for weight in self.weights:
            weight.copy_(self.noise[-weight.numel() :].view(weight.shape))
        for layer in self.cache:
            layer.zero_()
        self.sums = self._sums()

    def _sums(self) -> list[int]:
        return [self._bits_sum(weight) for weight in self.weights]

    def _bits_sum(self, weight: torch.Tensor) -> int:
        if self.torch_device is not torch.cuda:
            weight = weight.cpu()
        # A sum in another type makes a copy in that type first.
        parts = weight.view(torch.int16).flatten().split(SUMMED_AT_ONCE)
        return sum(int(part.sum(dtype=torch.int64)) for part in parts)

    def _first_cycle(self, result: Measurement, used_before: int) -> None:
        resident = resident_bytes()
        result.first_sleep = self._time(lambda: self.contender.sleep(1))
        result.host = resident_bytes() - resident
        result.left_on_device = self._used() - used_before
        if self.on_cpu:  # the backup is the same memory
            result.host = self.contender.pool.stats()[WEIGHTS].host
            result.left_on_device -= result.host
        self._wake(result)

    def _cycle(self, result: Measurement) -> None:
        result.sleeps.append(self._time(lambda: self.contender.sleep(1)))
        result.wakes.append(self._wake(result))

    def _wake(self, result: Measurement) -> float:
        seconds = self._time(lambda: self.contender.wake_up([WEIGHTS, KV_CACHE]))
        result.intact &= self._sums() == self.sums
        return seconds

    def _wake_in_two_steps(self, result: Measurement) -> None:
        steps: dict[str, list[float]] = {WEIGHTS: [], KV_CACHE: []}
        for _ in range(self.order.cycles):
            self.contender.sleep(1)
            for tag, seconds in steps.items():
                seconds.append(self._time(partial(self.contender.wake_up, [tag])))
            result.intact &= self._sums() == self.sums
        result.wake_weights, result.wake_cache = (median(steps[tag]) for tag in (WEIGHTS, KV_CACHE))

    def _prepared_cycle(self, result: Measurement) -> None:
        pool = self.contender.pool
        unprepared, prepares, sleeps = [], [], []
        for _ in range(3):
            pool.release_host()
            unprepared.append(self._time(lambda: self.contender.sleep(1)))
            self._wake(result)
            resident = resident_bytes()
            pool.release_host()
            result.host_after_release = max(0, result.host - max(0, resident - resident_bytes()))
            prepares.append(self._time(lambda: pool.prepare_host().result()))
            sleeps.append(self._time(lambda: self.contender.sleep(1)))
            self._wake(result)
        result.unprepared_sleep, result.prepare = median(unprepared), median(prepares)
        result.prepared_sleep = median(sleeps)

    def _level_2(self, result: Measurement) -> None:
        sleeps, wakes = [], []
        for _ in range(max(1, self.order.cycles)):
            time.sleep(PAUSE_SECONDS)
            sleeps.append(self._time(lambda: self.contender.sleep(2)))
            time.sleep(PAUSE_SECONDS)
            wakes.append(self._time(lambda: self.contender.wake_up([WEIGHTS, KV_CACHE])))
        result.sleep_level_2, result.wake_level_2 = median(sleeps), median(wakes)

    def _link(self) -> tuple[float, float]:
        """Bytes a second of plain copies of as many bytes as the weights: out of the device, into it."""
        size = min(LINK_BUFFER, self.order.weights)
        host = torch.ones(size, dtype=torch.uint8, pin_memory=not self.on_cpu)
        device = torch.ones(size, dtype=torch.uint8, device=self.order.device)
        times = max(1, round(self.order.weights / size))
        out, into = self._copy_seconds(host, device, times), self._copy_seconds(device, host, times)
        del host, device
        if not self.on_cpu:
            self.torch_device.empty_cache()
        return times * size / out, times * size / into

    def _copy_seconds(self, to: torch.Tensor, source: torch.Tensor, times: int) -> float:
        """Of the best of three times as many copies."""

        def copy() -> None:
            for _ in range(times):
                to.copy_(source, non_blocking=True)

        return min(self._time(copy) for _ in range(3))

    def _time(self, operation: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        operation()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        self.torch_device.synchronize()

    def _used(self) -> int:
        """Bytes of device memory in use, by the driver's count; on the CPU, what the operating system counts."""
        if self.on_cpu:
            return resident_bytes()
        free, total = self.torch_device.mem_get_info()
        return int(total - free)


def main() -> None:
    order = Order(**json.loads(sys.argv[1]))
    print(json.dumps(asdict(Bench(order).measure())), flush=True)
    os._exit(0)  # torch_memory_saver fails a process in which its memory is freed outside a region, as it is at the end


if __name__ == "__main__":
    main()
