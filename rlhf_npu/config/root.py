"""What the configurations of all entry points have in common."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_npu.config.keys import ConfigNode, Problem
from rlhf_npu.config.trainer import TrainerConfig
from rlhf_npu.errors import ConfigError


class RootConfig(ConfigNode):
    """A run."""

    trainer: TrainerConfig  # declared by each root, as the last of its nodes

    def check(self) -> None:
        """Checks every key, then freezes the configuration.

        Raises:
            ConfigError: names all problems at once.
        """
        if found := self.problems():
            raise ConfigError(problem_list(found))
        self.freeze()

    def warnings(self) -> list[str]:
        """What can run and is probably not meant."""
        return []


def problem_list(problems: Sequence[Problem | str]) -> str:
    """One line a problem, under a line that counts them."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"the configuration has {count}:", *(f"  {problem}" for problem in problems)])
