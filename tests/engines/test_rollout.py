"""The rollout engine sleeps and wakes without changing what it says, and its memory really goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_npu.errors import ConfigError
from tests.devices import PLATFORM
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

PROMPTS = [[1, 4, 13, 6, 14, 11, 13, 7], [1, 5, 5, 13]]
MIB = 1 << 20
CACHE_MIB = 256
COOL = 0.6  # a temperature


def _engine(model_path: str) -> Any:
    from rlhf_npu.config import DataConfig, ModelConfig, RolloutConfig
    from rlhf_npu.engines.rollout import RolloutEngine

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=16, max_response_length=24)
    config = RolloutConfig(n=1, kv_cache_memory_gb=CACHE_MIB / 1024, log_prob_micro_batch_size_per_device=1)
    return RolloutEngine(ModelConfig(path=model_path, dtype="float32"), config, data, PLATFORM, [2])


def _sleep_cycles(model_path: str) -> Any:
    from transformers import AutoModelForCausalLM

    from rlhf_npu.platform import resident_bytes

    engine = _engine(model_path)
    weights = dict(AutoModelForCausalLM.from_pretrained(model_path).named_parameters())
    texts, resident = [], []
    for level in (1, 2, 1, 2):
        texts.append(engine.generate(PROMPTS, n=1, seed=0, temperature=0.0))
        _touch_cache(engine)
        awake = resident_bytes()
        engine.sleep(level)
        resident.append((awake, resident_bytes()))
        engine.wake_up(["weights"])
        if level == 2:
            with engine.receiving_weights(), engine.updating_weights():
                engine.load_weights(weights.items())
        engine.wake_up(["kv_cache"])
    texts.append(engine.generate(PROMPTS, n=1, seed=0, temperature=0.0))
    return texts, resident


def _touch_cache(engine: Any) -> None:
    """Make every page of the KV cache resident, as a long run would."""
    for cache in engine.llm.llm_engine.model_executor.driver_worker.model_runner.kv_caches:
        for part in cache if isinstance(cache, tuple) else (cache,):  # on an NPU keys and values are two
            part.fill_(0)


@pytest.mark.slow
def test_generations_are_identical_before_sleep_and_after_wake(tmp_path: Path) -> None:
    ((texts, resident),) = run_ranks(1, _sleep_cycles, str(save_tiny_model(tmp_path / "model")))
    assert len(texts[0][0][0].token_ids) > 4
    assert all(text == texts[0] for text in texts)
    for awake, asleep in resident:
        assert awake - asleep > 0.95 * CACHE_MIB * MIB


def test_training_without_the_sleep_pool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_NPU_SLEEP_MODE", "0")
    with pytest.raises(ConfigError, match=r"RLHF_NPU_SLEEP_MODE=0 is set.*unset it"):
        _engine("no/model/is/looked/at")


def _sample(model_path: str) -> Any:
    import numpy as np

    def seed_both() -> None:
        torch.manual_seed(5)
        np.random.seed(5)  # noqa: NPY002

    def draw() -> tuple[float, float]:
        return torch.rand(1).item(), np.random.rand()  # noqa: NPY002

    def generate_and_draw(*arguments: Any, **named: Any) -> Any:
        drawn.append(draw())
        return generate(*arguments, **named)

    def generate_at(temperature: float) -> Any:
        return engine.generate(PROMPTS, n=3, seed=9, temperature=temperature)

    drawn: list[tuple[float, float]] = []
    engine = _engine(model_path)
    generate, engine.llm.generate = engine.llm.generate, generate_and_draw
    seed_both()
    first, again, other = (engine.generate(PROMPTS, n=3, seed=seed) for seed in (7, 7, 8))
    after = draw()
    seed_both()
    undisturbed = after == draw()
    return (first, again, other, drawn, undisturbed), generate_at(COOL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("rollout") / "model")


@pytest.fixture(scope="module")
def samples(model: Path) -> Any:
    (results,) = run_ranks(1, _sample, str(model))
    return results


@pytest.mark.slow
def test_log_probs_are_those_of_the_distribution_that_is_sampled(model: Path, samples: Any) -> None:
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    _, cool = samples
    for prompt, choices in zip(PROMPTS, cool, strict=True):
        for choice in choices:
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + list(choice.token_ids)])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / COOL).log_softmax(-1).gather(-1, torch.tensor(choice.token_ids)[:, None])[:, 0]
            assert choice.log_probs == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.slow
def test_a_seed_fixes_the_responses_and_leaves_the_trainers_generators_alone(samples: Any) -> None:
    (first, again, other, drawn, undisturbed), _ = samples
    assert first == again
    assert first != other
    assert drawn[0] == drawn[1] != drawn[2]  # vLLM's model runner V2, for GPUs, takes its seeds from numpy
    assert undisturbed
    for choices in first:
        assert len({choice.token_ids for choice in choices}) > 1
        for choice in choices:
            assert choice.finished == (choice.token_ids[-1] == 2)
            assert len(choice.log_probs) == len(choice.token_ids)
            assert all(log_prob <= 0 for log_prob in choice.log_probs)


def _wake_without_sleep(model_path: str) -> Any:
    engine = _engine(model_path)
    before = engine.generate(PROMPTS, n=1, seed=0, temperature=0.0)
    engine.sleep(1)
    engine.sleep(1)
    engine.wake_up(["weights"])
    engine.wake_up(["weights"])
    engine.wake_up(["kv_cache"])
    engine.wake_up(["kv_cache"])
    return before, engine.generate(PROMPTS, n=1, seed=0, temperature=0.0)


@pytest.mark.slow
def test_sleeping_twice_and_waking_twice_change_nothing(tmp_path: Path) -> None:
    ((before, after),) = run_ranks(1, _wake_without_sleep, str(save_tiny_model(tmp_path / "model")))
    assert before == after


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10])
def test_learning_rate_schedule(step: int) -> None:
    import math

    from rlhf_npu.config import OptimConfig
    from rlhf_npu.engines.trainer_engine import lr_factor

    cosine = OptimConfig(lr=1.0, lr_scheduler_type="cosine", lr_warmup_steps=1, min_lr_ratio=0.1)
    done = (step - 1) / 9
    expected = 0.5 if step == 0 else 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
    assert lr_factor(step, cosine, total=10) == pytest.approx(expected)
    constant = OptimConfig(lr=1.0)
    assert lr_factor(step, constant, total=10) == 1.0
