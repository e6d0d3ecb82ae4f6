"""Several ranks in one process: what each asks of all is answered from what all have."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import Ranks

Result = TypeVar("Result")


def run_together(calls: Sequence[Callable[[Ranks], Result]]) -> list[Result]:
    """The result of each rank's call."""
    barrier = threading.Barrier(len(calls), timeout=60)
    told: list[Tensor] = [torch.empty(0)] * len(calls)

    def run(rank: int) -> Result:
        def exchange(own: Tensor) -> list[Tensor]:
            told[rank] = own
            barrier.wait()
            everyones = list(told)
            barrier.wait()
            return everyones

        ranks = Ranks(lambda own: torch.stack(exchange(own)).sum(0), lambda own: torch.cat(exchange(own)))
        return calls[rank](ranks)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, range(len(calls))))
