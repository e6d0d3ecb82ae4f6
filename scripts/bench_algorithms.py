"""Seconds of the advantage estimators on one thread of a CPU: python scripts/bench_algorithms.py

What counts is the time of the thread itself, so other programs disturb it less; the best of several runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from rlhf_npu.algorithms.advantages import ADVANTAGES, AdvantageInputs
from rlhf_npu.config import AlgorithmConfig
from rlhf_npu.config.algorithm import OF_GROUPS

RUNS = 7


def best_ms(call: Callable[[], object]) -> float:
    """Milliseconds of the fastest of several calls."""
    call()
    return min(_timed(call) for _ in range(RUNS)) * 1e3


def _timed(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def masks(rows: int, width: int) -> dict[str, torch.Tensor]:
    """Response masks (rows, width) of the kinds that there are."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    return {
        "whole rows": torch.ones(rows, width),
        "ragged ends": (torch.arange(width) < lengths).float(),
        "holes everywhere": (torch.rand(rows, width, generator=generator) < 0.7).float(),
    }


def bench_of_sequences(rows: int, width: int) -> None:
    """The estimators that sum over time."""
    rewards, values = torch.randn(rows, width), torch.randn(rows, width)
    for kind, mask in masks(rows, width).items():
        inputs = AdvantageInputs(rewards, mask, values)
        for name in ("gae", "reinforce_plus_plus"):
            config = AlgorithmConfig(adv_estimator=name, gamma=0.999, lam=0.95)
            milliseconds = best_ms(partial(ADVANTAGES[name], inputs, config))
            print(f"{name:30s} {rows} x {width}, {kind:18s} {milliseconds:8.1f} ms")


def bench_of_groups(rows: int, responses: int) -> None:
    """The estimators that compare a prompt's responses, of one token each: what they add to spreading them."""
    inputs = AdvantageInputs(torch.randn(rows, 1), torch.ones(rows, 1), group_ids=torch.arange(rows) // responses)
    for name in OF_GROUPS:
        config = AlgorithmConfig(adv_estimator=name)
        milliseconds = best_ms(partial(ADVANTAGES[name], inputs, config))
        print(f"{name:30s} {rows} responses, {responses} a prompt {milliseconds:8.2f} ms")


if __name__ == "__main__":
    torch.set_num_threads(1)
    bench_of_groups(8192, 8)
    bench_of_sequences(1024, 8192)
