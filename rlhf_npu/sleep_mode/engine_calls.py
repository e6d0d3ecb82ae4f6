"""What this package adds to the calls of vLLM's engines that sleep in the pool: checks, an order, metrics.

vLLM 0.32 has some of it; 0.23 takes any level and any tag, stops requests before it looks at the level, and lets
requests in again when only the weights are awake, so that they would touch a KV cache that is not there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

from rlhf_npu.sleep_mode.names import SLEEP_WORKERS

LEVELS = (0, 1, 2)
TAGS = ("weights", "kv_cache", "scheduling")  # vLLM's own; the last is a pause without sleep
# The calls of `LLM` that wait until all requests are answered.
WAITING_CALLS = (
    "generate",
    "chat",
    "beam_search",
    "encode",
    "embed",
    "classify",
    "reward",
    "score",
    "wait_for_completion",
)
_MARK = "sleeps_in_pool"


def extend_engines() -> None:
    """In a process that makes engines: check levels and tags, resume in order, publish a server's metrics."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine

    extend_engine_core()
    if hasattr(LLMEngine, _MARK):
        return
    setattr(LLMEngine, _MARK, True)
    LLMEngine.sleep = _with_checked_level(LLMEngine.sleep)
    LLMEngine.wake_up = _with_checked_tags(LLMEngine.wake_up)
    AsyncLLM.sleep = _with_checked_level(_with_metrics(AsyncLLM.sleep))
    AsyncLLM.wake_up = _with_checked_tags(_with_metrics(AsyncLLM.wake_up))
    if hasattr(AsyncLLM, "release_kv_cache_memory"):  # since vLLM 0.32
        AsyncLLM.release_kv_cache_memory = _with_metrics(AsyncLLM.release_kv_cache_memory)
    if offline := sys.modules.get("vllm.entrypoints.llm"):  # a server has no use for it
        _refuse_waiting_asleep(offline.LLM)


def extend_engine_core() -> None:
    """In a process in which an engine runs: let requests in again only when all of it is awake."""
    from vllm.v1.engine.core import EngineCore

    if not hasattr(EngineCore, _MARK):
        setattr(EngineCore, _MARK, True)
        EngineCore.wake_up = _in_order(EngineCore.wake_up)


def _sleeps_in_pool(engine: Any) -> bool:
    return engine.vllm_config.parallel_config.worker_cls in SLEEP_WORKERS.values()


def _refuse_waiting_asleep(llm: Any) -> None:
    for name in WAITING_CALLS:
        if hasattr(llm, name):
            setattr(llm, name, _awake(getattr(llm, name)))


def _awake(call: Any) -> Any:
    """RuntimeError while the engine sleeps: the caller would wait for what nobody but the caller could end."""

    @functools.wraps(call)
    def awake(self: Any, *arguments: Any, **named: Any) -> Any:
        if _sleeps_in_pool(self.llm_engine) and self.llm_engine.is_sleeping():
            raise RuntimeError(
                f"LLM.{call.__name__}: the engine sleeps, or is paused, and would never answer; call wake_up() first"
            )
        return call(self, *arguments, **named)

    return awake


def _with_checked_level(sleep: Any) -> Any:
    """ValueError, which a server answers with 400, before anything has changed."""

    @functools.wraps(sleep)
    def checked(self: Any, level: int = 1, *arguments: Any, **named: Any) -> Any:
        if isinstance(level, bool) or level not in LEVELS:
            raise ValueError(
                f"sleep: level is {level!r}, want 1 (offload weights) or 2 (drop them), or 0 to pause without sleep"
            )
        return sleep(self, level, *arguments, **named)

    return checked


def _with_checked_tags(wake_up: Any) -> Any:
    """ValueError, which a server answers with 400, before anything has changed."""

    @functools.wraps(wake_up)
    def checked(self: Any, tags: Sequence[str] | None = None) -> Any:
        if unknown := [tag for tag in tags or () if tag not in TAGS]:
            raise ValueError(f"wake_up: unknown tags {unknown}; want some of {list(TAGS)}, or none for all")
        return wake_up(self, tags)

    return checked


def _in_order(wake_up: Any) -> Any:
    """Map the tags, then resume the scheduler unless something sleeps on; says whether nothing does."""

    @functools.wraps(wake_up)
    def in_order(self: Any, tags: list[str] | None = None) -> Any:
        if not _sleeps_in_pool(self):
            return wake_up(self, tags)
        memory = None if tags is None else [tag for tag in tags if tag != "scheduling"]
        if memory is None or memory:
            self.model_executor.wake_up(memory)
        if not self.model_executor.is_sleeping:
            self.resume_scheduler()
        return not self.model_executor.is_sleeping

    return in_order


def _with_metrics(operation: Any) -> Any:
    """Publish what the workers' pools say after each sleep and wake-up of a server."""

    @functools.wraps(operation)
    async def published(self: Any, *arguments: Any, **named: Any) -> Any:
        result = await operation(self, *arguments, **named)
        if _sleeps_in_pool(self):
            _metrics_of(self).publish(await self.collective_rpc("sleep_pool_stats"))
        return result

    return published


def _metrics_of(engine: Any) -> Any:
    if not hasattr(engine, "sleep_metrics"):
        from rlhf_npu.sleep_mode.metrics import SleepMetrics

        name = engine.vllm_config.model_config.served_model_name
        engine.sleep_metrics = SleepMetrics(name if isinstance(name, str) else name[0])
    return engine.sleep_metrics
