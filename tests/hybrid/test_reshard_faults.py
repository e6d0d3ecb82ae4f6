"""A reshard through vLLM's own loading that fails on its way is done anew, into the memory that graphs know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_npu.preflight.tiny_models import FAMILIES
from tests.devices import PLATFORM
from tests.hybrid.faults import Fault, some
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

MOST_FAULTS = 4  # of each kind of operation
PROMPTS = [[1, 40, 50, 60]]


def _engines(folder: str, dtype: str) -> Any:
    from rlhf_npu.config import DataConfig, ModelConfig, RolloutConfig
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.engines.rollout import RolloutEngine
    from rlhf_npu.hybrid.resharding.reshard import Resharder

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=16, max_response_length=8)
    config = RolloutConfig(n=1, kv_cache_memory_gb=0.01, log_prob_micro_batch_size_per_device=1)
    model = ModelConfig(path=folder, dtype=dtype)
    rollout = RolloutEngine(model, config, data, PLATFORM, [2])
    policy = load_policy(model, device=PLATFORM.device())
    return rollout, Resharder(policy, rollout, bucket_bytes=20_000)


def _addresses(rollout: Any) -> dict[str, int]:
    from rlhf_npu.sleep_mode.weight_update import own_tensors

    return {
        f"{path}.{name}": tensor.data_ptr()
        for path, layer in rollout.module.named_modules()
        for name, tensor in own_tensors(layer).items()
    }


def _answer(rollout: Any) -> Any:
    rollout.reset_prefix_cache()
    return rollout.generate(PROMPTS, n=1, seed=0, temperature=0.0)


def _fail_in_turn(folder: str, dtype: str) -> Any:
    """What each fault led to, and what is otherwise than before once the reshard was done anew."""
    from rlhf_npu.errors import NoWeightsError, ReshardError

    rollout, resharder = _engines(folder, dtype)
    with pytest.raises(torch.OutOfMemoryError), Fault("aten.copy_.default", 1, torch.OutOfMemoryError):
        resharder.rehearse()  # not that the model cannot be trained
    resharder.rehearse()
    answer, addresses, watch = _answer(rollout), _addresses(rollout), Fault()
    with watch:
        resharder.reshard()
    faults = [(name, nth) for name, count in watch.counts.items() for nth in some(count, MOST_FAULTS)]
    told, wrong = {}, []
    for name, nth in faults:
        for parameter in rollout.module.parameters():
            parameter.data.fill_(torch.nan if parameter.is_floating_point() else 0)
        try:
            with Fault(name, nth):
                resharder.reshard()
        except (RuntimeError, ReshardError) as error:
            told[name, nth] = str(error)
            with pytest.raises(NoWeightsError, match="sending them failed"):
                _answer(rollout)
            resharder.reshard()
        resharder.verify()
        wrong += [
            f"{name} {nth}: {tensor} moved" for tensor, at in _addresses(rollout).items() if addresses[tensor] != at
        ]
        wrong += [f"{name} {nth}: other answers"] if _answer(rollout) != answer else []
    return faults, told, wrong


def _fail_in_turn_in_each(folders: list[tuple[str, str]]) -> Any:
    return [_fail_in_turn(folder, dtype) for folder, dtype in folders]


def test_after_any_operation_that_fails_the_next_reshard_is_right_and_nothing_has_moved(tmp_path: Path) -> None:
    """Experts that are packed; products of weights that attention keeps."""
    names = ("Qwen3-MoE", "DeepSeek-V3")
    folders = [(str(FAMILIES[name].save(tmp_path / name)), FAMILIES[name].dtype) for name in names]
    (results,) = run_ranks(1, _fail_in_turn_in_each, folders)
    for name, (faults, told, wrong) in zip(names, results, strict=True):
        assert wrong == [], name
        assert "aten.copy_.default" in {operation for operation, _ in faults}, name
        assert len(told) > 0.9 * len(faults), name
        assert all("injected fault" in words for words in told.values()), name
