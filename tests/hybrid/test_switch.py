"""A switch that fails says which phase and can be tried again; one out of order is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.devices import PLATFORM
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

PROMPTS = [[1, 4, 13, 6, 14, 11, 13, 7]]


def _engines(model_path: str) -> Any:
    from rlhf_npu.config import DataConfig, ModelConfig, RolloutConfig
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.engines.rollout import RolloutEngine
    from rlhf_npu.hybrid.reshard import Resharder

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=16, max_response_length=16)
    model = ModelConfig(path=model_path, dtype="float32")
    config = RolloutConfig(n=1, kv_cache_memory_gb=0.05, log_prob_micro_batch_size_per_device=1)
    rollout = RolloutEngine(model, config, data, PLATFORM, [2])
    return rollout, Resharder(load_policy(model), rollout, bucket_bytes=1 << 20)


def _fail_and_retry(model_path: str, sleep_levels: tuple[int, ...]) -> Any:
    rollout, resharder = _engines(model_path)
    return [_fail_and_retry_at(level, rollout, resharder) for level in sleep_levels]


def _fail_and_retry_at(sleep_level: int, rollout: Any, resharder: Any) -> Any:
    from allocator import SleepPool
    from rlhf_npu.errors import SwitchError
    from rlhf_npu.hybrid.engine import HybridEngine

    hybrid = HybridEngine(rollout, resharder, sleep_level, PLATFORM)
    pool = SleepPool.get(PLATFORM.device())
    expected = rollout.generate(PROMPTS, n=1, seed=0, temperature=0.0)
    messages = []
    for switch, call in ((hybrid.to_train, "unmap"), (hybrid.to_generate, "map")):
        mode = hybrid.mode
        pool.inject_fault(call, 1)
        try:
            switch()
        except SwitchError as error:
            messages.append(str(error))
        assert hybrid.mode is mode
        switch()
    return messages, expected == rollout.generate(PROMPTS, n=1, seed=0, temperature=0.0)


def test_a_failed_phase_is_named_and_a_retry_completes(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "model"))
    levels = (1, 2)
    (results,) = run_ranks(1, _fail_and_retry, folder, levels)
    for level, ((asleep, awake), same) in zip(levels, results, strict=True):
        assert f"sleep level {level} weights+kv_cache" in asleep
        assert "wake_up weights" in awake
        assert same


def _out_of_order(model_path: str) -> Any:
    from rlhf_npu.errors import SwitchError
    from rlhf_npu.hybrid.engine import HybridEngine

    rollout, resharder = _engines(model_path)
    hybrid = HybridEngine(rollout, resharder, 1, PLATFORM)
    messages = []
    for switch in (hybrid.to_generate, hybrid.to_train, hybrid.to_train):
        try:
            report = switch()
        except SwitchError as error:
            messages.append(str(error))
    return messages, report.before.mapped, report.after.mapped, report.after.host, report.seconds


def test_a_switch_out_of_order_is_refused_and_a_report_counts_bytes(tmp_path: Path) -> None:
    folder = str(save_tiny_model(tmp_path / "model"))
    ((messages, before, after, host, seconds),) = run_ranks(1, _out_of_order, folder)
    assert ["mode generate" in messages[0], "mode train" in messages[1]] == [True, True]
    assert before["kv_cache"] > 40e6
    assert after == {"weights": 0, "kv_cache": 0}
    assert host["weights"] > 100_000
    assert seconds["sleep"] > 0
