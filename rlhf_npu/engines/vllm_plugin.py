"""vLLM's plug-in: with `enable_sleep_mode=True` its workers sleep in the sleep pool, on the CPU too.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes, before it reads
its configuration. RLHF_NPU_SLEEP_MODE=0 leaves vLLM as it is.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

SWITCH = "RLHF_NPU_SLEEP_MODE"
# The workers whose weights and cache are in the sleep pool.
SLEEP_WORKERS = {
    "cpu": "rlhf_npu.engines.sleep_cpu_worker.SleepCPUWorker",
    "cuda": "rlhf_npu.engines.sleep_gpu_worker.SleepGPUWorker",
    "npu": "rlhf_npu.engines.sleep_npu_worker.SleepNPUWorker",
}
TAGS = ("weights", "kv_cache", "scheduling")  # vLLM's own; the last is a pause without sleep
# Names of mechanisms, which vLLM has since 0.32: this one's, and vLLM's own.
BACKEND = "sleep_pool"
VLLMS_BACKEND = "cumem"


def register() -> None:
    """Offer sleep mode on this process's platform, for engines that ask for it and name no worker of their own."""
    if os.environ.get(SWITCH) == "0":
        return
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if kind in SLEEP_WORKERS:
        _offer_sleep_mode(type(current_platform), kind)


def _offer_sleep_mode(platform: Any, kind: str) -> None:
    if getattr(platform, "sleeps_in_pool", False):
        return
    check = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        ours = _is_ours(vllm_config)
        if ours and kind != "npu":
            vllm_config.parallel_config.worker_cls = SLEEP_WORKERS[kind]
        check(cls, vllm_config)
        if ours:
            _take_over(vllm_config, kind)

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.is_sleep_mode_available = lambda _: True
    platform.sleeps_in_pool = True


def _is_ours(vllm_config: Any) -> bool:
    """Whether the engine asks for sleep mode and leaves open how."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model is None or not model.enable_sleep_mode or parallel.worker_cls != "auto":
        return False
    return getattr(model, "sleep_mode_backend", VLLMS_BACKEND) in (VLLMS_BACKEND, BACKEND)


def _take_over(vllm_config: Any, kind: str) -> None:
    from rlhf_npu.engines.sleep_backend import register_backend

    register_backend()
    if hasattr(vllm_config.model_config, "sleep_mode_backend"):
        vllm_config.model_config.sleep_mode_backend = BACKEND
    if kind == "npu":  # vllm-ascend chooses among workers, and only then it is known which
        from rlhf_npu.engines.npu_traps import refuse_npu_traps

        refuse_npu_traps(vllm_config)
        vllm_config.parallel_config.worker_cls = SLEEP_WORKERS[kind]
    _watch_engines()


def _watch_engines() -> None:
    """Make the engines' `wake_up` refuse unknown tags, of which vLLM only warns, and a server's publish metrics."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    if not hasattr(LLMEngine, "checks_tags"):
        LLMEngine.wake_up = _with_checked_tags(LLMEngine.wake_up)
        AsyncLLM.wake_up = _with_checked_tags(_with_metrics(AsyncLLM.wake_up, "wake"))
        AsyncLLM.sleep = _with_metrics(AsyncLLM.sleep, "sleep")
        LLMEngine.checks_tags = True


def _with_checked_tags(wake_up: Any) -> Any:
    """ValueError, which a server answers with 400, before anything has changed."""

    @functools.wraps(wake_up)
    def checked(self: Any, tags: Sequence[str] | None = None) -> Any:
        if unknown := [tag for tag in tags or () if tag not in TAGS]:
            raise ValueError(f"wake_up: unknown tags {unknown}; want some of {list(TAGS)}, or none for all")
        return wake_up(self, tags)

    return checked


def _with_metrics(operation: Any, phase: str) -> Any:
    """Publish what the workers' pools say after each sleep and wake-up of a server."""

    @functools.wraps(operation)
    async def published(self: Any, *arguments: Any, **named: Any) -> Any:
        result = await operation(self, *arguments, **named)
        if self.vllm_config.parallel_config.worker_cls in SLEEP_WORKERS.values():
            from rlhf_npu.engines.sleep_metrics import publish

            publish(phase, await self.collective_rpc("sleep_pool_stats"))
        return result

    return published
