"""`python -m rlhf_npu.plan` as a user meets it: a table, a picture, words and a status, from `config.json` alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config

from rlhf_npu.config import compose_config
from rlhf_npu.config.sizes import read_size
from rlhf_npu.errors import ConfigError
from rlhf_npu.plan import show
from tests.hybrid.shapes import QWEN2_7B
from tests.hybrid.test_memory_plan import TWO_DEVICES

PROJECT = Path(__file__).parents[2]


def model_folder(folder: Path) -> str:
    """A folder that holds a 7 B model's configuration, and nothing else."""
    Qwen2Config(**QWEN2_7B, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    return f"actor_rollout_ref.model.path={folder}"


def test_what_does_not_fit_ends_with_status_1_a_table_a_picture_and_advice(tmp_path: Path) -> None:
    overrides = [*TWO_DEVICES, model_folder(tmp_path / "model"), "actor_rollout_ref.actor.zero_stage=2"]
    command = [sys.executable, "-m", "rlhf_npu.plan", *overrides, "--device-memory", "79GiB", "--picture", "plan.png"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert result.stderr.startswith("error: stage 'update_actor' does not fit: it needs ")
    assert result.stderr.endswith("it would fit with actor_rollout_ref.actor.zero_stage=3\n")
    (optimizer,) = [line for line in result.stdout.splitlines() if "actor.optimizer" in line]
    assert optimizer.split()[1::2] == ["actor.optimizer", "-", "-", "42.56", "-", "-"]  # generate, ..., save
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "plan.png"]


def test_what_fits_ends_with_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = compose_config([*TWO_DEVICES, model_folder(tmp_path / "model")])
    show(config, memory="79GiB", picture=None)
    shown = capsys.readouterr()
    assert "actor.optimizer to the host; weights, kv_cache dropped" in shown.out.splitlines()[-1]
    assert shown.err == ""


def test_amounts_of_memory_are_read_with_their_units() -> None:
    assert [read_size(text, "x") for text in ("64GiB", "80 GB", "1.5gib", "512", "2MiB")] == [
        64 << 30,
        80 * 10**9,
        3 << 29,
        512,
        2 << 20,
    ]
    for text in ("", "GiB", "64XB", "0", "-1GB", "1e9", "0.1"):
        with pytest.raises(ConfigError, match=r"--device-memory .*for example 64GiB"):
            read_size(text, "--device-memory")
