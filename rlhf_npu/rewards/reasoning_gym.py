"""Reward of reasoning-gym tasks: the verifier of the task itself."""

from __future__ import annotations

from functools import cache
from typing import Any

from reasoning_gym.factory import DATASETS, get_score_answer_fn
from reasoning_gym.utils import extract_answer

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.edges import one_line
from rlhf_npu.rewards.contract import UngradableError


def score(response: str, finished: bool, sample: PromptSample) -> float:  # noqa: ARG001
    """What the verifier of `sample.data_source` gives the answer; from 0 to 1, and some tasks give parts.

    The answer is what stands between the last `<answer>` and `</answer>`, and none is worth 0. Where the
    record's `extra_info.answer_tags` is false, a response without tags is the answer as a whole.

    Raises:
        UngradableError: the record was not written by `rlhf_npu.data.reasoning_gym`.
    """
    answer = extract_answer(response)
    if answer is None and not sample.extra_info.get("answer_tags", True):
        answer = response.strip()
    if answer is None:
        return 0.0
    return float(_verifier(sample.data_source)(answer, _entry(sample)))


def check_sample(sample: PromptSample) -> None:
    """Let the verifier grade the record's own answer.

    Raises:
        UngradableError: `data_source` names no task, there is no `extra_info.entry`, or the verifier fails on it.
    """
    entry, verifier = _entry(sample), _verifier(sample.data_source)
    try:
        float(verifier(str(entry["answer"]), entry))
    except Exception as error:
        reason = f"the verifier of {sample.data_source!r} fails on its extra_info.entry: {one_line(error)}"
        raise UngradableError(reason) from error


def _entry(sample: PromptSample) -> Any:
    entry = sample.extra_info.get("entry")
    if not isinstance(entry, dict):
        raise UngradableError("the record has no extra_info.entry; write prompts with rlhf_npu.data.reasoning_gym")
    return entry


@cache
def _verifier(task: str) -> Any:
    if task not in DATASETS:
        raise UngradableError(f"reasoning-gym has no task {task!r}; data_source must name one")
    return get_score_answer_fn(task)
