from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from rlhf_npu.algorithms.rollout_mismatch import MAXIMA, SUMS, mismatch_metrics, rollout_mismatch
from tests.algorithms.ragged import normal, random_batch


def reduced(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    sums = {name: torch.stack([part[name] for part in parts]).sum() for name in SUMS}
    return sums | {name: torch.stack([part[name] for part in parts]).max() for name in MAXIMA}


def test_metrics_by_definition_whatever_the_cut() -> None:
    noise, mask = random_batch(0, 7, 6)
    old = -normal(1, 7, 6).abs()
    rollout = old + 0.1 * noise
    pairs = [
        list(zip(r[m != 0].tolist(), o[m != 0].tolist(), strict=True))
        for r, o, m in zip(rollout, old, mask, strict=True)
    ]
    tokens = [pair for row in pairs for pair in row]
    probs = [abs(math.exp(r) - math.exp(o)) for r, o in tokens]
    logps = [abs(r - o) for r, o in tokens]
    expected = {
        "rollout_corr/kl": statistics.mean(r - o for r, o in tokens),
        "rollout_corr/k3_kl": statistics.mean(math.exp(o - r) - 1 - (o - r) for r, o in tokens),
        "rollout_corr/log_ppl_diff": statistics.mean(statistics.mean(r - o for r, o in row) for row in pairs if row),
        "rollout_corr/probs_diff_mean": statistics.mean(probs),
        "rollout_corr/probs_diff_max": max(probs),
        "rollout_corr/logp_diff_mean": statistics.mean(logps),
        "rollout_corr/logp_diff_max": max(logps),
    }
    for cut in (1, 3, 6):
        parts = [rollout_mismatch(rollout[rows], old[rows], mask[rows]) for rows in (slice(cut), slice(cut, None))]
        assert set(parts[0]) == {*SUMS, *MAXIMA}
        assert mismatch_metrics(reduced(parts)) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_equal_probabilities_do_not_differ() -> None:
    log_probs, mask = normal(2, 3, 4), torch.ones(3, 4)
    metrics = mismatch_metrics(rollout_mismatch(log_probs, log_probs.clone(), mask))
    assert set(metrics.values()) == {0.0}


def test_no_tokens_at_all() -> None:
    metrics = mismatch_metrics(rollout_mismatch(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)))
    assert set(metrics.values()) == {0.0}
