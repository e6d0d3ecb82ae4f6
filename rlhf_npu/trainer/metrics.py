"""Metrics of one step, under the names that users of verl know."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from statistics import fmean

from rlhf_npu.config import DataConfig, PPOConfig
from rlhf_npu.workers.hybrid_worker import FilteredSamples, Samples

Metrics = dict[str, float]

# TRL's name: the fraction of prompts whose responses all got the same reward.
ZERO_STD = "critic/frac_reward_zero_std"
UNGRADABLE = "reward/ungradable"
FAILED = "reward/failed"


class StepClock:
    """Wall-clock seconds of named parts of a step; those of a part that comes several times are added up."""

    def __init__(self) -> None:
        self._seconds: Metrics = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def metrics(self) -> Metrics:
        """`timing_s/<part>`."""
        return {f"timing_s/{part}": seconds for part, seconds in self._seconds.items()}


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
    `reward/failed`: the fraction of responses that a reward function failed to score.
    `reward/<part>/mean`: the mean of each number that functions returned beside the score, where they did.
    """
    metrics = {
        UNGRADABLE: fmean(bad for shard in samples for bad in shard.ungradable),
        FAILED: fmean(failure is not None for shard in samples for failure in shard.failures),
    }
    parts = chain.from_iterable(parts.items() for shard in samples for parts in shard.parts)
    metrics |= {f"reward/{part}/mean": mean for part, mean in _means(parts).items()}
    if n > 1:
        groups = [shard.scores[first : first + n] for shard in samples for first in range(0, len(shard.scores), n)]
        metrics[ZERO_STD] = fmean(min(group) == max(group) for group in groups)
    return metrics


def rollout_metrics(samples: Sequence[Samples], config: PPOConfig) -> Metrics:
    """All that the scalars of a step's sequences tell."""
    return sample_metrics(samples, config.data) | reward_metrics(samples, config.actor_rollout_ref.rollout.n)


def filter_metrics(ranks: Sequence[FilteredSamples], rounds: int, config: PPOConfig) -> Metrics:
    """What became of the prompts of a step whose groups are filtered.

    `filter_groups/{rounds,kept,filled,thrown_no_signal,thrown_surplus}`: rounds of generating, and prompts. The usual
    names are of what is trained on; `response_length/all/mean`, `critic/score/all/mean` and the like are of all that
    was generated.
    """
    counts = [vars(rank.counts) for rank in ranks]
    metrics = {f"filter_groups/{name}": float(sum(count[name] for count in counts)) for name in counts[0]}
    generated = [rank.generated for rank in ranks]
    scores = [score for shard in generated for score in shard.scores]
    everything = rollout_metrics(generated, config) | _spread("critic/score", scores)
    metrics |= {of_all(name): value for name, value in everything.items()}
    return metrics | {"filter_groups/rounds": float(rounds)}


def of_all(name: str) -> str:
    """A metric's name over all that was generated, where groups are filtered."""
    node, _, last = name.rpartition("/")
    return f"{node}/all/{last}"


def throughput_metrics(step: Metrics, devices: int) -> Metrics:
    """`perf/*`: seconds a step, prompt and response tokens a second and device."""
    seconds = step["timing_s/step"]
    return {
        "perf/time_per_step": seconds,
        "perf/throughput": step["perf/total_num_tokens"] / seconds / devices,
    }


def validation_metrics(samples: Sequence[Samples], n: int) -> Metrics:
    """`val-core/<data_source>/reward/mean@<n>`: the mean reward of `n` responses to each held-out prompt.

    `val-aux/<data_source>/<part>/mean@<n>`: the same of the numbers that reward functions returned beside it.
    """
    scores = chain.from_iterable(zip(shard.data_sources, shard.scores, strict=True) for shard in samples)
    parts = (
        (f"{source}/{part}", value)
        for shard in samples
        for source, parts in zip(shard.data_sources, shard.parts, strict=True)
        for part, value in parts.items()
    )
    core = {f"val-core/{source}/reward/mean@{n}": mean for source, mean in _means(scores).items()}
    return core | {f"val-aux/{name}/mean@{n}": mean for name, mean in _means(parts).items()}


def _means(named: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the values that have the same name."""
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in named:
        values[name].append(value)
    return {name: fmean(of_name) for name, of_name in values.items()}


def _spread(name: str, values: Sequence[float]) -> Metrics:
    return {
        f"{name}/mean": fmean(values),
        f"{name}/max": float(max(values)),
        f"{name}/min": float(min(values)),
    }
