"""What happens between generating and training, as data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mode(Enum):
    """Who has the device."""

    GENERATE = "generate"
    TRAIN = "train"


class Action(Enum):
    """What a phase does; the value names its timing, `timing_s/<value>`."""

    SLEEP = "sleep"
    WAKE_UP = "wake_up"
    RESHARD = "reshard"


@dataclass(frozen=True)
class Phase:
    """One step of a plan.

    Attributes:
        action: what it does.
        tags: the tags that sleep or wake; none for a reshard.
        sleep_level: 1 offloads the weights, 2 drops them; for SLEEP only.
    """

    action: Action
    tags: tuple[str, ...] = ()
    sleep_level: int = 1

    def __str__(self) -> str:
        level = f" level {self.sleep_level}" if self.action is Action.SLEEP else ""
        return f"{self.action.value}{level} {'+'.join(self.tags)}".strip()


@dataclass(frozen=True)
class SwitchPlan:
    """Ordered phases that lead from one mode to the other."""

    start: Mode
    end: Mode
    phases: tuple[Phase, ...]

    def __str__(self) -> str:
        return f"{self.start.value} -> {self.end.value}: {', '.join(map(str, self.phases))}"


def plan_to_train(sleep_level: int) -> SwitchPlan:
    """The rollout gives its memory to the trainer."""
    sleep = Phase(Action.SLEEP, ("weights", "kv_cache"), sleep_level)
    return SwitchPlan(Mode.GENERATE, Mode.TRAIN, (sleep,))


def plan_to_generate() -> SwitchPlan:
    """The rollout wakes with the trained weights; its cache comes last, when the reshard's buckets are gone."""
    phases = (
        Phase(Action.WAKE_UP, ("weights",)),
        Phase(Action.RESHARD),
        Phase(Action.WAKE_UP, ("kv_cache",)),
    )
    return SwitchPlan(Mode.TRAIN, Mode.GENERATE, phases)
