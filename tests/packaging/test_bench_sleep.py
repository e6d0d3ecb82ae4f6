"""scripts/bench_sleep.py on the CPU: it measures, checks what it measures, and writes what it says; and its sibling."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_sleep.py"
SMALL = ("--device", "cpu", "--cache", "0.03", "--cycles", "2")


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_measurement_of_two_sizes(tmp_path: Path) -> None:
    result = _bench(*SMALL, "--sizes", "0.02", "0.04", "--compare", "0.02", "--out", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr + result.stdout
    assert "torch_memory_saver, 0.02 GiB" in result.stdout  # said to be missing, or to need a GPU
    records = json.loads((tmp_path / "out" / "bench_sleep.json").read_text())
    assert [record["order"]["weights"] for record in records] == [int(0.02 * (1 << 30)), int(0.04 * (1 << 30))]
    for record in records:
        measured, weights = record["measurement"], record["order"]["weights"]
        assert measured["intact"]
        assert len(measured["sleeps"]) == len(measured["wakes"]) == 2
        assert all(0 < seconds < 5 for seconds in [*measured["sleeps"], *measured["wakes"], measured["first_sleep"]])
        assert weights <= measured["host"] <= 1.02 * weights
        assert measured["left_on_device"] < 4 << 20
    assert (tmp_path / "out" / "bench_sleep.png").stat().st_size > 1000
    assert "weights intact" in result.stdout


def test_a_size_that_is_no_size_is_refused_before_anything_runs(tmp_path: Path) -> None:
    result = _bench(*SMALL, "--sizes", "-1", "--out", str(tmp_path / "out"))
    assert (result.returncode, "must be positive" in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_here_is_said(tmp_path: Path) -> None:
    result = _bench("--device", "xpu:0", "--out", str(tmp_path / "out"))
    assert result.returncode == 2
    assert "trainer.device='xpu' is unknown" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_comparison_with_vllm_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    script = SCRIPT.with_name("bench_vllm_sleep.py")
    result = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert "needs a GPU; scripts/bench_sleep.py runs anywhere" in result.stderr
    assert list(tmp_path.iterdir()) == []
