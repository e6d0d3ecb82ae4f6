"""The command line as a user meets it, each time in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROGRAM = """
import sys
from rlhf_npu.config import PPO, PPOConfig, run_from_command_line
from rlhf_npu.errors import DataError

def job(config: PPOConfig) -> None:
    if config.trainer.experiment_name == "bad_data":
        raise DataError("train.jsonl:3: not JSON")
    if config.trainer.experiment_name == "bug":
        raise ZeroDivisionError("a bug")
    print("ran", config.trainer.seed, config.data.train_batch_size)

if __name__ == "__main__":
    run_from_command_line(PPO, job)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "program.py", *arguments]
    return _run(command, folder, environment)


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def test_a_job_gets_the_configuration_and_hydra_writes_nothing(folder: Path) -> None:
    result = run(folder, "trainer.seed=7")
    assert (result.returncode, result.stdout, result.stderr) == (0, "ran 7 64\n", "")
    assert [file.name for file in folder.iterdir()] == ["program.py"]


@pytest.mark.parametrize("override", ["data.train_batch_size=65", "data.sed=1", "trainer.seed=x"])
def test_bad_input_ends_with_status_2_and_leaves_nothing(folder: Path, override: str) -> None:
    result = run(folder, override)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: the configuration has 1 problem:")
    assert override.partition("=")[0] in result.stderr
    assert "Traceback" not in result.stderr
    assert [file.name for file in folder.iterdir()] == ["program.py"]


def test_an_error_of_the_job_is_a_message_and_a_bug_asks_to_be_reported(folder: Path) -> None:
    bad = run(folder, "trainer.experiment_name=bad_data")
    assert (bad.returncode, bad.stderr) == (2, "error: train.jsonl:3: not JSON\n")
    bug = run(folder, "trainer.experiment_name=bug")
    assert bug.returncode == 1
    assert bug.stderr.startswith("internal error: ZeroDivisionError: a bug (please report it; HYDRA_FULL_ERROR=1 shows")
    assert len(bug.stderr.splitlines()) == 1
    whole = run(folder, "trainer.experiment_name=bug", HYDRA_FULL_ERROR="1")
    assert whole.returncode == 1
    assert "Traceback" in whole.stderr
    assert "program.py" in whole.stderr


def test_the_full_traceback_is_there_for_the_asking(folder: Path) -> None:
    result = run(folder, "data.train_batch_size=65", HYDRA_FULL_ERROR="1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ConfigError" in result.stderr


def test_cfg_job_prints_yaml_with_the_overrides_in_it(folder: Path) -> None:
    result = run(folder, "trainer.seed=7", "--cfg", "job", "actor_rollout_ref.rollout.n=8")
    assert result.returncode == 0
    shown = yaml.safe_load(result.stdout)
    assert shown["actor_rollout_ref"]["rollout"]["n"] == 8
    assert shown["trainer"]["seed"] == 7
    assert shown["algorithm"]["lam"] == 1.0
    assert "hydra" not in shown


def test_help_is_a_page_with_every_key_and_valid_yaml(folder: Path) -> None:
    result = run(folder, "--help", "actor_rollout_ref.rollout.n=8")
    assert result.returncode == 0
    start, end = result.stdout.index("\ndata:\n"), result.stdout.index("\n--cfg job")
    shown = yaml.safe_load(result.stdout[start:end])
    assert shown["actor_rollout_ref"]["rollout"]["n"] == 8
    assert shown["trainer"]["default_local_dir"] == "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"
    assert "PROMPTS an optimizer step, over all devices" in result.stdout
    assert "grpo_smollm2_chain_sum" in result.stdout


def test_a_folder_of_ones_own_adds_recipes_and_its_mistakes_are_found(folder: Path) -> None:
    recipe = folder / "mine" / "recipe" / "small.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\ntrainer:\n  seed: 5\n")
    assert run(folder, "--config-dir", "mine", "recipe=small").stdout == "ran 5 64\n"
    recipe.write_text("# @package _global_\ntrainer:\n  sed: 5\n")
    wrong = run(folder, "--config-dir", "mine", "recipe=small")
    assert wrong.returncode == 2
    assert "unknown key trainer.sed; did you mean trainer.seed?" in wrong.stderr
    assert "recipe/small" in wrong.stderr


def test_a_primary_file_of_ones_own_is_looked_for_from_the_current_folder(folder: Path) -> None:
    (folder / "mine").mkdir()
    full = yaml.safe_load(run(folder, "--cfg", "job", "trainer.seed=9").stdout)
    full["defaults"] = ["ppo_schema", "_self_"]
    (folder / "mine" / "whole.yaml").write_text(yaml.safe_dump(full))
    result = run(folder, "--config-path", "mine", "--config-name", "whole", "hydra.run.dir=.")
    assert result.stdout == "ran 9 64\n"


def test_info_and_a_sweep_work(folder: Path) -> None:
    assert "ppo_schema" in run(folder, "--info", "defaults-tree").stdout
    sweep = run(folder, "--multirun", "trainer.seed=3,4")
    assert sweep.returncode == 0, sweep.stderr
    assert sweep.stdout.endswith("ran 3 64\nran 4 64\n")


def test_the_entry_point_itself_refuses_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_npu.main_ppo", "trainer.n_gpus_per_node=8"]
    result = _run(command, tmp_path, {})
    assert result.returncode == 2
    assert "here it is trainer.n_devices_per_node" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_and_a_full_disk_do_not_end_the_run(folder: Path) -> None:
    program = (folder / "program.py").read_text().replace('print("ran"', 'print("x" * 300000)\n    print("ran"')
    (folder / "program.py").write_text(program + '\n    open("ended", "w").close()\n')
    for end in ("| head -c 1", "> /dev/full", ">&-"):
        line = f"{sys.executable} program.py trainer.seed=3 {end}; echo status ${{PIPESTATUS[0]}}"
        result = _run(["bash", "-c", line], folder, {})
        assert result.stderr == ""
        assert result.stdout.endswith("status 0\n")
        (folder / "ended").unlink()


def test_a_terminal_without_unicode_gets_all_the_words(folder: Path) -> None:
    result = run(folder, "data.train_batch_size=65", PYTHONIOENCODING="ascii", COLUMNS="20")
    assert result.returncode == 2
    assert "data.train_batch_size=65" in result.stderr
    assert "UnicodeEncodeError" not in result.stderr
    result = run(folder, "trainer.seed='ü'", PYTHONIOENCODING="ascii")
    assert (result.returncode, "trainer.seed=\\xfc: must be a whole number" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"trainer:\n\tseed: 5\n", "small.yaml:3: not YAML: found character"),
        (b"trainer: {seed: 5, seed: 6}\n", "small.yaml:2: not YAML: found duplicate key seed"),
        (b"trainer: {experiment_name: \xff}\n", "small.yaml: not YAML: UnicodeDecodeError"),
        (b"- a\n", "small.yaml: holds a list; it must hold keys and values"),
        (b"trainer: {seed: five}\n", "In 'recipe/small': trainer"),
    ],
)
def test_a_broken_file_of_ones_own_is_named(folder: Path, content: bytes, words: str) -> None:
    recipe = folder / "mine" / "recipe" / "small.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_bytes(b"# @package _global_\n" + content)
    result = run(folder, "--config-dir", "mine", "recipe=small")
    assert result.returncode == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 2
