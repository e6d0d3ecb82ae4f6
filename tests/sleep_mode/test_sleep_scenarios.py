"""vLLM's own sleep-mode tests have their counterparts here, on the CPU, a GPU and an NPU, with graphs and without.

Memory that was dropped is poisoned, so that a read of it shows.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_npu.engines.rollout import NPU_GRAPHS
from rlhf_npu.platform import PLATFORMS
from tests.devices import DEVICE
from tests.sleep_mode.sleep_scenarios import LORA, PLAIN, PRESERVED
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ON_CPU = {"kv_cache_memory_bytes": 64 << 20, "block_size": 32, "sleep_preserve_parameter_names": [PRESERVED]}
ON_NPU = {"kv_cache_memory_bytes": 64 << 20}
GRAPHS_ON_NPU = ON_NPU | {"compilation_config": {"cudagraph_mode": NPU_GRAPHS}}
ENGINES: dict[str, dict[str, list[str]]] = {
    "cuda": {
        "eager": [],
        "graphs": ["--graphs"],
        "fp8_cache": ["--graphs", "--settings", '{"kv_cache_dtype": "fp8"}'],
        "lora": ["--lora"],
        "lora_graphs": ["--graphs", "--lora"],
    },
    "npu": {
        "eager": ["--settings", json.dumps(ON_NPU)],
        "graphs": ["--graphs", "--settings", json.dumps(GRAPHS_ON_NPU)],
        "lora": ["--lora", "--settings", json.dumps(ON_NPU)],
    },
    "cpu": {"cpu": ["--settings", json.dumps(ON_CPU)], "lora": ["--lora", "--settings", json.dumps(ON_CPU)]},
}
CASES = [(engine, one.__name__) for engine in ENGINES[DEVICE] for one in (LORA if "lora" in engine else PLAIN)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("scenarios") / "model", positions=256)


@pytest.fixture(scope="module")
def errors(model: Path) -> Callable[[str], dict[str, Any]]:
    """Why each scenario failed, if it did, on an engine."""
    return functools.cache(lambda engine: _run(model, ENGINES[DEVICE][engine]))


def _run(model: Path, options: list[str]) -> dict[str, Any]:
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "SLEEP_POOL_POISON": "1",
        "HF_HUB_OFFLINE": "1",
        **PLATFORMS[DEVICE].environment,
    }
    command = [sys.executable, "-m", "tests.sleep_mode.sleep_scenarios", str(model), *options]
    result = subprocess.run(
        command, env={**os.environ, **variables}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"scenario"')]
    return {line["scenario"]: line["error"] for line in lines}


@pytest.mark.parametrize(("engine", "scenario"), CASES)
def test_sleep_mode(errors: Callable[[str], dict[str, Any]], engine: str, scenario: str) -> None:
    assert errors(engine)[scenario] is None, errors(engine)[scenario]
