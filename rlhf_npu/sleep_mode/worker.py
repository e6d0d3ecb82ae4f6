"""What makes a worker of vLLM sleep in the sleep pool, on each device the same.

vLLM refuses sleep mode on the CPU, and on a GPU and an NPU it has a pool of its own.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.layers import rotary_embedding

from allocator import InvalidArgumentError
from rlhf_npu.sleep_mode.backend import WEIGHTS, SleepPoolBackend, make_backend
from rlhf_npu.sleep_mode.weight_update import watched_if_asked

DRAFT = "draft."  # how vLLM names the parameters of a draft model; those are kept always


class SleepMixin:
    """Sleep and wake-up through the sleep pool, for a worker of vLLM that runs on `device`."""

    device: torch.device
    model_config: Any
    model_runner: Any

    @cached_property
    def sleep_mode_backend(self) -> SleepPoolBackend:
        """Where this engine's weights and cache are."""
        backend = make_backend()
        backend.attach(self.device, self._parameters_to_drop, self._caches_to_drop)
        return backend

    def load_model(self, **arguments: Any) -> None:
        """Give back what loading made and freed, before vLLM looks how much memory is left for the cache."""
        with watched_if_asked():
            super().load_model(**arguments)  # type: ignore[misc]
        # vLLM would hand the tables in these weights to the next engine of the process, which runs while they sleep.
        rotary_embedding._ROPE_DICT.clear()  # noqa: SLF001
        self.sleep_mode_backend.pool.trim()

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        """vLLM's own seam for memory pools."""
        return self.sleep_mode_backend.region(tag)

    def sleep(self, level: int = 1) -> None:
        """Drop the KV cache; level 1 offloads the weights, level 2 drops the parameters among them."""
        self.sleep_mode_backend.suspend(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Map `tags` (all if None) again; after level 2 the parameters hold anything until they are loaded."""
        self.sleep_mode_backend.resume(tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        """Drop what these tags hold, while the rest stays awake."""
        self.sleep_mode_backend.discard(tags)

    def prepare_sleep(self) -> None:
        """Begin to make the host memory for level 1 in the background, so that the first sleep need not."""
        self.sleep_mode_backend.pool.prepare_host(WEIGHTS)

    def sleep_pool_stats(self) -> dict[str, dict[str, Any]]:
        """Each tag's memory and the seconds of its last sleep and wake-up, for metrics; see `TagStats`."""
        return {tag: asdict(stats) for tag, stats in self.sleep_mode_backend.pool.stats().items()}

    def _parameters_to_drop(self) -> list[torch.Tensor]:
        """All parameters but those that `sleep_preserve_parameter_names` (of vLLM 0.32) keeps."""
        patterns = getattr(self.model_config, "sleep_preserve_parameter_names", [])
        kept = [pattern for pattern in patterns if not pattern.startswith(DRAFT)]
        parameters = dict(self.model_runner.model.named_parameters())
        for pattern in kept:
            if not fnmatch.filter(parameters, pattern):
                raise InvalidArgumentError(f"sleep_preserve_parameter_names: no parameter matches {pattern!r}")
        return [
            parameter
            for name, parameter in parameters.items()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in kept)
        ]

    def _caches_to_drop(self) -> list[torch.Tensor]:
        """The memory of each layer's KV cache or state, whole, whatever views of it the layers have."""
        layers = self.model_runner.compilation_config.static_forward_context.values()
        caches = [self.model_runner.kv_caches, *(getattr(layer, "kv_cache", ()) for layer in layers)]
        storages = {view.untyped_storage().data_ptr(): view.untyped_storage() for view in _tensors(caches)}
        return [torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage) for storage in storages.values()]


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, (list, tuple)):
        for part in nested:
            yield from _tensors(part)
