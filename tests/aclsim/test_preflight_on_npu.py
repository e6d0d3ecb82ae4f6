"""scripts/preflight.py with the real torch_npu on a simulated device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]
MIB = 1 << 20
# As the script runs, after a line of the caller's.
PROGRAM = "import sys, torch; {first}; from rlhf_npu.preflight.__main__ import main; sys.exit(main())"


def reported(
    tmp_path: Path, *, device: str = "npu:0", first: str = "", **environment: str
) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the checks of the JSON report by their names."""
    file = tmp_path / "report.json"
    program = ["-c", PROGRAM.format(first=first)] if first else [str(PROJECT / "scripts" / "preflight.py")]
    command = [sys.executable, *program, "--device", device, "--size", "64MiB", "--report", str(file)]
    python_path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": python_path} | environment
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    report = json.loads(file.read_text())
    assert report["failed"] == (done.returncode == 1)
    assert report["device"] == "npu:0"
    return done.returncode, {check["name"]: check for check in report["checks"]}


def test_the_npu_passes_by_its_own_count_of_memory(tmp_path: Path) -> None:
    memory = 20 << 30
    status, checks = reported(tmp_path, device="auto", ACLSIM_DEVICE_MEMORY=str(memory), TASK_QUEUE_ENABLE="2")
    assert status == 0
    assert checks["CANN"]["value"] == "8.5.0"
    assert checks["torch-npu"]["value"] == "2.10.0.post4, as the extra npu has it"
    assert checks["granularity"]["measured"] == {"bytes": 2 * MIB}
    assert checks["device memory"]["measured"]["total"] == memory
    assert checks["VLLM_ASCEND_ENABLE_NZ"]["status"] == "info"
    assert checks["TASK_QUEUE_ENABLE"]["status"] == "warning"
    assert "PYTORCH_NPU_ALLOC_CONF" not in checks
    for name in ("first sleep, level 1", "second sleep, level 1", "sleep, level 2"):
        measured = checks[name]["measured"]
        assert measured["returned"] == measured["expected"] > 128 * MIB
    assert checks["second wake-up"]["measured"]["wrong_bytes"] == 0
    assert checks["plain copy back"]["measured"]["bytes"] == 64 * MIB


@pytest.mark.parametrize("variable", ["PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_by_environment_fail_with_the_variable(tmp_path: Path, variable: str) -> None:
    status, checks = reported(tmp_path, **{variable: "expandable_segments:True"})
    assert status == 1
    assert checks["expandable segments"]["status"] == "failed"
    assert f"switched on by {variable}=expandable_segments:True" in checks["expandable segments"]["value"]
    assert "unset the variable" in checks["expandable segments"]["advice"]
    assert "fill" not in checks


def test_expandable_segments_by_torchs_settings_fail_where_a_region_opens(tmp_path: Path) -> None:
    switch = "torch.npu.memory._set_allocator_settings('expandable_segments:True')"
    status, checks = reported(tmp_path, first=switch)
    assert status == 1
    assert checks["expandable segments"]["status"] == "ok"
    assert "switched on by torch's allocator settings" in checks["tensors in a region"]["value"]
    assert "fill" not in checks


def test_too_little_memory_fails_with_what_is_needed_and_free(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, ACLSIM_DEVICE_MEMORY=str(100 * MIB))
    assert status == 1
    measured = checks["memory for it"]["measured"]
    assert measured["needed"] > 128 * MIB > 100 * MIB > measured["free"] > 0
    assert checks["memory for it"]["value"] == "138 MiB needed, 98 MiB free"
    assert "fill" not in checks


def test_memory_that_the_driver_refuses_is_told_in_its_words_and_not_torchs(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, ACLSIM_DEVICE_MEMORY=str(MIB))
    assert status == 1
    assert "aclrtMallocPhysical returned 207001" in checks["tensors in a region"]["value"]
    assert checks["tensors in a region"]["measured"] == {"needed": 2 * MIB, "free": MIB}


def test_memory_that_another_holds_is_pointed_out(tmp_path: Path) -> None:
    hold = "held = torch.zeros(32 << 20, device='npu:0')"
    status, checks = reported(tmp_path, first=hold, ACLSIM_DEVICE_MEMORY=str(1 << 30))
    assert status == 0
    assert checks["device memory"]["status"] == "warning"
    assert "holds 130 MiB" in checks["device memory"]["advice"]


def test_an_npu_that_fails_to_wake_names_the_tag_and_the_bytes(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, SLEEP_POOL_FAULT="copy_in:1")
    assert status == 1
    assert list(checks)[-1] == "first wake-up"
    assert "copy_in of tag 'weights': injected fault" in checks["first wake-up"]["value"]
    assert "bytes at 0x" in checks["first wake-up"]["value"]
