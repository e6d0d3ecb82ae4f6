"""One prompt, as the loop, the workers and reward functions see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptSample:
    """One prompt and what a reward function needs to score a response to it.

    Attributes:
        index: place in the data set it was loaded into.
        prompt_ids: token ids the model continues.
        prompt_text: the same as text, special tokens of a chat template included.
        data_source: name of the task.
        ground_truth: the right answer, as the reward function wants it.
        extra_info: whatever else the record carries.
        file: the file that the record came from.
        row: its line or row there, from 1.
        messages: the prompt's chat messages as the record has them, where a reward model reads them by a template of
            its own; None for prompts that are text, and without such a model.
    """

    index: int
    prompt_ids: tuple[int, ...]
    prompt_text: str
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]
    file: str = ""
    row: int = 0
    messages: list[dict[str, Any]] | None = None

    @property
    def location(self) -> str:
        """`file:row`, for people to read."""
        return f"{self.file}:{self.row}"
