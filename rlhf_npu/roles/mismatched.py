"""KTO's completions behind prompts that they do not belong to."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_npu.data.packing import Completion, Example


def mismatched(data: Sequence[Example], index: int, max_length: int) -> Example:
    """The prompt of example `index` with the completion of the next one, cut off at `max_length` tokens.

    KTO estimates with such pairs how far the policy is from the reference (Ethayarajh et al. 2024, section 4.1). Who
    is whose next depends on the data set alone, so the reference need score them only once.
    """
    prompt, other = data[index].prompt, data[(index + 1) % len(data)].completions[0]
    room = max(1, max_length - len(prompt))
    return Example(prompt, (Completion(other.input_ids[:room], other.mask[:room]),))
