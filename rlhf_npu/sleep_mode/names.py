"""The names by which vLLM finds what sleeps in the sleep pool."""

from __future__ import annotations

# The workers whose weights and cache are in the pool, by the kind of device.
SLEEP_WORKERS = {
    "cpu": "rlhf_npu.sleep_mode.cpu_worker.SleepCPUWorker",
    "cuda": "rlhf_npu.sleep_mode.gpu_worker.SleepGPUWorker",
    "npu": "rlhf_npu.sleep_mode.npu_worker.SleepNPUWorker",
}
# Names of mechanisms, which vLLM has since 0.32: this one's, and vLLM's own.
BACKEND = "sleep_pool"
VLLMS_BACKEND = "cumem"
