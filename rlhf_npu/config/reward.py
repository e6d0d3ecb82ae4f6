"""Which function scores a response."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_npu.config.keys import ConfigNode, Problem, did_you_mean, key, nearest_choice

BUILTIN_REWARDS = ("digits", "math_verify", "reasoning_gym")


@dataclass
class RewardConfig(ConfigNode):
    """The reward function and its keyword arguments."""

    function: str = key(f"{', '.join(BUILTIN_REWARDS)}, path/to/file.py:name or package.module:name")
    kwargs: dict[str, Any] = key("keyword arguments for it; add one with +reward.kwargs.name=value", {})

    def relations(self) -> Iterator[Problem]:
        module, colon, name = self.function.rpartition(":")
        if self.function not in BUILTIN_REWARDS and not (module and colon and name):
            hint = did_you_mean(nearest_choice(self.function, BUILTIN_REWARDS))
            yield Problem(
                "function",
                self.function,
                f"must be one of {', '.join(BUILTIN_REWARDS)}, or path/to/file.py:name, or package.module:name{hint}",
            )
