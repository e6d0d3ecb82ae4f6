"""Who is awake in which stage of a step, as data: planned before the run, executed phase by phase."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import product

from rlhf_npu.errors import PlanError

GIB = 1 << 30


class Stage(Enum):
    """What the device is used for; the value names it in metrics and messages."""

    GENERATE = "generate"
    REWARD_MODEL = "reward_model"
    LOG_PROB = "old_log_prob"
    REF = "ref"
    VALUES = "values"
    TRAIN_CRITIC = "update_critic"
    TRAIN_ACTOR = "update_actor"
    RESHARD = "reshard"
    SAVE = "save"


class Fate(Enum):
    """What becomes of a tag's bytes when it sleeps: copied to the host, or dropped because nobody reads them again."""

    OFFLOAD = "offload"
    DISCARD = "discard"


class Policy(Enum):
    """How it is decided what sleeps: as little as fits, all that can, or the rollout alone."""

    AUTO = "auto"
    OFFLOAD = "offload"
    KEEP = "keep"


class Action(Enum):
    """What a phase does; the value names its timing, `timing_s/<value>`."""

    SLEEP = "sleep"
    WAKE_UP = "wake_up"
    RESHARD = "reshard"


@dataclass(frozen=True)
class Tag:
    """One tenant of the pool.

    Attributes:
        name: of its tag in the pool.
        bytes: that it holds on one device.
        needed: the stages that read or write it.
        fate: what becomes of it when it sleeps.
        group: tags of one group sleep together or not at all; a tag without one decides each of its gaps by itself.
        must_sleep: it sleeps whenever it is not needed, whether or not memory suffices.
    """

    name: str
    bytes: int
    needed: frozenset[Stage]
    fate: Fate
    group: str = ""
    must_sleep: bool = False


@dataclass(frozen=True)
class Phase:
    """One action on some tags; none for a reshard."""

    action: Action
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.action.value} {'+'.join(self.tags)}".strip()


@dataclass(frozen=True)
class SwitchPlan:
    """Which tags are awake in each stage.

    Attributes:
        cycle: the stages of a step in their order; the first follows the last.
        tags: every tenant of the pool.
        awake: names of the tags that are awake in a stage, also in those outside of the cycle.
    """

    cycle: tuple[Stage, ...]
    tags: tuple[Tag, ...]
    awake: Mapping[Stage, frozenset[str]]

    def __str__(self) -> str:
        copied, dropped = self.offloaded(), self.dropped()
        moves = [f"{', '.join(copied)} to the host and back ({self.copied_bytes() / GIB:.2f} GiB)"] if copied else []
        moves += [f"{', '.join(dropped)} dropped"] if dropped else []
        return f"in each step, on each device: {'; '.join(moves)}" if moves else "everything stays on the device"

    def phases(self, stage: Stage, awake: Collection[str], asleep: Collection[str]) -> tuple[Phase, ...]:
        """What leads into `stage`: first all that sleeps, then all that wakes, each in the tags' order.

        Args:
            awake, asleep: tags that are known to be so; what is in neither is put where it belongs.
        """
        wanted = self.awake[stage]
        to_sleep = tuple(tag.name for tag in self.tags if tag.name not in wanted and tag.name not in asleep)
        to_wake = tuple(tag.name for tag in self.tags if tag.name in wanted and tag.name not in awake)
        phases = Phase(Action.SLEEP, to_sleep), Phase(Action.WAKE_UP, to_wake)
        return tuple(phase for phase in phases if phase.tags)

    def awake_bytes(self, stage: Stage) -> int:
        """Bytes of all tags that are awake in `stage`."""
        return sum(tag.bytes for tag in self.tags if tag.name in self.awake[stage])

    def offloaded(self) -> tuple[str, ...]:
        """The tags that are copied to the host in a step."""
        return tuple(tag.name for tag in self.tags if tag.fate is Fate.OFFLOAD and self._gaps_asleep(tag))

    def dropped(self) -> tuple[str, ...]:
        """The tags that are dropped in a step."""
        return tuple(tag.name for tag in self.tags if tag.fate is Fate.DISCARD and self._gaps_asleep(tag))

    def copied_bytes(self) -> int:
        """Bytes that a step copies between device and host, both ways."""
        return sum(2 * tag.bytes * self._gaps_asleep(tag) for tag in self.tags if tag.fate is Fate.OFFLOAD)

    def _gaps_asleep(self, tag: Tag) -> int:
        """How often a step puts the tag to sleep."""
        before = (self.cycle[-1], *self.cycle[:-1])
        return sum(
            tag.name in self.awake[last] and tag.name not in self.awake[stage]
            for last, stage in zip(before, self.cycle, strict=True)
        )


