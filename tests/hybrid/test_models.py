"""Families of models whose weights vLLM renames, transforms or serves through others' classes: the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_npu.config import ModelConfig
from rlhf_npu.engines.models import load_policy
from rlhf_npu.hybrid.resharding.checkpoint_names import as_in_checkpoint
from rlhf_npu.hybrid.resharding.gathered import gathered_buckets
from rlhf_npu.preflight.model_trial import Trial, try_model
from rlhf_npu.preflight.tiny_models import FAMILIES
from tests.devices import DEVICE, PLATFORM
from tests.ranks import run_ranks

PARTS = ["loaded", "level 1", "level 2", "saved"]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_sent_are_a_checkpoints_names_and_tensors(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    saved = load_file(family.save(tmp_path) / "model.safetensors")
    policy = load_policy(ModelConfig(path=str(tmp_path), dtype=family.dtype))
    buckets = gathered_buckets(policy, bucket_bytes=20_000)
    sent = [weight for bucket in buckets for weight in as_in_checkpoint(policy, bucket)]
    assert sorted(name for name, _ in sent) == sorted(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in sent)


# vllm-ascend 0.23 turns a part of each head by a table of the wrong width, caps no scores, and its sliding windows are
# one token wider.
NOT_ON_NPU = pytest.mark.skipif(DEVICE == "npu", reason="vllm-ascend cannot serve it")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("Mixtral", 2, id="experts_packed_and_renamed"),
        pytest.param("DeepSeek-V3", 1, id="products_of_weights_kept_by_attention"),
        pytest.param("GPT-NeoX", 1, id="served_through_the_classes_of_transformers", marks=NOT_ON_NPU),
        pytest.param("Gemma 2", 1, id="attention_scores_capped", marks=NOT_ON_NPU),
        pytest.param("GPT-2", 1, id="dropout"),
    ],
)
def test_rollout_and_trainer_score_alike_before_and_after_new_weights(tmp_path: Path, name: str, ranks: int) -> None:
    family = FAMILIES[name]
    model = ModelConfig(path=str(family.save(tmp_path / "model")), dtype=family.dtype)
    stage = 3 if ranks > 1 else 1
    outcomes = list(try_model(Trial(model, PLATFORM.name, ranks=ranks, zero_stage=stage, save=True)))
    assert [(outcome.part, outcome.right) for outcome in outcomes] == [(part, True) for part in PARTS], outcomes


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "npu", reason="vLLM itself caps them")
def test_attention_that_vllm_ascend_does_not_cap_is_refused_before_training(tmp_path: Path) -> None:
    family = FAMILIES["Gemma 2"]
    (loaded,) = try_model(Trial(ModelConfig(path=str(family.save(tmp_path / "model")), dtype=family.dtype), "npu"))
    assert not loaded.right
    assert loaded.mean > 1e3 * loaded.explained


@pytest.mark.slow
@NOT_ON_NPU
def test_a_model_whose_new_weights_vllm_does_not_take_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    family = FAMILIES["gpt-oss"]
    model = ModelConfig(path=str(family.save(tmp_path / "model")), dtype=family.dtype)
    loaded, refused = try_model(Trial(model, PLATFORM.name))
    assert loaded.right
    assert not refused.right
    assert "models of type 'gpt_oss' cannot be trained here: vLLM does not take new weights" in refused.words


def _exchange_experts(model_path: str) -> Any:
    from rlhf_npu.config import DataConfig, RolloutConfig
    from rlhf_npu.engines.rollout import RolloutEngine
    from rlhf_npu.errors import ReshardError
    from rlhf_npu.hybrid.resharding.reshard import Resharder
    from rlhf_npu.hybrid.same_function import compare_functions

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=64, max_response_length=16)
    config = RolloutConfig(n=1, kv_cache_memory_gb=0.05, log_prob_micro_batch_size_per_device=1)
    model = ModelConfig(path=model_path, dtype="float32")
    rollout, policy = RolloutEngine(model, config, data, PLATFORM, [2]), load_policy(model)
    prompts = [[1, 40, 50, 60], list(range(3, 60))]
    addresses = {name: tensor.data_ptr() for name, tensor in rollout.module.named_parameters()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    resharder = Resharder(policy, rollout, 1 << 20)
    resharder.reshard()
    moved = [name for name, tensor in rollout.module.named_parameters() if tensor.data_ptr() != addresses[name]]
    right = compare_functions(policy, rollout, prompts, 1.0, 8)
    experts: list[Any] = list(rollout.transformations.transformed)
    for layer in experts:
        layer.w13_weight.data[[0, 1]] = layer.w13_weight.data[[1, 0]]
    wrong = compare_functions(policy, rollout, prompts, 1.0, 8)
    try:
        resharder.verify()
    except ReshardError as error:
        return right, moved, str(error), wrong
    return right, moved, "nothing", wrong


@pytest.mark.slow
def test_experts_that_changed_places_are_named_and_fail_the_comparison(tmp_path: Path) -> None:
    folder = FAMILIES["Qwen3-MoE"].save(tmp_path / "model")
    ((right, moved, complaint, wrong),) = run_ranks(1, _exchange_experts, str(folder))
    assert right.same, right.worst
    assert moved == []
    assert "model.layers.0.mlp.experts" in complaint
    assert "w13_weight" in complaint
    assert not wrong.same
    assert "the trainer's log-probability is" in str(wrong.worst)


def _with_dropout(model_path: str) -> Any:
    from rlhf_npu.config import DataConfig, RolloutConfig
    from rlhf_npu.engines.rollout import RolloutEngine
    from rlhf_npu.hybrid.same_function import agrees_with_eager_attention, compare_functions, rollout_scores

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=64, max_response_length=16)
    config = RolloutConfig(n=1, kv_cache_memory_gb=0.05, log_prob_micro_batch_size_per_device=1)
    model = ModelConfig(path=model_path, dtype="float32", attn_implementation="sdpa")
    rollout, policy = RolloutEngine(model, config, data, PLATFORM, [2]), load_policy(model)
    prompts = [[1, 40, 50, 60], list(range(3, 60))]
    layers: Any = policy.model.layers
    for layer in layers:
        layer.self_attn.attention_dropout = 0.1
    report = compare_functions(policy, rollout, prompts, 0.7, 8)
    scores = rollout_scores(rollout, prompts, 8)
    return report, agrees_with_eager_attention(policy, scores), policy.config._attn_implementation


@pytest.mark.slow
@NOT_ON_NPU
def test_uncapped_attention_and_dropout_are_seen_and_the_cure_is_found(tmp_path: Path) -> None:
    folder = FAMILIES["Gemma 2"].save(tmp_path / "model")
    ((report, eager_agrees, attention),) = run_ranks(1, _with_dropout, str(folder))
    reading, generating, training = report.comparisons
    assert not reading.same
    assert not generating.same
    assert not training.same
    assert reading.mean > 1e4 * reading.mean_explained
    assert eager_agrees
    assert attention == report.trainer_attention == "sdpa"
