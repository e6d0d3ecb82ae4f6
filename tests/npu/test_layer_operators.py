"""References of normalization, activations, rotary embedding and vocabulary against closed forms in float64."""

import math

import pytest
import torch
import torch_npu
from simulated_npu import npu_operators
from simulated_npu.references import NotSimulatedError
from torch import Tensor

npu_operators.install()

EPSILON = 1e-3


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours.cpu().double(), expected, atol=2e-6, rtol=2e-6)


def root_mean_square(x: Tensor) -> Tensor:
    return (x.double().pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPSILON).sqrt()


def test_rms_norm() -> None:
    x, gamma = random(3, 2, 16), random(16)
    y, reciprocal = torch_npu.npu_rms_norm(x.to("npu"), gamma.to("npu"), EPSILON)
    close(y, x.double() / root_mean_square(x) * gamma.double())
    close(reciprocal, 1 / root_mean_square(x))


@pytest.mark.parametrize("with_beta", [False, True])
def test_add_rms_norm(with_beta: bool) -> None:
    a, b, gamma, beta = random(3, 16), random(3, 16, seed=1), random(16), random(16, seed=1)
    total = a.double() + b.double()
    expected = total / root_mean_square(total) * gamma.double()
    ours = (a.to("npu"), b.to("npu"), gamma.to("npu"))
    results = [torch.ops._C_ascend.npu_add_rms_norm_bias(*ours, beta.to("npu") if with_beta else None, EPSILON)]
    if not with_beta:
        results.append(torch_npu.npu_add_rms_norm(*ours, EPSILON))
    for y, reciprocal, x in results:
        close(y, expected + beta.double() if with_beta else expected)
        close(reciprocal, 1 / root_mean_square(total))
        close(x, total)


def test_gemma_rms_norm_counts_its_weight_from_one() -> None:
    x, gamma = random(3, 16), random(16)
    y, _ = torch.ops._C_ascend.npu_gemma_rms_norm(x.to("npu"), gamma.to("npu"), EPSILON)
    close(y, x.double() / root_mean_square(x) * (1 + gamma.double()))


def test_bfloat16_is_normalized_in_float32() -> None:
    x, gamma = random(3, 16, dtype=torch.bfloat16), random(16, dtype=torch.bfloat16)
    y, reciprocal = torch_npu.npu_rms_norm(x.to("npu"), gamma.to("npu"), EPSILON)
    assert (y.dtype, reciprocal.dtype) == (torch.bfloat16, torch.float32)
    expected = (x.double() / root_mean_square(x)).to(torch.bfloat16).double() * gamma.double()
    torch.testing.assert_close(y.cpu(), expected.to(torch.bfloat16), atol=0, rtol=2**-7)
    close(reciprocal, 1 / root_mean_square(x))


def test_quantization_of_tokens() -> None:
    x = random(3, 16)
    x[1] = 0
    numbers, scale = torch_npu.npu_dynamic_quant(x.to("npu"))
    close(scale, x.double().abs().amax(-1) / 127)
    assert numbers.dtype == torch.int8
    error = (numbers.cpu().double() * scale.cpu().double().unsqueeze(-1) - x).abs()
    assert bool((error <= scale.cpu().unsqueeze(-1) / 2 * (1 + 1e-6)).all())
    assert numbers.abs().amax(-1).tolist() == [127, 0, 127]


def test_quantization_by_given_scales() -> None:
    x, scale, offset = random(3, 16) * 50, random(16).abs(), random(16)
    numbers = torch_npu.npu_quantize(x.to("npu"), scale.to("npu"), offset.to("npu"), torch.qint8, -1, False)
    expected = (x.double() * scale.double() + offset.double()).round().clamp(-128, 127)
    assert torch.equal(numbers.cpu().double(), expected)
    with pytest.raises(NotSimulatedError, match="npu_quantize"):
        torch_npu.npu_quantize(x.to("npu"), scale.to("npu"), offset.to("npu"), torch.quint8, -1, False)


@pytest.mark.parametrize("dim", [-1, 0])
def test_swiglu(dim: int) -> None:
    x = random(4, 6)
    gate, up = x.double().chunk(2, dim)
    close(torch_npu.npu_swiglu(x.to("npu"), dim=dim), gate / (1 + torch.exp(-gate)) * up)


def test_swiglu_of_an_odd_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="npu_swiglu: dimension -1"):
        torch_npu.npu_swiglu(random(2, 5).to("npu"))


def test_fast_gelu_by_its_documented_formula() -> None:
    x = random(50) * 3
    wide = x.double()
    expected = wide / (1 + torch.exp(-1.702 * wide.abs())) * torch.exp(0.851 * (wide - wide.abs()))
    close(torch_npu.npu_fast_gelu(x.to("npu")), expected)


def turned(heads: Tensor, angles: Tensor, neox: bool) -> Tensor:
    """Pairs of each head [tokens, heads, size] as complex numbers, times e^(i angle) of angles [tokens, size / 2]."""
    half = heads.shape[-1] // 2
    pairs = [(i, i + half) if neox else (2 * i, 2 * i + 1) for i in range(half)]
    out = torch.empty_like(heads, dtype=torch.float64)
    for t in range(heads.shape[0]):
        for n in range(heads.shape[1]):
            for i, (a, b) in enumerate(pairs):
                number = complex(heads[t, n, a], heads[t, n, b]) * complex(
                    math.cos(angles[t, i]), math.sin(angles[t, i])
                )
                out[t, n, a], out[t, n, b] = number.real, number.imag
    return out


