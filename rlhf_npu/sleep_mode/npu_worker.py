"""vllm-ascend's NPU worker in the sleep pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from vllm_ascend.ascend_config import get_ascend_config
from vllm_ascend.device_allocator.camem import CaMemAllocator
from vllm_ascend.worker.worker import NPUWorker

from rlhf_npu.sleep_mode.backend import SleepPoolBackend
from rlhf_npu.sleep_mode.npu_traps import refuse_fractal_nz, refuse_second_engine
from rlhf_npu.sleep_mode.worker import SleepMixin


class SleepNPUWorker(SleepMixin, NPUWorker):
    """An NPU worker that sleeps in this pool instead of vllm-ascend's."""

    def load_model(self, **arguments: Any) -> None:
        """Load the weights in the pool.

        Raises:
            ConfigError: this worker cannot sleep, see `npu_traps`; nothing was loaded.
        """
        refuse_fractal_nz(get_ascend_config().weight_nz_mode)
        refuse_second_engine(self.sleep_mode_backend.pool.namespace)
        _obey_logprobs_mode(self.model_runner.sampler, self.model_config.logprobs_mode)
        with _in_place_of_camem(self.sleep_mode_backend):
            super().load_model(**arguments)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Make the KV cache in the pool."""
        with _in_place_of_camem(self.sleep_mode_backend):
            super().initialize_from_config(kv_cache_config)

    def reload_weights(self, *arguments: Any, **named: Any) -> None:
        """Load the checkpoint again, in place: vLLM's GPU worker has this call, vllm-ascend's has not."""
        self.model_runner.reload_weights(*arguments, **named)

    def sleep(self, level: int = 1) -> None:
        """As always; with `enable_sleep_mode_extra_cleanup` HCCL's buffers and the graphs go as well."""
        if get_ascend_config().enable_sleep_mode_extra_cleanup:
            self.sleep_wakeup_manager.sleep()
        super().sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As always: weights of experts keep the layout in which they are computed with."""
        super().wake_up(tags)
        if get_ascend_config().enable_sleep_mode_extra_cleanup:
            self.sleep_wakeup_manager.wakeup(tags)


def _obey_logprobs_mode(sampler: Any, mode: str) -> None:
    """vllm-ascend makes its sampler without it: log-probabilities would be those of temperature 1."""
    sampler.logprobs_mode = sampler.topk_topp_sampler.logprobs_mode = mode


@contextmanager
def _in_place_of_camem(backend: SleepPoolBackend) -> Iterator[None]:
    """vllm-ascend asks CaMemAllocator for its memory pools, by its one instance; meanwhile that is `backend`."""
    before = CaMemAllocator.instance
    CaMemAllocator.instance = _BackendAsCaMem(backend)
    try:
        yield
    finally:
        CaMemAllocator.instance = before


class _BackendAsCaMem:
    """What vllm-ascend calls of CaMemAllocator while it loads and makes caches."""

    def __init__(self, backend: SleepPoolBackend) -> None:
        self._backend = backend

    def get_current_usage(self) -> int:
        """vllm-ascend wants none before it loads, since its pool has room for one engine; this one is an engine's."""
        return 0

    def use_memory_pool(self, tag: str) -> AbstractContextManager[None]:
        """What is made within sleeps under the tag."""
        return self._backend.region(tag)

    def use_allocation_tag(self, _tag: str) -> AbstractContextManager[None]:
        """For what is to stay; the pool keeps all that is no cache and no parameter, whatever its tag."""
        return nullcontext()
