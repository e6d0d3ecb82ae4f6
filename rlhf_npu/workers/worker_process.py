"""The process of a rank: what the Ray actors of every kind of run are made of."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import ray
import torch

from rlhf_npu.engines.process_group import join_process_group
from rlhf_npu.errors import WorkerError
from rlhf_npu.garbage import search_as_usual
from rlhf_npu.platform import PLATFORMS
from rlhf_npu.run_id import RUN_ID_VARIABLE
from rlhf_npu.workers.environment import Rank, free_port, log_to, worker_log
from rlhf_npu.workers.shared_memory import join_run


class WorkerProcess:
    """A process on one device. Every rank gets each call, in the order in which the driver makes them."""

    def __init__(self, rank: Rank, platform_name: str, output: str, driver_node: str) -> None:
        join_run(os.environ[RUN_ID_VARIABLE], may_be_first=ray.get_runtime_context().get_node_id() != driver_node)
        self._rank = rank
        self._platform = PLATFORMS[platform_name]
        self._output = Path(output)
        self._log = worker_log(self._output, rank.rank)
        log_to(self._log)

    def call(self, method: str, *args: Any) -> Any:
        """Call `method`; what it raises is in this worker's log as well.

        Raises:
            WorkerError: it tried to end the process, as a user's function may.
        """
        try:
            return getattr(self, method)(*args)
        except (SystemExit, KeyboardInterrupt) as error:
            traceback.print_exc()
            raise WorkerError(
                f"rank {self._rank.rank}: {method} raised {error!r}, which would have ended the worker; "
                f"its log is {self._log}"
            ) from error
        except Exception:
            traceback.print_exc()
            raise

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it, for the ranks to meet at."""
        return ray.util.get_node_ip_address(), free_port()

    def join(self, address: str, port: int, seed: int) -> None:
        """Meet the other ranks at `address:port`."""
        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        self._platform.activate()
        join_process_group(self._platform)
        torch.manual_seed(seed)

    def settle(self) -> None:
        """All that stays until the end is built."""
        search_as_usual()

    def close(self) -> None:
        """Leave the process group."""
        if torch.distributed.is_initialized():  # vllm-ascend's engine has ended it
            torch.distributed.destroy_process_group()
