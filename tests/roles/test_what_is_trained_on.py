"""Which tokens a batch trains, with which rewards and weights, as the configuration asks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict

from rlhf_npu.config import PPOConfig, RolloutCorrectionConfig, compose_config
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.roles.advantages import add_advantages, add_token_rewards
from rlhf_npu.roles.mini_batches import mini_batch_totals
from rlhf_npu.roles.mismatch import correct_over_ranks
from rlhf_npu.roles.policy import pair_shares
from rlhf_npu.roles.rollout_batch import build_batch, trim


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def completion(tokens: int, finished: bool, log_prob: float = -1.0) -> Completion:
    return Completion(token_ids=(5,) * tokens, log_probs=(log_prob,) * tokens, finished=finished)


def batch(mask_truncated: bool) -> TensorDict:
    """Responses of 2, 4, 3 and 4 tokens, of which the second and the fourth met the limit."""
    prompt = PromptSample(7, (3, 4), "ab", data_source="", ground_truth=None, extra_info={})
    choices = [completion(2, True), completion(4, False), completion(3, True), completion(4, False)]
    return build_batch([prompt], [choices], mask_truncated)


def test_truncated_responses_are_left_out_if_asked_for() -> None:
    assert batch(mask_truncated=False)["loss_mask"].sum(1).tolist() == [2, 4, 3, 4]
    masked = batch(mask_truncated=True)
    assert masked["loss_mask"].sum(1).tolist() == [2, 0, 3, 0]
    assert masked["response_mask"].sum(1).tolist() == [2, 4, 3, 4]
    totals = mini_batch_totals(masked, horizon=4)
    assert (totals.tokens, totals.sequences) == (5, 4)
    assert trim(masked[:1])["loss_mask"].shape == (1, 2)


def test_a_mini_batch_of_which_nothing_is_trained_divides_by_something() -> None:
    assert mini_batch_totals(batch(mask_truncated=True)[1:2], horizon=4).tokens == 1


def test_rejected_tokens_are_left_out_and_the_others_weighed() -> None:
    given = batch(mask_truncated=True)
    ratios = torch.tensor([[1.0, 4.0, 1.0, 1.0]] * 4)
    given["old_log_probs"] = given["rollout_log_probs"] + ratios.log() * given["response_mask"]
    config = RolloutCorrectionConfig(
        rollout_is="token", rollout_is_threshold=2.0, rollout_rs="token_k1", rollout_rs_threshold=3.0
    )
    metrics = correct_over_ranks(given, config)
    assert given["loss_mask"].tolist() == [[1, 0, 0, 0], [0] * 4, [1, 0, 1, 0], [0] * 4]
    assert given["rollout_is_weights"].tolist() == [[1, 2, 0, 0], [1, 2, 1, 1], [1, 2, 1, 0], [1, 2, 1, 1]]
    assert metrics["rollout_corr/rollout_rs_masked_fraction"] == pytest.approx(4 / 13)
    assert metrics["rollout_corr/rollout_is_max"] == 2


def shaped(*overrides: str) -> tuple[TensorDict, dict[str, float], PPOConfig]:
    config = compose_config(["data.max_response_length=4", "algorithm.adv_estimator=rloo", *overrides])
    given = batch(mask_truncated=False)
    given["scores"] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    return given, add_token_rewards(given, config, kl_coef=0.0), config


def test_long_responses_lose_reward() -> None:
    given, metrics, config = shaped("reward.overlong_buffer.len=2", "reward.overlong_buffer.penalty_factor=0.5")
    assert given["token_level_rewards"].sum(1).tolist() == [1, -0.5, 0.75, 0.5]
    assert metrics == {"reward/overlong_penalty": pytest.approx(-0.3125), "reward/overlong": 0.75}
    statistics = add_advantages(given, config.algorithm)
    assert statistics["critic/score/mean"] == pytest.approx(0.75)
    assert statistics["critic/rewards/mean"] == pytest.approx(0.4375)


def test_without_a_buffer_rewards_are_the_scores() -> None:
    given, metrics, _ = shaped()
    assert given["token_level_rewards"].sum(1).tolist() == [1, 0, 1, 1]
    assert metrics == {}


@pytest.mark.parametrize("mask_truncated", [False, True])
def test_pairs_are_of_whole_responses_that_lie_side_by_side(mask_truncated: bool) -> None:
    prompt = PromptSample(7, (3, 4), "ab", data_source="", ground_truth=None, extra_info={})
    choices = [completion(2, True), completion(4, True), completion(3, True), completion(1, False)]
    given = build_batch([prompt, prompt, prompt], [choices[:2], choices[2:], choices[:2]], mask_truncated)
    rewards = [1.0, 2.0, 5.0, 3.0, 1.0, 1.0]
    given["token_level_rewards"] = torch.tensor(rewards)[:, None] * torch.tensor([1.0, 0.0, 0.0, 0.0])
    generator = torch.Generator().manual_seed(2)
    now, ref, old = (torch.randn(3, 6, 4, generator=generator) - 2).unbind()
    given["ref_log_probs"], given["old_log_probs"] = ref, old
    shares = pair_shares(now, given, mini_batch_totals(given, horizon=4), beta=0.5)
    lengths = [2, 4, 3, 1, 2, 4]
    ratios = [
        math.fsum((now[row, token] - ref[row, token]).double().item() for token in range(length))
        for row, length in enumerate(lengths)
    ]
    margins = [0.5 * (ratios[1] - ratios[0]), 0.5 * (ratios[2] - ratios[3])][: 1 if mask_truncated else 2]
    assert shares["pg_loss"].item() == pytest.approx(sum(math.log1p(math.exp(-one)) for one in margins) / 3, rel=1e-5)
    assert shares["dpo_margin"].item() == pytest.approx(sum(margins) / 3, rel=1e-5)
    assert shares["dpo_accuracy"].item() == pytest.approx(sum(one > 0 for one in margins) / 3)
    assert shares["dpo_pairs"].item() == pytest.approx(len(margins) / 3)
    tokens = [(row, token) for row, length in enumerate(lengths) for token in range(length)]
    trained = [pair for pair in tokens if not mask_truncated or pair[0] != 3]
    kl = math.fsum((old[pair] - now[pair]).double().item() for pair in trained) / len(trained)
    assert shares["ppo_kl"].item() == pytest.approx(kl, rel=1e-4)
