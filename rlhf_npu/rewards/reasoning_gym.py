"""Reward of reasoning-gym tasks: the verifier of the task itself."""

from __future__ import annotations

from functools import cache
from typing import Any

from reasoning_gym.factory import DATASETS, get_score_answer_fn
from reasoning_gym.utils import extract_answer

from rlhf_npu.data.prompts import PromptSample


def score(response: str, finished: bool, sample: PromptSample) -> float:  # noqa: ARG001
    """What the verifier of `sample.data_source` gives the answer; from 0 to 1, and some tasks give parts.

    The answer is what stands between the last `<answer>` and `</answer>`, and none is worth 0. Where the
    record's `extra_info.answer_tags` is false, a response without tags is the answer as a whole.

    Raises:
        ValueError: the record was not written by `rlhf_npu.data.reasoning_gym`.
    """
    answer = extract_answer(response)
    if answer is None and not sample.extra_info.get("answer_tags", True):
        answer = response.strip()
    if answer is None:
        return 0.0
    return float(_verifier(sample.data_source)(answer, _entry(sample)))


def _entry(sample: PromptSample) -> Any:
    if "entry" not in sample.extra_info:
        raise ValueError("the record has no extra_info.entry; write prompts with rlhf_npu.data.reasoning_gym")
    return sample.extra_info["entry"]


@cache
def _verifier(task: str) -> Any:
    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}; data_source must name one")
    return get_score_answer_fn(task)
