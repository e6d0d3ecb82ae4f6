"""SFT, preferences and reward models, end to end: the recipes, shortened, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from rlhf_npu.config import DPO, REWARD, SFT, Schema
from rlhf_npu.data.builtin import resolve
from rlhf_npu.learning_from_files import learn_from_files
from tests.devices import DEVICE

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = ["trainer.total_training_steps=3", "data.val_max_samples=31", "trainer.logger=[console,jsonl]"]


def run(recipe: str, output: Path, *overrides: str) -> list[dict[str, Any]]:
    """The metrics of each step of a run, and of the validation before them."""
    result = launch([str(RECIPES / f"{recipe}_digits.sh")], output, *overrides)
    assert result.returncode == 0, result.stdout + result.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def launch(command: list[str], output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run as a user starts it."""
    return subprocess.run(
        [*command, f"trainer.default_local_dir={output}", *SHORT, *overrides],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=560 if DEVICE == "npu" else 290,
        check=False,
    )


def test_dpo_learns_pairs_at_zero_3_and_keeps_the_references_log_probabilities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = Path(resolve("builtin:digits/model")).parent
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / prepared.name).symlink_to(prepared)
    monkeypatch.setenv("RLHF_NPU_CACHE", str(tmp_path / "cache"))
    before, *steps = run("dpo", tmp_path / "run", "engine.zero_stage=3", "optim.lr=1e-3")
    # Policy and reference are the same then, in every example, however it is packed.
    assert before["val-core/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert before["val-core/rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["val-core/loss"] < before["val-core/loss"] - 0.05
    assert steps[-1]["val-core/rewards/accuracies"] > 0.6
    assert len(list((tmp_path / "cache" / "reference").glob("*.npy"))) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    again = launch(
        [sys.executable, "-m", "rlhf_npu.main_dpo"],
        tmp_path / "again",
        "trainer.total_training_steps=1",
        "trainer.n_devices_per_node=1",
    )
    assert "scoring" not in again.stdout
    first = json.loads((tmp_path / "again" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["train/grad_norm"] == pytest.approx(steps[0]["train/grad_norm"], rel=1e-4)


@pytest.mark.parametrize("recipe", ["ipo", "simpo", "orpo"])
def test_other_losses_on_pairs_take_steps(recipe: str, tmp_path: Path) -> None:
    short = ["trainer.total_training_steps=2", "trainer.val_before_train=false", "trainer.n_devices_per_node=1"]
    first, second = run(recipe, tmp_path / "run", *short)
    assert second["train/loss"] < first["train/loss"]
    assert second["train/grad_norm"] > 0


def test_kto_learns_single_answers(tmp_path: Path) -> None:
    before, *steps = run("kto", tmp_path / "run", "trainer.total_training_steps=12")  # the first few say little
    assert before["val-core/loss"] == pytest.approx(0.5, abs=1e-5)
    assert steps[-1]["val-core/loss"] < 0.48
    assert steps[-1]["val-core/rewards/desirable"] > steps[-1]["val-core/rewards/undesirable"]


def test_sft_lowers_the_loss_of_answers(tmp_path: Path) -> None:
    before, *steps = run("sft", tmp_path / "run")
    assert steps[-1]["val-core/loss"] < before["val-core/loss"] - 0.1
    assert (tmp_path / "run" / "learning_curve.png").is_file()


@pytest.mark.parametrize(
    ("schema", "override", "words"),
    [
        (DPO, "data.train_batch_size=63", "data.train_batch_size=63: counts examples over all devices"),
        (DPO, "data.train_files=[builtin:digits/sft]", "'chosen'"),
        (DPO, "beta=0.2", "unknown key beta; here it is loss.beta"),
        (DPO, "data.train_batch_size=65536", "the training files have"),
        (SFT, "data.max_length=100000", "positions"),
        (REWARD, "model.path=/nowhere", "/nowhere"),
    ],
)
def test_wrong_input_is_refused_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    schema: Schema,
    override: str,
    words: str,
) -> None:
    more = ["data.max_tokens_per_device=100000"] if "max_length" in override else []
    output = f"trainer.default_local_dir={tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", ["main", output, *SHORT, override, *more])
    with pytest.raises(SystemExit) as end:
        learn_from_files(schema)
    printed = capfd.readouterr()
    assert end.value.code == 2, printed.out + printed.err
    assert words in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
    assert not (tmp_path / "run").exists()
