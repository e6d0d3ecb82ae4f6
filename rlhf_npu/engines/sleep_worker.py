"""What makes a worker of vLLM keep its weights and its KV cache in the sleep pool.

vLLM refuses sleep mode on the CPU, and on a GPU it has a pool of its own. With this `LLM.sleep` and `LLM.wake_up` use
the same pool on both, so that the loop runs the same code everywhere.
"""

from __future__ import annotations

import fnmatch
import itertools
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from vllm.model_executor.layers import rotary_embedding

from allocator import InvalidArgumentError, SleepPool

WEIGHTS = "weights"
KV_CACHE = "kv_cache"
_engines = itertools.count()


class SleepMixin:
    """Sleep and wake-up through the sleep pool, for a worker of vLLM that runs on `device`."""

    device: torch.device
    model_config: Any
    model_runner: Any

    @cached_property
    def sleep_pool(self) -> SleepPool:
        """This engine's own pool: other engines of the process sleep on their own."""
        number = next(_engines)
        return SleepPool.get(self.device, namespace=f"engine{number}" if number else "default")

    def load_model(self, **arguments: Any) -> None:
        """Give back what loading made and freed, before vLLM looks how much memory is left for the cache."""
        super().load_model(**arguments)  # type: ignore[misc]
        # vLLM would hand the tables in these weights to the next engine of the process, which runs while they sleep.
        rotary_embedding._ROPE_DICT.clear()  # noqa: SLF001
        self.sleep_pool.trim()

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        """vLLM's own seam for memory pools; its other tags (runtime, workspace) stay outside."""
        return self.sleep_pool.region(tag) if tag in (WEIGHTS, KV_CACHE) else nullcontext()

    def sleep(self, level: int = 1) -> None:
        """Drop the KV cache; level 1 offloads the weights, level 2 of their memory only what is no parameter.

        Raises:
            InvalidArgumentError: another level; nothing was changed.
        """
        if level not in (1, 2):
            raise InvalidArgumentError(f"level is {level!r}, want 1 (offload weights) or 2 (drop them)", phase="sleep")
        droppable = self._parameters_to_drop() if level == 2 else []
        self.sleep_pool.sleep(offload=[WEIGHTS], discard=[KV_CACHE], droppable=droppable)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Map `tags` (all if None) again; after level 2 the parameters hold anything until they are loaded."""
        self.sleep_pool.wake_up(tags)

    def _parameters_to_drop(self) -> list[torch.Tensor]:
        """All parameters but those that `sleep_preserve_parameter_names` (of vLLM 0.32) keeps."""
        kept = getattr(self.model_config, "sleep_preserve_parameter_names", [])
        parameters = dict(self.model_runner.model.named_parameters())
        for pattern in kept:
            if not fnmatch.filter(parameters, pattern):
                raise InvalidArgumentError(f"sleep_preserve_parameter_names: no parameter matches {pattern!r}")
        return [
            parameter
            for name, parameter in parameters.items()
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in kept)
        ]
