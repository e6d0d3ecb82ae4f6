"""DAPO's dynamic sampling on one rank: which prompts are trained on (Yu et al. 2025, arXiv 2503.14476, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards import numeric_parts
from rlhf_npu.roles.scoring import ScoredResponse

SCORE = "score"


@dataclass(frozen=True)
class Group:
    """A prompt's responses, and what they are worth."""

    prompt: PromptSample
    completions: list[Completion]
    scored: list[ScoredResponse]


@dataclass(frozen=True)
class GroupCounts:
    """Prompts of a rank in a step, by what became of them; together they are all that was generated for.

    Attributes:
        kept: trained on, with signal.
        filled: trained on without, since too few had any.
        thrown_no_signal: not trained on, since their responses are all worth the same.
        thrown_surplus: not trained on, since there were enough.
    """

    kept: int
    filled: int
    thrown_no_signal: int
    thrown_surplus: int


class GroupFilter:
    """Collects groups round after round, until `share` of them have signal.

    Args:
        share: groups that this rank trains on in a step.
        metric: "score", or the part of the reward by which responses must differ.
    """

    def __init__(self, share: int, metric: str) -> None:
        self._share = share
        self._metric = metric
        self._groups: list[Group] = []
        self._telling: list[int] = []

    def add(self, groups: Sequence[Group]) -> None:
        """Take what a round has generated.

        Raises:
            RewardError: the reward has no such part.
        """
        for group in groups:
            if has_signal(self._values(group)):
                self._telling.append(len(self._groups))
            self._groups.append(group)

    @property
    def missing(self) -> int:
        """Groups with signal that are still missing."""
        return max(0, self._share - len(self._telling))

    def take(self) -> tuple[list[Group], list[Group], GroupCounts]:
        """The groups to train on, all groups, and their counts; begins anew.

        The first `share` groups with signal, and if there are fewer the first without, all in the order in which they
        were generated.
        """
        telling = set(self._telling)
        kept = self._telling[: self._share]
        silent = [place for place in range(len(self._groups)) if place not in telling]
        filled = silent[: self._share - len(kept)]
        counts = GroupCounts(len(kept), len(filled), len(silent) - len(filled), len(telling) - len(kept))
        everything = self._groups
        self._groups, self._telling = [], []
        return [everything[place] for place in sorted(kept + filled)], everything, counts

    def _values(self, group: Group) -> list[float]:
        """Without those that no function has scored: their rewards say nothing of what is better."""
        return [self._value(line) for line in group.scored if line.failed is None and line.ungradable is None]

    def _value(self, line: ScoredResponse) -> float:
        if self._metric == SCORE:
            return line.score
        parts = numeric_parts(line.reward_extra_info)
        if self._metric in parts:
            return parts[self._metric]
        raise RewardError(
            f"algorithm.filter_groups.metric={self._metric}: the reward function returned no number under that name "
            f"beside its score, but {', '.join(parts) or 'none'}; set it to {SCORE}, or return a dict with it"
        )


def has_signal(values: Sequence[float]) -> bool:
    """Whether a group's responses differ."""
    return len(set(values)) > 1
