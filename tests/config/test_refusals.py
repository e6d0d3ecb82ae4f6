"""Input that cannot work: the message names the key, its value, and what would be right."""

from __future__ import annotations

import pytest

from rlhf_npu.config import compose_config
from rlhf_npu.errors import ConfigError

ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"
CORRECTION = "algorithm.rollout_correction"


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
        ("algorithm=gpo", "(did you mean gspo?)"),
        ("reward.kwargs.scale=2", "put a plus before it: +reward.kwargs.scale=2"),
        ("data.train_files=[a", "cannot read data.train_files=[a"),
        ("=3", "cannot read =3: no key"),
        ("importance_sampling_level=sequence", f"here it is {ACTOR}.policy_loss.loss_mode=gspo"),
        ("+reward_model.overlong_buffer.len=64", "here it is reward.overlong_buffer"),
        (
            f"{ROLLOUT}.top_p=0.9",
            f"unknown key {ROLLOUT}.top_p; it is a key of verl, TRL and OpenRLHF and does not exist",
        ),
        (
            "critic.model.use_remove_padding=true",
            "it is a key of verl and does not exist here: micro-batches are padded",
        ),
        ("data.apply_chat_template_kwargs.enable_thinking=false", "a chat template gets the messages alone"),
        ("trainer.resume_mode=auto", "it is a key of verl and does not exist here: a run saves its model"),
        (
            f"{ACTOR}.megatron.tensor_model_parallel_size=2",
            "it is a key of verl and does not exist here: models are cut",
        ),
        ("vllm.num_engines=2", "it is a key of OpenRLHF and does not exist here"),
        ("~nope", "unknown key nope"),
        ("trainer=3", "trainer=3: is a group of keys; set one of them, for example trainer.device"),
        ("+trainer.seed=3", "+trainer.seed: is there already; write it without the plus: trainer.seed=3"),
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
        (f"{ROLLOUT}.gpu_memory_utilization=true", "gpu_memory_utilization=true: must be a number or text"),
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
        ("algorithm.kl_penalty=low_var_kl", "must be one of k1, k2, k3, abs, k1+, k3+ (did you mean k3?)"),
        ("actor_rollout_ref.model.dtype=bf16", "(did you mean bfloat16?)"),
        (f"{ACTOR}.zero_stage=4", f"{ACTOR}.zero_stage=4: must be one of 0, 1, 2, 3"),
        (f"{ACTOR}.clip_ratio_c=0.5", "must be above 1, or 0 to turn dual clip off"),
        (f"{ACTOR}.policy_loss.loss_mode=gmpo", "(did you mean geo_mean?)"),
        (f"{ACTOR}.policy_loss.clip_cov_lb=9", "must be below clip_cov_ub=5"),
        ("algorithm.adv_estimator=grpo_passk", "(did you mean pass_at_k?)"),
        (f"{CORRECTION}.rollout_is_threshold_lower=3", "must be at most rollout_is_threshold=2"),
        (
            f"{CORRECTION}.rollout_rs=token_k2",
            f"{CORRECTION}.rollout_rs_threshold=null: rollout_rs=token_k2 needs a bound",
        ),
        (f"{CORRECTION}.rollout_rs=geometric", "(did you mean seq_mean_k1?)"),
        ("reward.overlong_buffer.len=17", "must be at most data.max_response_length=16"),
        (f"{ACTOR}.optim.betas=[0.9]", "must be two numbers"),
        (f"{ACTOR}.optim.betas=[0.9,1.0]", f"{ACTOR}.optim.betas=[0.9,1.0]: must be at least 0 and below 1"),
        (f"{ROLLOUT}.temperature=0", f"{ROLLOUT}.temperature=0.0: must be above 0"),
        (f"{ROLLOUT}.val_kwargs.n=4", "greedy responses are all alike"),
        (f"{ROLLOUT}.gpu_memory_utilization=all", "must be auto, or a number above 0 and at most 1"),
        (f"{ROLLOUT}.gpu_memory_utilization=1.5", "gpu_memory_utilization=1.5: must be above 0 and at most 1"),
        (f"{ROLLOUT}.sleep_level=3", f"{ROLLOUT}.sleep_level=3: must be one of auto, 1, 2"),
        ("trainer.logger=[console,tensorbord]", "(did you mean tensorboard?)"),
        ("trainer.total_training_steps=0", "must be at least 1"),
        ("reward.function=digit", "(did you mean digits?)"),
        ("reward.function=:score", "reward.function=:score: must be one of"),
        ("actor_rollout_ref.model.path=???", "actor_rollout_ref.model.path=???: has no value"),
        ("data.train_files=[???]", "data.train_files[0]=???: has no value"),
        ("data.prompt_key=${data.prompts}", "data.prompts"),
        ("data.prompt_key=${oc.env:RLHF_NPU_NOT_SET}", "data.prompt_key: KeyError raised"),
        ("data.prompt_key=${data.prompt_key}", "data.prompt_key: Recursive interpolation detected"),
        ("data.seed=" + "9" * 30, f"data.seed={'9' * 30}: must be at least 0 and at most 9223372036854775807"),
        ("trainer.test_freq=3000000000", "trainer.test_freq=3000000000: must be at most 2147483647"),
        ("data.train_batch_size=2000000000", "with rollout.n=8 a step has more than 16777216 sequences"),
        ("trainer.experiment_name='a\0b'", r"trainer.experiment_name=a\x00b: must be text that UTF-8 can hold"),
        ("trainer.project_name='\udcff'", r"trainer.project_name=\udcff: must be text that UTF-8 can hold"),
        ("+reward.kwargs={a:['\udcff']}", "must be text that UTF-8 can hold"),
        ("trainer.default_local_dir=''", "trainer.default_local_dir=: must name a file or a folder"),
        ("trainer.default_local_dir=~nobodyhere/x", "there is no such user"),
    ],
)
def test_wrong_values_say_what_would_be_right(override: str, expected: str) -> None:
    assert expected in refusal(override)


def test_grpo_needs_a_group_and_has_no_critic_to_warm_up() -> None:
    message = refusal("algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=1", "trainer.critic_warmup=2")
    assert f"{ROLLOUT}.n=1: algorithm.adv_estimator=grpo compares a prompt's responses" in message
    assert "trainer.critic_warmup=2: there is no critic" in message


def test_rejections_have_the_bounds_that_they_compare_with() -> None:
    bounds = [f"{CORRECTION}.rollout_rs_threshold=0.5", f"{CORRECTION}.rollout_rs_threshold_lower=0.1"]
    assert "token_k3 has no lower bound; set null" in refusal(f"{CORRECTION}.rollout_rs=token_k3", *bounds)
    assert "must be at least the lower bound" in refusal(f"{CORRECTION}.rollout_rs=token_k1", bounds[0])
    assert compose_config([f"{CORRECTION}.rollout_rs=token_k1", *bounds])


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


@pytest.mark.parametrize(
    ("deletion", "expected"),
    [
        ("~data.nope", "unknown key data.nope"),
        (
            "~trainer.default_local_dir",
            "~trainer.default_local_dir: trainer.default_local_dir has no default to go back",
        ),
        ("~critic", "critic.optim.lr=???: has no value"),
        ("~trainer.seed=2", "~trainer.seed=2: write ~trainer.seed, which brings its default back"),
        ("~reward.kwargs.x", "~reward.kwargs.x: there is no such argument to delete"),
        ("~reward.kwargs", "~reward.kwargs: delete its arguments one by one"),
    ],
)
def test_what_cannot_be_deleted(deletion: str, expected: str) -> None:
    assert expected in refusal(deletion)
