"""What sleep mode cannot work with on an NPU is refused in words, before anything is loaded."""

from __future__ import annotations

import pytest

from rlhf_npu.errors import ConfigError
from rlhf_npu.sleep_mode.npu_traps import NPU_WORKER, refuse_fractal_nz, refuse_second_engine, refuse_worker


def test_weights_in_fractal_nz() -> None:
    refuse_fractal_nz(0)
    for mode in (1, 2):
        with pytest.raises(ConfigError, match=f"weight_nz_mode={mode}.*VLLM_ASCEND_ENABLE_NZ=0"):
            refuse_fractal_nz(mode)


def test_workers_that_cannot_sleep() -> None:
    refuse_worker(NPU_WORKER)
    with pytest.raises(ConfigError, match=r"worker_310p\.NPUWorker310.*310P.*enable_sleep_mode=False"):
        refuse_worker("vllm_ascend._310p.worker_310p.NPUWorker310")


def test_a_second_engine_of_a_process() -> None:
    refuse_second_engine("default")
    with pytest.raises(ConfigError, match="in a process of its own"):
        refuse_second_engine("engine1")
