"""Rewards of this rank's responses, and the record of each for people to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.data.values import json_form
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.errors import WorkerError
from rlhf_npu.rewards import RewardFunction


@dataclass(frozen=True)
class ScoredResponse:
    """One line of a rollout file."""

    step: int
    data_source: str
    prompt: str
    response: str
    ground_truth: Any
    score: float
    finished: bool
    reward_extra_info: dict[str, Any]
    ungradable: str | None


class Scorer:
    """Decodes responses and asks the reward function."""

    def __init__(self, reward: RewardFunction, tokenizer: PreTrainedTokenizerBase) -> None:
        self._reward = reward
        self._tokenizer = tokenizer

    def score(
        self, prompts: Sequence[PromptSample], completions: Sequence[Sequence[Completion]], step: int
    ) -> list[ScoredResponse]:
        """One scored response a completion, in order.

        Raises:
            RewardError: the reward function raised, or returned something that is not a finite number.
        """
        return list(self._responses(prompts, completions, step))

    def _responses(
        self, prompts: Sequence[PromptSample], completions: Sequence[Sequence[Completion]], step: int
    ) -> Iterator[ScoredResponse]:
        for prompt, choices in zip(prompts, completions, strict=True):
            for choice in choices:
                text = self._tokenizer.decode(choice.token_ids, skip_special_tokens=True)
                graded = self._reward.grade(text, choice.finished, prompt)
                yield ScoredResponse(
                    step,
                    prompt.data_source,
                    prompt.prompt_text,
                    text,
                    prompt.ground_truth,
                    graded.score,
                    choice.finished,
                    graded.extra_info,
                    graded.ungradable,
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
