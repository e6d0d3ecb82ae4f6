"""Input that cannot work: the message names the key, its value, and what would be right."""

from __future__ import annotations

import pytest

from rlhf_npu.config import compose_config
from rlhf_npu.errors import ConfigError

ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            f"{ROLLOUT}.temprature=1",
            f"unknown key {ROLLOUT}.temprature; did you mean {ROLLOUT}.temperature?",
        ),
        ("rollout.n=4", f"unknown key rollout.n; did you mean {ROLLOUT}.n?"),
        ("lr=1e-6", f"unknown key lr; did you mean {ACTOR}.optim.lr or critic.optim.lr?"),
        ("algorithms.gamma=1", "unknown key algorithms.gamma; did you mean algorithm.gamma?"),
        ("+trainer.total_epoch=2", "unknown key trainer.total_epoch; did you mean trainer.total_epochs?"),
        ("zzz=1", "unknown key zzz; --help lists all keys"),
        ("trainer.n_gpus_per_node=8", "here it is trainer.n_devices_per_node"),
        (f"{ACTOR}.ppo_micro_batch_size_per_gpu=8", f"here it is {ACTOR}.ppo_micro_batch_size_per_device"),
        (f"{ACTOR}.clip_ratio=0.2", f"here it is {ACTOR}.clip_ratio_low and {ACTOR}.clip_ratio_high"),
        (f"{ACTOR}.fsdp_config.param_offload=true", f"here it is {ACTOR}.zero_stage"),
        ("num_generations=8", f"here it is {ROLLOUT}.n"),
        ("n_samples_per_prompt=8", f"here it is {ROLLOUT}.n"),
        ("recipe=grpo_smollm2", "must be one of grpo_smollm2_chain_sum"),
        ("algorithm=gpo", "must be one of dr_grpo, gae, grpo (did you mean grpo?)"),
        ("reward.kwargs.scale=2", "put a plus before it: +reward.kwargs.scale=2"),
        ("data.train_files=[a", "cannot read data.train_files=[a"),
    ],
)
def test_unknown_keys_get_a_suggestion(override: str, expected: str) -> None:
    assert expected in refusal(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train_batch_size=many", "data.train_batch_size=many: must be a whole number"),
        ("data.train_batch_size=1.5", "data.train_batch_size=1.5: must be a whole number"),
        ("data.train_batch_size=null", "data.train_batch_size=null: must be a whole number"),
        ("algorithm.gamma=high", "algorithm.gamma=high: must be a number"),
        ("data.shuffle=perhaps", "data.shuffle=perhaps: must be true or false"),
        ("data.train_files=a.jsonl", "data.train_files=a.jsonl: must be a list: data.train_files=[a.jsonl]"),
        ("trainer.total_training_steps=all", "must be a whole number or null"),
        ("reward.kwargs=3", "must be a set of names and values: reward.kwargs={name:value}"),
    ],
)
def test_wrong_types_are_told_in_one_line(override: str, expected: str) -> None:
    message = refusal(override)
    assert expected in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.truncation=middle", "data.truncation=middle: must be one of error, left, right"),
        ("data.max_prompt_length=0", "data.max_prompt_length=0: must be at least 1"),
        ("data.train_files=[]", "data.train_files=[]: must name at least one file"),
        ("algorithm.gamma=1.5", "algorithm.gamma=1.5: must be at least 0 and at most 1"),
        ("algorithm.gamma=nan", "algorithm.gamma=nan: must be at least 0"),
        ("algorithm.kl_penalty=low_var_kl", "must be one of k1, k2, k3 (did you mean k3?)"),
        ("actor_rollout_ref.model.dtype=bf16", "(did you mean bfloat16?)"),
        (f"{ACTOR}.zero_stage=4", f"{ACTOR}.zero_stage=4: must be one of 0, 1, 2, 3"),
        (f"{ACTOR}.clip_ratio_c=0.5", "must be above 1, or 0 to turn dual clip off"),
        (f"{ACTOR}.optim.betas=[0.9]", "must be two numbers"),
        (f"{ACTOR}.optim.betas=[0.9,1.0]", f"{ACTOR}.optim.betas=[0.9,1.0]: must be at least 0 and below 1"),
        (f"{ROLLOUT}.temperature=0", f"{ROLLOUT}.temperature=0.0: must be above 0"),
        (f"{ROLLOUT}.val_kwargs.n=4", "greedy responses are all alike"),
        ("trainer.logger=[console,tensorbord]", "(did you mean tensorboard?)"),
        ("trainer.total_training_steps=0", "must be at least 1"),
        ("reward.function=digit", "(did you mean digits?)"),
        ("reward.function=:score", "reward.function=:score: must be one of"),
        ("actor_rollout_ref.model.path=???", "actor_rollout_ref.model.path=???: has no value"),
        ("data.train_files=[???]", "data.train_files[0]=???: has no value"),
        ("data.prompt_key=${data.prompts}", "data.prompts"),
    ],
)
def test_wrong_values_say_what_would_be_right(override: str, expected: str) -> None:
    assert expected in refusal(override)


def test_grpo_needs_a_group_and_has_no_critic_to_warm_up() -> None:
    message = refusal("algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=1", "trainer.critic_warmup=2")
    assert f"{ROLLOUT}.n=1: algorithm.adv_estimator=grpo compares a prompt's responses" in message
    assert "trainer.critic_warmup=2: there is no critic" in message


def test_zero_stage_0_is_refused_in_bfloat16() -> None:
    bfloat16 = "actor_rollout_ref.model.dtype=bfloat16"
    message = refusal(bfloat16, f"{ACTOR}.zero_stage=0", "critic.zero_stage=0")
    assert f"{ACTOR}.zero_stage=0: " in message
    assert "critic.zero_stage=0: " in message
    assert compose_config([bfloat16, "critic.zero_stage=0", "algorithm.adv_estimator=grpo"]).critic.zero_stage == 0


def test_all_problems_come_at_once() -> None:
    unreadable = refusal("data.train_batch_size=many", "data.sed=1", "algorithm=gpo", "data.shuffle=3x")
    assert unreadable.startswith("the configuration has 4 problems:")
    wrong = refusal("data.truncation=middle", "algorithm.gamma=2", "data.train_batch_size=65")
    assert wrong.startswith("the configuration has 3 problems:")
    assert "One step" in wrong
