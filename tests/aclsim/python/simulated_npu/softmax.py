"""Attention by its definition, of one sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(query keyᵀ scale) value; each group of query heads shares a head of keys.

    query [T, N, D], key [S, K, D], value [S, K, V], N a multiple of K; visible [T, S] is true where a query sees a
    key; sinks [N] takes part in the softmax as the score of a key whose value is zero. Returns [T, N, V]
    and the logarithms of the softmax's sums [T, N, 1] in float32. A query that sees nothing gets zeros.
    """
    queries = query.float().unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("tkgd,skd->kgts", queries, key.float()) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(key.shape[1], -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), -1)
    weights = scores.softmax(-1)[..., : key.shape[0]]
    weights = torch.where(visible.any(-1, keepdim=True), weights, 0.0)
    mixed = torch.einsum("kgts,skv->tkgv", weights, value.float())
    sums = scores.logsumexp(-1).permute(2, 0, 1).flatten(1)[..., None]
    return mixed.flatten(1, 2).to(query.dtype), sums
