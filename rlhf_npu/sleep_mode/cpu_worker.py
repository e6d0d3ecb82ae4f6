"""vLLM's CPU worker in the sleep pool."""

from __future__ import annotations

import os

from vllm.v1.worker.cpu_worker import CPUWorker

from rlhf_npu.run_id import RUN_ID_VARIABLE
from rlhf_npu.sleep_mode.cpu_weights import make_cpu_weights_updatable
from rlhf_npu.sleep_mode.worker import SleepMixin


class SleepCPUWorker(SleepMixin, CPUWorker):
    """A CPU worker that sleeps; named to vLLM through `worker_cls`."""

    def init_device(self) -> None:
        """Name vLLM's shared memory after this run: what a crashed run left behind cannot collide with it."""
        if run_id := os.environ.get(RUN_ID_VARIABLE):
            self.distributed_init_method = f"env://:{run_id}"
        make_cpu_weights_updatable()
        super().init_device()
