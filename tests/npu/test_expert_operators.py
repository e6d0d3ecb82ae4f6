"""References of mixtures of experts against loops over tokens and experts in float64."""

import math
from typing import Any

import pytest
import torch
import torch_npu
from simulated_npu import npu_operators
from simulated_npu.references import NotSimulatedError
from torch import Tensor

npu_operators.install()

TOKENS, EXPERTS, K, HIDDEN = 5, 8, 2, 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def gated(logits: Tensor, bias: Tensor | None = None, **change: object) -> tuple[Tensor, Tensor, Tensor]:
    arguments: dict[str, object] = {
        "k": K,
        "k_group": 1,
        "group_count": 1,
        "group_select_mode": 1,
        "renorm": 0,
        "norm_type": 0,
        "out_flag": False,
        "routed_scaling_factor": 1.0,
        "eps": 1e-20,
        "bias_opt": None if bias is None else bias.to("npu"),
    }
    weights, experts, scores = torch.ops._C_ascend.moe_gating_top_k(logits.to("npu"), **arguments | change)
    return weights.cpu(), experts.cpu(), scores.cpu()


def scored(row: Tensor, norm_type: int) -> list[float]:
    exponentials = [math.exp(float(x)) for x in row]
    if norm_type == 1:
        return [1 / (1 + 1 / e) for e in exponentials]
    return [e / sum(exponentials) for e in exponentials]


@pytest.mark.parametrize("norm_type", [0, 1])
@pytest.mark.parametrize("renorm", [0, 1])
def test_the_best_experts_and_their_weights(norm_type: int, renorm: int) -> None:
    logits, bias = random(TOKENS, EXPERTS), random(EXPERTS)
    weights, experts, scores = gated(
        logits, bias, norm_type=norm_type, renorm=renorm, routed_scaling_factor=2.5, out_flag=True
    )
    assert experts.dtype == torch.int32
    for t in range(TOKENS):
        row = scored(logits[t], norm_type)
        best = sorted(range(EXPERTS), key=lambda e: -(row[e] + float(bias[e])))[:K]
        total = sum(row[e] for e in best) if norm_type == 1 or renorm else 1.0
        assert experts[t].tolist() == best
        assert weights[t].tolist() == pytest.approx([2.5 * row[e] / total for e in best], rel=1e-5)
        assert scores[t].tolist() == pytest.approx(row, rel=1e-5)


@pytest.mark.parametrize("mode", [0, 1])
def test_experts_come_from_the_best_groups_alone(mode: int) -> None:
    logits = random(TOKENS, EXPERTS)
    _, experts, _ = gated(logits, k_group=2, group_count=4, group_select_mode=mode, norm_type=1, k=3)
    for t in range(TOKENS):
        row = scored(logits[t], 1)
        groups = [row[i : i + 2] for i in range(0, EXPERTS, 2)]
        best = sorted(range(4), key=lambda g: -(sum(groups[g]) if mode == 1 else max(groups[g])))[:2]
        members = [e for e in range(EXPERTS) if e // 2 in best]
        assert experts[t].tolist() == sorted(members, key=lambda e: -row[e])[:3]


def routed(x: Tensor, experts: Tensor, span: list[int], kind: int = 1, **change: Any) -> list[Tensor]:
    arguments: dict[str, object] = {
        "active_num": experts.numel(),
        "expert_num": EXPERTS,
        "expert_tokens_num_type": kind,
        "expert_tokens_num_flag": True,
        "active_expert_range": span,
        "quant_mode": -1,
    }
    results = torch.ops._C_ascend.npu_moe_init_routing_custom(x.to("npu"), experts.to("npu"), **arguments | change)
    return [result.cpu() for result in results]


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("span", [(0, EXPERTS), (2, 5), (5, 8)])
def test_copies_of_tokens_are_sorted_by_expert(span: tuple[int, int], kind: int) -> None:
    x = random(TOKENS, HIDDEN)
    experts = torch.tensor([[7, 2], [2, 4], [0, 7], [4, 2], [6, 0]], dtype=torch.int32)
    expanded, places, counts, _ = routed(x, experts, list(span), kind)
    copies = [(int(e), t, t * K + j) for t, row in enumerate(experts) for j, e in enumerate(row) if e in range(*span)]
    expected_places = [-1] * (TOKENS * K)
    for place, (_, token, copy) in enumerate(sorted(copies)):
        assert torch.equal(expanded[place], x[token])
        expected_places[copy] = place
    assert places.tolist() == expected_places
    assert places.dtype == torch.int32
    numbers = [sum(e == expert for e, _, _ in copies) for expert in range(*span)]
    assert counts.tolist() == (numbers if kind == 1 else [sum(numbers[: i + 1]) for i in range(len(numbers))])


@pytest.mark.parametrize("change", [{"quant_mode": 1}, {"drop_pad_mode": 1}, {"row_idx_type": 1}, {"active_num": 3}])
def test_other_ways_of_routing_are_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(NotSimulatedError, match=f"npu_moe_init_routing_custom: {next(iter(change))}"):
        routed(random(2, HIDDEN), torch.zeros(2, 1, dtype=torch.int32), [0, EXPERTS], **change)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("with_bias", [False, True])
def test_each_group_of_rows_has_its_own_weight(kind: int, with_bias: bool) -> None:
    counts = torch.tensor([2, 0, 3])
    x, weight, bias = random(6, 4), random(3, 4, 5), random(3, 5)
    (out,) = torch_npu.npu_grouped_matmul(
        x=[x.to("npu")],
        weight=[weight.to("npu")],
        bias=[bias.to("npu")] if with_bias else None,
        split_item=2,
        group_type=0,
        group_list_type=kind,
        group_list=(counts if kind == 1 else counts.cumsum(0)).to("npu"),
    )
    for row, group in enumerate((0, 0, 2, 2, 2)):
        expected = x[row].double() @ weight[group].double() + (bias[group].double() if with_bias else 0)
        torch.testing.assert_close(out[row].cpu().double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(out[5].cpu(), torch.zeros(5))


@pytest.mark.parametrize(
    ("change", "error"), [({"scale": [torch.ones(1)]}, "scale"), ({"split_item": 0}, "split_item")]
)
def test_other_grouped_products_are_refused_by_name(change: dict[str, object], error: str) -> None:
    arguments: dict[str, object] = {"group_list": torch.tensor([1]).to("npu"), "split_item": 2, "group_type": 0}
    if "scale" in change:
        change = {"scale": [torch.ones(1).to("npu")]}
    with pytest.raises(NotSimulatedError, match=f"npu_grouped_matmul: .*{error}"):
        torch_npu.npu_grouped_matmul([random(1, 4).to("npu")], [random(1, 4, 5).to("npu")], **arguments | change)


def test_copies_are_summed_by_their_weights() -> None:
    permuted, places, weights = random(6, HIDDEN), torch.tensor([3, 0, 5, 1, 2, 4], dtype=torch.int32), random(3, 2)
    out = torch_npu.npu_moe_token_unpermute(permuted.to("npu"), places.to("npu"), probs=weights.to("npu")).cpu()
    for t in range(3):
        expected = sum(float(weights[t, j]) * permuted[int(places[2 * t + j])].double() for j in range(2))
        torch.testing.assert_close(out[t].double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(
        torch_npu.npu_moe_token_unpermute(permuted.to("npu"), places.to("npu")).cpu(), permuted[places.long()]
    )
