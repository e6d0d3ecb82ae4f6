"""Data and reward are tried before Ray starts."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf_npu.config import PPOConfig
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.errors import DataError, RewardError
from rlhf_npu.rewards import record_checks, trial
from rlhf_npu.rewards.math_verify import MathGrader
from rlhf_npu.trainer.start_checks import check_data_and_reward
from rlhf_npu.trainer.terminal import PPO_LINE, Terminal
from tests.prompt_data import dataset_of
from tests.rewards.samples import sample
from tests.tiny_model import save_tiny_model


def check(function: str, *sets: list[PromptSample], **kwargs: Any) -> str:
    """What the console says."""
    config = PPOConfig()
    config.reward.function, config.reward.kwargs = function, kwargs
    screen = io.StringIO()
    check_data_and_reward(
        config, [dataset_of(samples) for samples in sets], Terminal(1, PPO_LINE, Console(file=screen, width=300))
    )
    return screen.getvalue()


def records(*ground_truths: Any, file: str = "a.jsonl") -> list[PromptSample]:
    return [replace(sample(truth), file=file, row=row) for row, truth in enumerate(ground_truths, start=1)]


def test_ground_truths_of_all_files_are_read() -> None:
    said = check("math_verify", records("1", "2"), records(r"\$0.90", file="held_out.jsonl"))
    assert "checking 3 ground truths for reward.function=math_verify, for 30 s at most ..." in said
    assert "checked 3 of 3 ground truths in" in said
    with pytest.raises(DataError, match=r"held_out\.jsonl:2: the ground truth '' is no mathematical expression"):
        check("math_verify", records("1"), records("1", "", file="held_out.jsonl"))


def test_ground_truths_that_there_was_no_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_checks, "SECONDS", 0.0)
    said = check("math_verify", records("1", "2", "3"))
    assert "checked 1 of 3 ground truths in 0.0 s" in said
    assert "warning: a response to a record that turns out to have no readable ground truth will get 0" in said


def test_a_grader_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_npu.rewards.math_verify._grader", MathGrader)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RewardError, match=r"reward\.function=math_verify: .*did not start"):
        check("math_verify", records(r"\sqrt{71}"))


def test_a_function_answers_a_prompt_of_each_data_source(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def score(data_source, response):\n    return {'test': 1.0}[data_source]\n")
    function = f"{tmp_path}/reward.py:score"
    said = check(function, records(*"12345"), records("1"))
    assert f"trying reward.function={function} on 2 of the prompts, for 30 s at most ..." in said
    assert re.search(r"the reward function scored 4 responses in \d\.\d{3} s each", said)
    other = replace(sample("6", "others"), file="a.jsonl", row=6)
    with pytest.raises(RewardError, match=r"data source 'others' \(a\.jsonl:6\), response '', it raised KeyError"):
        check(function, [*records(*"12345"), other])


def test_a_function_that_takes_long_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "SECONDS", 2.0)
    (tmp_path / "reward.py").write_text("import time\ndef score(response):\n    time.sleep(600)\n")
    said = check(f"{tmp_path}/reward.py:score", records("1"))
    assert "warning: reward.function=" in said
    assert "scored 0 responses of a trial within 2 s" in said


def test_what_is_wrong_with_training_and_held_out_prompts_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1,2:"}\n')
    command = [sys.executable, "-m", "rlhf_npu.main_ppo"]
    files = ["data.train_files=[train.jsonl]", "data.val_files=[held_out.jsonl]"]
    result = subprocess.run([*command, *files], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 2
    first, training, held_out, *_ = result.stderr.splitlines()
    assert first == "error: the data has 2 problems:"
    assert training.startswith("  train.jsonl:1: no 'data_source'")
    assert held_out.startswith("  held_out.jsonl: no such file")
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl"}


def test_what_does_not_fit_is_refused_with_a_setting_that_fits_before_anything_is_written(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    line = '{"prompt": "1,2:", "data_source": "test", "reward_model": {"ground_truth": "3"}}\n'
    (tmp_path / "prompts.jsonl").write_text(line * 64)
    files = ["data.train_files=[prompts.jsonl]", "data.val_files=[prompts.jsonl]", "reward.function=digits"]
    command = [sys.executable, "-m", "rlhf_npu.main_ppo", *files, "actor_rollout_ref.model.path=model"]
    limits = ["hybrid.device_memory_gb=0.25", "actor_rollout_ref.rollout.kv_cache_memory_gb=0.25"]
    result = subprocess.run([*command, *limits], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 2, result.stderr
    (error,) = result.stderr.splitlines()
    assert error.startswith("error: stage 'generate' does not fit: it needs 0.")
    assert error.endswith("it would fit with actor_rollout_ref.rollout.kv_cache_memory_gb=0.125")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "prompts.jsonl"}


def test_a_function_that_exits_ends_the_command_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("import sys\ndef score(response): sys.exit('no key')\n")
    command = [sys.executable, "-m", "rlhf_npu.main_ppo", "reward.function=reward.py:score"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 2
    (error,) = result.stderr.splitlines()
    assert f"error: reward.function={tmp_path}/reward.py:score: on prompt 0 of data source 'digit_sequence'" in error
    assert error.endswith("response '', it raised SystemExit: no key")
    assert {path.name for path in tmp_path.iterdir()} <= {"reward.py", "__pycache__"}