def tables(positions: int, size: int) -> tuple[Tensor, Tensor]:
    """Angles [positions, size / 2], and the table of their cosines and sines."""
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), 10.0 ** -torch.arange(size // 2))
    return angles, torch.cat((angles.cos(), angles.sin()), -1).float()


@pytest.mark.parametrize("neox", [True, False])
def test_rotary_embedding_turns_pairs_by_the_angles_of_their_positions(neox: bool) -> None:
    angles, table = tables(9, 8)
    positions = torch.tensor([4, 0, 8])
    query, key = random(3, 4 * 8), random(3, 2 * 8)
    ours = query.to("npu"), key.to("npu")
    torch_npu._npu_rotary_embedding(positions.to("npu"), *ours, 8, table.to("npu"), neox)
    for before, after in zip((query, key), ours, strict=True):
        close(after.view(3, -1, 8), turned(before.view(3, -1, 8), angles[positions], neox))


@pytest.mark.parametrize("neox", [True, False])
def test_vllm_ascend_turns_a_part_of_each_head_and_leaves_the_rest(neox: bool) -> None:
    from vllm_ascend.ops.rotary_embedding import rope_forward_oot

    angles, table = tables(9, 4)
    positions = torch.tensor([4, 0, 8])
    query, key = random(3, 4 * 8), random(3, 2 * 8)
    ours = rope_forward_oot(positions.to("npu"), query.to("npu"), key.to("npu"), table.to("npu"), 8, 4, neox)
    for before, after in zip((query, key), ours, strict=True):
        heads, result = before.view(3, -1, 8), after.view(3, -1, 8)
        close(result[..., :4], turned(heads[..., :4], angles[positions], neox))
        assert torch.equal(result[..., 4:].cpu(), heads[..., 4:])


def test_a_table_that_does_not_fit_the_heads_is_refused() -> None:
    query = random(3, 16).to("npu")
    with pytest.raises(NotSimulatedError, match="_npu_rotary_embedding: cos_sin_cache has rows of 4"):
        torch_npu._npu_rotary_embedding(
            torch.arange(3).to("npu"), query, query.clone(), 8, tables(9, 4)[1].to("npu"), True
        )


@pytest.mark.parametrize(("mode", "neox"), [("half", True), ("interleave", False)])
def test_rotary_mul(mode: str, neox: bool) -> None:
    angles, _ = tables(3, 8)
    wide = torch.cat((angles, angles), -1) if neox else angles.repeat_interleave(2, -1)
    x = random(3, 2, 8)
    y = torch_npu.npu_rotary_mul(
        x.to("npu"), wide.cos()[:, None].float().to("npu"), wide.sin()[:, None].float().to("npu"), mode
    )
    close(y, turned(x, angles, neox))


def test_ids_of_a_part_of_the_vocabulary_become_its_rows() -> None:
    # Ids 10 to 13 at rows 0 to 3, two rows of padding, added ids 30 and 31 at rows 6 and 7.
    ids = torch.tensor([[9, 10, 13, 14], [29, 30, 31, 32]])
    rows, elsewhere = torch.ops._C_ascend.get_masked_input_and_mask(ids.to("npu"), 10, 14, 2, 30, 32)
    assert rows.tolist() == [[0, 0, 3, 0], [0, 6, 7, 0]]
    assert elsewhere.tolist() == [[True, False, False, True], [True, False, False, True]]


def kept(probabilities: list[float], k: int, p: float) -> set[int]:
    """The k most probable ids, and of those the fewest most probable ones that reach p of their sum."""
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])[:k]
    total, reached = sum(probabilities[i] for i in order), 0.0
    chosen: set[int] = set()
    for i in order:
        if chosen and reached >= p * total - 1e-12:
            break
        chosen.add(i)
        reached += probabilities[i]
    return chosen


@pytest.mark.parametrize(("k", "p"), [(8, 0.3), (3, 0.999), (5, 0.6), (1, 1.0), (8, 1e-6)])
def test_top_k_and_top_p(k: int, p: float) -> None:
    logits = random(2, 8)
    limits = torch.full((2,), p).to("npu"), torch.full((2,), k, dtype=torch.int32).to("npu")
    ours = torch_npu.npu_top_k_top_p(logits.to("npu"), *limits).cpu()
    for row, result in zip(logits, ours, strict=True):
        chosen = kept(row.double().exp().tolist(), k, p)
        expected = torch.tensor([float(x) if i in chosen else -math.inf for i, x in enumerate(row)])
        assert torch.equal(result, expected)


def test_accumulating_product() -> None:
    x, weight, total = random(5, 3), random(5, 4), random(3, 4)
    ours = total.to("npu")
    torch_npu._npu_matmul_add_fp32(x.to("npu"), weight.to("npu"), ours)
    close(ours, total.double() + x.double().t() @ weight.double())
