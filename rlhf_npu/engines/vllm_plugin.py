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
# The workers whose weights and cache are in the sleep pool; on an NPU vllm-ascend has a pool of its own.
SLEEP_WORKERS = {
    "cpu": "rlhf_npu.engines.sleep_cpu_worker.SleepCPUWorker",
    "cuda": "rlhf_npu.engines.sleep_gpu_worker.SleepGPUWorker",
}
TAGS = ("weights", "kv_cache", "scheduling")  # vLLM's own; the last is a pause without sleep


def register() -> None:
    """Offer sleep mode on this process's platform, for engines that ask for it and name no worker of their own."""
    if os.environ.get(SWITCH) == "0":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        _offer_sleep_mode(type(current_platform), SLEEP_WORKERS["cuda"])
    if current_platform.is_cpu():
        _offer_sleep_mode(type(current_platform), SLEEP_WORKERS["cpu"])


def _offer_sleep_mode(platform: Any, worker: str) -> None:
    if getattr(platform, "sleeps_in_pool", False):
        return
    check = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        if model is not None and model.enable_sleep_mode and parallel.worker_cls == "auto":
            parallel.worker_cls = worker
            _refuse_unknown_tags()
        check(cls, vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.is_sleep_mode_available = lambda _: True
    platform.sleeps_in_pool = True


def _refuse_unknown_tags() -> None:
    """Make the engines' `wake_up` raise ValueError, which a server answers with 400; vLLM only logs a warning."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    for engine in (AsyncLLM, LLMEngine):
        if not hasattr(engine.wake_up, "checks_tags"):
            engine.wake_up = _with_checked_tags(engine.wake_up)


def _with_checked_tags(wake_up: Any) -> Any:
    @functools.wraps(wake_up)
    def checked(self: Any, tags: Sequence[str] | None = None) -> Any:
        if unknown := [tag for tag in tags or () if tag not in TAGS]:
            raise ValueError(f"wake_up: unknown tags {unknown}; want some of {list(TAGS)}, or none for all")
        return wake_up(self, tags)

    checked.checks_tags = True  # type: ignore[attr-defined]
    return checked
