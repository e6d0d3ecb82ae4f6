"""A run with a reward function as users of verl bring it, on a table with values that JSON lacks."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    from helpers_beside import worth
    return {"score": worth(data_source), "when": extra_info["when"], "length": len(solution_str)}
"""
KEYS = (
    "data.val_files=[]",
    "data.train_batch_size=4",
    "data.max_prompt_length=16",
    "data.max_response_length=4",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.rollout.n=2",
    "actor_rollout_ref.rollout.kv_cache_memory_gb=0.1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=8",
    "trainer.n_devices_per_node=1",
    "trainer.total_training_steps=6",
    "trainer.logger=[jsonl]",
)


def test_it_is_called_by_name_and_a_reward_that_never_changes_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "helpers_beside.py").write_text("def worth(data_source): return {'sums': 0.5}[data_source]\n")
    (tmp_path / "vllm.py").write_text("raise RuntimeError('takes the place of the engine')\n")
    row = {
        "prompt": "1,2",
        "data_source": "sums",
        "reward_model": {"ground_truth": Decimal("3.50")},
        "extra_info": {"when": datetime.date(2026, 1, 2)},
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 4), tmp_path / "train.parquet")
    command = [
        *(sys.executable, "-m", "rlhf_npu.main_ppo", *KEYS),
        f"data.train_files=[{tmp_path}/train.parquet]",
        f"actor_rollout_ref.model.path={save_tiny_model(tmp_path / 'model')}",
        f"reward.function={tmp_path}/reward.py:compute_score",
        f"trainer.default_local_dir={tmp_path}/run",
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    assert [step["critic/score/mean"] for step in steps] == [0.5] * 6
    assert [step["critic/frac_reward_zero_std"] for step in steps] == [1.0] * 6
    (warning,) = [line for line in result.stdout.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: step 5: for 5 steps all rewards have been equal (now 0.5)")
    assert f"{tmp_path}/run/rollouts" in warning
    rollouts = (tmp_path / "run" / "rollouts" / "step_000006.rank_0.jsonl").read_text().splitlines()
    first = json.loads(rollouts[0])
    assert (first["score"], first["ground_truth"]) == (0.5, "3.50")
    assert first["reward_extra_info"]["when"] == "2026-01-02"