def plan_switches(
    tags: Sequence[Tag],
    cycle: Sequence[Stage],
    workspace: Mapping[Stage, int],
    capacity: int,
    policy: Policy = Policy.AUTO,
) -> SwitchPlan:
    """The plan that copies the fewest bytes, and of those the one that maps the fewest, of all that fit.

    Args:
        cycle: the stages of a step in their order; SAVE, which may follow it, is planned as well.
        workspace: bytes that a stage takes beside the tags.
        capacity: bytes of one device.

    Raises:
        PlanError: nothing fits; names the stage and the largest tag that is awake in it.
    """
    tags, cycle = tuple(tags), tuple(cycle)
    plans = [SwitchPlan(cycle, tags, awake) for awake in _candidates(tags, cycle, policy)]
    fitting = [plan for plan in plans if _overshoot(plan, workspace, capacity)[0] <= 0]
    if not fitting:
        least = min(plans, key=lambda plan: sum(map(len, plan.awake.values())))
        raise _does_not_fit(least, workspace, capacity)
    best = min(fitting, key=lambda plan: (plan.copied_bytes(), _remapped_bytes(plan)))
    return _with_save(best, workspace, capacity)


def gaps(tag: Tag, cycle: Sequence[Stage]) -> list[frozenset[Stage]]:
    """The runs of stages, around the cycle, in which the tag is not needed."""
    start = next((place for place, stage in enumerate(cycle) if stage in tag.needed), 0)
    runs: list[set[Stage]] = [set()]
    for stage in (*cycle[start:], *cycle[:start]):
        if stage not in tag.needed:
            runs[-1].add(stage)
        elif runs[-1]:
            runs.append(set())
    return [frozenset(run) for run in runs if run]


Gap = tuple[str, frozenset[Stage]]


def _candidates(
    tags: Sequence[Tag], cycle: Sequence[Stage], policy: Policy
) -> Iterator[Mapping[Stage, frozenset[str]]]:
    """Each way to let some of the gaps be slept through."""
    free, asleep_always = _decisions(tags, cycle, policy)
    for choice in product((False, True), repeat=len(free)):
        chosen = [decision for decision, sleeps in zip(free, choice, strict=True) if sleeps]
        asleep = [gap for decision in (*asleep_always, *chosen) for gap in decision]
        yield {
            stage: frozenset(tag.name for tag in tags) - {name for name, stages in asleep if stage in stages}
            for stage in cycle
        }


def _decisions(tags: Sequence[Tag], cycle: Sequence[Stage], policy: Policy) -> tuple[list[list[Gap]], list[list[Gap]]]:
    """Gaps that are decided together: those that the policy leaves open, and those that are slept through."""
    open_, asleep = dict[str, list[Gap]](), dict[str, list[Gap]]()
    for tag in tags:
        for number, gap in enumerate(gaps(tag, cycle)):
            group = tag.group or f"{tag.name} {number}"
            where = asleep if _always_sleeps(tag, tags, policy) else open_
            where.setdefault(group, []).append((tag.name, gap))
    return [] if policy is Policy.KEEP else list(open_.values()), list(asleep.values())


def _always_sleeps(tag: Tag, tags: Sequence[Tag], policy: Policy) -> bool:
    forced = any(other.must_sleep for other in tags if other is tag or (tag.group and other.group == tag.group))
    return forced or policy is Policy.OFFLOAD or (policy is Policy.KEEP and bool(tag.group))


def _overshoot(plan: SwitchPlan, workspace: Mapping[Stage, int], capacity: int) -> tuple[int, Stage]:
    """By how many bytes the fullest stage exceeds the capacity, and which it is."""
    used = {stage: plan.awake_bytes(stage) + workspace.get(stage, 0) for stage in plan.cycle}
    fullest = max(plan.cycle, key=used.__getitem__)
    return used[fullest] - capacity, fullest


def _remapped_bytes(plan: SwitchPlan) -> int:
    return sum(tag.bytes * plan._gaps_asleep(tag) for tag in plan.tags)  # noqa: SLF001


def _does_not_fit(plan: SwitchPlan, workspace: Mapping[Stage, int], capacity: int) -> PlanError:
    missing, stage = _overshoot(plan, workspace, capacity)
    awake = sorted((tag for tag in plan.tags if tag.name in plan.awake[stage]), key=lambda tag: -tag.bytes)
    parts = [f"{tag.name} {tag.bytes / GIB:.2f}" for tag in awake] + [f"workspace {workspace.get(stage, 0) / GIB:.2f}"]
    return PlanError(
        f"stage '{stage.value}' does not fit: it needs {(capacity + missing) / GIB:.2f} GiB "
        f"({', '.join(parts)}), and a device has {capacity / GIB:.2f} GiB",
        stage=stage.value,
        tag=awake[0].name if awake else "",
        missing=missing,
    )


def _with_save(plan: SwitchPlan, workspace: Mapping[Stage, int], capacity: int) -> SwitchPlan:
    """Saving follows generation: what is awake there stays if that fits, so that nothing must be made again."""
    needed = frozenset(tag.name for tag in plan.tags if Stage.SAVE in tag.needed)
    awake = needed | plan.awake[plan.cycle[0]]
    beside = sum(tag.bytes for tag in plan.tags if tag.name in awake) + workspace.get(Stage.SAVE, 0)
    return SwitchPlan(plan.cycle, plan.tags, {**plan.awake, Stage.SAVE: awake if beside <= capacity else needed})
