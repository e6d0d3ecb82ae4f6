"""Importance weights and rejections by the ratio of the trainer's probabilities to the rollout's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import Ranks
from rlhf_npu.algorithms.rollout_correction import RolloutCorrection, correct_rollout
from rlhf_npu.config import RolloutCorrectionConfig
from rlhf_npu.config.rollout_correction import REJECTIONS
from tests.algorithms import references
from tests.algorithms.ragged import holed_batch, normal
from tests.algorithms.together import run_together

RS, IS = "rollout_corr/rollout_rs", "rollout_corr/rollout_is"


def log_probs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    noise, mask = holed_batch(seed, 9, 8)
    rollout = -normal(seed + 1, 9, 8).abs() - 0.3
    return rollout, rollout + 0.6 * noise, mask


def corrected(seed: int = 0, **keys: object) -> tuple[RolloutCorrection, references.Rows, Tensor]:
    """The correction, and the log-ratios of each response's tokens."""
    rollout, old, mask = log_probs(seed)
    config = RolloutCorrectionConfig(**keys)  # type: ignore[arg-type]
    result = correct_rollout(rollout, old, mask, config, Ranks())
    return result, references.dense(old - rollout, mask), mask


@pytest.mark.parametrize("lower", [None, 0.6])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_are_truncated_or_masked(level: str, lower: float | None) -> None:
    result, rows, mask = corrected(rollout_is=level, rollout_is_threshold=1.5, rollout_is_threshold_lower=lower)
    assert result.weights is not None
    assert not result.weights[mask == 0].any()
    assert torch.equal(result.kept, mask)
    expected = []
    for row in rows:
        raw = [math.exp(value) for value in row] if level == "token" else [math.exp(sum(row))] * len(row)
        expected.append([min(r, 1.5) if lower is None else r * (lower <= r <= 1.5) for r in raw])
    for got, wanted in zip(references.dense(result.weights, mask), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-9)
    tokens = [value for row in expected for value in row]
    mean, square = statistics.fmean(tokens), statistics.fmean(value * value for value in tokens)
    assert result.metrics[f"{IS}_mean"] == pytest.approx(mean)
    assert result.metrics[f"{IS}_std"] == pytest.approx(statistics.pstdev(tokens))
    assert result.metrics[f"{IS}_max"] == pytest.approx(max(tokens))
    assert result.metrics[f"{IS}_min"] == pytest.approx(min(tokens))
    assert result.metrics[f"{IS}_eff_sample_size"] == pytest.approx(mean * mean / square)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_fractions_outside_of_the_bounds_are_of_what_the_weights_are_of(level: str) -> None:
    result, rows, _ = corrected(rollout_is=level, rollout_is_threshold=1.5)
    ratios = [math.exp(v) for row in rows for v in row] if level == "token" else [math.exp(sum(r)) for r in rows if r]
    high, low = statistics.fmean(r > 1.5 for r in ratios), statistics.fmean(r < 1 / 1.5 for r in ratios)
    assert 0 < high < 1
    assert result.metrics[f"{IS}_ratio_fraction_high"] == pytest.approx(high)
    assert result.metrics[f"{IS}_ratio_fraction_low"] == pytest.approx(low)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalized_weights_have_mean_1(level: str) -> None:
    result, _, mask = corrected(rollout_is=level, rollout_is_batch_normalize=True)
    plain, _, _ = corrected(rollout_is=level)
    assert result.weights is not None
    assert plain.weights is not None
    rows = references.dense(result.weights, mask)
    counted = [v for row in rows for v in row] if level == "token" else [row[0] for row in rows if row]
    assert statistics.fmean(counted) == pytest.approx(1)
    factor = result.metrics[f"{IS}_batch_norm_factor"]
    torch.testing.assert_close(result.weights * factor, plain.weights)


def divergence(log_ratio: float, estimator: str) -> float:
    return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": math.exp(log_ratio) - 1 - log_ratio}[estimator]


@pytest.mark.parametrize("rejection", REJECTIONS)
def test_what_is_out_of_bounds_is_left_out(rejection: str) -> None:
    level, estimator = rejection.rsplit("_", 1)
    bounds_of_ratio = (0.8, 1.3) if level == "seq_mean" else (0.4, 2.0)
    lowest, upper = bounds_of_ratio if estimator == "k1" else (0.0, 0.8 if level == "seq_sum" else 0.15)
    lower = lowest if estimator == "k1" else None
    result, rows, mask = corrected(rollout_rs=rejection, rollout_rs_threshold=upper, rollout_rs_threshold_lower=lower)
    joins: dict[str, Callable[[list[float]], float]] = {"seq_sum": sum, "seq_mean": statistics.fmean, "seq_max": max}
    join = joins.get(level)

    def keeps(value: float) -> float:
        inside = math.log(lowest) <= value <= math.log(upper) if estimator == "k1" else value <= upper
        return float(inside)

    expected = []
    for row in rows:
        values = [divergence(value, estimator) for value in row]
        expected.append([keeps(join(values))] * len(row) if join and row else [keeps(value) for value in values])
    assert references.dense(result.kept, mask) == expected
    assert not result.kept[mask == 0].any()
    assert result.weights is None
    tokens = [value for row in expected for value in row]
    assert 0 < statistics.fmean(tokens) < 1
    assert result.metrics[f"{RS}_masked_fraction"] == pytest.approx(1 - statistics.fmean(tokens))
    whole = statistics.fmean(all(row) for row in expected if row)
    assert result.metrics[f"{RS}_seq_masked_fraction"] == pytest.approx(1 - whole)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ranks_correct_as_one_would(level: str) -> None:
    rollout, old, mask = log_probs()
    config = RolloutCorrectionConfig(
        rollout_is=level, rollout_is_batch_normalize=True, rollout_rs="seq_mean_k2", rollout_rs_threshold=0.15
    )
    whole = correct_rollout(rollout, old, mask, config, Ranks())

    def part(rows: slice, ranks: Ranks) -> RolloutCorrection:
        return correct_rollout(rollout[rows], old[rows], mask[rows], config, ranks)

    parts = run_together([partial(part, slice(0, 4)), partial(part, slice(4, None))])
    assert whole.weights is not None
    weights = [result.weights for result in parts if result.weights is not None]
    torch.testing.assert_close(torch.cat(weights), whole.weights, rtol=1e-9, atol=1e-12)
    assert torch.equal(torch.cat([result.kept for result in parts]), whole.kept)
    for result in parts:
        assert result.metrics == pytest.approx(whole.metrics)


def test_the_lower_bound_of_a_ratio_is_the_reciprocal_by_default() -> None:
    both, _, _ = corrected(rollout_rs="token_k1", rollout_rs_threshold=1.25, rollout_rs_threshold_lower=0.8)
    one, _, _ = corrected(rollout_rs="token_k1", rollout_rs_threshold=1.25)
    assert torch.equal(both.kept, one.kept)


def test_nothing_is_corrected_by_default() -> None:
    result, _, mask = corrected()
    assert result.weights is None
    assert result.kept is not None
    assert torch.equal(result.kept, mask)
    assert result.metrics == {}


def test_equal_probabilities_need_no_correction() -> None:
    rollout, _, mask = log_probs()
    config = RolloutCorrectionConfig(rollout_is="sequence", rollout_rs="seq_mean_k3", rollout_rs_threshold=1e-3)
    result = correct_rollout(rollout, rollout, mask, config, Ranks())
    assert result.weights is not None
    assert torch.equal(result.weights, mask.double())
    assert torch.equal(result.kept, mask)
    assert result.metrics[f"{IS}_eff_sample_size"] == pytest.approx(1)
