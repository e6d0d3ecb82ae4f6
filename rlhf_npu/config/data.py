"""Prompts: where they come from and how many make a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_npu.config.keys import AT_LEAST_ONE, NOT_NEGATIVE, SEED, ConfigNode, Problem, key


@dataclass
class DataConfig(ConfigNode):
    """Prompt files and limits. Lengths are tokens; the batch size is prompts over all devices."""

    train_files: list[str] = key("prompt files to train on: .parquet, .jsonl, .json or builtin:<task>/train", path=True)
    val_files: list[str] = key("held-out prompt files; [] turns validation off", path=True)
    train_batch_size: int = key("prompts a step, over all devices", within=AT_LEAST_ONE)
    val_max_samples: int = key("held-out prompts used, from the first on; 0 = all", 0, within=NOT_NEGATIVE)
    max_prompt_length: int = key("tokens of a prompt at most", within=AT_LEAST_ONE)
    max_response_length: int = key("tokens generated a response at most", within=AT_LEAST_ONE)
    filter_overlong_prompts: bool = key("skip (and count) prompts above max_prompt_length", True)
    truncation: str = key(
        "what happens to an overlong prompt that is not skipped", "error", choices=("error", "left", "right")
    )
    prompt_key: str = key("field of a record that holds the prompt", "prompt")
    shuffle: bool = key("a new order of the training prompts each epoch", True)
    seed: int = key("seed of that order", 1, within=SEED)

    def relations(self) -> Iterator[Problem]:
        if not self.train_files:
            yield Problem("train_files", self.train_files, "must name at least one file")
        if not self.prompt_key:
            yield Problem("prompt_key", self.prompt_key, "must name a field, for example prompt")
