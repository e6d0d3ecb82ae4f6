"""References of attention with latent keys against explicit sums in float64."""

import math

import pytest
import torch
import torch_npu
from simulated_npu import npu_operators
from simulated_npu.references import NotSimulatedError
from torch import Tensor

npu_operators.install()

HEADS, LATENT, ROPE, BLOCK, SCALE = 4, 6, 4, 4, 0.3
LENGTHS, TABLE = (6, 3), ((3, 1), (0, 2))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(ours: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(ours.cpu().double(), torch.as_tensor(expected).double(), atol=1e-5, rtol=1e-5)


def test_prefill_scores_the_parts_with_and_without_position_and_gives_its_sums() -> None:
    query, key, value = random(5, HEADS, LATENT), random(5, HEADS, LATENT, seed=1), random(5, HEADS, 3)
    query_rope, key_rope = random(5, HEADS, ROPE), random(5, HEADS, ROPE, seed=1)
    out, sums = torch_npu.npu_fused_infer_attention_score(
        *(tensor.to("npu") for tensor in (query, key, value)),
        query_rope=query_rope.to("npu"),
        key_rope=key_rope.to("npu"),
        atten_mask=torch.ones(2048, 2048).triu(1).to(torch.int8).to("npu"),
        actual_seq_lengths=[5],
        actual_seq_lengths_kv=[5],
        num_heads=HEADS,
        num_key_value_heads=HEADS,
        input_layout="TND",
        scale=SCALE,
        sparse_mode=3,
        softmax_lse_flag=True,
    )
    for t in range(5):
        for n in range(HEADS):
            scores = [
                SCALE
                * float(query[t, n].double() @ key[s, n].double() + query_rope[t, n].double() @ key_rope[s, n].double())
                for s in range(t + 1)
            ]
            total = sum(math.exp(score) for score in scores)
            close(out[t, n], sum(math.exp(score) / total * value[s, n].double() for s, score in enumerate(scores)))
            assert float(sums[t, n, 0]) == pytest.approx(math.log(total), abs=1e-5)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of x [tokens, ROPE] turned; the first ones of all pairs, then the second."""
    first = [
        [float(x[t, 2 * i] * angles[t, i].cos() - x[t, 2 * i + 1] * angles[t, i].sin()) for i in range(2)]
        for t in range(len(x))
    ]
    second = [
        [float(x[t, 2 * i + 1] * angles[t, i].cos() + x[t, 2 * i] * angles[t, i].sin()) for i in range(2)]
        for t in range(len(x))
    ]
    return torch.cat((torch.tensor(first), torch.tensor(second)), -1)


def test_what_is_cached_is_normalized_and_turned_and_goes_to_its_slot() -> None:
    kv, gamma, angles = random(3, 1, 1, LATENT + ROPE), random(LATENT), random(3, 2)
    cos, sin = (torch.cat((f, f), -1)[:, None, None].to("npu") for f in (angles.cos(), angles.sin()))
    caches = [torch.full((4, BLOCK, 1, size), 7.0).to("npu") for size in (ROPE, LATENT)]
    slots = torch.tensor([9, -1, 2])
    _, _, rope, latent = torch_npu.npu_kv_rmsnorm_rope_cache(
        kv.to("npu"),
        gamma.to("npu"),
        cos,
        sin,
        slots.to("npu"),
        *caches,
        epsilon=1e-3,
        cache_mode="PA",
        is_output_kv=True,
    )
    parts = kv.view(3, -1).double().split([LATENT, ROPE], -1)
    normalized = parts[0] / (parts[0].pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * gamma.double()
    turned = rotated(parts[1], angles)
    close(latent.view(3, -1), normalized)
    close(rope.view(3, -1), turned)
    for cache, expected in zip(caches, (turned, normalized), strict=True):
        rows = torch.full((4 * BLOCK, expected.shape[-1]), 7.0, dtype=torch.float64)
        rows[9], rows[2] = expected[0].double(), expected[2].double()
        close(cache.view(4 * BLOCK, -1), rows)
    with pytest.raises(NotSimulatedError, match="npu_kv_rmsnorm_rope_cache: cache_mode"):
        torch_npu.npu_kv_rmsnorm_rope_cache(
            kv.to("npu"), gamma.to("npu"), cos, sin, slots.to("npu"), *caches, cache_mode="PA_NZ"
        )


def test_decoding_reads_each_sequences_blocks_and_all_heads_share_their_keys() -> None:
    query, query_rope = random(2, HEADS, 1, LATENT), random(2, HEADS, 1, ROPE)
    latent, rope = (torch.full((4, 1, BLOCK, size), math.nan) for size in (LATENT, ROPE))
    tokens = [(random(length, LATENT), random(length, ROPE)) for length in LENGTHS]
    for row, (latents, ropes) in enumerate(tokens):
        for i in range(LENGTHS[row]):
            latent[TABLE[row][i // BLOCK], 0, i % BLOCK] = latents[i]
            rope[TABLE[row][i // BLOCK], 0, i % BLOCK] = ropes[i]
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        query.to("npu"),
        latent.to("npu"),
        latent.to("npu"),
        query_rope=query_rope.to("npu"),
        key_rope=rope.to("npu"),
        num_query_heads=HEADS,
        num_key_value_heads=1,
        input_layout="BNSD_NBSD",
        softmax_scale=SCALE,
        block_table=torch.tensor(TABLE, dtype=torch.int32).to("npu"),
        block_size=BLOCK,
        actual_seq_kvlen=list(LENGTHS),
    )
    assert out.shape == (HEADS, 2, 1, LATENT)
    for row, (latents, ropes) in enumerate(tokens):
        for n in range(HEADS):
            weights = [
                math.exp(
                    SCALE * float(query[row, n, 0].double() @ a.double() + query_rope[row, n, 0].double() @ b.double())
                )
                for a, b in zip(latents, ropes, strict=True)
            ]
            mixed = sum(w * a.double() for w, a in zip(weights, latents, strict=True))
            close(out[n, row, 0], mixed / sum(weights))


def test_transposed_products_of_batches() -> None:
    x, weight = random(3, 2, 5), random(3, 5, 4)
    out = torch_npu.npu_transpose_batchmatmul(x.to("npu"), weight.to("npu"), perm_y=(1, 0, 2))
    for n in range(3):
        close(out[:, n], x[n].double() @ weight[n].double())
