"""What overrides, groups and recipes make of the defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_npu.config import compose_config
from rlhf_npu.config.compose import config_folder

PROJECT = Path(__file__).parents[2]
RECIPES = sorted(file.stem for file in (config_folder() / "recipe").glob("*.yaml"))
ALGORITHMS = sorted(file.stem for file in (config_folder() / "algorithm").glob("*.yaml"))
MODEL = "actor_rollout_ref.model.path=model"


def test_the_defaults_are_ppo_on_two_cpu_processes() -> None:
    config = compose_config()
    assert config.has_critic
    assert not config.has_reference
    assert config.trainer.world_size == 2
    assert config.data.train_files == ["builtin:digits/train"]
    assert config.trainer.experiment_name == "digits_gae"


def test_overrides_of_every_type_arrive_typed() -> None:
    config = compose_config(
        [
            "data.train_files=[a.jsonl,b.parquet]",
            "data.shuffle=false",
            "actor_rollout_ref.actor.optim.lr=3e-6",
            "actor_rollout_ref.actor.optim.betas=[0.9,0.95]",
            "critic.model.path=other",
            "trainer.total_training_steps=null",
            "+reward.kwargs={scale:2,label:x}",
        ]
    )
    assert config.data.train_files == ["a.jsonl", "b.parquet"]
    assert config.data.shuffle is False
    assert config.actor_rollout_ref.actor.optim.lr == 3e-6
    assert config.actor_rollout_ref.actor.optim.betas == [0.9, 0.95]
    assert config.critic.model.path == "other"
    assert config.trainer.total_training_steps is None
    assert config.reward.kwargs == {"scale": 2, "label": "x"}


def test_a_number_may_be_left_to_the_plan() -> None:
    key = "actor_rollout_ref.rollout.gpu_memory_utilization"
    values = [compose_config([f"{key}={value}"]).actor_rollout_ref.rollout for value in ("auto", "1", "0.25")]
    assert [rollout.gpu_memory_utilization for rollout in values] == ["auto", 1, 0.25]
    assert [rollout.sleep_level for rollout in values] == ["auto", "auto", "auto"]


def test_the_estimator_alone_switches_to_grpo() -> None:
    config = compose_config(["algorithm.adv_estimator=grpo"])
    assert not config.has_critic
    assert config.batch_math.critic_optimizer_steps == 0
    assert config.trainer.experiment_name == "digits_grpo"


@pytest.mark.parametrize("key", ["actor_rollout_ref.actor.use_kl_loss", "algorithm.use_kl_in_reward"])
def test_either_kl_term_brings_the_reference(key: str) -> None:
    assert compose_config([f"{key}=true"]).has_reference


def test_algorithm_groups_give_way_to_overrides() -> None:
    dr_grpo = compose_config(["algorithm=dr_grpo"])
    assert dr_grpo.actor_rollout_ref.actor.loss_agg_mode == "seq-mean-token-sum-norm"
    assert not dr_grpo.algorithm.norm_adv_by_std_in_grpo
    changed = compose_config(["algorithm=grpo", "actor_rollout_ref.actor.loss_agg_mode=token-mean"])
    assert changed.actor_rollout_ref.actor.loss_agg_mode == "token-mean"


@pytest.mark.parametrize("group", ALGORITHMS)
def test_every_algorithm_is_one_line(group: str) -> None:
    config = compose_config([f"algorithm={group}"])
    assert group in (
        config.algorithm.adv_estimator,
        config.actor_rollout_ref.actor.policy_loss.loss_mode,
        "dapo",
        "dr_grpo",
    )
    assert not config.warnings()


def test_a_loss_that_is_not_aggregated_as_in_its_paper_is_warned_of() -> None:
    mode = "actor_rollout_ref.actor.policy_loss.loss_mode"
    (warning,) = compose_config([f"{mode}=gspo"]).warnings()
    assert "loss_agg_mode=token-mean" in warning
    assert "algorithm=gspo" in warning
    (warning,) = compose_config([f"{mode}=gpg", "actor_rollout_ref.actor.ppo_mini_batch_size=32"]).warnings()
    assert "2 optimizer steps" in warning


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_passes_its_checks(recipe: str) -> None:
    config = compose_config([f"recipe={recipe}", MODEL])
    assert not config.batch_math.problems()


def test_every_recipe_script_runs_a_recipe_that_exists() -> None:
    scripts = list((PROJECT / "recipes").glob("*_*.sh"))
    named = {
        word.removeprefix("recipe=")
        for file in scripts
        for word in file.read_text().split()
        if word.startswith("recipe=")
    }
    assert len(scripts) >= 4
    assert named == set(RECIPES)


def test_the_output_folder_carries_date_and_time() -> None:
    folder = Path(compose_config().trainer.default_local_dir)
    assert folder.parts[0] == "outputs"
    assert len(folder.parts) == 3
    assert folder.parts[1].count("-") == 2


def test_deleting_a_key_brings_its_default_back_whatever_set_it_before() -> None:
    config = compose_config(
        [
            "recipe=grpo_smollm2_chain_sum",
            MODEL,
            "trainer.seed=9",
            "~trainer.seed",
            "~actor_rollout_ref.rollout.enforce_eager",
            "actor_rollout_ref.rollout.val_kwargs={n:4,temperature:1}",
            "~actor_rollout_ref.rollout.val_kwargs",
            "~critic.model.path",
            "~actor_rollout_ref.actor.optim.betas",
            "~data.prompt_key",
        ]
    )
    rollout = config.actor_rollout_ref.rollout
    assert (config.trainer.seed, config.critic.model.path, config.data.prompt_key) == (1, None, "prompt")
    assert (rollout.enforce_eager, rollout.val_kwargs.n, rollout.val_kwargs.temperature) == (True, 1, 0.0)
    assert compose_config(["~trainer.seed", "trainer.seed=3"]).trainer.seed == 3


def test_groups_and_reward_arguments_are_deleted_as_in_hydra() -> None:
    assert compose_config(["algorithm=grpo", "~algorithm"]).has_critic
    assert compose_config(["algorithm=grpo", "~algorithm=grpo"]).has_critic
    assert compose_config(["+reward.kwargs.x=3", "+reward.kwargs.y=4", "~reward.kwargs.x"]).reward.kwargs == {"y": 4}


def test_a_path_may_begin_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = compose_config(
        [
            "trainer.default_local_dir=~/run",
            "data.train_files=[~/a.jsonl,b.jsonl]",
            "actor_rollout_ref.model.path='~/m'",
        ]
    )
    assert config.trainer.default_local_dir == "/home/me/run"
    assert config.data.train_files == ["/home/me/a.jsonl", "b.jsonl"]
    assert config.actor_rollout_ref.model.path == "/home/me/m"
