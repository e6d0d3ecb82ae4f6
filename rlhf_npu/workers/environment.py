"""What a worker's process needs in its environment before torch, vLLM and DeepSpeed are imported."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf_npu.platform import Platform
from rlhf_npu.run_id import RUN_ID_VARIABLE


@dataclass(frozen=True)
class Rank:
    """Where a worker stands: its place among all devices and among those of its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def of(cls, rank: int, world_size: int, per_node: int) -> Rank:
        """The place of `rank` where each node has `per_node` consecutive ranks."""
        return cls(rank, world_size, rank % per_node, per_node)

    @property
    def node(self) -> int:
        """Which of the nodes it is on, in the order of their ranks."""
        return self.rank // self.local_world_size


def static_environment(rank: Rank, platform: Platform, run_id: str) -> dict[str, str]:
    """Variables known before the process starts."""
    # Ray shows an accelerator worker only its own device, whose index is then 0.
    local_rank = rank.local_rank if platform.name == "cpu" else 0
    return {
        "RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(rank.local_world_size),
        RUN_ID_VARIABLE: run_id,
        "DS_ACCELERATOR": platform.deepspeed_accelerator,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **platform.environment,
    }


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def worker_log(output: Path, rank: int) -> Path:
    """The file that a worker's prints go to."""
    return output / "logs" / f"worker_{rank}.log"


def log_to(path: Path) -> None:
    """Send what this process and its libraries print to `path`, so that the driver's terminal stays readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file, stream.fileno())
    os.close(file)
