"""The plan of a run against figures computed by hand, and refusals whose advice really helps."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import replace

import pytest
from transformers import Qwen2Config

from rlhf_npu.config import PPOConfig, compose_config
from rlhf_npu.errors import ConfigError, PlanError
from rlhf_npu.hybrid.memory.memory_demand import Device, Models
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan, fitting_plan, plan_memory
from rlhf_npu.hybrid.memory.model_shape import model_shape
from rlhf_npu.hybrid.switch_plan import Stage
from tests.hybrid.shapes import qwen2_7b, without_weights

GIB = 1 << 30
MICRO = "reward_model.micro_batch_size_per_device=4"
ROLLOUT, ACTOR = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
CHECKPOINTING = "actor_rollout_ref.model.enable_gradient_checkpointing"
# 7 B on two devices: 16 prompts x 8 responses of 512 + 512 tokens.
TWO_DEVICES = (
    "trainer.device=npu",
    "algorithm.adv_estimator=grpo",
    "data.train_batch_size=16",
    "data.max_prompt_length=512",
    "data.max_response_length=512",
    "actor_rollout_ref.model.dtype=bfloat16",
    f"{CHECKPOINTING}=true",
    f"{ACTOR}.ppo_mini_batch_size=16",
    f"{ACTOR}.ppo_micro_batch_size_per_device=4",
    f"{ACTOR}.entropy_coeff=0",
    f"{ACTOR}.zero_stage=3",
    f"{ROLLOUT}.n=8",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_device=4",
    f"{ROLLOUT}.tensor_model_parallel_size=2",
    f"{ROLLOUT}.gpu_memory_utilization=0.6",
)
ELEMENTS = 2 * 152064 * 3584 + 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944 + 3584 + 1024 + 7168) + 3584


@functools.cache
def models() -> Models:
    shape = qwen2_7b()
    return Models(shape, shape)


def config_of(*overrides: str) -> PPOConfig:
    return compose_config([*TWO_DEVICES, *overrides])


def plan(*overrides: str, gib: float = 79) -> MemoryPlan:
    size = int(gib * GIB)
    return fitting_plan(config_of(*overrides), models(), Device("npu", size, size))


def sizes(planned: MemoryPlan) -> dict[str, int]:
    return {tag.name: tag.bytes for tag in planned.switch_plan.tags}


def test_7b_fits_on_two_devices_with_a_large_cache_while_its_optimizer_sleeps() -> None:
    planned = plan()
    held = sizes(planned)
    assert ELEMENTS == 7_615_616_512  # as its authors count them
    assert held["actor.params"] == ELEMENTS * 2 // 2
    assert held["actor.optimizer"] == ELEMENTS * 12 // 2
    assert held["actor.grads"] == ELEMENTS * 4 // 2 + 500_000_000 * 2
    assert held["weights"] == pytest.approx(ELEMENTS * 2 // 2, rel=1e-3)
    assert held["kv_cache"] >= 30 * GIB
    assert "actor.optimizer" in planned.switch_plan.offloaded()
    for stage in planned.switch_plan.cycle:
        assert planned.used(stage) <= 79 * GIB
    assert planned.peak == planned.used(Stage.TRAIN_ACTOR)
    assert planned.peak >= (2 + 12 + 4) * ELEMENTS // 2


def test_all_can_be_made_to_sleep_or_all_of_the_trainer_to_stay() -> None:
    everything = plan("hybrid.plan=offload").switch_plan
    assert everything.awake[Stage.GENERATE] == {"weights", "kv_cache"}
    assert everything.awake[Stage.TRAIN_ACTOR] == {"actor.params", "actor.grads", "actor.optimizer"}
    kept = plan("hybrid.plan=keep", gib=200).switch_plan
    assert kept.awake[Stage.GENERATE] == {"weights", "kv_cache", "actor.params", "actor.grads", "actor.optimizer"}
    assert kept.awake[Stage.TRAIN_ACTOR] == {"actor.params", "actor.grads", "actor.optimizer"}


def test_an_auto_cache_holds_all_sequences_that_are_generated_together_and_no_more() -> None:
    a_token = 28 * 2 * (4 // 2) * 128 * 2  # layers, keys and values, heads of one device, numbers, bytes
    cache = plan(f"{ROLLOUT}.gpu_memory_utilization=auto").kv_cache_bytes
    assert cache == 256 * 1024 * a_token


def test_an_auto_cache_takes_what_is_left_where_that_is_less() -> None:
    planned = plan(f"{ROLLOUT}.gpu_memory_utilization=auto", f"{ROLLOUT}.max_num_seqs=4096")
    assert planned.kv_cache_bytes < 4096 * 1024 * 28_672
    assert 79 * GIB - (1 << 20) < planned.used(Stage.GENERATE) <= 79 * GIB
    assert planned.switch_plan.awake[Stage.GENERATE] == {"weights", "kv_cache"}


REFUSED = {
    ("update_actor", "actor.optimizer"): (f"{ACTOR}.zero_stage=2",),
    ("update_actor", "actor.optimizer", "activations"): (
        f"{CHECKPOINTING}=false",
        f"{ACTOR}.ppo_micro_batch_size_per_device=16",
    ),
    ("update_actor", "actor.optimizer", "one device"): (
        "trainer.n_devices_per_node=1",
        f"{ROLLOUT}.tensor_model_parallel_size=1",
        f"{ACTOR}.ppo_micro_batch_size_per_device=16",
    ),
    ("generate", "actor.optimizer"): ("hybrid.plan=keep",),
    ("generate", "kv_cache"): (f"{ROLLOUT}.gpu_memory_utilization=0.1",),
    ("old_log_prob", "actor.params"): (
        f"{ROLLOUT}.log_prob_micro_batch_size_per_device=64",
        "data.max_response_length=16384",
    ),
}


def advice(error: PlanError) -> list[str]:
    return re.sub(r".*it would fit with ", "", str(error)).split()


@pytest.mark.parametrize("burst", REFUSED, ids=" ".join)
def test_a_refusal_names_stage_and_tag_and_settings_that_fit_none_of_them_needless(burst: tuple[str, ...]) -> None:
    overrides = REFUSED[burst]
    with pytest.raises(PlanError, match=rf"stage '{burst[0]}' does not fit") as refused:
        plan(*overrides)
    assert (refused.value.stage, refused.value.tag) == burst[:2]
    assert refused.value.missing > 0
    wanted = advice(refused.value)
    assert fits((*overrides, *wanted))
    assert not any(fits((*overrides, *fewer)) for fewer in leaving_one_out(wanted))


def fits(overrides: Iterable[str]) -> bool:
    size = 79 * GIB
    try:
        plan_memory(config_of(*overrides), models(), Device("npu", size, size))
    except (ConfigError, PlanError):
        return False
    return True


def leaving_one_out(overrides: list[str]) -> Iterable[list[str]]:
    return (overrides[:place] + overrides[place + 1 :] for place in range(len(overrides)))


def test_where_nothing_helps_that_is_said() -> None:
    with pytest.raises(PlanError, match="no setting was found that would fit"):
        plan(gib=2)


def test_critic_and_reference_have_tags_and_stages_of_their_own() -> None:
    micros = [f"{node}_micro_batch_size_per_device=4" for node in ("critic.ppo", "actor_rollout_ref.ref.log_prob")]
    terms = "algorithm.adv_estimator=gae", "algorithm.use_kl_in_reward=true", "critic.zero_stage=3"
    planned = plan(*terms, *micros, gib=150)
    held = sizes(planned)
    value_model = ELEMENTS - 152064 * 3584 + 3584 + 1
    assert held["critic.params"] == (value_model + 1) // 2 * 2
    assert held["critic.optimizer"] == (value_model + 1) // 2 * 12
    assert held["ref.params"] == ELEMENTS * 2
    # A critic makes no logits.
    assert planned.workspace[Stage.VALUES] < planned.workspace[Stage.LOG_PROB]
    assert set(planned.workspace) == set(Stage) - {Stage.REWARD_MODEL}


def test_a_reward_model_has_a_tag_and_a_stage_of_its_own() -> None:
    scored = ("reward_model.enable=true", "reward_model.model.path=rm", "hybrid.plan=offload")

    def planned(*overrides: str, gib: float = 79) -> MemoryPlan:
        size = int(gib * GIB)
        with_reward = replace(models(), reward=qwen2_7b())
        return fitting_plan(config_of(*scored, *overrides), with_reward, Device("npu", size, size))

    whole, sharded = (planned(f"reward_model.zero_stage={stage}", MICRO) for stage in (0, 3))
    assert sizes(whole)["reward.params"] == ELEMENTS * 2
    assert sizes(sharded)["reward.params"] == ELEMENTS * 2 // 2
    assert whole.switch_plan.cycle[:3] == (Stage.GENERATE, Stage.REWARD_MODEL, Stage.LOG_PROB)
    assert whole.switch_plan.awake[Stage.REWARD_MODEL] == {"reward.params"}
    awake = [stage for stage, tags in whole.switch_plan.awake.items() if "reward.params" in tags]
    assert awake == [Stage.REWARD_MODEL]
    assert "reward.params" in whole.switch_plan.offloaded()
    gathered = 1_050_000_000 * 2
    assert sharded.workspace[Stage.REWARD_MODEL] == whole.workspace[Stage.REWARD_MODEL] + gathered
    with pytest.raises(PlanError, match="stage 'reward_model' does not fit") as refused:
        planned("reward_model.micro_batch_size_per_device=64", "data.max_response_length=32256")
    assert any(advised.startswith("reward_model.micro_batch_size_per_device=") for advised in advice(refused.value))


def test_on_the_cpu_the_configured_cache_is_taken_and_a_small_machine_suffices() -> None:
    config = compose_config()
    sizes_of_a_test = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    shape = model_shape(without_weights(Qwen2Config(**sizes_of_a_test)))
    planned = fitting_plan(config, Models(shape, shape), Device("cpu", GIB, GIB))
    assert planned.kv_cache_bytes == GIB // 4
    assert planned.switch_plan.copied_bytes() == 0
