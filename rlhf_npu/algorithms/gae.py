"""Generalized advantage estimation, and the discounted sums behind it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_npu.algorithms.estimates import AdvantageInputs, Advantages
from rlhf_npu.config import AlgorithmConfig

_CHUNK = 64
_BLOCK_ELEMENTS = 1 << 18
"""Elements of a block of rows on the CPU: what is computed of them mostly stays in its cache."""


@torch.no_grad()
def gae(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 11 to 16).

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token, A_t = sum_k (gamma lambda)^k
    delta_{t+k}, and the return is A_t + V_t. Tokens inside a response that the mask leaves out take no
    time: gamma and lambda apply from one response token to the next.
    """
    if inputs.values is None:
        raise ValueError("gae needs the critic's values; use grpo where there is no critic")
    rewards, values, mask = inputs.token_level_rewards, inputs.values, inputs.response_mask
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    for rows in row_blocks(rewards):
        tokens = mask[rows] != 0
        own_rewards, own_values = at_tokens(rewards[rows], tokens), at_tokens(values[rows], tokens)
        returns[rows] = lambda_returns(own_rewards, own_values, tokens, config.gamma, config.lam)
        torch.sub(returns[rows], own_values, out=advantages[rows])
    return Advantages(advantages, returns)


def lambda_returns(rewards: Tensor, values: Tensor, tokens: Tensor, gamma: float, lam: float) -> Tensor:
    """R_t = r_t + gamma ((1 - lambda) V_{t+1} + lambda R_{t+1}), from one response token to the next.

    The bracket obeys Q_t = (1 - lambda) V_t + lambda r_t + gamma lambda Q_{t+1}, a discounted sum.

    Args:
        rewards, values: (B, T), 0 where there is no response token.
        tokens: (B, T) of bool, the response tokens.

    Returns:
        (B, T), 0 where there is no response token.
    """
    following = _at_next_token(torch.lerp(values, rewards, lam), tokens, gamma * lam)
    return torch.add(rewards, following, alpha=gamma)


def at_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """`values` (B, T) where `tokens` (B, T) is true, 0 elsewhere, NaN or not."""
    product = values * tokens.to(values)
    # A product is several times as fast as a fill, which only NaN and infinities need.
    return product if bool(product.sum().isfinite()) else values.masked_fill(~tokens, 0)


def _at_next_token(terms: Tensor, tokens: Tensor, decay: float) -> Tensor:
    """For each token the discounted sum of `terms`, which are 0 elsewhere, from the next token on; 0 elsewhere."""
    if bool((tokens[:, 1:] <= tokens[:, :-1]).all()):
        return pad(discounted_suffix_sums(terms, decay)[:, 1:], (0, 1))
    seen = tokens.cumsum(1, dtype=torch.int32).long()  # several times as fast as summing in int64
    # Column k + 1 holds token k, the last column nothing; what is no token adds its 0 to the token before it.
    dense = terms.new_zeros(terms.shape[0], terms.shape[1] + 2).scatter_add_(1, seen, terms)
    dense[:, 1:-1] = discounted_suffix_sums(dense[:, 1:-1], decay)
    return dense[:, 1:].gather(1, seen) * tokens.to(terms)


def discounted_suffix_sums(values: Tensor, decay: float) -> Tensor:
    """(B, T) sums of decay^k values_{t+k} over k >= 0.

    Within chunks by a product with a triangle of powers; what follows a chunk is again such a sum, of chunks.
    """
    rows, width = values.shape
    powers = torch.tensor(decay, dtype=torch.float64).pow(torch.arange(_CHUNK + 1)).to(values)
    place = torch.arange(_CHUNK, device=values.device)
    lag = place[:, None] - place
    triangle = powers[lag.clamp(min=0)].masked_fill(lag < 0, 0)
    chunks = -(-width // _CHUNK)
    sums = pad(values, (0, chunks * _CHUNK - width)).view(rows, chunks, _CHUNK) @ triangle
    if chunks > 1:
        later = discounted_suffix_sums(sums[:, 1:, 0], decay**_CHUNK)
        sums[:, :-1] += later[..., None] * powers[1:].flip(0)
    return sums.view(rows, chunks * _CHUNK)[:, :width]


def row_blocks(tensor: Tensor) -> list[slice]:
    """Rows of (B, T) that are computed together."""
    rows, width = tensor.shape
    size = max(1, _BLOCK_ELEMENTS // max(1, width)) if tensor.device.type == "cpu" else max(1, rows)
    return [slice(start, start + size) for start in range(0, rows, size)]
