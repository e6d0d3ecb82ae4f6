"""The shell scripts: what they refuse, what they repeat, and where they can be called from."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SHELL = [*(PROJECT / "scripts").glob("*.sh"), *(PROJECT / "recipes").glob("*.sh"), PROJECT / ".ci" / "run"]


def bash(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | environment
    return subprocess.run(["bash", *command], cwd=cwd, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A project like this one, small enough to be set up without an index."""
    root = tmp_path / "checkout"
    (root / "allocator" / "csrc").mkdir(parents=True)
    (root / "allocator" / "csrc" / "pool.cpp").write_text("// the pool\n")
    (root / "requirements").mkdir()
    (root / "requirements" / "cpu.lock").write_text("# nothing == nothing\n")
    shutil.copytree(PROJECT / "scripts", root / "scripts")
    backend = "[build-system]\nrequires = []\nbackend-path = ['.']\nbuild-backend = 'backend'\n"
    (root / "pyproject.toml").write_text(backend)
    (root / "setup.py").write_text("")
    shutil.copy(Path(__file__).parent / "empty_backend.py", root / "backend.py")
    return root


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_every_script_is_valid_and_stops_at_the_first_failure(script: Path) -> None:
    assert bash("-n", str(script), cwd=PROJECT).returncode == 0
    if script.name != "environment.sh":
        assert os.access(script, os.X_OK)
        assert "set -euo pipefail" in script.read_text()


def test_set_up_does_only_what_changed(checkout: Path, tmp_path: Path) -> None:
    setup = str(checkout / "scripts" / "setup.sh")
    first = bash(setup, cwd=tmp_path, PYTHON=sys.executable)
    assert first.returncode == 0, first.stderr
    assert "making .venv" in first.stdout
    assert bash(setup, cwd=tmp_path, PYTHON=sys.executable).stdout == ""
    (checkout / ".venv" / "left_over").touch()
    (checkout / "allocator" / "csrc" / "pool.cpp").write_text("// changed\n")
    native = bash(setup, cwd=tmp_path, PYTHON=sys.executable)
    assert "building the native part" in native.stdout
    assert "making .venv" not in native.stdout
    assert (checkout / ".venv" / "left_over").exists()
    (checkout / "requirements" / "cpu.lock").write_text("# changed == changed\n")
    locked = bash(setup, cwd=tmp_path, PYTHON=sys.executable)
    assert "making .venv" in locked.stdout
    assert not (checkout / ".venv" / "left_over").exists()


def test_an_interrupted_set_up_starts_from_nothing(checkout: Path) -> None:
    setup = str(checkout / "scripts" / "setup.sh")
    (checkout / "requirements" / "cpu.lock").write_text("no-such-package-anywhere==0\n")
    broken = bash(setup, cwd=checkout, PYTHON=sys.executable, PIP_NO_INDEX="1")
    assert broken.returncode != 0
    assert "could not install requirements/cpu.lock" in broken.stderr
    (checkout / ".venv" / "half_done").touch()
    (checkout / "requirements" / "cpu.lock").write_text("# nothing == nothing\n")
    assert bash(setup, cwd=checkout, PYTHON=sys.executable).returncode == 0
    assert not (checkout / ".venv" / "half_done").exists()


def test_a_missing_python_or_lock_is_named(checkout: Path) -> None:
    setup = str(checkout / "scripts" / "setup.sh")
    no_python = bash(setup, cwd=checkout, PYTHON="/nowhere/python3")
    assert no_python.returncode == 1
    assert "needs Python 3.11 or 3.12" in no_python.stderr
    assert "/nowhere/python3" in no_python.stderr
    assert not (checkout / ".venv").exists()
    no_lock = bash(setup, "nothing", cwd=checkout, PYTHON=sys.executable)
    assert no_lock.returncode == 1
    assert "there is no requirements/nothing.lock" in no_lock.stderr
    assert not (checkout / ".venv").exists()


def test_recipes_pass_their_arguments_on_from_any_folder(tmp_path: Path) -> None:
    for name, expected in (("ppo_digits", "adv_estimator: gae"), ("grpo_digits", "adv_estimator: grpo")):
        script = str(PROJECT / "recipes" / f"{name}.sh")
        result = bash(script, "--cfg", "job", "trainer.seed=77", cwd=tmp_path, PYTHON=sys.executable)
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout
        assert "seed: 77" in result.stdout
    assert list(tmp_path.iterdir()) == []
