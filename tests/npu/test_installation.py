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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Found:
    """A distribution that pip found for a requirement."""

    version: str
    for_any_machine: bool

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Found:
        """From pip's report."""
        return cls(entry["metadata"]["version"], entry["download_info"]["url"].endswith("-any.whl"))


def normalized(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """The package of a lock's line."""
    return normalized(requirement.partition("==")[0])


def wheel(folder: Path, name: str, version: str, requires: list[str], tag: str) -> None:
    """A wheel of that name and metadata that holds nothing: it stands for one that lies on an index."""
    stem = f"{re.sub(r'[-.]', '_', name)}-{version}"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(folder / f"{stem}-{tag}.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", head + "".join(f"Requires-Dist: {line}\n" for line in requires))
        archive.writestr(f"{stem}.dist-info/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")


def resolved(machine: str, tmp_path: Path, *requirements: str) -> dict[str, Found]:
    """What pip would install on a machine of that kind with both indexes, by names."""
    index, report = tmp_path / "index", tmp_path / "report.json"
    index.mkdir(parents=True)
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
    installed = json.loads(report.read_text())["install"]
    return {normalized(entry["metadata"]["name"]): Found.of(entry) for entry in installed}


def test_the_lock_has_a_package_for_each_line_on_either_machine(tmp_path: Path) -> None:
    (line,) = [line for line in commands() if "npu.lock" in line]
    *options, lock = line.removeprefix("pip install ").split()
    arm = resolved("aarch64", tmp_path / "aarch64", *options, lock)
    assert arm["torch"].version == "2.10.0"
    assert arm["torch-npu"].version == "2.10.0.post4"
    assert arm["vllm-ascend"].version == "0.23.0"
    assert {"setuptools-rust", "semantic-version", "setuptools-scm", "setuptools"} <= set(arm)
    # A wheel for any machine is there for either; of the others each machine has its own.
    lines = [text for text in (PROJECT / lock).read_text().splitlines() if text and not text.startswith("#")]
    own = [text for text in lines if ";" in text or not arm[name_of(text)].for_any_machine]
    assert 50 < len(own) < len(lines)
    cut = tmp_path / "own.lock"
    cut.write_text("\n".join(own))
    intel = resolved("x86_64", tmp_path / "x86_64", *options, str(cut))
    assert intel["torch"].version == "2.10.0+cpu"
    assert set(intel) == {name_of(text) for text in own}
    versions = {name: one.version.removesuffix("+cpu") for name, one in intel.items()}
    assert versions == {name: arm[name].version for name in intel}


def test_the_extra_alone_can_be_resolved(tmp_path: Path) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["npu"]]
    found = resolved("x86_64", tmp_path, *requirements)
    assert found["torch-npu"].version == "2.10.0.post4"
    assert "triton" in found  # what the lock is for: this would lie over triton-ascend's files


def test_vllm_is_built_under_the_version_that_vllm_ascend_asks_for() -> None:
    lines = commands()
    (build,) = [line for line in lines if line.startswith("pip install") and "vllm==" in line]
    (settings,) = [line for line in lines if line.startswith("export VLLM")]
    # The same command has built the one that is installed here.
    setup = (PROJECT / "scripts" / "setup_npu_sim.sh").read_text().replace("\\\n", " ")
    (built,) = [line for line in setup.splitlines() if "--no-binary vllm" in line]
    built = built.split(" || ")[0].replace('"', "").replace("$vllm", "0.23.0")
    assert built.split() == [*settings.split()[1:], *build.split()]
    distribution = importlib.metadata.distribution("vllm")
    assert distribution.version == "0.23.0"
    assert not list(Path(str(distribution.locate_file("vllm"))).glob("_C*.so"))
    assert "torch" not in {re.split(r"\W", line)[0] for line in distribution.requires or ()}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the stack's own metadata are those of x86-64")
def test_torch_npu_accepts_the_locks_torch() -> None:
    assert importlib.metadata.requires("torch-npu") == ["torch==2.10.0+cpu"]
