"""The installation that docs/npu.md tells users to type: what pip makes of its commands, CANN aside."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]
# pip, on a machine of that name: it takes the markers' platform_machine from here.
PIP = """import platform, runpy, sys
machine, *sys.argv = sys.argv[1:]
platform.machine = lambda: machine
runpy.run_module("pip", run_name="__main__")
"""
# Only as source on the index: built, they serve any machine as far as pip can tell.
BUILT = ("antlr4-python3-runtime", "cellpylib", "deepspeed", "pycosat", "zss", "bfi", "magiccube")
# What PyTorch's index and Ascend's have, and PyPI has not.
PLACES = {
    "x86_64": ("torch==2.10.0+cpu", "torchvision==0.25.0+cpu", "triton-ascend==3.2.2"),
    "aarch64": ("triton-ascend==3.2.2",),
}


def commands() -> list[str]:
    """The lines of the first block of commands under "Installation"."""
    section = (PROJECT / "docs" / "npu.md").read_text().split("\n## Installation\n")[1]
    return section.split("```bash\n")[1].split("```")[0].splitlines()


def wheel(folder: Path, name: str, version: str, requires: list[str], tag: str) -> None:
    """A wheel of that name and metadata that holds nothing: it stands for one that lies on an index."""
    stem = f"{re.sub(r'[-.]', '_', name)}-{version}"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", head + "".join(f"Requires-Dist: {line}\n" for line in requires))
        archive.writestr(f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def resolved(machine: str, tmp_path: Path, *requirements: str) -> dict[str, str]:
    """What pip would install on a machine of that kind with both indexes: versions by names."""
    index, report = tmp_path / "index", tmp_path / "report.json"
    index.mkdir()
    for place in PLACES[machine]:
        name, _, version = place.partition("==")
        known = importlib.metadata.requires(name) or [] if name == "torchvision" else []
        wheel(index, name, version, known, f"cp312-cp312-manylinux_2_28_{machine}")
    wheel(index, "arctic-inference", "0.1.1", [], "py3-none-any")
    for name in BUILT:
        wheel(index, name, importlib.metadata.version(name), importlib.metadata.requires(name) or [], "py3-none-any")
    tags = [f"--platform=manylinux_2_{minor}_{machine}" for minor in (34, 31, 28, 27, 26, 24, 17, 12, 5)]
    options = ["--dry-run", "--ignore-installed", "--quiet", "--only-binary=:all:", "--python-version=3.12"]
    places = [f"--find-links={index}", f"--target={tmp_path / 'site'}", f"--report={report}"]
    tags.append(f"--platform=manylinux2014_{machine}")
    done = subprocess.run(
        [sys.executable, "-c", PIP, machine, "pip", "install", *options, *tags, *places, *requirements],
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = (entry["metadata"] for entry in json.loads(report.read_text())["install"])
    return {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"] for entry in found}


@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
def test_the_lock_has_a_package_for_each_line_on_either_machine(machine: str, tmp_path: Path) -> None:
    (line,) = [line for line in commands() if "npu.lock" in line]
    found = resolved(machine, tmp_path, *line.removeprefix("pip install ").split())
    assert found["torch"] == {"x86_64": "2.10.0+cpu", "aarch64": "2.10.0"}[machine]
    assert found["torch-npu"] == "2.10.0.post4"
    assert found["vllm-ascend"] == "0.23.0"
    assert {"setuptools-rust", "semantic-version", "setuptools-scm", "setuptools"} <= set(found)


def test_the_extra_alone_can_be_resolved(tmp_path: Path) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["npu"]]
    found = resolved("x86_64", tmp_path, *requirements)
    assert found["torch-npu"] == "2.10.0.post4"
    assert "triton" in found  # what the lock is for: this would lie over triton-ascend's files


def test_vllm_is_built_under_the_version_that_vllm_ascend_asks_for(tmp_path: Path) -> None:
    lines = commands()
    (build,) = [line for line in lines if line.startswith("pip install") and "vllm==" in line]
    (settings,) = [line for line in lines if line.startswith("export VLLM")]
    pip = f"{sys.executable} -m pip install --no-cache-dir --target {tmp_path}"
    script = f"{settings}\n{build.replace('pip install', pip)}"
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(["bash", "-ec", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    assert distribution.version == "0.23.0"
    assert not list((tmp_path / "vllm").glob("_C*.so"))
    assert "torch" not in {re.split(r"\W", line)[0] for line in distribution.requires or ()}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the stack's own metadata are those of x86-64")
def test_torch_npu_accepts_the_locks_torch() -> None:
    assert importlib.metadata.requires("torch-npu") == ["torch==2.10.0+cpu"]
