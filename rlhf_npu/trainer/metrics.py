"""Metrics of one step, under the names that users of verl know."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from rlhf_npu.config import DataConfig
from rlhf_npu.hybrid.engine import SwitchReport
from rlhf_npu.workers.hybrid_worker import Samples

Metrics = dict[str, float]

# TRL's name: the fraction of prompts whose responses all got the same reward.
ZERO_STD = "critic/frac_reward_zero_std"
UNGRADABLE = "reward/ungradable"


class StepClock:
    """Wall-clock seconds of named parts of a step."""

    def __init__(self) -> None:
        self._seconds: Metrics = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[part] = time.perf_counter() - start

    def metrics(self) -> Metrics:
        """`timing_s/<part>`."""
        return {f"timing_s/{part}": seconds for part, seconds in self._seconds.items()}


def switch_metrics(reports: Sequence[SwitchReport]) -> Metrics:
    """Seconds of each action on the slowest rank; bytes of each tag summed over ranks after the switch."""
    actions = {action for report in reports for action in report.seconds}
    metrics = {f"timing_s/{action}": max(report.seconds[action] for report in reports) for action in actions}
    if reports[0].reshard is not None:
        metrics["reshard/version"] = reports[0].reshard.version
        metrics["reshard/gb"] = sum(report.reshard.moved_bytes for report in reports if report.reshard) / 1e9
    return metrics | _memory("asleep" if "sleep" in actions else "awake", reports)


def _memory(state: str, reports: Sequence[SwitchReport]) -> Metrics:
    totals: Metrics = defaultdict(float)
    for report in reports:
        for name, value in report.after.metrics().items():
            totals[name.replace("memory/", f"memory_{state}/", 1)] += value
    return dict(totals)


def sample_metrics(samples: Sequence[Samples], data: DataConfig) -> Metrics:
    """`response_length/*` and `prompt_length/*` in tokens; a response is clipped if it met the length limit."""
    responses = [length for shard in samples for length in shard.response_lengths]
    prompts = [length for shard in samples for length in shard.prompt_lengths]
    clipped = [not finished for shard in samples for finished in shard.finished]
    return {
        **_spread("response_length", responses),
        "response_length/clip_ratio": fmean(clipped),
        **_spread("prompt_length", prompts),
        "prompt_length/clip_ratio": fmean(length == data.max_prompt_length for length in prompts),
        "perf/total_num_tokens": float(sum(responses) + sum(prompts)),
    }


def reward_metrics(samples: Sequence[Samples], n: int) -> Metrics:
    """What the rewards of a step can teach; each prompt has `n` responses, one after the other.

    `critic/frac_reward_zero_std`, where n > 1: the fraction of prompts whose responses all got the same reward.
    `reward/ungradable`: the fraction of responses whose record cannot be graded.
    """
    metrics = {UNGRADABLE: fmean(bad for shard in samples for bad in shard.ungradable)}
    if n > 1:
        groups = [shard.scores[first : first + n] for shard in samples for first in range(0, len(shard.scores), n)]
        metrics[ZERO_STD] = fmean(min(group) == max(group) for group in groups)
    return metrics


def throughput_metrics(step: Metrics, memory: Sequence[Metrics]) -> Metrics:
    """`perf/*`: seconds a step, prompt and response tokens a second and device, peak memory of the largest rank."""
    seconds = step["timing_s/step"]
    return {
        "perf/time_per_step": seconds,
        "perf/throughput": step["perf/total_num_tokens"] / seconds / len(memory),
        **{name: max(rank[name] for rank in memory) for name in memory[0]},
    }


def validation_metrics(samples: Sequence[Samples], n: int) -> Metrics:
    """`val-core/<data_source>/reward/mean@<n>`: the mean reward of `n` responses to each held-out prompt."""
    scores: dict[str, list[float]] = defaultdict(list)
    for shard in samples:
        for source, score in zip(shard.data_sources, shard.scores, strict=True):
            scores[source].append(score)
    return {f"val-core/{source}/reward/mean@{n}": fmean(values) for source, values in scores.items()}


def _spread(name: str, values: Sequence[int]) -> Metrics:
    return {
        f"{name}/mean": fmean(values),
        f"{name}/max": float(max(values)),
        f"{name}/min": float(min(values)),
    }
