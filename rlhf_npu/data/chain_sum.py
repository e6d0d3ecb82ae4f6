"""reasoning-gym's `chain_sum` with numbers so small that a model of 135 M parameters is sometimes right."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_npu.data.atomic_folder import atomic_folder
from rlhf_npu.data.reasoning_gym import PromptStyle, make_entries, write_prompts
from rlhf_npu.errors import DataError

TASK = "chain_sum"
PLAIN = PromptStyle(system_prompt="", answer_tags=False)


@dataclass(frozen=True)
class ChainSum:
    """How many sums, how hard they are, and how they are asked.

    No held-out sum is among those to train on, and no solved example is asked. The defaults are for
    SmolLM2-135M-Instruct, whose answers at temperature 1 are right about one time in ten.
    """

    train_size: int = 2000
    val_size: int = 100
    examples: int = 2
    min_terms: int = 2
    max_terms: int = 3
    min_digits: int = 1
    max_digits: int = 1
    style: PromptStyle = PLAIN
    seed: int = 0


def prepare(folder: str | os.PathLike[str], task: ChainSum | None = None) -> Path:
    """Write `train.jsonl` and `val.jsonl` into `folder`, or nothing.

    Raises:
        DataError: reasoning-gym refuses the numbers of terms or digits, or there are too few such sums.
    """
    task = task or ChainSum()
    examples, val, train = _split(_entries(task), task)
    with atomic_folder(folder) as staging:
        write_prompts(staging / "train.jsonl", TASK, train, task.style, examples)
        write_prompts(staging / "val.jsonl", TASK, val, task.style, examples)
    return Path(folder)


def _entries(task: ChainSum) -> list[dict[str, Any]]:
    return make_entries(
        TASK,
        size=2 * (task.train_size + task.val_size + task.examples),
        seed=task.seed,
        min_terms=task.min_terms,
        max_terms=task.max_terms,
        min_digits=task.min_digits,
        max_digits=task.max_digits,
    )


def _split(
    entries: list[dict[str, Any]], task: ChainSum
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """(examples, val, train): the first two have no question twice, and train has none of theirs."""
    distinct = list({entry["question"]: entry for entry in entries}.values())
    examples, rest = distinct[: task.examples], distinct[task.examples :]
    val = rest[: task.val_size]
    taken = {entry["question"] for entry in examples + val}
    train = [entry for entry in entries if entry["question"] not in taken][: task.train_size]
    if len(val) < task.val_size or len(train) < task.train_size:
        raise DataError(
            f"chain_sum with {task.min_terms} to {task.max_terms} terms of {task.min_digits} to "
            f"{task.max_digits} digits has too few different sums for {task.val_size} held-out and "
            f"{task.train_size} training prompts; allow more terms or digits"
        )
    return examples, val, train
