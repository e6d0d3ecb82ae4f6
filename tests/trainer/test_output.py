"""The output folder: one run's, from before Ray starts; given back when training does not begin."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_npu.config import compose_config
from rlhf_npu.errors import ConfigError
from rlhf_npu.trainer.output import claim_folder

CLAIM = """
import sys
from rlhf_npu.config import compose_config
from rlhf_npu.errors import ConfigError
from rlhf_npu.trainer.output import claim_folder

config = compose_config(sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
try:
    with claim_folder(config) as output:
        output.keep()
        print(output.path)
except ConfigError as error:
    print("refused", error)
"""
SWEEP = """
from rlhf_npu.config import PPO, run_from_command_line
from rlhf_npu.trainer.output import claim_folder

def job(config):
    with claim_folder(config) as output:
        output.keep()
        print(config.trainer.seed, output.path)

run_from_command_line(PPO, job)
"""


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SWEEP, "--multirun", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def claims_at_once(folder: Path, override: str) -> list[str]:
    """What three processes say that claim a folder at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, override],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return [process.communicate("go\n")[0].strip() for process in processes]


def test_of_runs_that_start_at_the_same_moment_one_gets_the_folder(tmp_path: Path) -> None:
    said = claims_at_once(tmp_path, "trainer.default_local_dir=run")
    assert sorted(line.startswith("refused") for line in said) == [False, True, True]
    assert f"trainer.default_local_dir={tmp_path / 'run'}" in next(line for line in said if line.startswith("refused"))


def test_runs_that_share_a_folder_by_the_clock_get_one_each(tmp_path: Path) -> None:
    said = claims_at_once(tmp_path, "trainer.default_local_dir=outputs/2026-01-01/12-00-00")
    names = {Path(line).name for line in said}
    assert names == {"12-00-00", "12-00-00-2", "12-00-00-3"}
    config = (tmp_path / "outputs" / "2026-01-01" / "12-00-00-2" / "config.yaml").read_text()
    assert "default_local_dir: " + str(tmp_path / "outputs" / "2026-01-01" / "12-00-00-2") in config


def test_each_job_of_a_sweep_has_a_folder_of_its_own(tmp_path: Path) -> None:
    by_default = sweep(tmp_path, "trainer.seed=1,2")
    named = sweep(tmp_path, "trainer.seed=1,2", "trainer.default_local_dir=runs/${trainer.seed}")
    assert (by_default.returncode, named.returncode) == (0, 0), by_default.stderr + named.stderr
    assert len(list(tmp_path.glob("outputs/*/*/config.yaml"))) == 2
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"1", "2"}
    assert "seed: 2" in (tmp_path / "runs" / "2" / "config.yaml").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "runs"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trainer.seed=1,2", "trainer.default_local_dir=out"), "2 jobs of the sweep would write there"),
        (("data.train_batch_size=64,65",), "the job data.train_batch_size=65"),
        (("trainer.sed=1,2",), "did you mean trainer.seed?"),
    ],
)
def test_a_sweep_with_a_job_that_cannot_work_starts_none(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = sweep(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def run_that_ends_with(error: BaseException, folder: Path, *, wrote: tuple[str, ...], trained: bool = False) -> Path:
    with claim_folder(compose_config([f"trainer.default_local_dir={folder}"])) as output:
        for name in wrote:
            path = output.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if trained:
            output.keep()
        raise error


def test_a_run_that_fails_before_training_gives_its_folder_back_but_for_the_logs(tmp_path: Path) -> None:
    folder, start = tmp_path / "new" / "run", ("metrics.jsonl", "logs/worker_0.log", "tensorboard/events")
    with pytest.raises(RuntimeError):
        run_that_ends_with(RuntimeError("no Ray"), folder, wrote=())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt):
        run_that_ends_with(KeyboardInterrupt(), folder, wrote=start)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):  # the folder is free again
        with pytest.raises(RuntimeError):
            run_that_ends_with(RuntimeError("engine"), folder, wrote=start)
        assert [path.name for path in folder.iterdir()] == ["logs"]


def test_an_interrupted_run_keeps_its_results_and_no_half_model(tmp_path: Path) -> None:
    wrote = ("metrics.jsonl", "model.partial/config.json")
    with pytest.raises(KeyboardInterrupt):
        run_that_ends_with(KeyboardInterrupt(), tmp_path, wrote=wrote, trained=True)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "metrics.jsonl"}


@pytest.mark.parametrize(("path", "words"), [("file/run", "Not a directory"), ("file", "Not a directory")])
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "file").touch()
    config = compose_config([f"trainer.default_local_dir={tmp_path / path}"])
    with pytest.raises(ConfigError, match=words) as refused, claim_folder(config):
        pass
    assert f"trainer.default_local_dir={tmp_path / path}" in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_ray_deletes_after_the_job_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "outputs"
    with (
        pytest.raises(ConfigError, match="Ray deletes"),
        claim_folder(compose_config([f"trainer.default_local_dir={folder}"])),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
