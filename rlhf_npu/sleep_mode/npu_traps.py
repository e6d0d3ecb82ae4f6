"""What sleep mode cannot work with in vllm-ascend, refused before anything is loaded.

vllm-ascend itself refuses the first of them only when it is to wake up.
"""

from __future__ import annotations

from typing import Any

from allocator.torch_mem_pool import refuse_expandable_segments
from rlhf_npu.errors import ConfigError
from rlhf_npu.sleep_mode.backend import FIRST_ENGINE

NPU_WORKER = "vllm_ascend.worker.worker.NPUWorker"


def refuse_npu_traps(vllm_config: Any) -> None:
    """Check the configuration after vllm-ascend completed it.

    Raises:
        ConfigError: weights in FRACTAL_NZ, or a worker that cannot sleep.
        HookError: expandable segments are switched on by an environment variable.
    """
    from vllm_ascend.ascend_config import get_ascend_config

    refuse_worker(vllm_config.parallel_config.worker_cls)
    refuse_fractal_nz(get_ascend_config().weight_nz_mode)
    refuse_expandable_segments("npu")


def refuse_worker(worker_cls: str) -> None:
    """Sleep mode is made for vllm-ascend's worker for Atlas A2 and A3."""
    if worker_cls != NPU_WORKER:
        raise ConfigError(
            f"vllm-ascend chose the worker {worker_cls}, which sleep mode is not made for: it works with {NPU_WORKER}. "
            "On Atlas 300I (310P) and with xlite_graph_config switch sleep mode off (enable_sleep_mode=False)."
        )


def refuse_fractal_nz(weight_nz_mode: int) -> None:
    """Weights in FRACTAL_NZ cannot be overwritten in place by weights in ND: they would be silently wrong."""
    if weight_nz_mode != 0:
        raise ConfigError(
            f"weight_nz_mode={weight_nz_mode}: vllm-ascend would keep weights in the format FRACTAL_NZ, into which new "
            "weights cannot be loaded while training goes on. Set VLLM_ASCEND_ENABLE_NZ=0 in the environment, or "
            'weight_nz_mode to 0: additional_config={"weight_nz_mode": 0}.'
        )


def refuse_second_engine(namespace: str) -> None:
    """vllm-ascend keeps the rotary tables of a process's first engine for all others, which then read what sleeps."""
    if namespace != FIRST_ENGINE:
        raise ConfigError(
            "this process has had an engine with sleep mode before: vllm-ascend shares tables among the engines of a "
            "process, and they would be read while the first one sleeps. Start each engine in a process of its own."
        )
