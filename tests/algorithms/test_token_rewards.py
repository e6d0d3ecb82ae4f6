from __future__ import annotations

import torch

from rlhf_npu.algorithms.token_rewards import overlong_penalties, penalize_kl, place_scores


def test_the_score_stands_at_the_last_response_token() -> None:
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 0]])
    rewards = place_scores(torch.tensor([1.0, -2.0, 3.0, 4.0]), mask)
    assert rewards.tolist() == [[0, 0, 1], [-2, 0, 0], [0, 0, 3], [0, 0, 0]]


def test_a_long_response_is_not_cut_by_the_masks_type() -> None:
    """float16 and bfloat16 cannot count to 4,000."""
    for dtype in (torch.bfloat16, torch.float16, torch.int64, torch.bool):
        mask = torch.zeros(1, 4096, dtype=dtype)
        mask[0, :4001] = 1
        assert int(place_scores(torch.tensor([1.0]), mask).argmax()) == 4000


def test_kl_is_taken_off_response_tokens_only() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0]])
    kl = torch.tensor([[0.5, -0.25, torch.nan]])
    rewards = penalize_kl(scores, kl, torch.tensor([[1.0, 1.0, 0.0]]), coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 1.025, 0.0]]))


def test_the_punishment_of_length_rises_to_the_limit() -> None:
    """DAPO's numbers scaled down: a limit of 20 tokens, of which the last 4 are punished."""
    lengths = torch.tensor([1, 16, 17, 18, 20, 25])
    penalties = overlong_penalties(lengths, longest=20, buffer=4, factor=2.0)
    assert penalties.tolist() == [0, 0, -0.5, -1, -2, -2]
