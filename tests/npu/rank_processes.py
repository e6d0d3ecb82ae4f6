"""Ranks in processes of their own that live for several calls, forked from a server that has imported torch_npu."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from rlhf_npu.workers.environment import free_port

SECONDS = 60


@dataclass(frozen=True)
class Failure:
    """What a rank raised."""

    words: str


class RankProcesses:
    """A world of ranks, each on a simulated NPU of its own and with HCCL as torch.distributed's backend."""

    def __init__(self, size: int, **environment: str) -> None:
        """Starts `size` processes with these variables; a rank joins the world by its first call of the backend."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch_npu"])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        world |= {"ACLSIM_DEVICES": str(size), "OMP_NUM_THREADS": "1"} | environment
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, world | {"RANK": str(rank)}), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        """Ranks end as programs do; what does not end within a few seconds is killed."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(5)
            process.kill()
            process.join()

    @property
    def size(self) -> int:
        return len(self._processes)

    def start(self, rank: int, function: Callable[..., Any], *args: Any) -> None:
        """Has one rank call `function(*args)`; `result` gets what it returns."""
        self._ends[rank].send((function, args))

    def result(self, rank: int, seconds: float = SECONDS) -> Any:
        """What the rank's oldest call returned, or the Failure that it raised.

        Raises:
            AssertionError: it has not answered within `seconds`.
        """
        assert self._ends[rank].poll(seconds), f"rank {rank} has not answered within {seconds} s"
        return self._ends[rank].recv()

    def attempt_of(self, rank: int, function: Callable[..., Any], *args: Any, seconds: float = 10) -> Any:
        """`function(*args)` on one rank alone: its result or Failure."""
        self.start(rank, function, *args)
        return self.result(rank, seconds)

    def attempt(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on all ranks at once: results or Failures by rank."""
        for rank in range(self.size):
            self.start(rank, function, *args)
        return [self.result(rank) for rank in range(self.size)]

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """As `attempt`, but a failure fails the test."""
        results = self.attempt(function, *args)
        for rank, result in enumerate(results):
            assert not isinstance(result, Failure), f"rank {rank}:\n{result.words}"
        return results

    def kill(self, rank: int) -> None:
        """Ends the rank as the kernel ends a process that is out of memory."""
        os.kill(self._processes[rank].pid, signal.SIGKILL)


def _serve(end: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    import torch
    import torch.distributed as dist
    import torch_npu

    torch.set_num_threads(1)
    torch_npu.npu.set_device(int(os.environ["RANK"]))
    dist.init_process_group("cpu:gloo,npu:hccl")
    while True:
        try:
            function, args = end.recv()
        except EOFError:
            dist.destroy_process_group()
            return
        try:
            end.send(function(*args))
        except Exception:  # noqa: BLE001  # whatever it is, the test shows it
            end.send(Failure(traceback.format_exc()))
