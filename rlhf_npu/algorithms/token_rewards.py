"""Rewards for each token, from the score of a whole response and the KL penalty."""

from __future__ import annotations

import torch
from torch import Tensor


def place_scores(scores: Tensor, response_mask: Tensor) -> Tensor:
    """Each response's score at its last token, 0 elsewhere.

    Args:
        scores: (B,).
        response_mask: (B, T), 1 at response tokens. A response without tokens gets no reward.

    Returns:
        (B, T) of the scores' type.
    """
    tokens = response_mask != 0
    position = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    last = (position * tokens).argmax(dim=1, keepdim=True)
    rewards = torch.zeros(tokens.shape, dtype=scores.dtype, device=scores.device)
    return rewards.scatter(1, last, scores[:, None]).masked_fill(~tokens, 0)


def penalize_kl(token_scores: Tensor, kl: Tensor, mask: Tensor, coef: float) -> Tensor:
    """token_scores - coef * kl at response tokens, 0 elsewhere; all (B, T).

    The reward of Ziegler et al. 2019 (arXiv 1909.08593, eq. 2), its KL term spread over the tokens.
    """
    return (token_scores - coef * kl).masked_fill(mask == 0, 0)


def overlong_penalties(lengths: Tensor, longest: int, buffer: int, factor: float) -> Tensor:
    """What a response's reward loses for its length (DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13).

    Nothing up to longest - buffer tokens, from there on linearly to -factor at `longest` tokens.

    Args:
        lengths: (B,) tokens of the responses.
        longest: tokens of a response at most.
        buffer: tokens over which the penalty rises, at least 1.

    Returns:
        (B,) float32, at most 0.
    """
    return -factor * ((lengths.float() - (longest - buffer)) / buffer).clamp(0, 1)
