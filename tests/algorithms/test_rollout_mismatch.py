from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from rlhf_npu.algorithms.rollout_mismatch import MAXIMA, SUMS, mismatch_metrics, rollout_mismatch
from tests.algorithms.ragged import normal, random_batch

PERPLEXITIES = ("training_ppl", "rollout_ppl", "training_log_ppl", "rollout_log_ppl")


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
    ppl = [(statistics.mean(-o for _, o in row), statistics.mean(-r for r, _ in row)) for row in pairs if row]
    expected = {
        "rollout_corr/training_log_ppl": statistics.mean(old for old, _ in ppl),
        "rollout_corr/rollout_log_ppl": statistics.mean(rollout for _, rollout in ppl),
        "rollout_corr/training_ppl": statistics.mean(math.exp(old) for old, _ in ppl),
        "rollout_corr/rollout_ppl": statistics.mean(math.exp(rollout) for _, rollout in ppl),
        "rollout_corr/ppl_ratio": statistics.mean(math.exp(old - rollout) for old, rollout in ppl),
        "rollout_corr/log_ppl_abs_diff": statistics.mean(abs(old - rollout) for old, rollout in ppl),
        "rollout_corr/chi2_token": statistics.mean(math.exp(o - r) ** 2 - 1 for r, o in tokens),
        "rollout_corr/chi2_seq": statistics.mean(math.exp(2 * sum(o - r for r, o in row)) - 1 for row in pairs if row),
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
    of_equals = {"ppl_ratio": 1.0} | {name: metrics[f"rollout_corr/{name}"] for name in PERPLEXITIES}
    assert {name for name in metrics if metrics[name]} == {f"rollout_corr/{name}" for name in of_equals}
    assert metrics["rollout_corr/training_ppl"] == metrics["rollout_corr/rollout_ppl"]
    assert metrics["rollout_corr/ppl_ratio"] == 1


def test_no_tokens_at_all() -> None:
    metrics = mismatch_metrics(rollout_mismatch(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)))
    assert set(metrics.values()) == {0.0}
