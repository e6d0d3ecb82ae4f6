"""What the first step's peaks decide: against plans worked out by hand."""

from __future__ import annotations

import pickle

from rlhf_npu.hybrid.measured_plan import SecondPlan, second_plan
from rlhf_npu.hybrid.memory.memory_demand import Device
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan
from rlhf_npu.hybrid.switch_plan import Policy, Stage, plan_switches
from rlhf_npu.hybrid.tags import cycle_of, make_tags
from tests.hybrid.test_memory_plan import config_of

# GRPO. Generating needs 24, log-probabilities 8, training 64, a reshard 12; all of them are 88.
SIZES = {"weights": 4, "kv_cache": 20, "actor.params": 8, "actor.grads": 8, "actor.optimizer": 48}
WORKSPACE = 2  # that each stage is predicted to take


def predicted(capacity: int, policy: Policy = Policy.AUTO) -> MemoryPlan:
    workspace = dict.fromkeys(Stage, WORKSPACE)
    plan = plan_switches(make_tags(SIZES, "auto"), cycle_of(config_of()), workspace, capacity, policy)
    return MemoryPlan(workspace, Device("npu", capacity, capacity), SIZES["kv_cache"], plan)


def second(capacity: int, sizes: dict[str, int] | None = None, policy: Policy = Policy.AUTO, **seen: int) -> SecondPlan:
    first = predicted(capacity, policy)
    peaks = {Stage[name]: size for name, size in seen.items()}
    return second_plan(config_of(f"hybrid.plan={policy.value}"), first.switch_plan, sizes or SIZES, peaks, first)


def test_where_the_tags_hold_less_than_predicted_and_all_fits_nothing_sleeps() -> None:
    assert predicted(80).switch_plan.copied_bytes() > 0
    roomy = second(80, SIZES | {"kv_cache": 10})  # 78 and a workspace of 2
    assert str(roomy.plan) == "everything stays on the device"
    assert roomy.burst is None
    one_more = second(80, SIZES | {"kv_cache": 11})
    assert one_more.plan.dropped() != ()
    assert one_more.plan.copied_bytes() == 0


def test_a_step_that_took_less_than_predicted_may_be_followed_by_one_that_does_not() -> None:
    """All 88 would fit beside nothing, but 90 do not fit into 89."""
    tight = second(89, GENERATE=0, LOG_PROB=0, TRAIN_ACTOR=0, RESHARD=0)
    assert tight.plan == predicted(89).switch_plan
    assert tight.plan.dropped() != ()
    assert set(tight.surplus.workspace.values()) == {0}


def test_a_peak_above_the_prediction_puts_more_to_sleep_and_no_more_than_it_must() -> None:
    assert str(predicted(90).switch_plan) == "everything stays on the device"
    training = second(90, TRAIN_ACTOR=22)  # 64 + 22: without the rollout, which is dropped
    assert training.plan.awake[Stage.TRAIN_ACTOR] == {"actor.params", "actor.grads", "actor.optimizer"}
    assert training.plan.copied_bytes() == 0
    generating = second(90, GENERATE=32)  # 88 + 32 are 30 too many: only the optimizer is as large
    assert generating.plan.offloaded() == ("actor.optimizer",)
    assert generating.plan.dropped() == ()
    assert generating.plan.copied_bytes() == 2 * 48
    assert generating.plan.awake[Stage.GENERATE] == set(SIZES) - {"actor.optimizer"}
    assert generating.burst is None
    assert generating.surplus.workspace[Stage.GENERATE] == 32 - WORKSPACE


def test_where_nothing_fits_the_first_steps_plan_stays_and_the_reason_is_told() -> None:
    found = second(90, SIZES | {"weights": 7}, TRAIN_ACTOR=40)  # 64 + 40
    assert found.plan == predicted(90).switch_plan
    assert found.burst is not None
    assert (found.burst.stage, found.burst.tag, found.burst.missing) == ("update_actor", "actor.optimizer", 14)
    assert found.surplus.workspace == dict.fromkeys(Stage, 0) | {Stage.TRAIN_ACTOR: 38}
    assert found.surplus.tags == dict.fromkeys(SIZES, 0) | {"weights": 3}
    again = pickle.loads(pickle.dumps(found))  # as it comes from a worker
    assert (again.plan, again.surplus, str(again.burst)) == (found.plan, found.surplus, str(found.burst))
    assert again.burst.missing == 14


def test_a_policy_that_was_asked_for_is_kept_to() -> None:
    offload = second(1000, policy=Policy.OFFLOAD).plan
    assert offload.offloaded() == ("actor.params", "actor.optimizer")
    assert offload.dropped() == ("weights", "kv_cache", "actor.grads")
