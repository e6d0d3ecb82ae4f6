"""The mechanism behind vLLM's sleep mode: one engine's weights and KV cache in the sleep pool.

vLLM 0.32 knows its mechanisms by name, and third parties may add theirs; before that there was one, in the worker. Here
both get the same: from vLLM's factory where it has one, otherwise from `make_backend`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch

from allocator import InvalidArgumentError, SleepPool
from rlhf_npu.sleep_mode.names import BACKEND

try:
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend, SleepModeBackendFactory
except ModuleNotFoundError:  # before vLLM 0.32
    SleepModeBackend = object
    SleepModeBackendFactory = None

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
FIRST_ENGINE = "default"  # the namespace of a process's first engine
Tensors = Callable[[], list[torch.Tensor]]
_engines = itertools.count()


class SleepPoolBackend(SleepModeBackend):
    """Suspends and resumes one engine; `attach` says whose memory it is."""

    def attach(self, device: torch.device, parameters: Tensors, caches: Tensors) -> None:
        """Serve a worker on `device`.

        Args:
            device: the worker's.
            parameters: what level 2 may drop, asked for at each sleep.
            caches: what every sleep may drop.
        """
        self._device, self._parameters, self._caches = device, parameters, caches
        self._tags: set[str] = set()

    @cached_property
    def pool(self) -> SleepPool:
        """This engine's own pool: other engines of the process sleep on their own."""
        number = next(_engines)
        return SleepPool.get(self._device, namespace=f"engine{number}" if number else FIRST_ENGINE)

    def region(self, tag: str) -> AbstractContextManager[None]:
        """For what vLLM makes under a tag; its other tags (runtime, workspace) stay outside and awake."""
        if tag not in (WEIGHTS, KV_CACHE):
            return nullcontext()
        self._tags.add(tag)
        return self.pool.region(tag)

    def suspend(self, level: int = 1) -> None:
        """Drop the KV cache; level 1 offloads the weights, level 2 drops the parameters among them.

        What else was made beside them (buffers, scales, tables, what attention plans with) comes back as it was.

        Raises:
            InvalidArgumentError: another level; nothing was changed.
        """
        if level not in (1, 2):
            raise InvalidArgumentError(f"level is {level!r}, want 1 (offload weights) or 2 (drop them)", phase="sleep")
        parameters = self._parameters() if level == 2 else []
        self.pool.sleep(offload=sorted(self._tags), droppable=[*parameters, *self._caches()])

    def resume(self, tags: list[str] | None = None) -> None:
        """Map `tags` (all if None) again; after level 2 the parameters hold anything until they are loaded."""
        # The pool may have other tenants' tags, which sleep on.
        self.pool.wake_up(sorted(self._tags) if tags is None else tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Drop the KV cache while the weights stay: vLLM gives it back while requests are paused.

        Raises:
            InvalidArgumentError: another tag than the cache's.
        """
        if set(tags) - {KV_CACHE}:
            raise InvalidArgumentError(f"discard: {list(tags)}; only {[KV_CACHE]} can be dropped alone", phase="sleep")
        self.pool.sleep(offload=sorted(self._tags & set(tags)), droppable=self._caches())

    def state(self) -> str:
        """SUSPENDED while anything of this engine sleeps, otherwise RUNNING."""
        stats = self.pool.stats()
        return "SUSPENDED" if any(stats[tag].is_asleep for tag in self._tags) else "RUNNING"

    @classmethod
    def preserves_communicators(cls) -> bool:
        """Only weights and cache are touched."""
        return True

    @classmethod
    def preserves_compiled_artifacts(cls) -> bool:
        """The process lives on, and addresses stay."""
        return True

    @classmethod
    def preserves_graphs_with_communicators(cls) -> bool:
        """Nothing that a graph holds moves."""
        return True


def register_backend() -> None:
    """Make the backend known to vLLM by its name, where vLLM has names for them."""
    if SleepModeBackendFactory is not None and BACKEND not in SleepModeBackendFactory._registry:  # noqa: SLF001
        SleepModeBackendFactory.register_backend(BACKEND, __name__, SleepPoolBackend.__name__)


def make_backend() -> SleepPoolBackend:
    """A backend for one engine."""
    if SleepModeBackendFactory is None:
        return SleepPoolBackend()
    register_backend()
    made: Any = SleepModeBackendFactory.get_backend_class(BACKEND)()
    return made
