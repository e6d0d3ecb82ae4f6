"""Which tags sleep in which stage: as few as fit, never one that is needed, and a refusal that names what bursts."""

from __future__ import annotations

import itertools
import pickle
import random

import pytest

from rlhf_npu.errors import PlanError
from rlhf_npu.hybrid.switch_plan import Action, Fate, Policy, Stage, SwitchPlan, Tag, gaps, plan_switches
from rlhf_npu.hybrid.tags import make_tags

PPO = (
    Stage.GENERATE,
    Stage.LOG_PROB,
    Stage.REF,
    Stage.VALUES,
    Stage.TRAIN_CRITIC,
    Stage.TRAIN_ACTOR,
    Stage.RESHARD,
)
SIZES = {
    "weights": 4,
    "kv_cache": 20,
    "actor.params": 8,
    "actor.grads": 8,
    "actor.optimizer": 48,
    "critic.params": 8,
    "critic.optimizer": 48,
    "ref.params": 8,
}


def plan(capacity: int, policy: Policy = Policy.AUTO, level: str = "auto", **workspace: int) -> SwitchPlan:
    beside = {Stage[name]: size for name, size in workspace.items()}
    return plan_switches(make_tags(SIZES, level), PPO, beside, capacity, policy)


def test_where_memory_suffices_nothing_sleeps() -> None:
    everything = plan(capacity=sum(SIZES.values()))
    assert all(awake == set(SIZES) for awake in everything.awake.values())
    assert everything.copied_bytes() == 0
    assert str(everything) == "everything stays on the device"


def test_what_is_dropped_goes_before_what_is_copied() -> None:
    one_less = plan(capacity=sum(SIZES.values()) - 1)
    assert one_less.copied_bytes() == 0
    # Generation needs all but gradients: only they can leave without a copy.
    assert one_less.awake[Stage.GENERATE] == set(SIZES) - {"actor.grads"}


def test_the_fewest_bytes_are_copied_that_fit() -> None:
    """Room for all but one optimizer: the smallest set of copies is that of something that is not needed there."""
    for capacity in range(70, sum(SIZES.values()), 9):
        found = plan(capacity)
        for stage in PPO:
            assert found.awake_bytes(stage) <= capacity
            assert found.awake[stage] >= {tag.name for tag in found.tags if stage in tag.needed}
    copied = [plan(capacity).copied_bytes() for capacity in range(70, sum(SIZES.values()) + 9, 9)]
    assert copied == sorted(copied, reverse=True)
    assert copied[0] > 0 == copied[-1]


def test_no_other_choice_of_what_sleeps_copies_less() -> None:
    """Against a search over the tags that are awake in each stage, without gaps, groups or decisions."""
    cycle = (Stage.GENERATE, Stage.LOG_PROB, Stage.TRAIN_ACTOR, Stage.RESHARD)
    rng = random.Random(0)
    for _ in range(20):
        sizes = {name: rng.randint(1, 9) for name in ("weights", "kv_cache", "actor.params", "actor.optimizer")}
        tags = make_tags(sizes, "auto")
        capacity = rng.randint(8, sum(sizes.values()))
        least = _least_copied(tags, cycle, capacity)
        if least is None:
            with pytest.raises(PlanError):
                plan_switches(tags, cycle, {}, capacity)
        else:
            assert plan_switches(tags, cycle, {}, capacity).copied_bytes() == least


def _least_copied(tags: tuple[Tag, ...], cycle: tuple[Stage, ...], capacity: int) -> int | None:
    ways = []
    for tag in tags:
        optional = [stage for stage in cycle if stage not in tag.needed]
        needed = [stage for stage in cycle if stage in tag.needed]
        subsets = itertools.chain.from_iterable(itertools.combinations(optional, n) for n in range(len(optional) + 1))
        ways.append([frozenset((*needed, *subset)) for subset in subsets])
    least = None
    for choice in itertools.product(*ways):
        awake = dict(zip((tag.name for tag in tags), choice, strict=True))
        if any(sum(tag.bytes for tag in tags if stage in awake[tag.name]) > capacity for stage in cycle):
            continue
        copied = sum(2 * tag.bytes * _falls_asleep(awake[tag.name], cycle) for tag in tags if tag.fate is Fate.OFFLOAD)
        least = copied if least is None else min(least, copied)
    return least


