"""References of attention and its cache against explicit sums in float64."""

import math
from collections.abc import Callable

import pytest
import torch
import torch_npu
from simulated_npu import npu_operators
from simulated_npu.references import NotSimulatedError
from simulated_npu.triton_kernels import compute_slot_mapping
from torch import Tensor

npu_operators.install()

HEADS, KEY_HEADS, SIZE, BLOCK = 6, 2, 8, 4
SCALE = 0.31
Sees = Callable[[int, int], bool]


def mask() -> Tensor:
    return torch.ones(2048, 2048).triu(1).to(torch.int8).to("npu")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def summed(query: Tensor, key: Tensor, value: Tensor, sees: Sees, sinks: Tensor | None = None) -> Tensor:
    """Softmax by its definition: a query [T, N, D] over the keys [S, K, D] whose indices it sees."""
    out = torch.zeros(query.shape[0], query.shape[1], value.shape[-1], dtype=torch.float64)
    group = query.shape[1] // key.shape[1]
    for t in range(query.shape[0]):
        for n in range(query.shape[1]):
            total = math.exp(float(sinks[n])) if sinks is not None else 0.0
            for s in (s for s in range(key.shape[0]) if sees(t, s)):
                product = sum(float(a) * float(b) for a, b in zip(query[t, n], key[s, n // group], strict=True))
                weight = math.exp(SCALE * product)
                total += weight
                out[t, n] += weight * value[s, n // group].double()
            if total > 0:
                out[t, n] /= total
    return out


def fused(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], key_lengths: list[int], **more: object
) -> Tensor:
    keywords: dict[str, object] = {
        "atten_mask": mask(),
        "actual_seq_lengths": lengths,
        "actual_seq_lengths_kv": key_lengths,
        "num_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "input_layout": "TND",
        "scale": SCALE,
        "sparse_mode": 3,
    }
    out, _ = torch_npu.npu_fused_infer_attention_score(
        query.to("npu"), key.to("npu"), value.to("npu"), **keywords | more
    )
    return out.cpu()


class Paged:
    """Two sequences in a cache whose blocks are neither adjacent nor in order; what no sequence holds is not finite."""

    lengths = (9, 6)
    table = ((7, 2, 5), (0, 3, 1))

    def __init__(self) -> None:
        self.key = torch.full((8, BLOCK, KEY_HEADS, SIZE), math.nan)
        self.value = self.key.clone()
        self.keys = [random(length, KEY_HEADS, SIZE, seed=1) for length in self.lengths]
        self.values = [random(length, KEY_HEADS, SIZE, seed=2) for length in self.lengths]
        self.slots = [
            torch.tensor([blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(length)], dtype=torch.int32)
            for blocks, length in zip(self.table, self.lengths, strict=True)
        ]
        for new, cache in ((self.keys, self.key), (self.values, self.value)):
            for rows, slots in zip(new, self.slots, strict=True):
                cache.view(-1, KEY_HEADS, SIZE)[slots.long()] = rows

    @property
    def block_table(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.int32).to("npu")

    def fused(self, query: Tensor, queries: list[int], **more: object) -> Tensor:
        key, value = (cache.flatten(2) for cache in (self.key, self.value))
        more |= {"block_table": self.block_table, "block_size": BLOCK}
        return fused(query, key, value, queries, list(self.lengths), **more)


def test_sequences_without_cache_see_only_their_own_keys_up_to_themselves() -> None:
    query, key, value = random(7, HEADS, SIZE), random(7, KEY_HEADS, SIZE), random(7, KEY_HEADS, SIZE, seed=5)
    out = fused(query, key, value, [3, 7], [3, 7])
    for begin, end in ((0, 3), (3, 7)):
        part = slice(begin, end)
        torch.testing.assert_close(
            out[part].double(), summed(query[part], key[part], value[part], lambda t, s: s <= t), atol=1e-5, rtol=1e-5
        )


def test_a_chunk_of_a_prompt_sees_its_cached_prefix_in_scattered_blocks() -> None:
    paged, query = Paged(), random(6, HEADS, SIZE)
    out = paged.fused(query, [4, 6])
    for begin, end, length, keys, values in ((0, 4, 9, *_of(paged, 0)), (4, 6, 6, *_of(paged, 1))):
        prefix = length - (end - begin)
        expected = summed(query[begin:end], keys, values, lambda t, s, prefix=prefix: s <= prefix + t)  # type: ignore[misc]
        torch.testing.assert_close(out[begin:end].double(), expected, atol=1e-5, rtol=1e-5)


def _of(paged: Paged, row: int) -> tuple[Tensor, Tensor]:
    return paged.keys[row], paged.values[row]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 0), (3, 1), (2147483647, 0)])
