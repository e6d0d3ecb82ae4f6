"""Prompts of reasoning-gym tasks, which verify themselves (Stojanovski et al. 2025, arXiv 2505.24760).

A record's `extra_info` holds the task's `entry`, which its verifier needs, and `answer_tags`: whether the
answer is to stand between `<answer>` and `</answer>`. The reward `reasoning_gym` goes by both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasoning_gym.factory import DATASETS, create_dataset
from reasoning_gym.utils import SYSTEM_PROMPTS

from rlhf_npu.errors import DataError

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class PromptStyle:
    """How a question is asked in a chat.

    Attributes:
        system_prompt: the first message; none if empty.
        answer_tags: answers stand between `<answer>` and `</answer>`; else the whole response is one.
    """

    system_prompt: str = SYSTEM_PROMPTS["default"]
    answer_tags: bool = True

    def messages(self, question: str, examples: Iterable[Entry]) -> list[dict[str, str]]:
        """The chat that asks `question`, after `examples` in which the assistant has answered."""
        chat = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        for example in examples:
            chat.append({"role": "user", "content": example["question"]})
            chat.append({"role": "assistant", "content": self._answer(example["answer"])})
        return [*chat, {"role": "user", "content": question}]

    def _answer(self, answer: str) -> str:
        return f"<answer>{answer}</answer>" if self.answer_tags else answer


def make_entries(task: str, size: int, seed: int, **task_config: Any) -> list[dict[str, Any]]:
    """`size` questions of the task: dicts with `question`, `answer` and `metadata`; the seed decides which.

    Raises:
        DataError: reasoning-gym has no such task, or the task refuses the configuration.
    """
    if task not in DATASETS:
        raise DataError(f"reasoning-gym has no task {task!r}; it has {', '.join(sorted(DATASETS))}")
    try:
        dataset = create_dataset(task, size=size, seed=seed, **task_config)
    except (TypeError, AssertionError) as error:
        raise DataError(f"reasoning-gym's {task!r} refuses {task_config}: {error}") from error
    return [dataset[index] for index in range(size)]


def write_prompts(
    path: Path,
    task: str,
    entries: Iterable[Entry],
    style: PromptStyle,
    examples: Iterable[Entry] = (),
) -> None:
    """Write one JSON line an entry, as `load_prompts` reads them; `examples` come before each question.

    Raises:
        DataError: an entry holds what JSON cannot.
    """
    solved = list(examples)
    with path.open("w", encoding="utf-8") as file:
        for entry in entries:
            file.write(_to_json(_record(task, entry, style, solved), task) + "\n")


def _record(task: str, entry: Entry, style: PromptStyle, examples: list[Entry]) -> dict[str, Any]:
    return {
        "prompt": style.messages(entry["question"], examples),
        "data_source": task,
        "reward_model": {"ground_truth": entry["answer"]},
        "extra_info": {"entry": entry, "answer_tags": style.answer_tags},
    }


def _to_json(record: dict[str, Any], task: str) -> str:
    try:
        return json.dumps(record, ensure_ascii=False)
    except TypeError as error:
        raise DataError(f"reasoning-gym's {task!r} cannot be kept as JSON: {error}; use another task") from error
