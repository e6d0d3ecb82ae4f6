"""What of the keys of rewards, of dynamic sampling and of online DPO is refused."""

from __future__ import annotations

import pytest

from rlhf_npu.config import compose_config
from rlhf_npu.errors import ConfigError

NONE = "reward.function=null"
MODEL = ("reward_model.enable=true", "reward_model.model.path=rm")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["reward.function=digit"],
            "must be one of digits, math_verify, reasoning_gym, or path/to/file.py:name, package",
        ),
        ([NONE], "reward.function=null: must be digits, math_verify, reasoning_gym, path/to/file.py:name"),
        (["reward.functions=[digits]"], "reward.functions=[digits]: needs reward.function=null"),
        ([NONE, "reward.functions=[digits,digit]"], "reward.functions=digit: must be one of digits"),
        ([NONE, "reward.functions=[digits,digits]"], "names a function twice"),
        (
            [NONE, "reward.functions=[digits,a.py:b]", "reward.weights=[1]"],
            "one number for each of the 2 reward.functions",
        ),
        (["reward.weights=[1]"], "reward.weights=[1.0]: must hold one number for each of the 0"),
        (["reward.timeout=0"], "reward.timeout=0"),
        (["reward.max_failed_ratio=1.5"], "reward.max_failed_ratio=1.5: must be at least 0 and at most 1"),
        (["reward.failed_score=nan"], "reward.failed_score=nan: must be at least"),
        (["algorithm.filter_groups.max_num_gen_batches=0"], "max_num_gen_batches=0: must be above 0"),
        (["algorithm.filter_groups.metric=seq_reward"], "must be score, which is the reward before penalties"),
        (
            ["algorithm=dapo", "actor_rollout_ref.rollout.n=1"],
            "filter_groups.enable=true: compares a prompt's responses",
        ),
        (
            ["algorithm=dapo", "algorithm.adv_estimator=remax"],
            "filter_groups.enable=true: remax compares with a greedy",
        ),
        (["algorithm=online_dpo", "actor_rollout_ref.rollout.n=4"], "compares the two responses to a prompt; set 2"),
        (
            ["algorithm=online_dpo", "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=1"],
            "ppo_micro_batch_size_per_device=1: policy_loss.loss_mode=online_dpo needs both responses",
        ),
        (["algorithm=online_dpo", "algorithm.adv_estimator=gae"], "has no use for a critic; set grpo"),
        (["algorithm=online_dpo", "algorithm.rollout_correction.rollout_is=token"], "has no tokens to weigh; set null"),
        (["+algorithm.dynamic_filtering=true"], "unknown key algorithm.dynamic_filtering"),
        (["dynamic_filtering=true"], "here it is algorithm.filter_groups.enable"),
        (["remote_rm_url=http://a"], "here it is reward.function=http://host:port/path"),
        (["reward_weights=[1]"], "here it is reward.weights"),
        ([NONE], "or a model in reward_model.model.path"),
        (["reward_model.enable=true"], "reward_model.model.path=null: must name the folder of the reward model"),
        (["reward_model.model.path=rm"], "reward_model.enable=false: model.path=rm would score nothing; set true"),
        (["reward_model.weight=nan", *MODEL], "reward_model.weight=nan: must be at least"),
        (["reward_model.zero_stage=2", *MODEL], "reward_model.zero_stage=2: must be one of 0, 3"),
        (["reward_model.micro_batch_size_per_gpu=8"], "here it is reward_model.micro_batch_size_per_device"),
        (["reward_model.model.input_tokenizer=x"], "tokenizer and chat template are used where they differ"),
        (["reward_model_path=x"], "here it is reward_model.model.path"),
        (["reward_pretrain=x"], "here it is reward_model.model.path"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides)
    assert message in " ".join(str(caught.value).split())


def test_ways_to_name_functions() -> None:
    several = compose_config([NONE, "reward.functions=[math_verify,mine.py:score]", "reward.weights=[1,0.5]"]).reward
    assert str(several) == "reward.functions=[math_verify,mine.py:score]"
    service = compose_config(["reward.function=http://127.0.0.1:8000/score"]).reward
    assert (str(service), service.names) == (
        "reward.function=http://127.0.0.1:8000/score",
        ["http://127.0.0.1:8000/score"],
    )
    assert compose_config(["algorithm=dapo"]).algorithm.filter_groups.enable
    assert compose_config(["algorithm=online_dpo"]).has_reference


def test_a_reward_model_needs_no_function_beside_it_and_is_in_the_table() -> None:
    config = compose_config([NONE, *MODEL, "reward_model.micro_batch_size_per_device=100"])
    assert config.reward.names == []
    # 64 prompts x 8 responses over 2 devices are 256 sequences on each: 100, 100 and 56.
    assert "reward model micro-batches" in config.batch_math.text()
    (row,) = [line for line in config.batch_math.text().splitlines() if "reward model" in line]
    assert "3" in row.split("│")[2]
