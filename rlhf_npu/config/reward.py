"""Which functions score a response, and what happens where one fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rlhf_npu.config.keys import (
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    ConfigNode,
    Problem,
    Range,
    did_you_mean,
    key,
    nearest_choice,
    spell,
)

BUILTIN_REWARDS = ("digits", "math_verify", "reasoning_gym")
KINDS = f"{', '.join(BUILTIN_REWARDS)}, path/to/file.py:name, package.module:name or http://host:port/path"
REWARD_SIZE = Range(at_least=-1e6, at_most=1e6)


@dataclass
class OverlongBufferConfig(ConfigNode):
    """DAPO's soft punishment of responses that come close to the limit."""

    len: int = key(
        "tokens before data.max_response_length over which the penalty rises; 0 = off", 0, within=NOT_NEGATIVE
    )
    penalty_factor: float = key("the penalty at the limit", 1.0, within=NOT_NEGATIVE)


@dataclass
class RewardConfig(ConfigNode):
    """The reward functions, their keyword arguments, and how much may fail."""

    function: str | None = key(KINDS)
    kwargs: dict[str, Any] = key("keyword arguments for it; add one with +reward.kwargs.name=value", {})
    functions: list[str] = key("several, whose weighted sum is the reward, where reward.function=null", [])
    weights: list[float] = key("the weight of each of reward.functions; [] = 1 each", [], within=REWARD_SIZE)
    timeout: float | None = key(
        "seconds that a call or one HTTP request may take; null = no limit", 300.0, within=POSITIVE
    )
    concurrency: int = key(
        "calls of async functions, or HTTP requests, at the same time on a device", 32, within=POSITIVE
    )
    retries: int = key("times that an HTTP request is sent again", 3, within=NOT_NEGATIVE)
    failed_score: float = key("reward of a response that a function failed to score", 0.0, within=REWARD_SIZE)
    max_failed_ratio: float = key("share of a step's responses that may fail; more end the run", 0.01, within=FRACTION)
    overlong_buffer: OverlongBufferConfig = field(default_factory=OverlongBufferConfig)

    @property
    def names(self) -> list[str]:
        """The functions."""
        return [self.function] if self.function is not None else self.functions

    def __str__(self) -> str:
        """The functions, as the command line has them."""
        if self.function is not None:
            return f"reward.function={self.function}"
        return f"reward.functions={spell(self.functions)}"

    def relations(self) -> Iterator[Problem]:
        yield from self._number_problems()
        for name in self.names:
            yield from _name_problems("functions" if self.function is None else "function", name)

    def _number_problems(self) -> Iterator[Problem]:
        if self.function is not None and self.functions:
            yield Problem("functions", self.functions, "needs reward.function=null, since it stands in its place")
        if len(set(self.functions)) < len(self.functions):
            yield Problem("functions", self.functions, "names a function twice; give it one weight")
        if self.weights and len(self.weights) != len(self.functions):
            right = f"must hold one number for each of the {len(self.functions)} reward.functions"
            yield Problem("weights", self.weights, right)


def is_remote(name: str) -> bool:
    """Whether a reward function is a service that is asked over HTTP."""
    return name.startswith(("http://", "https://"))


def _name_problems(key_name: str, name: str) -> Iterator[Problem]:
    module, colon, attribute = name.rpartition(":")
    if name in BUILTIN_REWARDS or is_remote(name) or (module and colon and attribute):
        return
    hint = did_you_mean(nearest_choice(name, BUILTIN_REWARDS))
    yield Problem(
        key_name,
        name,
        f"must be one of {', '.join(BUILTIN_REWARDS)}, or path/to/file.py:name, package.module:name, "
        f"or http://host:port/path{hint}",
    )