def _falls_asleep(awake: frozenset[Stage], cycle: tuple[Stage, ...]) -> int:
    return sum(
        before in awake and after not in awake for before, after in zip((cycle[-1], *cycle), cycle, strict=False)
    )


def test_all_sleeps_that_can_with_offload_and_only_the_rollout_with_keep() -> None:
    offload = plan(sum(SIZES.values()), Policy.OFFLOAD)
    for stage in PPO:
        assert offload.awake[stage] == {tag.name for tag in offload.tags if stage in tag.needed}
    keep = plan(sum(SIZES.values()), Policy.KEEP)
    assert keep.awake[Stage.GENERATE] == set(SIZES)
    assert keep.awake[Stage.TRAIN_ACTOR] == set(SIZES) - {"weights", "kv_cache"}


def test_a_sleep_level_that_was_asked_for_is_kept_to() -> None:
    roomy = 10 * sum(SIZES.values())
    first, second = plan(roomy, level="1"), plan(roomy, level="2")
    assert first.offloaded() == ("weights",)
    assert first.copied_bytes() == 2 * SIZES["weights"]
    assert second.dropped() == ("weights", "kv_cache")
    assert second.copied_bytes() == 0


def test_what_a_stage_takes_beside_the_tags_counts() -> None:
    roomy = sum(SIZES.values())
    assert plan(roomy, TRAIN_ACTOR=1).awake[Stage.TRAIN_ACTOR] != set(SIZES)
    assert plan(roomy, TRAIN_ACTOR=1).awake[Stage.GENERATE] == set(SIZES)


def test_a_plan_that_does_not_fit_names_stage_tag_and_bytes() -> None:
    with pytest.raises(PlanError, match=r"stage 'update_actor' does not fit.*actor.optimizer") as caught:
        plan(capacity=60)
    assert (caught.value.stage, caught.value.tag, caught.value.missing) == ("update_actor", "actor.optimizer", 4)
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes from a worker
    assert (str(again), again.stage, again.tag, again.missing) == (
        str(caught.value),
        "update_actor",
        "actor.optimizer",
        4,
    )


def test_phases_sleep_before_they_wake_and_leave_alone_what_is_in_its_place() -> None:
    offload = plan(sum(SIZES.values()), Policy.OFFLOAD)
    sleep, wake = offload.phases(Stage.TRAIN_CRITIC, awake={"actor.params"}, asleep={"ref.params", "weights"})
    assert sleep.action is Action.SLEEP
    assert set(sleep.tags) == {"kv_cache", "actor.params", "actor.grads", "actor.optimizer"}
    assert wake.action is Action.WAKE_UP
    assert wake.tags == ("critic.params", "critic.optimizer")
    assert offload.phases(Stage.TRAIN_CRITIC, awake=wake.tags, asleep=set(SIZES) - set(wake.tags)) == ()


def test_saving_leaves_the_rollout_awake_where_it_fits() -> None:
    roomy = plan(sum(SIZES.values()), Policy.OFFLOAD)
    assert roomy.awake[Stage.SAVE] == {"weights", "kv_cache", "actor.params"}
    tight = plan(64, Policy.OFFLOAD, SAVE=40)
    assert tight.awake[Stage.SAVE] == {"actor.params"}


def test_gaps_go_around_the_cycle() -> None:
    (actor,) = (tag for tag in make_tags(SIZES, "auto") if tag.name == "actor.params")
    assert gaps(actor, PPO) == [{Stage.REF, Stage.VALUES, Stage.TRAIN_CRITIC}, {Stage.GENERATE}]
    (cache,) = (tag for tag in make_tags(SIZES, "auto") if tag.name == "kv_cache")
    assert gaps(cache, PPO) == [set(PPO) - {Stage.GENERATE}]
