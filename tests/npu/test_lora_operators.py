"""References of vllm-ascend's kernels for adapters against loops over tokens in float64."""

import pytest
import torch
from simulated_npu import npu_operators
from simulated_npu.references import CALLS
from torch import Tensor

npu_operators.install()

TOKENS, HIDDEN, RANK, OUT, ADAPTERS = 5, 24, 8, 10, 3
INDICES = torch.tensor([2, -1, 0, 2, 1])


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=[3, 4])
def shrinking(request: pytest.FixtureRequest) -> Tensor:
    weight = random(ADAPTERS, RANK, HIDDEN)
    return weight if request.param == 3 else weight[:, None]


def shrunk(x: Tensor, weight: Tensor, before: Tensor) -> Tensor:
    """scale 0.5 times the adapter's matrix times x for tokens that have one."""
    out = before.double()
    for t, adapter in enumerate(INDICES.tolist()):
        if adapter >= 0:
            out[t] = 0.5 * weight.view(ADAPTERS, RANK, HIDDEN)[adapter].double() @ x[t].double()
    return out


def test_shrinking_replaces_the_rows_of_tokens_with_an_adapter(shrinking: Tensor) -> None:
    x, before = random(TOKENS, HIDDEN), random(TOKENS, RANK, dtype=torch.float32)
    y = before.to("npu")
    torch.ops._C_ascend.bgmv_shrink(x.to("npu"), shrinking.to("npu"), INDICES.to("npu"), y, 0.5)
    torch.testing.assert_close(y.cpu().double(), shrunk(x, shrinking, before), atol=1e-5, rtol=1e-5)


def expanded(x: Tensor, weight: Tensor, before: Tensor, offset: int) -> Tensor:
    out = before.double()
    for t, adapter in enumerate(INDICES.tolist()):
        if adapter >= 0:
            out[t, offset : offset + OUT] += weight[adapter].double() @ x[t].double()
    return out.to(before.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_expanding_adds_to_its_slice(dtype: torch.dtype) -> None:
    x, weight = random(TOKENS, RANK, dtype=torch.float32), random(ADAPTERS, OUT, RANK, dtype=dtype)
    before = random(TOKENS, OUT + 7, dtype=dtype)
    y = before.to("npu")
    torch.ops._C_ascend.bgmv_expand(x.to("npu"), weight.to("npu"), INDICES.to("npu"), y, 3, OUT)
    torch.testing.assert_close(y.cpu(), expanded(x, weight, before, 3), atol=0, rtol=2**-7)
    assert torch.equal(y.cpu()[:, :3], before[:, :3])
    assert torch.equal(y.cpu()[:, 3 + OUT :], before[:, 3 + OUT :])


def test_one_adapter_may_have_fewer_rows_than_the_slice_and_several_may_not() -> None:
    x, weight, y = random(2, RANK, dtype=torch.float32), random(1, OUT, RANK), random(2, OUT + 6)
    ours, indices = y.to("npu"), torch.tensor([0, -1]).to("npu")
    torch.ops._C_ascend.bgmv_expand(x.to("npu"), weight.to("npu"), indices, ours, 0, OUT + 6)
    expected = y[0, :OUT].double() + weight[0].double() @ x[0].double()
    torch.testing.assert_close(ours.cpu()[0, :OUT], expected.to(y.dtype), atol=0, rtol=2**-7)
    assert torch.equal(ours.cpu()[0, OUT:], y[0, OUT:])
    assert torch.equal(ours.cpu()[1], y[1])
    with pytest.raises(
        ValueError, match=r"bgmv_expand: weight is torch.bfloat16 \[2, 10, 8\], for 8 inputs and 16 outputs"
    ):
        torch.ops._C_ascend.bgmv_expand(x.to("npu"), random(2, OUT, RANK).to("npu"), indices, y.to("npu"), 0, OUT + 6)


def test_sequences_give_their_tokens_their_adapter() -> None:
    lengths, adapters = torch.tensor([1, 1, 2]), torch.tensor([2, -1, 0])
    per_token = torch.tensor([2, -1, 0, 0, -1])  # the last token is of no sequence
    x, weight = random(TOKENS, HIDDEN), random(ADAPTERS, RANK, HIDDEN)
    results = []
    for call, indices in (
        (torch.ops._C_ascend.sgmv_shrink, (adapters, lengths)),
        (torch.ops._C_ascend.bgmv_shrink, (per_token,)),
    ):
        y = torch.full((TOKENS, RANK), 7.0).to("npu")
        call(x.to("npu"), weight.to("npu"), *(index.to("npu") for index in indices), y, 0.5)
        results.append(y.cpu())
    assert torch.equal(*results)
    weight, outs = random(ADAPTERS, OUT, RANK), []
    for call, indices in (
        (torch.ops._C_ascend.sgmv_expand, (adapters, lengths)),
        (torch.ops._C_ascend.bgmv_expand, (per_token,)),
    ):
        y = random(TOKENS, OUT).to("npu")
        call(results[0].to("npu"), weight.to("npu"), *(index.to("npu") for index in indices), y, 0, OUT)
        outs.append(y.cpu())
    assert torch.equal(*outs)


def test_float32_is_refused_as_by_the_kernel() -> None:
    x, weight = random(TOKENS, HIDDEN, dtype=torch.float32), random(ADAPTERS, RANK, HIDDEN)
    y = torch.zeros(TOKENS, RANK).to("npu")
    with pytest.raises(ValueError, match=r"bgmv_shrink: x is torch.float32"):
        torch.ops._C_ascend.bgmv_shrink(x.to("npu"), weight.to("npu"), INDICES.to("npu"), y, 1.0)


def test_a_rank_that_the_kernel_does_not_sum_up_is_refused() -> None:
    x, weight = random(TOKENS, 4, dtype=torch.float32), random(ADAPTERS, OUT, 4)
    with pytest.raises(ValueError, match=r"bgmv_expand: x is torch.float32 .* rank 8, 16, 32 or 64"):
        torch.ops._C_ascend.bgmv_expand(
            x.to("npu"), weight.to("npu"), INDICES.to("npu"), random(TOKENS, OUT).to("npu"), 0, OUT
        )
    assert CALLS["_C_ascend::bgmv_expand"] > 0