def test_a_band_holds_both_of_its_ends(before: int, after: int) -> None:
    paged, query = Paged(), random(6, HEADS, SIZE)
    out = paged.fused(query, [4, 6], sparse_mode=4, pre_tokens=before, next_tokens=after)
    expected = summed(query[:4], *_of(paged, 0), lambda t, s: 5 + t - before <= s <= 5 + t + after)
    torch.testing.assert_close(out[:4].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "sees"), [(0, lambda t, s: True), (2, lambda t, s: s <= t), (3, lambda t, s: s <= t + 3)]
)
def test_modes_without_a_band(mode: int, sees: Sees) -> None:
    query, key, value = random(2, HEADS, SIZE), random(5, KEY_HEADS, SIZE), random(5, KEY_HEADS, SIZE, seed=5)
    out = fused(query, key, value, [2], [5], sparse_mode=mode, atten_mask=None if mode == 0 else mask())
    torch.testing.assert_close(out.double(), summed(query, key, value, sees), atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_no_key_gets_zeros() -> None:
    query, key = random(4, HEADS, SIZE), random(2, KEY_HEADS, SIZE)
    out = fused(query, key, key, [4], [2])
    assert torch.equal(out[:2], torch.zeros(2, HEADS, SIZE))
    torch.testing.assert_close(out[2:].double(), summed(query[2:], key, key, lambda t, s: s <= t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 2])
def test_a_sink_takes_its_part_of_each_softmax(window: int | None) -> None:
    query, key, value = random(5, HEADS, SIZE), random(5, KEY_HEADS, SIZE), random(5, KEY_HEADS, SIZE, seed=5)
    sinks = random(HEADS)
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        query.to("npu"),
        key.to("npu"),
        value.to("npu"),
        atten_mask=mask(),
        actual_seq_qlen=[5],
        actual_seq_kvlen=[5],
        num_query_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        input_layout="TND",
        softmax_scale=SCALE,
        sparse_mode=3 if window is None else 4,
        pre_tokens=2147483647 if window is None else window,
        next_tokens=0,
        learnable_sink=sinks.to("npu"),
    )
    before = 5 if window is None else window
    expected = summed(query, key, value, lambda t, s: t - before <= s <= t, sinks)
    torch.testing.assert_close(out.cpu().double(), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_rounded_once() -> None:
    query, key, value = (random(4, n, SIZE, seed=n, dtype=torch.bfloat16) for n in (HEADS, KEY_HEADS, KEY_HEADS))
    out = fused(query, key, value, [4], [4])
    expected = summed(query, key, value, lambda t, s: s <= t).to(torch.bfloat16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, atol=0, rtol=2**-7)


@pytest.mark.parametrize("version", ["", "_v2"])
def test_the_out_variant_writes_to_what_it_was_given(version: str) -> None:
    query, key = random(3, HEADS, SIZE), random(3, KEY_HEADS, SIZE)
    names = ("actual_seq_qlen", "actual_seq_kvlen", "num_query_heads", "softmax_scale")
    if not version:
        names = ("actual_seq_lengths", "actual_seq_lengths_kv", "num_heads", "scale")
    arguments = dict(zip(names, ([3], [3], HEADS, SCALE), strict=True)) | {
        "atten_mask": mask(),
        "num_key_value_heads": KEY_HEADS,
        "input_layout": "TND",
        "sparse_mode": 3,
    }
    operands = [tensor.to("npu") for tensor in (query, key, key)]
    room = getattr(torch_npu, f"_npu_fused_infer_attention_score{version}_get_max_workspace")(*operands, **arguments)
    out = torch.zeros(3, HEADS, SIZE).to("npu")
    operator = getattr(torch_npu, f"npu_fused_infer_attention_score{version}").out
    operator(*operands, **arguments, workspace=room, out=[out, torch.empty(1).to("npu")])
    torch.testing.assert_close(out.cpu().double(), summed(query, key, key, lambda t, s: s <= t), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key_antiquant_mode": 1}, "key_antiquant_mode"),
        ({"antiquant_mode": 1}, "antiquant_mode"),
        ({"sparse_mode": 1}, "sparse_mode"),
        ({"input_layout": "BSH"}, "input_layout"),
        ({"sparse_mode": 0}, "atten_mask"),
        ({"pse_shift": torch.ones(3, HEADS, SIZE)}, "pse_shift"),
        ({"query_rope": torch.ones(3, HEADS, SIZE)}, "query_rope needs key_rope"),
        ({"actual_seq_lengths": None}, "lengths of queries"),
    ],
)
def test_what_is_not_simulated_is_refused_by_name(change: dict[str, object], words: str) -> None:
    query, key = random(3, HEADS, SIZE), random(3, KEY_HEADS, SIZE)
    changed = {name: value.to("npu") if isinstance(value, Tensor) else value for name, value in change.items()}
    with pytest.raises(NotSimulatedError, match=f"npu::npu_fused_infer_attention_score.*{words}"):
        fused(query, key, key, [3], [3], **changed)


