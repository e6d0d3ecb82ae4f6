"""Dynamic sampling in runs of DAPO and online DPO, with a reward that hangs: real Ray, DeepSpeed and vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainer.test_main_ppo import log_of, metrics_of, run

REWARD = """
import time

def score(solution_str, ground_truth):
    number = sum(map(ord, solution_str))
    if solution_str not in ("", ground_truth) and number % 13 == 5:
        time.sleep(60)
    differs = sum(map(ord, ground_truth)) % 2
    return {"score": number % 2 if differs else 0.5, "differs": differs}
"""
STEPS = 2


PAIRS = (
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=16",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_device=16",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "n"),
    [(("algorithm=dapo",), 4), (("algorithm=online_dpo", "algorithm.filter_groups.enable=true", *PAIRS), 2)],
    ids=["dapo", "online_dpo"],
)
def test_prompts_without_signal_are_replaced_and_a_reward_that_hangs_costs_its_response(
    tmp_path: Path, overrides: tuple[str, ...], n: int
) -> None:
    (tmp_path / "rewards.py").write_text(REWARD)
    output = tmp_path / "run"
    result = run(
        output,
        *overrides,
        f"trainer.total_training_steps={STEPS}",
        "trainer.val_before_train=false",
        "data.val_files=[]",
        "reward.function=rewards.py:score",
        "reward.timeout=0.05",
        "reward.max_failed_ratio=0.5",
        "reward.failed_score=0.25",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr + log_of(output)
    steps = metrics_of(output)
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        rounds = step["filter_groups/rounds"]
        thrown = step["filter_groups/thrown_no_signal"] + step["filter_groups/thrown_surplus"]
        assert 2 <= rounds <= 10
        assert (step["filter_groups/kept"], step["filter_groups/filled"]) == (16, 0)
        assert thrown == 16 * (rounds - 1)
        assert step["reward/differs/mean"] == 1.0
        assert 0 < step["reward/differs/all/mean"] < 1
        assert step["critic/frac_reward_zero_std"] == 0
        assert 0 < step["critic/all/frac_reward_zero_std"] < 1
        assert 0 < step["reward/all/failed"] < 0.5
        lines = [
            json.loads(line)
            for path in (output / "rollouts").glob(f"step_{step['step']:06d}.*")
            for line in path.open()
        ]
        assert len(lines) == rounds * 16 * n
        failed = [line for line in lines if line["failed"] is not None]
        assert step["reward/all/failed"] == pytest.approx(len(failed) / len(lines))
        assert {line["score"] for line in failed} == {0.25}
        assert all("it took longer than reward.timeout=0.05 s" in line["failed"] for line in failed)
        assert step["critic/score/all/mean"] == pytest.approx(sum(line["score"] for line in lines) / len(lines))
        assert step["actor/grad_norm"] > 0
        assert step.get("actor/dpo_pairs", 1.0) == 1.0
    assert len({line["prompt"] for line in lines}) > 16
    assert "the reward failed on" in result.stdout
