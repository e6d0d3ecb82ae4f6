"""vLLM as its users run it: sleep mode in this project's pool, with nothing but the package installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_npu.platform import PLATFORMS
from rlhf_npu.preflight.tiny_models import FAMILIES
from tests.devices import DEVICE
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

WORKERS = min(2, torch.cuda.device_count()) if DEVICE == "cuda" else 2

# What vLLM's documentation shows for a GPU.
PUBLISHED_EXAMPLE = """
import sys
from vllm import LLM, SamplingParams

def main():
    llm = LLM(sys.argv[1], enable_sleep_mode=True, max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.3)
    prompt = {"prompt_token_ids": [1, 4, 13, 6, 14, 11, 13, 7]}
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

    def text():
        return llm.generate(prompt, sampling)[0].outputs[0].token_ids

    before = text()
    llm.sleep(level=1)
    for asleep in (text, lambda: llm.chat([{"role": "user", "content": "1"}])):
        try:
            asleep()
        except RuntimeError as error:
            print("asleep:", error)
    llm.wake_up()
    assert text() == before

    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    assert text() == before
    for misuse in (lambda: llm.sleep(level=3), lambda: llm.wake_up(tags=["wights"])):
        try:
            misuse()
        except Exception as error:
            print("refused:", error)
    llm.wake_up()
    assert text() == before
    print("the same", len(before))

if __name__ == "__main__":
    main()
"""

ASYNC_ENGINE = """
import asyncio
import sys
from vllm import AsyncEngineArgs, AsyncLLMEngine, SamplingParams

async def main():
    settings = dict(max_model_len=64, max_num_seqs=4, gpu_memory_utilization=0.3, tensor_parallel_size=WORKERS)
    settings["enforce_eager"] = sys.argv[2] == "eager"
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(sys.argv[1], enable_sleep_mode=True, **settings))
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

    async def text(name):
        prompt = {"prompt_token_ids": [1, 4, 13, 6, 14, 11, 13, 7]}
        async for output in engine.generate(prompt, sampling, name):
            said = output.outputs[0].token_ids
        return said

    before = await text("before")
    for level in (1, 2):
        await engine.sleep(level)
        assert await engine.is_sleeping()
        held = await engine.collective_rpc("sleep_pool_stats")
        print("mapped", [sum(tag["mapped"] for tag in worker.values()) for worker in held])
        await engine.wake_up(["weights"])
        await engine.collective_rpc("reload_weights")
        await engine.wake_up(["kv_cache"])
        assert not await engine.is_sleeping()
        assert await text(f"level {level}") == before
    print("the same", len(before))
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""

TWO_ENGINES = """
import sys
from vllm import LLM, SamplingParams
from allocator import SleepPool

prompt = {"prompt_token_ids": [1, 4, 13, 6, 14, 11, 13, 7]}
sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)

def engine():
    settings = dict(max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.3, seed=0)
    return LLM(sys.argv[1], enable_sleep_mode=True, **settings)

def text(llm):
    return llm.generate(prompt, sampling)[0].outputs[0].token_ids

first = engine()
before = text(first)
first.sleep()
try:
    text(first)
except RuntimeError as error:
    print("asleep:", error)
second = engine()
assert text(second) == before
for _ in range(2):
    second.sleep()
    first.wake_up()
    assert text(first) == before
    first.sleep()
    second.wake_up()
    assert text(second) == before
mapped = [sum(tag.mapped for tag in SleepPool.get("DEVICE", name).stats().values()) for name in ("default", "engine1")]
print("mapped", mapped[0], mapped[1] > 0)
"""

WITHOUT_SLEEP_MODE = """
import sys
from vllm import LLM

llm = LLM(sys.argv[1], max_model_len=64, enforce_eager=True, gpu_memory_utilization=0.3)
print(type(llm.llm_engine.model_executor.driver_worker.worker).__name__, "allocator" in sys.modules)
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def _run(program: str, model: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = model.parent / "program.py"
    script.write_text(program)
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACLSIM_DEVICES": str(WORKERS),
        **PLATFORMS[DEVICE].environment,
        **environment,
    }
    command = [sys.executable, str(script), str(model), *arguments]
    return subprocess.run(command, env=variables, cwd=model.parent, capture_output=True, text=True, check=False)


def test_the_published_example_runs_as_it_stands(model: Path) -> None:
    result = _run(PUBLISHED_EXAMPLE, model, SLEEP_POOL_POISON="1")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "want 1 (offload weights) or 2 (drop them)" in result.stdout
    assert "unknown tags ['wights']" in result.stdout
    assert "the same 16" in result.stdout
    for call in ("generate", "chat"):
        assert f"asleep: LLM.{call}: the engine sleeps, or is paused, and would never answer" in result.stdout


@pytest.mark.skipif(DEVICE == "cuda", reason="about what is packed on the CPU and turned around on an NPU")
def test_experts_are_packed_at_each_load(tmp_path: Path) -> None:
    model = FAMILIES["Qwen3-MoE"].save(tmp_path / "model")
    result = _run(PUBLISHED_EXAMPLE, model, SLEEP_POOL_POISON="1")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "the same 16" in result.stdout


@pytest.fixture
def without_leftovers() -> Iterator[None]:
    """vLLM ends workers that are slow to stop, and their shared memory stays."""
    yield
    for segment in Path("/dev/shm").glob("vllm_dist_*"):
        segment.unlink()


@pytest.mark.parametrize("mode", ["eager", "graphs"] if DEVICE == "cuda" else ["eager"])
@pytest.mark.usefixtures("without_leftovers")
def test_an_asynchronous_engine_of_several_workers(model: Path, mode: str) -> None:
    result = _run(ASYNC_ENGINE.replace("WORKERS", str(WORKERS)), model, mode, SLEEP_POOL_POISON="1")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert result.stdout.count(f"mapped {[0] * WORKERS}") == 2
    assert "the same 16" in result.stdout


@pytest.mark.skipif(DEVICE != "npu", reason="only vllm-ascend shares tables among engines")
def test_a_second_engine_of_a_process_is_refused_on_an_npu(model: Path) -> None:
    result = _run(TWO_ENGINES, model, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert result.returncode != 0
    assert "asleep: LLM.generate: the engine sleeps, or is paused, and would never answer" in result.stdout
    assert "Start each engine in a process of its own" in result.stderr


@pytest.mark.skipif(DEVICE == "npu", reason="refused there")
def test_two_engines_of_a_process_take_turns(model: Path) -> None:
    place = "cuda:0" if DEVICE == "cuda" else DEVICE
    result = _run(TWO_ENGINES.replace("DEVICE", place), model, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "mapped 0 True" in result.stdout
    assert "asleep: LLM.generate: the engine sleeps, or is paused, and would never answer" in result.stdout


@pytest.mark.skipif(DEVICE != "cpu", reason="GPUs and NPUs have sleep modes of their own")
def test_switched_off_vllm_refuses_the_cpu_as_it_always_did(model: Path) -> None:
    result = _run(PUBLISHED_EXAMPLE, model, RLHF_NPU_SLEEP_MODE="0")
    assert result.returncode == 1
    assert "Sleep mode is not supported on current platform" in result.stderr


def test_an_engine_that_does_not_ask_for_it_gets_vllms_own_worker(model: Path) -> None:
    result = _run(WITHOUT_SLEEP_MODE, model, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert result.returncode == 0, result.stderr[-3000:]
    worker = {"cpu": "CPUWorker", "cuda": "Worker", "npu": "NPUWorker"}[DEVICE]
    assert result.stdout.splitlines()[-1] == f"{worker} False"
