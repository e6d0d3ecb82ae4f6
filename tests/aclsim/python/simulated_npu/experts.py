"""References of routing in mixtures of experts. The products are in linear.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simulated_npu.references import NotSimulatedError, reference

SOFTMAX, SIGMOID = 0, 1


def _within_best_groups(scores: Tensor, kept: int, groups: int, by_two_largest: bool) -> Tensor:
    """`scores` [tokens, experts] with -inf outside of the `kept` groups with the highest score."""
    grouped = scores.unflatten(1, (groups, -1))
    group_scores = grouped.topk(2, -1).values.sum(-1) if by_two_largest else grouped.amax(-1)
    best = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
    outside = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)


@reference("_C_ascend::moe_gating_top_k")
def moe_gating_top_k(
    x: Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k experts of each token: (weights [tokens, k] in x's dtype, experts [tokens, k] int32, scores).

    x [tokens, experts] are logits, of which norm_type 0 takes the softmax and 1 the sigmoid. bias_opt [experts] counts
    for the choice alone. With group_count above 1, only the k_group best groups are chosen from, by their largest
    score (group_select_mode 0) or the sum of their two largest (1). Weights are divided by their sum plus eps for
    sigmoid or renorm 1, and multiplied by routed_scaling_factor. The scores, [tokens, experts] float32, are given for
    out_flag, else nothing. Between equal scores the lower expert wins. vllm-ascend,
    tests/e2e/nightly/single_node/ops/singlecard_ops, the test of this operator.
    """
    if norm_type not in (SOFTMAX, SIGMOID):
        raise NotSimulatedError(f"_C_ascend::moe_gating_top_k: norm_type {norm_type} is not simulated")
    scores = x.float().softmax(-1) if norm_type == SOFTMAX else x.float().sigmoid()
    choice = scores if bias_opt is None else scores + bias_opt.float()
    if group_count > 1:
        choice = _within_best_groups(choice, k_group, group_count, group_select_mode == 1)
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, experts)
    if norm_type == SIGMOID or renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = (weights * routed_scaling_factor).to(x.dtype)
    return weights, experts.int(), scores if out_flag else scores.new_empty(0)


@reference("_C_ascend::npu_moe_init_routing_custom")
def moe_init_routing(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int,
    expert_num: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies of each token for its experts, those of one expert after another:
    (tokens [tokens * k, hidden], where each copy went [tokens * k] int32, tokens an expert [experts] int64, no scales).

    x [tokens, hidden], expert_idx [tokens, k]. Only the experts of active_expert_range, [first, last + 1], get theirs:
    copies for others have no place, which is -1, and rows that are left over, whose content the hardware leaves open,
    are zeros. With expert_tokens_num_type 0 the numbers of tokens are summed up, with 1 not. vllm-ascend,
    device/device_op.py, npu_moe_init_routing, and the test of this operator in
    tests/e2e/nightly/single_node/ops/singlecard_ops.
    """
    name = "_C_ascend::npu_moe_init_routing_custom"
    copies = expert_idx.numel()
    if quant_mode != -1:
        raise NotSimulatedError(f"{name}: quant_mode is not simulated, and was given as {quant_mode}")
    if active_num not in (-1, 0, copies):
        raise NotSimulatedError(f"{name}: active_num is not simulated, and was given as {active_num}")
    if not expert_tokens_num_flag or expert_tokens_num_type not in (0, 1):
        raise NotSimulatedError(f"{name}: expert_tokens_num_type {expert_tokens_num_type} is not simulated")
    first, end = active_expert_range or (0, expert_num)
    wanted = expert_idx.flatten().long()
    active = (wanted >= first) & (wanted < end)
    order = torch.where(active, wanted, expert_num).sort(stable=True).indices
    taken = order[: int(active.sum())]
    expanded = x.new_zeros(copies, x.shape[1])
    expanded[: taken.shape[0]] = x[taken // expert_idx.shape[1]]
    places = torch.full((copies,), -1, dtype=torch.int32, device=x.device)
    places[taken] = torch.arange(taken.shape[0], dtype=torch.int32, device=x.device)
    counts = torch.zeros(end - first, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, wanted[taken] - first, torch.ones_like(taken))
    if expert_tokens_num_type == 0:
        counts = counts.cumsum(0)
    return expanded, places, counts, x.new_empty(0, dtype=torch.float32)


@reference("npu::npu_moe_token_unpermute")
def moe_token_unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, *, probs: Tensor | None) -> Tensor:
    """Sums each token's copies, weighted by probs [tokens, k]: [tokens, hidden] in permuted_tokens' dtype.

    permuted_tokens [tokens * k, hidden], sorted_indices [tokens * k] their places; without probs, k is 1. op-plugin,
    torch_npu-npu_moe_token_unpermute.md.
    """
    copies = permuted_tokens[sorted_indices.long()]
    if probs is None:
        return copies
    weighted = copies.float().unflatten(0, probs.shape) * probs.float()[..., None]
    return weighted.sum(1).to(permuted_tokens.dtype)
