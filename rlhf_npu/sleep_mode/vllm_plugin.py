"""vLLM's plug-in: with `enable_sleep_mode=True` its workers sleep in the sleep pool, on the CPU too.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes, before it reads
its configuration. RLHF_NPU_SLEEP_MODE=0 leaves vLLM as it is.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from rlhf_npu.sleep_mode.names import BACKEND, SLEEP_WORKERS, VLLMS_BACKEND

SWITCH = "RLHF_NPU_SLEEP_MODE"


def register() -> bool:
    """Offer sleep mode on this process's platform, for engines that ask for it and name no worker of their own.

    Returns:
        Whether it is offered: not when it is switched off, or on a platform without a worker for it.
    """
    if os.environ.get(SWITCH) == "0":
        return False
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if kind not in SLEEP_WORKERS:
        return False
    _offer_sleep_mode(type(current_platform), kind)
    if "vllm.v1.engine.core" in sys.modules:  # an engine's own process, to which its configuration comes complete
        from rlhf_npu.sleep_mode.engine_calls import extend_engine_core

        extend_engine_core()
    return True


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
    from rlhf_npu.sleep_mode.backend import register_backend
    from rlhf_npu.sleep_mode.engine_calls import extend_engines

    register_backend()
    if hasattr(vllm_config.model_config, "sleep_mode_backend"):
        vllm_config.model_config.sleep_mode_backend = BACKEND
    if kind == "npu":  # vllm-ascend chooses among workers, and only then it is known which
        from rlhf_npu.sleep_mode.npu_traps import refuse_npu_traps

        refuse_npu_traps(vllm_config)
        vllm_config.parallel_config.worker_cls = SLEEP_WORKERS[kind]
    extend_engines()
