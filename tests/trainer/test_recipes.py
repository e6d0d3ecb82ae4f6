"""The recipes run as they stand: a real model on real input, cut down to what a CPU does in a minute."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.smollm2
def test_smollm2_takes_a_step_on_chain_sum(tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = subprocess.run(
        [
            RECIPES / "grpo_smollm2_chain_sum_cpu.sh",
            f"trainer.default_local_dir={output}",
            "trainer.total_training_steps=1",
            "data.train_batch_size=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "data.val_max_samples=2",
        ],
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    _, step = (json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines())
    assert step["reshard/version"] == 1
    assert step["reshard/gb"] == pytest.approx(0.269, abs=0.01)
    # bf16 on both sides, in which rounding explains 0.06 on this model; TRL's rollout and trainer differ by 0.041.
    assert step["rollout_corr/logp_diff_mean"] < 0.1
    assert "val-core/chain_sum/reward/mean@1" in step
    (rollouts,) = (output / "rollouts").iterdir()
    for record in map(json.loads, rollouts.read_text().splitlines()):
        assert record["prompt"].startswith("<|im_start|>")
        assert record["prompt"].endswith("<|im_start|>assistant\n")
        assert 0 <= record["score"] <= 1
    assert (output / "model" / "model.safetensors").stat().st_size > 250e6