@pytest.mark.parametrize(
    "change",
    [
        {"atten_mask": None},
        {"actual_seq_lengths": [2]},
        {"actual_seq_lengths_kv": [1, 3]},
        {"num_heads": 4},
        {"atten_mask": torch.zeros(2048, 2048, dtype=torch.int8)},
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object]) -> None:
    query, key = random(3, HEADS, SIZE), random(3, KEY_HEADS, SIZE)
    changed = {name: value.to("npu") if isinstance(value, Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match="npu::npu_fused_infer_attention_score"):
        fused(query, key, key, [3], [3], **changed)


@pytest.mark.parametrize("flat", [False, True])
def test_paged_attention_of_one_query_a_sequence(flat: bool) -> None:
    paged, query = Paged(), random(2, HEADS, SIZE)
    given = query.flatten(1).to("npu") if flat else query.to("npu")
    out = torch.empty_like(given)
    torch_npu._npu_paged_attention(
        query=given,
        key_cache=paged.key.to("npu"),
        value_cache=paged.value.to("npu"),
        num_kv_heads=KEY_HEADS,
        num_heads=HEADS,
        scale_value=SCALE,
        block_table=paged.block_table,
        context_lens=torch.tensor(paged.lengths, dtype=torch.int32),
        out=out,
    )
    for row in range(2):
        expected = summed(query[row : row + 1], *_of(paged, row), lambda t, s: True)
        torch.testing.assert_close(out[row].view(1, HEADS, SIZE).cpu().double(), expected, atol=1e-5, rtol=1e-5)


def test_new_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    paged = Paged()
    caches = [torch.full_like(paged.key, math.nan).to("npu") for _ in range(2)]
    skipped = torch.tensor([-1], dtype=torch.int32)
    slots = torch.cat((*paged.slots, skipped)).to("npu")
    keys, values = (torch.cat((*rows, random(1, KEY_HEADS, SIZE))).to("npu") for rows in (paged.keys, paged.values))
    torch_npu._npu_reshape_and_cache(
        key=keys, value=values, key_cache=caches[0], value_cache=caches[1], slot_indices=slots
    )
    for cache, expected in zip(caches, (paged.key, paged.value), strict=True):
        torch.testing.assert_close(cache.cpu(), expected, atol=0, rtol=0, equal_nan=True)
    with pytest.raises(ValueError, match="16 tokens, and slots for 15"):
        torch_npu._npu_reshape_and_cache(
            key=keys, value=values, key_cache=caches[0], value_cache=caches[1], slot_indices=slots[:-1]
        )


def test_slots_follow_from_positions_and_blocks() -> None:
    paged = Paged()
    slots = torch.full((12,), 77).to("npu")
    compute_slot_mapping[(3,)](
        5,
        8,
        torch.tensor([0, 3, 5, 5], dtype=torch.int32).to("npu"),
        torch.tensor([6, 7, 8, 0, 5]).to("npu"),
        paged.block_table,
        3,
        BLOCK,
        slots,
        TOTAL_CP_WORLD_SIZE=1,
        TOTAL_CP_RANK=0,
        CP_KV_CACHE_INTERLEAVE_SIZE=1,
        PAD_ID=-1,
        BLOCK_SIZE=1024,
    )
    expected = [*paged.slots[0][6:9].tolist(), *paged.slots[1][[0, 5]].tolist(), -1, -1, -1, 77, 77, 77, 77]
    assert slots.tolist() == expected
