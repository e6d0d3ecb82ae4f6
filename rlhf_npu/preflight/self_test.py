"""Puts real memory to sleep and wakes it: counted by the device itself, compared byte by byte, and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from allocator import PhaseStats, SleepPool
from rlhf_npu.platform import resident_bytes
from rlhf_npu.preflight.region import region
from rlhf_npu.preflight.report import Check, Status, attempt, readable

_MIB = 1 << 20
_WORD = 4
_LARGEST_TENSOR = 64 * _MIB
# Of the memory that should come back; the rest is for what others do with it meanwhile.
_NEARLY_ALL = 0.9
_REPORT = "do not use sleep mode on this machine; report this as a bug, with the whole output"


class SelfTest:
    """Weights and a cache of `size` bytes each, and the steps that they go through in turn."""

    def __init__(self, pool: SleepPool, size: int) -> None:
        self.weights: list[torch.Tensor] = []
        self.cache = torch.empty(0)
        self._pool = pool
        self._size = size
        self._sizes = _cut(size, min(_LARGEST_TENSOR, size // 4))
        self._on_cpu = pool.device == "cpu"
        self._addresses: list[int] = []

    def checks(self) -> Iterator[Check]:
        """The outcome of one step after the other, up to the first that fails; then what to compare the rates with."""
        for name, step in self._steps():
            check = attempt(name, step, "do not rely on sleep mode here until this step goes well")
            yield check
            if check.status is Status.FAILED:
                return
        yield from self.plain_copies()

    def _steps(self) -> list[tuple[str, Callable[[], Check]]]:
        return [
            ("memory for it", self.enough),
            ("fill", self.fill),
            ("first sleep, level 1", lambda: self.sleep(1, "first sleep, level 1")),
            ("first wake-up", lambda: self.wake_up("first wake-up")),
            ("second sleep, level 1", lambda: self.sleep(1, "second sleep, level 1")),
            ("second wake-up", lambda: self.wake_up("second wake-up")),
            ("sleep, level 2", lambda: self.sleep(2, "sleep, level 2")),
            ("wake-up, load anew", lambda: self.wake_up("wake-up, load anew", load=True)),
        ]

    def enough(self) -> Check:
        """Whether the memory is there; on the CPU the backup of the weights comes from the same memory."""
        rounding = (len(self._sizes) + 1) * self._pool.granularity()
        needed, free = self._size * (3 if self._on_cpu else 2) + rounding, self._pool.memory_info().free
        value = f"{readable(needed)} needed, {readable(free)} free"
        measured = {"needed": needed, "free": free}
        if free >= needed:
            return Check("memory for it", Status.OK, value, measured=measured)
        advice = "end what else holds memory of this device, or test with less: --size"
        return Check("memory for it", Status.FAILED, value, advice, measured)

    def fill(self) -> Check:
        """Makes the weights, of several tensors, and the cache; every four bytes of the weights are different."""
        with region(self._pool, "weights"):
            self.weights = [self._empty(size) for size in self._sizes]
        with region(self._pool, "kv_cache"):
            self.cache = self._empty(self._size).zero_()
        self._load()
        self._addresses = self._current_addresses()
        return Check("fill", Status.OK, f"{readable(self._size)} of weights, {readable(self._size)} of cache")

    def sleep(self, level: int, name: str) -> Check:
        """Puts all to sleep, and asks the pool and the device what is still there."""
        mapped, kept, held = self._mapped(), self._host_on_device(), self._held()
        self._pool.sleep(level=level)
        if left := self._mapped():
            return Check(name, Status.FAILED, f"the pool still holds {readable(left)} of the device", _REPORT)
        returned, expected = held - self._held(), mapped - (self._host_on_device() - kept)
        return self._came_back(name, returned, expected)

    def _came_back(self, name: str, returned: int, expected: int) -> Check:
        counted = "the system's count of this process" if self._on_cpu else "the device's own count"
        phase = self._pool.stats()["weights"].sleep
        value = f"{_pace(phase)}; {readable(max(0, returned))} of {readable(expected)} came back, by {counted}"
        measured = {"expected": expected, "returned": returned, **_numbers(phase)}
        if returned >= _NEARLY_ALL * expected:
            return Check(name, Status.OK, value, measured=measured)
        advice = "run this again with nothing else on the device; if it stays so, sleep frees nothing here"
        return Check(name, Status.FAILED, value, advice, measured)

    def wake_up(self, name: str, load: bool = False) -> Check:
        """Wakes all up and compares the weights; after level 2 they are loaded anew first."""
        self._pool.wake_up()
        self.cache.zero_()  # on the CPU, memory that nobody wrote is not there yet
        if load:
            self._load()
        return self.compare(name)

    def compare(self, name: str) -> Check:
        """Whether the weights are where they were, and hold what they held, every byte of them."""
        if self._current_addresses() != self._addresses:
            return Check(name, Status.FAILED, "tensors moved: their addresses are not what they were", _REPORT)
        phase = self._pool.stats()["weights"].wake
        wrong = sum(_differing_bytes(tensor, number) for number, tensor in enumerate(self.weights))
        measured = {"wrong_bytes": wrong, **_numbers(phase)}
        if wrong:
            value = f"{wrong} of {self._size} bytes of the weights are not what they were"
            return Check(name, Status.FAILED, value, _REPORT, measured)
        value = f"{_pace(phase)}; every byte of the weights is right, at its address"
        return Check(name, Status.OK, value, measured=measured)

    def plain_copies(self) -> Iterator[Check]:
        """What torch takes to copy the weights to the host and back, through memory pinned beforehand."""
        host = torch.zeros(self.weights[0].numel(), dtype=torch.int32, pin_memory=not self._on_cpu)
        out = self._timed(lambda tensor: host[: tensor.numel()].copy_(tensor, non_blocking=True))
        back = self._timed(lambda tensor: tensor.copy_(host[: tensor.numel()], non_blocking=True))
        for name, phase in (("plain copy to the host", out), ("plain copy back", back)):
            yield Check(name, Status.INFO, f"{_pace(phase)}, for comparison", measured=_numbers(phase))

    def _timed(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> PhaseStats:
        self._synchronize()
        started = time.perf_counter()
        for tensor in self.weights:
            copy(tensor)
        self._synchronize()
        seconds = time.perf_counter() - started
        return PhaseStats(seconds, 0.0, seconds, 0.0, bytes=self._size, copied=self._size)

    def _synchronize(self) -> None:
        if not self._on_cpu:
            kind = self._pool.device.partition(":")[0]
            getattr(torch, kind).synchronize(self._pool.device)

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size // _WORD, dtype=torch.int32, device=self._pool.device)

    def _load(self) -> None:
        for number, tensor in enumerate(self.weights):
            tensor.copy_(_pattern(tensor.numel(), number))

    def _current_addresses(self) -> list[int]:
        return [tensor.data_ptr() for tensor in [*self.weights, self.cache]]

    def _mapped(self) -> int:
        return sum(tag.mapped for tag in self._pool.stats().values())

    def _host_on_device(self) -> int:
        """Backups that lie in the device's own memory: on the CPU all, elsewhere none."""
        return sum(tag.host for tag in self._pool.stats().values()) if self._on_cpu else 0

    def _held(self) -> int:
        """What is in use, of the device; of the CPU what this process uses, since much else goes on there."""
        if self._on_cpu:
            return resident_bytes()
        memory = self._pool.memory_info()
        return memory.total - memory.free


def _cut(size: int, largest: int) -> list[int]:
    whole, rest = divmod(size, largest)
    return [largest] * whole + ([rest] if rest else [])


def _pattern(words: int, number: int) -> torch.Tensor:
    """Other words at each place, and others in each tensor: its largest has 2**24 words."""
    return torch.arange(words, dtype=torch.int32).bitwise_xor_(number % 128 << 24)


def _differing_bytes(tensor: torch.Tensor, number: int) -> int:
    seen, expected = tensor.cpu(), _pattern(tensor.numel(), number)
    if torch.equal(seen, expected):
        return 0
    return int((seen.view(torch.uint8) != expected.view(torch.uint8)).sum())


def _pace(phase: PhaseStats) -> str:
    return f"{phase.seconds:.3f} s, {phase.gib_per_s:.2f} GiB/s"


def _numbers(phase: PhaseStats) -> dict[str, float]:
    return {"seconds": phase.seconds, "bytes": phase.bytes, "gib_per_s": phase.gib_per_s}
