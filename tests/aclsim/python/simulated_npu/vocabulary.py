"""References of what a vocabulary that is split over ranks needs, and of choosing from it."""

from __future__ import annotations

import torch
from torch import Tensor

from simulated_npu.references import reference


@reference("_C_ascend::get_masked_input_and_mask")
def masked_input_and_mask(
    ids: Tensor,
    org_vocab_start_index: int,
    org_vocab_end_index: int,
    num_org_vocab_padding: int,
    added_vocab_start_index: int,
    added_vocab_end_index: int,
) -> tuple[Tensor, Tensor]:
    """Rows of this rank's part of the embedding for ids of any shape, 0 for those of others, and where that is so.

    A part holds the ids from org_vocab_start_index to org_vocab_end_index, num_org_vocab_padding rows of padding, and
    the added ids. vLLM, vocab_parallel_embedding.py, get_masked_input_and_mask.
    """
    original = (ids >= org_vocab_start_index) & (ids < org_vocab_end_index)
    added = (ids >= added_vocab_start_index) & (ids < added_vocab_end_index)
    added_row = org_vocab_end_index - org_vocab_start_index + num_org_vocab_padding
    rows = torch.where(original, ids - org_vocab_start_index, 0)
    rows = torch.where(added, ids - added_vocab_start_index + added_row, rows)
    return rows, ~(original | added)


@reference("npu::npu_top_k_top_p")
def top_k_top_p(logits: Tensor, p: Tensor | None, k: Tensor | None) -> Tensor:
    """logits [rows, ids] with -inf for what is not among the k [rows] largest, or not among the most probable ids
    that together have probability p [rows]; the largest always stays.

    op-plugin, torch_npu-npu_top_k_top_p.md: ascending stable sort, cut below the k-th largest, then of what is left
    all whose probabilities from the smallest on sum up to 1 - p or less.
    """
    values, order = logits.sort(dim=-1, stable=True)
    if k is not None:
        smallest = values.gather(-1, (values.shape[-1] - k.long())[:, None])
        values = values.masked_fill(values < smallest, float("-inf"))
    if p is not None:
        dropped = values.softmax(-1).cumsum(-1) <= 1 - p[:, None]
        dropped[:, -1] = False
        values = values.masked_fill(dropped, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, values)
