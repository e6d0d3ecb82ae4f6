"""Reward of the digit-sequence task."""

from __future__ import annotations

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.rewards.contract import UngradableError, shown

_END = None


def score(response: str, finished: bool, sample: PromptSample) -> float:
    """Share of the answer's tokens that are right before the first that is wrong; from 0 to 1.

    A token is a character, and the end of the response is the last one: an answer of L characters has L +
    1.
    """
    expected = [*sample.ground_truth, _END]
    given = [*response, _END] if finished else [*response]
    right = 0
    for want, got in zip(expected, given, strict=False):
        if want != got:
            break
        right += 1
    return right / len(expected)


def check_sample(sample: PromptSample) -> None:
    """Refuse a record whose ground truth is no text.

    Raises:
        UngradableError: says what it is.
    """
    if not isinstance(sample.ground_truth, str):
        raise UngradableError(f"the ground truth {shown(sample.ground_truth)} is no string of digits")
