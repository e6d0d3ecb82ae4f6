"""vLLM's GPU worker in the sleep pool."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from rlhf_npu.sleep_mode.backend import KV_CACHE
from rlhf_npu.sleep_mode.worker import SleepMixin


class SleepGPUWorker(SleepMixin, Worker):
    """A GPU worker that sleeps in this pool instead of vLLM's."""

    def wake_up(self, tags: list[str] | None = None) -> None:
        """As always, and what the runner of vLLM 0.23 must do with a cache that has come back."""
        super().wake_up(tags)
        if (tags is None or KV_CACHE in tags) and hasattr(self.model_runner, "post_kv_cache_wake_up"):
            self.model_runner.post_kv_cache_wake_up()
