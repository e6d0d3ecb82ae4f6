"""Advantages and losses once more, in plain Python and float64, from the papers' formulas."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

Rows = list[list[float]]
Estimator = Callable[[Rows, list[int]], Rows]


def dense(values: Tensor, mask: Tensor) -> Rows:
    """The values at the tokens of each response, in order."""
    pairs = zip(values.tolist(), mask.tolist(), strict=True)
    return [[v for v, m in zip(row, keep, strict=True) if m] for row, keep in pairs]


def peers(values: Sequence[float], groups: Sequence[int], group: int) -> list[float]:
    return [value for value, other in zip(values, groups, strict=True) if other == group]


def grpo(rewards: Rows, groups: list[int], by_std: bool = True) -> Rows:
    scores = [sum(row) for row in rewards]
    result = []
    for row, score, group in zip(rewards, scores, groups, strict=True):
        own = peers(scores, groups, group)
        spread = statistics.stdev(own) if len(own) > 1 else 0.0
        centred = score - statistics.fmean(own)
        result.append([centred / (spread + 1e-6) if by_std else centred] * len(row))
    return result


def rloo(rewards: Rows, groups: list[int]) -> Rows:
    scores = [sum(row) for row in rewards]
    result = []
    for index, (row, group) in enumerate(zip(rewards, groups, strict=True)):
        others = [s for i, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == group and i != index]
        advantage = scores[index] - statistics.fmean(others) if others else 0.0
        result.append([advantage] * len(row))
    return result


def opo(rewards: Rows, groups: list[int]) -> Rows:
    result = []
    for row, group in zip(rewards, groups, strict=True):
        own = [other for other, g in zip(rewards, groups, strict=True) if g == group]
        tokens = sum(map(len, own))
        baseline = sum(len(other) * sum(other) for other in own) / tokens if tokens else 0.0
        result.append([sum(row) - baseline if len(own) > 1 else 0.0] * len(row))
    return result


def gpg(rewards: Rows, groups: list[int]) -> Rows:
    scores = [sum(row) for row in rewards]
    telling = [len(set(peers(scores, groups, group))) > 1 for group in groups]
    alpha = len(scores) / sum(telling) if any(telling) else 0.0
    means = [statistics.fmean(peers(scores, groups, group)) for group in groups]
    return [
        [alpha * (score - mean) if tells else 0.0] * len(row)
        for row, score, mean, tells in zip(rewards, scores, means, telling, strict=True)
    ]


def pass_at_k(rewards: Rows, groups: list[int], by_std: bool = True) -> Rows:
    scores = [sum(row) for row in rewards]
    result = []
    for index, (row, group) in enumerate(zip(rewards, groups, strict=True)):
        own = peers(scores, groups, group)
        others = [s for i, (s, g) in enumerate(zip(scores, groups, strict=True)) if g == group and i != index]
        gain = max(own) - max(others) if others else 0.0
        spread = statistics.stdev(own) + 1e-6 if len(own) > 1 else 1.0
        result.append([gain / spread if by_std else gain] * len(row))
    return result


def returns(rewards: Rows, gamma: float) -> Rows:
    return [[sum(gamma ** (k - t) * row[k] for k in range(t, len(row))) for t in range(len(row))] for row in rewards]


def whitened(rows: Rows) -> Rows:
    tokens = [value for row in rows for value in row]
    mean, scale = statistics.fmean(tokens), math.sqrt(statistics.pvariance(tokens) + 1e-8)
    return [[(value - mean) / scale for value in row] for row in rows]


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def ppo_objective(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)


def sapo_objective(ratio: float, advantage: float, tau_pos: float, tau_neg: float) -> float:
    tau = tau_pos if advantage > 0 else tau_neg
    return 4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage


def gmpo_objective(log_ratios: Sequence[float], advantage: float, low: float, high: float) -> float:
    """Of a response whose tokens all have the same advantage."""
    side = min if advantage > 0 else max
    mean = statistics.fmean(side(value, clip(value, -low, high)) for value in log_ratios)
    return math.exp(mean) * advantage


def covariances(log_probs: Sequence[float], advantages: Sequence[float]) -> list[float]:
    mean_log_prob, mean_advantage = statistics.fmean(log_probs), statistics.fmean(advantages)
    return [
        (log_prob - mean_log_prob) * (advantage - mean_advantage)
        for log_prob, advantage in zip(log_probs, advantages, strict=True)
    ]
