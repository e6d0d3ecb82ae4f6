"""A rollout engine that did not read the model's weights: after the trainer sent them it is as if it had."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_npu.preflight.tiny_models import FAMILIES
from tests.devices import PLATFORM
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def _engine(folder: str, dtype: str, reads_weights: bool) -> Any:
    from rlhf_npu.config import DataConfig, ModelConfig, RolloutConfig
    from rlhf_npu.engines.rollout import RolloutEngine

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=64, max_response_length=16)
    config = RolloutConfig(n=1, kv_cache_memory_gb=0.05, log_prob_micro_batch_size_per_device=1, enforce_eager=True)
    model = ModelConfig(path=folder, dtype=dtype)
    return RolloutEngine(model, config, data, PLATFORM, [2], reads_weights=reads_weights)


def _state(engine: Any) -> dict[str, torch.Tensor]:
    """All that the model computes with: parameters, buffers, and what layers derived from them."""
    from rlhf_npu.sleep_mode.weight_update import own_tensors

    return {
        f"{path}.{name}": tensor.detach().cpu().clone()
        for path, layer in engine.module.named_modules()
        for name, tensor in own_tensors(layer).items()
        if not tensor.is_meta and not name.endswith("kv_cache")
    }


def _compare(folder: str, dtype: str) -> Any:
    from rlhf_npu.config import ModelConfig
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.hybrid.resharding.reshard import Resharder

    policy = load_policy(ModelConfig(path=folder, dtype=dtype), device=PLATFORM.device())
    unread = _engine(folder, dtype, reads_weights=False)
    refusals = [_refusals(unread)]
    unread.sleep(2)
    unread.wake_up(["weights", "kv_cache"])
    resharder = Resharder(policy, unread, 1 << 20)
    resharder.rehearse()
    found = _state(unread)
    answer = unread.generate([[1, 40, 50]], n=1, seed=0, max_tokens=4)
    for level in (1, 2):
        unread.sleep(level)
        unread.wake_up(["weights", "kv_cache"])
        refusals.append(_refusals(unread))
    refusals.append(_refusals_after_a_failure(unread))
    resharder.reshard()
    refusals.append(_refusals(unread))
    unread.shutdown()
    read = _engine(folder, dtype, reads_weights=True)
    expected = _state(read)
    same_answer = read.generate([[1, 40, 50]], n=1, seed=0, max_tokens=4) == answer
    read.shutdown()
    differing = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    return [*differing, *(found.keys() ^ expected.keys())], same_answer, refusals


def _refusals(engine: Any) -> list[str]:
    """What the engine says instead of generating and scoring."""
    from rlhf_npu.errors import NoWeightsError

    said = []
    for act in (lambda: engine.generate([[1, 40]], n=1, seed=0, max_tokens=1), lambda: engine.score([[1, 40]])):
        try:
            act()
        except NoWeightsError as error:
            said.append(str(error))
    return said


def _refusals_after_a_failure(engine: Any) -> list[str]:
    with suppress(ZeroDivisionError), engine.receiving_weights():
        raise ZeroDivisionError
    return _refusals(engine)


def _compare_all(folders: list[tuple[str, str]]) -> Any:
    return [_compare(folder, dtype) for folder, dtype in folders]


def test_it_holds_what_one_that_read_the_weights_holds(tmp_path: Path) -> None:
    """Weights that are packed, products of weights, tied ones, and classes of transformers."""
    names = ("Mixtral", "DeepSeek-V3", "Qwen3", "GPT-NeoX")
    folders = [(str(FAMILIES[name].save(tmp_path / name)), FAMILIES[name].dtype) for name in names]
    (results,) = run_ranks(1, _compare_all, folders)
    for name, (differing, same_answer, refusals) in zip(names, results, strict=True):
        assert differing == [], name
        assert same_answer, name
        at_first, after_level_1, after_level_2, after_a_failure, in_the_end = refusals
        assert after_level_1 == in_the_end == [], name
        for said, reason in (
            (at_first, "did not read the model's weights"),
            (after_level_2, "slept at level 2"),
            (after_a_failure, "sending them failed"),
        ):
            assert ["cannot generate" in said[0], "cannot score" in said[1]] == [True, True], name
            assert all(reason in words for words in said), name
