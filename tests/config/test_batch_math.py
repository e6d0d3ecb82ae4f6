"""The arithmetic of a step, and how wrong arithmetic is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_npu.config import BatchMath, compose_config
from rlhf_npu.config import batch_math as keys
from rlhf_npu.errors import ConfigError

ROLLOUT_N = "actor_rollout_ref.rollout.n"
RIGHT = BatchMath(
    prompts=96,
    responses_per_prompt=5,
    mini_batch_prompts=24,
    nodes=2,
    devices_per_node=4,
    tensor_parallel=2,
    actor_micro_batch=5,
    old_log_prob_micro_batch=20,
    critic_micro_batch=3,
    ref_log_prob_micro_batch=60,
    reward_micro_batch=7,
    actor_epochs=2,
    critic_epochs=3,
)
FIELDS = {
    keys.TRAIN_BATCH: "prompts",
    keys.MINI_BATCH: "mini_batch_prompts",
    keys.TENSOR_PARALLEL: "tensor_parallel",
    keys.ACTOR_MICRO: "actor_micro_batch",
    keys.CRITIC_MICRO: "critic_micro_batch",
    keys.OLD_LOG_PROB_MICRO: "old_log_prob_micro_batch",
    keys.REF_LOG_PROB_MICRO: "ref_log_prob_micro_batch",
}


def test_a_step_worked_out_by_hand() -> None:
    assert RIGHT.problems() == []
    assert RIGHT.devices == 8
    assert RIGHT.rollout_engines == 4
    assert RIGHT.sequences == 480
    assert RIGHT.sequences_per_device == 60
    assert RIGHT.mini_batches == 4
    assert RIGHT.mini_batch_sequences == 120
    assert RIGHT.mini_batch_sequences_per_device == 15
    assert RIGHT.actor_micro_batches == 3
    assert RIGHT.critic_micro_batches == 5
    assert RIGHT.actor_optimizer_steps == 8
    assert RIGHT.critic_optimizer_steps == 12


@pytest.mark.parametrize(
    ("change", "key", "nearest"),
    [
        ({"tensor_parallel": 3}, keys.TENSOR_PARALLEL, "2 or 4"),
        ({"tensor_parallel": 8}, keys.TENSOR_PARALLEL, "4"),
        ({"mini_batch_prompts": 20}, keys.MINI_BATCH, "16 or 24"),
        ({"prompts": 100}, keys.TRAIN_BATCH, "96 or 120"),
        ({"prompts": 12}, keys.TRAIN_BATCH, "24"),
        ({"actor_micro_batch": 4}, keys.ACTOR_MICRO, "3 or 5"),
        ({"actor_micro_batch": 64}, keys.ACTOR_MICRO, "15"),
        ({"critic_micro_batch": 2}, keys.CRITIC_MICRO, "1 or 3"),
        ({"old_log_prob_micro_batch": 9}, keys.OLD_LOG_PROB_MICRO, "6 or 10"),
        ({"ref_log_prob_micro_batch": 7}, keys.REF_LOG_PROB_MICRO, "6 or 10"),
    ],
)
def test_what_does_not_divide_is_named_with_the_nearest_values_that_do(
    change: dict[str, int], key: str, nearest: str
) -> None:
    problems = dataclasses.replace(RIGHT, **change).problems()
    assert [problem.key for problem in problems][:1] == [key]
    assert f"nearest: {nearest}" in problems[0].right


sizes = st.integers(1, 48)


@given(
    st.builds(
        BatchMath,
        prompts=st.integers(1, 200),
        responses_per_prompt=st.integers(1, 6),
        mini_batch_prompts=sizes,
        nodes=st.integers(1, 2),
        devices_per_node=st.integers(1, 4),
        tensor_parallel=st.integers(1, 4),
        actor_micro_batch=sizes,
        old_log_prob_micro_batch=sizes,
        critic_micro_batch=st.none() | sizes,
        ref_log_prob_micro_batch=st.none() | sizes,
        actor_epochs=st.just(1),
        critic_epochs=st.just(1),
    )
)
def test_every_value_it_proposes_removes_the_problem(math: BatchMath) -> None:
    for problem in math.problems():
        proposed = re.search(r"nearest: (\d+)(?: or (\d+))?", problem.right)
        assert proposed is not None
        for value in filter(None, proposed.groups()):
            changed = {FIELDS[problem.key]: int(value)}
            if f"with {keys.TRAIN_BATCH}" in problem.right:
                changed["prompts"] = int(value)
            left = dataclasses.replace(math, **changed).problems()
            assert problem.key not in [other.key for other in left]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 4))
def test_a_batch_without_problems_is_cut_without_rest(
    mini_batches: int, per_device: int, devices: int, responses: int
) -> None:
    math = BatchMath(
        prompts=mini_batches * per_device * devices,
        responses_per_prompt=responses,
        mini_batch_prompts=per_device * devices,
        nodes=1,
        devices_per_node=devices,
        tensor_parallel=1,
        actor_micro_batch=per_device,
        old_log_prob_micro_batch=responses,
        critic_micro_batch=None,
        ref_log_prob_micro_batch=None,
        reward_micro_batch=None,
        actor_epochs=1,
        critic_epochs=1,
    )
    assert math.problems() == []
    pieces = math.mini_batches * math.actor_micro_batches * math.actor_micro_batch * devices
    assert pieces == math.sequences


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.train_batch_size=65"],
        ["actor_rollout_ref.actor.ppo_mini_batch_size=31"],
        ["trainer.n_devices_per_node=3"],
        ["actor_rollout_ref.rollout.tensor_model_parallel_size=3"],
        ["actor_rollout_ref.actor.ppo_micro_batch_size_per_device=7"],
        ["critic.ppo_micro_batch_size_per_device=7"],
        ["actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=7"],
        [
            "algorithm.use_kl_in_reward=true",
            "actor_rollout_ref.ref.log_prob_micro_batch_size_per_device=7",
        ],
    ],
)
def test_wrong_arithmetic_is_refused_with_the_table(overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    message = str(caught.value)
    assert overrides[-1] in message or keys.MINI_BATCH in message
    for quantity in ("prompts", "sequences", "mini-batches", "actor micro-batches", "actor optimizer steps"):
        assert quantity in message
    assert "(not whole)" in message


def test_sizes_of_models_that_are_not_built_do_not_matter() -> None:
    compose_config(["actor_rollout_ref.ref.log_prob_micro_batch_size_per_device=7"])
    compose_config(["algorithm.adv_estimator=grpo", "critic.ppo_micro_batch_size_per_device=7"])


def test_the_table_fits_a_terminal() -> None:
    assert max(len(line) for line in RIGHT.text(width=80).splitlines()) <= 80
