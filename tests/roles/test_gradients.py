"""A mini-batch's gradient is one number: it does not depend on micro-batches, on ranks, or on the ZeRO stage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from rlhf_npu.algorithms.advantages import ADVANTAGES
from rlhf_npu.config import ActorConfig, AlgorithmConfig, CriticConfig, ModelConfig, OptimConfig, PolicyLossConfig
from rlhf_npu.config.policy_loss import LOSS_MODES, OF_PAIRS
from tests.devices import PLATFORM
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

SEQUENCES, PROMPT, RESPONSE = 16, 5, 9
COVARIANCE = PolicyLossConfig(clip_cov_ratio=0.1, clip_cov_lb=0.0, clip_cov_ub=9.0, kl_cov_ratio=0.1, ppo_kl_coef=1.0)
ACTOR = ActorConfig(
    ppo_mini_batch_size=SEQUENCES,
    ppo_micro_batch_size_per_device=1,
    zero_stage=0,
    entropy_coeff=0.01,
    policy_loss=COVARIANCE,
    use_kl_loss=True,
    kl_loss_coef=0.1,
    optim=OptimConfig(lr=1e-3),
)
CRITIC = CriticConfig(ppo_micro_batch_size_per_device=1, zero_stage=0, optim=OptimConfig(lr=1e-3))
AGGREGATIONS = ("token-mean", "seq-mean-token-mean")
OTHER_LOSSES = tuple(mode for mode in LOSS_MODES if mode != "vanilla")
Gradients = dict[str, torch.Tensor]


def _batch() -> TensorDict:
    """Ragged prompts and responses; ratios, advantages and values that reach every branch of the losses."""
    generator = torch.Generator().manual_seed(3)

    def lengths(most: int) -> torch.Tensor:
        return torch.randint(1, most + 1, (SEQUENCES, 1), generator=generator)

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(SEQUENCES, RESPONSE, generator=generator) * scale

    response_mask = (torch.arange(RESPONSE)[None] < lengths(RESPONSE)).float()
    return TensorDict(
        {
            "prompts": torch.randint(3, 15, (SEQUENCES, PROMPT), generator=generator),
            "prompt_mask": (torch.arange(PROMPT)[None] >= PROMPT - lengths(PROMPT)).float(),
            "responses": torch.randint(3, 15, (SEQUENCES, RESPONSE), generator=generator),
            "response_mask": response_mask,
            "loss_mask": response_mask * (torch.arange(SEQUENCES)[:, None] != 3),
            "old_log_probs": noise(0.5) - 2.7,
            "ref_log_probs": noise(0.5) - 2.7,
            "advantages": noise(1.0),
            "values": noise(0.5),
            "returns": noise(1.0),
            "rollout_is_weights": noise(0.2).exp(),
            "token_level_rewards": noise(1.0) * response_mask,
            "scores": noise(1.0)[:, 0],
            "baselines": noise(1.0)[:, 0],
            "group_ids": torch.arange(SEQUENCES) // 4,
        },
        batch_size=[SEQUENCES],
    )


def _gradients(model_path: str, cuts: list[tuple[int, int]]) -> dict[str, list[Gradients]]:
    """By `loss_agg_mode`: gradients of the actor and of the critic for each (ZeRO stage, micro-batch size).

    By loss and by estimator: those of the actor for each micro-batch size at stage 0.
    """
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = SEQUENCES // world_size
    mine = _batch()[rank * share : (rank + 1) * share].to(PLATFORM.device())
    by_aggregation = {
        mode: [
            _actor_gradients(model_path, mine, stage, micro_size, mode)
            | _critic_gradients(model_path, mine, stage, micro_size, mode)
            for stage, micro_size in cuts
        ]
        for mode in AGGREGATIONS
    }
    return by_aggregation | _of_losses_and_estimators(model_path, mine, [size for stage, size in cuts if stage == 0])


def _of_losses_and_estimators(path: str, batch: TensorDict, micro_sizes: list[int]) -> dict[str, list[Gradients]]:
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.roles.advantages import add_advantages
    from rlhf_npu.roles.policy import PolicyTrainer

    engine = _engine(load_policy(ModelConfig(path=path, dtype="float32")), stage=0)

    def of(mode: str, batch: TensorDict, micro_sizes: list[int] = micro_sizes) -> list[Gradients]:
        config = replace(ACTOR, loss_agg_mode="seq-mean-token-mean", policy_loss=replace(COVARIANCE, loss_mode=mode))
        trainer = PolicyTrainer(engine, config, temperature=0.8, horizon=RESPONSE)
        trainer.choose_tokens(batch, SEQUENCES)
        return [_accumulated(engine, trainer._loss, batch, micro_size, "actor") for micro_size in micro_sizes]

    results = {mode: of(mode, batch.clone()) for mode in OTHER_LOSSES}
    even = [size for size in micro_sizes if size % 2 == 0]
    results |= {mode: of(mode, batch.clone(), even) for mode in OF_PAIRS}
    for name in ADVANTAGES:
        estimated = batch.clone()
        add_advantages(estimated, AlgorithmConfig(adv_estimator=name))
        results[f"estimator {name}"] = of("vanilla", estimated)
    engine.close()
    return results


def _actor_gradients(path: str, batch: TensorDict, stage: int, micro_size: int, mode: str) -> Gradients:
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.roles.policy import PolicyTrainer

    engine = _engine(load_policy(ModelConfig(path=path, dtype="float32")), stage)
    trainer = PolicyTrainer(engine, replace(ACTOR, loss_agg_mode=mode), temperature=0.8, horizon=RESPONSE)
    gradients = _accumulated(engine, trainer._loss, batch, micro_size, "actor")
    engine.close()
    return gradients


def _critic_gradients(path: str, batch: TensorDict, stage: int, micro_size: int, mode: str) -> Gradients:
    from rlhf_npu.engines.models import load_critic
    from rlhf_npu.roles.critic import CriticTrainer

    critic = load_critic(ModelConfig(path=path, dtype="float32"))
    torch.nn.init.constant_(critic.value_head.weight, 0.05)
    engine = _engine(critic, stage)
    trainer = CriticTrainer(engine, replace(CRITIC, loss_agg_mode=mode), horizon=RESPONSE)
    gradients = _accumulated(engine, trainer._loss, batch, micro_size, "critic")
    engine.close()
    return gradients


def _engine(module: torch.nn.Module, stage: int) -> Any:
    from rlhf_npu.engines.trainer_engine import TrainerEngine

    return TrainerEngine(
        module,
        OptimConfig(lr=1e-3),
        zero_stage=stage,
        dtype="float32",
        grad_clip=1.0,
        optimizer_steps=1,
        platform=PLATFORM,
    )


def _accumulated(engine: Any, loss: Any, batch: TensorDict, micro_size: int, name: str) -> Gradients:
    from functools import partial

    from deepspeed.utils import safe_get_full_grad

    from rlhf_npu.roles.mini_batches import mini_batch_totals

    totals = mini_batch_totals(batch, RESPONSE)
    engine.accumulate(batch.split(micro_size), partial(loss, totals=totals))
    gradients = {}
    for parameter_name, parameter in engine.module.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else safe_get_full_grad(parameter)
        gradients[f"{name}.{parameter_name}"] = gradient.cpu().clone()
        parameter.grad = None
    return gradients


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Gradients]]]:
    """The gradients of one rank alone, then those of each of two; the whole mini-batch at once comes first."""
    folder = str(save_tiny_model(tmp_path_factory.mktemp("gradients") / "model"))
    alone = run_ranks(1, _gradients, folder, [(0, SEQUENCES), (0, 1), (2, 4)])
    return alone + run_ranks(2, _gradients, folder, [(0, 2), (1, 8), (2, 1), (3, 4)])


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_gradients_do_not_depend_on_the_cut(worlds: list[dict[str, list[Gradients]]], loss_agg_mode: str) -> None:
    whole, *others = [gradients for world in worlds for gradients in world[loss_agg_mode]]
    assert len(others) == 2 + 2 * 4
    _assert_equal(whole, others)


@pytest.mark.parametrize("name", [*OTHER_LOSSES, *(f"estimator {name}" for name in ADVANTAGES)])
def test_nor_do_those_of_any_loss_and_estimator(worlds: list[dict[str, list[Gradients]]], name: str) -> None:
    whole, *others = [gradients for world in worlds for gradients in world[name]]
    assert len(others) == 1 + 2
    _assert_equal(whole, others)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_nor_do_those_of_losses_of_pairs(worlds: list[dict[str, list[Gradients]]], name: str) -> None:
    whole, *others = [gradients for world in worlds for gradients in world[name]]
    assert len(others) == 2
    _assert_equal(whole, others)


def _assert_equal(whole: Gradients, others: list[Gradients]) -> None:
    assert all(gradient.abs().max() > 1e-5 for gradient in whole.values())
    for gradients in others:
        assert gradients.keys() == whole.keys()
        for name, expected in whole.items():
            assert (gradients[name] - expected).abs().max() < 1e-6, name
