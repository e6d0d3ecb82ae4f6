"""What an NPU's installation must hold, by the metadata that real packages leave; the lock and the extra agree."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
ENGINES = {"deepspeed": "0.19.8", "ray": "2.60.0", "transformers": "5.5.4", "tensordict": "0.14.3"}
ON_X86_64 = ENGINES | {
    "torch": "2.10.0+cpu",
    "torch-npu": "2.10.0.post4",
    "torchvision": "0.25.0+cpu",
    "triton-ascend": "3.2.2",
    "vllm": "0.23.0",
    "vllm-ascend": "0.23.0",
    "scipy": "1.18.1",
    "pandas": "3.1.1",
}
# PyPI's torch and torchvision for aarch64 are built for the CPU, and say so nowhere.
ON_AARCH64 = ON_X86_64 | {"torch": "2.10.0", "torchvision": "0.25.0"}
ON_THE_CPU = ENGINES | {"torch": "2.13.0+cpu", "vllm": "0.32.0"}
CHECK = """import sys
sys.path[:] = {path!r} + sys.path
from rlhf_npu.installation import check_installation
check_installation()
"""
BUILD_VLLM = (
    "VLLM_VERSION_OVERRIDE=0.23.0 VLLM_TARGET_DEVICE=empty "
    "pip install --no-deps --no-build-isolation --no-binary vllm vllm==0.23.0"
)


def install(site: Path, versions: dict[str, str]) -> None:
    """Leaves what pip leaves of these packages: an importable name, and metadata."""
    for name, version in versions.items():
        module = name.replace("-", "_")
        (site / module).mkdir(parents=True)
        (site / module / "__init__.py").write_text("raise ImportError('the check must not import this')\n")
        metadata = site / f"{module}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def check(site: Path) -> str:
    """The last line of the error that a check of this installation, and of nothing else, ends in; "" for none."""
    program = CHECK.format(path=[str(site), str(PROJECT)])
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (done.stderr == "")
    return done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize("versions", [ON_X86_64, ON_AARCH64, ON_X86_64 | {"vllm": "0.23.0+empty"}, ON_THE_CPU])
def test_a_right_installation_is_not_refused(tmp_path: Path, versions: dict[str, str]) -> None:
    install(tmp_path, versions)
    assert check(tmp_path) == ""


def test_beside_torchs_cpu_build_a_torchvision_built_for_cuda_is_refused_where_there_is_no_npu(tmp_path: Path) -> None:
    install(tmp_path, ON_THE_CPU | {"torchvision": "0.28.0"})
    assert "pip uninstall torchvision" in check(tmp_path)


@pytest.mark.parametrize("name", ["torchvision", "triton-ascend", "scipy", "pandas", "vllm-ascend"])
def test_what_vllm_needs_on_an_npu_is_named_with_the_command_that_installs_it(tmp_path: Path, name: str) -> None:
    install(tmp_path, {package: version for package, version in ON_AARCH64.items() if package != name})
    error = check(tmp_path)
    assert f"InstallationError: {name} not installed" in error
    assert f"pip install --no-deps {name}" in error
    assert "uninstall" not in error


@pytest.mark.parametrize("version", ["0.22.1", "0.23.1.dev3+g1234567"])
def test_another_release_of_vllm_than_vllm_ascends_is_refused_with_the_command_that_builds_it(
    tmp_path: Path, version: str
) -> None:
    install(tmp_path, ON_X86_64 | {"vllm": version})
    error = check(tmp_path)
    assert f"vllm-ascend 0.23.0 is made for vllm 0.23.0, but vllm {version} is installed" in error
    assert BUILD_VLLM in error


def test_a_torch_that_torch_npu_is_not_made_for_is_refused(tmp_path: Path) -> None:
    install(tmp_path, ON_AARCH64 | {"torch": "2.11.0"})
    assert "torch-npu 2.10.0.post4 is made for torch 2.10.0, but torch 2.11.0 is installed" in check(tmp_path)


def test_a_triton_that_lies_over_triton_ascends_files_is_refused_and_one_below_them_is_not(tmp_path: Path) -> None:
    install(tmp_path, ON_X86_64 | {"triton": "3.9.0"})
    compiler = tmp_path / "triton" / "compiler.py"
    compiler.write_text("backend = 'npu'\n")
    digest = urlsafe_b64encode(hashlib.sha256(compiler.read_bytes()).digest()).rstrip(b"=").decode()
    record = f"triton/compiler.py,sha256={digest},16\ntriton_ascend-3.2.2.dist-info/RECORD,,\n"
    (tmp_path / "triton_ascend-3.2.2.dist-info" / "RECORD").write_text(record)
    assert check(tmp_path) == ""
    compiler.write_text("backend = 'cuda'\n")
    error = check(tmp_path)
    assert "triton 3.9.0 has overwritten triton/compiler.py of triton-ascend" in error
    assert "pip install --no-deps --force-reinstall triton-ascend==3.2.2" in error


def locked(name: str) -> dict[str, set[str]]:
    """The versions of a lock by the packages' normalized names: two where the machine decides."""
    versions: dict[str, set[str]] = {}
    for line in (PROJECT / "requirements" / name).read_text().splitlines():
        if match := re.match(r"([\w.-]+)==([^; ]+)", line):
            versions.setdefault(re.sub(r"[-_.]+", "-", match[1]).lower(), set()).add(match[2])
    return versions


def extra() -> dict[str, str]:
    """The versions that the extra pins, of which pyproject.toml says that users have them."""
    lines = (PROJECT / "pyproject.toml").read_text().split("\nnpu = [")[1].split("]\n")[0]
    return dict(re.findall(r'"([\w-]+)(?:\[\w+])?==([\w.]+)"', lines))


def test_the_extra_and_both_locks_have_the_same_versions() -> None:
    users, simulated = locked("npu.lock"), locked("npu-sim.lock")
    for name, version in extra().items():
        assert version in users[name]
        assert name == "triton-ascend" or simulated[name] == {version}
    assert users["torch"] == {"2.10.0", "2.10.0+cpu"}
    assert users["torchvision"] == {"0.25.0", "0.25.0+cpu"}


def test_what_runs_on_the_simulated_stack_is_what_users_install() -> None:
    users, simulated = locked("npu.lock"), locked("npu-sim.lock")
    different = {name for name in users.keys() & simulated.keys() if users[name] != simulated[name]}
    assert different == {"torch", "torchvision"}  # PyPI's builds in the simulation


def test_nothing_that_overwrites_triton_ascend_or_is_built_for_cuda_is_in_the_lock() -> None:
    names = set(locked("npu.lock"))
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-"))}
    assert "triton" not in names
