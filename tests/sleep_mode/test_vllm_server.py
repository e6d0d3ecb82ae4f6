"""vLLM's server with `--enable-sleep-mode`: its own endpoints, on the CPU or a GPU, with requests in flight.

RLHF_NPU_LOAD_REQUESTS and RLHF_NPU_LOAD_CYCLES say how many requests meet how many sleeps and wake-ups.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf_npu.platform import PLATFORMS
from rlhf_npu.workers.environment import free_port
from tests.devices import DEVICE
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

START_SECONDS = 240
REQUESTS = int(os.environ.get("RLHF_NPU_LOAD_REQUESTS", "40"))
CYCLES = int(os.environ.get("RLHF_NPU_LOAD_CYCLES", "4"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    model, port = save_tiny_model(folder / "model"), free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-sleep-mode", "--enforce-eager", "--max-model-len", "64", "--gpu-memory-utilization", "0.3"]
    environment = {
        **os.environ,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **PLATFORMS[DEVICE].environment,
    }
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    _wait_until_healthy(process, address, folder / "log")
    yield address
    process.terminate()
    process.wait(timeout=60)


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    process.kill()
    raise AssertionError(log.read_text()[-4000:])


def _request(number: int) -> dict[str, Any]:
    prompt = [1, 4 + number % 9, 13, 6, 14, 11, 13, 7]
    return {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def _text(server: str, number: int = 0) -> str:
    answer = httpx.post(f"{server}/v1/completions", json=_request(number), timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def _post(server: str, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{server}/{path}", timeout=60, json=body or None)


def _is_sleeping(server: str) -> bool:
    return httpx.get(f"{server}/is_sleeping", timeout=60).json()["is_sleeping"]


def test_both_levels_and_waking_in_two_steps(server: str) -> None:
    before = _text(server)
    assert _post(server, "sleep?level=1").status_code == 200
    assert _is_sleeping(server)
    assert _post(server, "wake_up?tags=weights").status_code == 200
    assert _is_sleeping(server)
    assert _post(server, "wake_up").status_code == 200
    assert not _is_sleeping(server)
    assert _text(server) == before
    assert _post(server, "sleep?level=2").status_code == 200
    assert _post(server, "wake_up?tags=weights").status_code == 200
    assert _post(server, "collective_rpc", method="reload_weights").status_code == 200
    assert _post(server, "wake_up?tags=kv_cache").status_code == 200
    assert _text(server) == before


def _metrics(server: str) -> dict[str, float]:
    lines = httpx.get(f"{server}/metrics", timeout=60).text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith(("rlhf_npu:", "vllm:engine_sleep_state"))]
    return {name: float(value) for name, value in pairs}


def test_metrics_say_state_bytes_and_seconds(server: str) -> None:
    assert _post(server, "sleep?level=1").status_code == 200
    asleep = _metrics(server)
    assert _post(server, "wake_up").status_code == 200
    awake = _metrics(server)
    assert _post(server, "wake_up").status_code == 200
    again = _metrics(server)  # nothing has moved since
    state = next(name for name in asleep if 'sleep_state="weights_offloaded"' in name)
    assert (asleep[state], awake[state]) == (1, 0)
    for tag in ("weights", "kv_cache"):
        on_device = f'rlhf_npu:sleep_pool_bytes{{model_name="tiny",place="device",tag="{tag}"}}'
        assert asleep[on_device] == 0
        assert awake[on_device] > 1 << 16
        for phase in ("sleep", "wake"):
            labels = f'{{model_name="tiny",phase="{phase}",tag="{tag}"}}'
            assert awake[f"rlhf_npu:sleep_pool_seconds_sum{labels}"] > 0
            assert (
                again[f"rlhf_npu:sleep_pool_seconds_count{labels}"]
                == awake[f"rlhf_npu:sleep_pool_seconds_count{labels}"]
            )
    assert asleep['rlhf_npu:sleep_pool_bytes{model_name="tiny",place="host",tag="weights"}'] > 1 << 16


def test_the_cache_alone_is_given_back_while_paused(server: str) -> None:
    from vllm.version import __version_tuple__

    if __version_tuple__ < (0, 32):
        pytest.skip("vLLM has this endpoint since 0.32")
    before = _text(server)
    assert _post(server, "sleep?level=0").status_code == 200
    assert _post(server, "release_kv_cache_memory").status_code == 200
    held = _metrics(server)
    assert held['rlhf_npu:sleep_pool_bytes{model_name="tiny",place="device",tag="kv_cache"}'] == 0
    assert held['rlhf_npu:sleep_pool_bytes{model_name="tiny",place="device",tag="weights"}'] > 1 << 16
    assert _post(server, "wake_up?tags=kv_cache").status_code == 200
    assert _text(server) == before


def test_a_level_or_a_tag_that_is_none_changes_nothing(server: str) -> None:
    before = _text(server)
    assert _post(server, "sleep?level=3").status_code == 400
    assert not _is_sleeping(server)
    assert _post(server, "sleep").status_code == 200
    refused = _post(server, "wake_up?tags=weights&tags=wights")
    assert (refused.status_code, "unknown tags ['wights']" in refused.text) == (400, True)
    assert _is_sleeping(server)
    assert _post(server, "wake_up").status_code == 200
    assert _text(server) == before


def test_a_request_that_comes_while_the_server_sleeps_waits_for_it_to_wake(server: str) -> None:
    before = _text(server)
    assert _post(server, "sleep?level=1").status_code == 200
    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(_text, server)
        time.sleep(1)
        assert not answer.done()
        assert _post(server, "wake_up?tags=weights").status_code == 200
        time.sleep(0.5)
        assert not answer.done()  # its KV cache is not there yet
        assert _post(server, "wake_up?tags=kv_cache").status_code == 200
        assert answer.result(timeout=60) == before


@pytest.mark.parametrize("mode", ["wait", "abort"])
def test_each_request_ends_while_the_server_sleeps_and_wakes(server: str, mode: str) -> None:
    wanted = [_text(server, number) for number in range(9)]
    answers = asyncio.run(_load(server, mode))
    assert len(answers) == REQUESTS
    finished = [(number, choice["text"]) for number, choice in answers if choice["finish_reason"] == "length"]
    assert all(text == wanted[number % 9] for number, text in finished)
    cut = [choice["finish_reason"] for _, choice in answers if choice["finish_reason"] != "length"]
    assert set(cut) <= ({"abort"} if mode == "abort" else set())
    assert len(finished) >= REQUESTS / 4


async def _load(server: str, mode: str) -> list[tuple[int, dict[str, Any]]]:
    """Many requests at once, and a few sleeps and wake-ups meanwhile; each request's answer.

    The last quarter comes after them, however slow the device is.
    """
    turned = asyncio.Event()
    async with httpx.AsyncClient(base_url=server, timeout=120) as client:

        async def ask(number: int) -> tuple[int, dict[str, Any]]:
            await (turned.wait() if number >= REQUESTS * 3 // 4 else asyncio.sleep(number * 0.05))
            answer = await client.post("/v1/completions", json=_request(number))
            assert answer.status_code == 200, answer.text
            return number, answer.json()["choices"][0]

        async def turn() -> None:
            for _ in range(CYCLES):
                await asyncio.sleep(0.3)
                assert (await client.post(f"/sleep?level=1&mode={mode}")).status_code == 200
                assert (await client.post("/wake_up")).status_code == 200

        answers = asyncio.gather(*(ask(number) for number in range(REQUESTS)))
        await turn()
        turned.set()
        return await answers
