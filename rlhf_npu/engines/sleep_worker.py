"""vLLM's CPU worker with its weights and its KV cache in the sleep pool.

vLLM itself refuses sleep mode on the CPU. This worker gives `LLM.sleep` and `LLM.wake_up` there the meaning
that they have on an accelerator, so that the loop runs the same code everywhere.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from allocator import SleepPool
from rlhf_npu.engines.updatable_linear import keep_linear_weights
from rlhf_npu.workers.environment import RUN_ID_VARIABLE

WEIGHTS = "weights"
KV_CACHE = "kv_cache"


class SleepCPUWorker(CPUWorker):
    """A CPU worker that sleeps; named to vLLM through `worker_cls`."""

    def init_device(self) -> None:
        """Name vLLM's shared memory after this run: what a crashed run left behind cannot collide with it."""
        if run_id := os.environ.get(RUN_ID_VARIABLE):
            self.distributed_init_method = f"env://:{run_id}"
        keep_linear_weights()
        super().init_device()
        self._saved_buffers: dict[str, torch.Tensor] = {}

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[None]:
        """vLLM's own seam for memory pools; its other tags (runtime, workspace) stay outside."""
        return SleepPool.get("cpu").region(tag) if tag in (WEIGHTS, KV_CACHE) else nullcontext()

    def sleep(self, level: int = 1) -> None:
        """Level 1 offloads the weights and drops the KV cache; level 2 drops both and keeps the buffers."""
        if level == 2:
            self._saved_buffers = {name: buffer.clone() for name, buffer in self._named_buffers()}
        SleepPool.get("cpu").sleep(level=level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """Map `tags` (all if None) again and restore the buffers that level 2 dropped."""
        SleepPool.get("cpu").wake_up(tags)
        if tags is None or WEIGHTS in tags:
            self._restore_buffers()

    def _restore_buffers(self) -> None:
        for name, buffer in self._named_buffers():
            if name in self._saved_buffers:
                buffer.copy_(self._saved_buffers[name])
        self._saved_buffers = {}

    def _named_buffers(self) -> list[tuple[str, torch.Tensor]]:
        return list(self.model_runner.model.named_buffers())
