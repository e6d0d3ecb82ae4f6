"""Rewards of this rank's responses, and the record of each for people to read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.data.values import json_form
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.errors import WorkerError
from rlhf_npu.rewards import Graded, Response, RewardFunction


@dataclass(frozen=True)
class ScoredResponse:
    """One line of a rollout file; `failed` says why there is no score but `reward.failed_score`, if so."""

    step: int
    data_source: str
    prompt: str
    response: str
    ground_truth: Any
    score: float
    finished: bool
    reward_extra_info: dict[str, Any]
    ungradable: str | None
    failed: str | None


class Scorer:
    """Decodes responses and asks the reward function.

    Args:
        max_failed_ratio: `reward.max_failed_ratio`, which counts the responses of all ranks.
        ranks: their number; they have equally many responses.
    """

    def __init__(
        self, reward: RewardFunction, tokenizer: PreTrainedTokenizerBase, max_failed_ratio: float = 0.0, ranks: int = 1
    ) -> None:
        self._reward = reward
        self._tokenizer = tokenizer
        self._max_failed_ratio = max_failed_ratio
        self._ranks = ranks

    def score(
        self,
        prompts: Sequence[PromptSample],
        completions: Sequence[Sequence[Completion]],
        step: int,
        by_model: Sequence[Graded] | None = None,
    ) -> list[ScoredResponse]:
        """One scored response a completion, in order.

        Args:
            by_model: what the reward model says of each, if there is one.

        Raises:
            RewardError: more of them than may failed to be scored: the reward function raised, took too long, or
                returned something that is not a finite number.
        """
        responses = list(self._responses(prompts, completions))
        if by_model is not None:
            pairs = zip(responses, by_model, strict=True)
            responses = [replace(response, by_model=graded) for response, graded in pairs]
        allowed = failures_allowed(self._max_failed_ratio, len(responses) * self._ranks)
        graded = self._reward.grade_all(responses, allowed)
        return [_line(step, *pair) for pair in zip(responses, graded, strict=True)]

    def _responses(
        self, prompts: Sequence[PromptSample], completions: Sequence[Sequence[Completion]]
    ) -> Iterator[Response]:
        for prompt, choices in zip(prompts, completions, strict=True):
            for choice in choices:
                text = self._tokenizer.decode(choice.token_ids, skip_special_tokens=True)
                yield Response(text, choice.finished, prompt)


def failures_allowed(ratio: float, responses: int) -> int:
    """How many of a number of responses may fail."""
    return math.floor(ratio * responses + 1e-9)


def _line(step: int, response: Response, graded: Graded) -> ScoredResponse:
    sample = response.sample
    return ScoredResponse(
        step=step,
        data_source=sample.data_source,
        prompt=sample.prompt_text,
        response=response.text,
        ground_truth=sample.ground_truth,
        score=graded.score,
        finished=response.finished,
        reward_extra_info=graded.extra_info,
        ungradable=graded.ungradable,
        failed=graded.failure,
    )


def write_responses(responses: Sequence[ScoredResponse], path: Path) -> None:
    """Write JSON lines; the file appears whole or not at all. What JSON lacks is written as `json_form` has it.

    Raises:
        WorkerError: the file system refuses; names the file.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(json_form(vars(line)), ensure_ascii=False) + "\n" for line in responses)
        partial.rename(path)
    except OSError as error:
        raise WorkerError(f"cannot write {path}: {error.strerror or error}") from error
