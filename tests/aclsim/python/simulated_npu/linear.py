"""References of matrix products: of a whole, of adapters of low rank, and of groups of tokens with a weight each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from simulated_npu.references import NotSimulatedError, reference


@reference("atb::_npu_matmul_add_fp32")
def matmul_add(x: Tensor, weight: Tensor, total: Tensor) -> None:
    """total += xᵀ weight in float32; x [T, N], weight [T, M], total [N, M]. vllm-ascend warms up with it."""
    total += x.float().t() @ weight.float()


@reference("npu::npu_grouped_matmul")
def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None,
    group_list: Tensor | None,
    split_item: int,
    group_type: int | None,
    group_list_type: int,
) -> list[Tensor]:
    """One product a group of rows: x [[rows, K]], weight [[groups, K, N]], bias [[groups, N]]; gives [[rows, N]].

    group_list [groups] are the groups' last rows plus one (group_list_type 0) or their numbers of rows (1). Rows of no
    group, whose content the hardware leaves open, are zeros. Products are in float32 and rounded once. op-plugin,
    torch_npu-npu_grouped_matmul.md, of which split_item 2 and 3 and group_type 0 are simulated.
    """
    name = "npu::npu_grouped_matmul"
    if split_item not in (2, 3) or group_type != 0 or group_list_type not in (0, 1):
        raise NotSimulatedError(
            f"{name}: split_item {split_item}, group_type {group_type} and group_list_type {group_list_type} together "
            "are not simulated"
        )
    if len(x) != 1 or len(weight) != 1 or group_list is None:
        raise NotSimulatedError(f"{name}: {len(x)} x and {len(weight)} weight, with group_list {group_list}")
    rows, matrices = x[0], weight[0]
    ends = group_list.tolist() if group_list_type == 0 else group_list.cumsum(0).tolist()
    if len(ends) != matrices.shape[0] or ends[-1] > rows.shape[0]:
        raise ValueError(f"{name}: groups that end at {ends} do not fit {rows.shape[0]} rows, weight {matrices.shape}")
    out = rows.new_zeros(rows.shape[0], matrices.shape[-1])
    for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end == begin:
            continue
        product = rows[begin:end].float() @ matrices[group].float()
        out[begin:end] = product if not bias else product + bias[0][group].float()
    return [out]
