"""Examples to learn from without generating: where they come from and how many make a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_npu.config.keys import AT_LEAST_ONE, NOT_NEGATIVE, SEED, ConfigNode, Problem, Range, key


@dataclass
class OfflineDataConfig(ConfigNode):
    """Files of pairs, single completions or conversations, and limits. Lengths are tokens."""

    train_files: list[str] = key("files to train on: .parquet, .jsonl, .json or builtin:<task>/<part>", path=True)
    val_files: list[str] = key("held-out files; [] turns validation off", path=True)
    train_batch_size: int = key("examples (pairs count once) an optimizer step, over all devices", within=AT_LEAST_ONE)
    val_max_samples: int = key("held-out examples used, from the first on; 0 = all", 0, within=NOT_NEGATIVE)
    max_length: int = key("tokens of a prompt and one completion at most", within=Range(at_least=2))
    max_tokens_per_device: int = key(
        "tokens of a forward and backward pass on one device at most, a pair's prompt counted once", within=AT_LEAST_ONE
    )
    filter_overlong: bool = key("skip (and count) examples above max_length", True)
    truncation: str = key(
        "what happens to an overlong example that is not skipped; left = its prompt's beginning goes, right = its "
        "completions' ends go",
        "error",
        choices=("error", "left", "right"),
        elsewhere={"keep_end": "left", "keep_start": "right"},
    )
    train_on: str = key(
        "which turns of a chat under 'messages' are trained",
        "all_assistant",
        choices=("all_assistant", "last_assistant"),
    )
    shuffle: bool = key("a new order of the training examples each epoch", True)
    seed: int = key("seed of that order", 1, within=SEED)

    def relations(self) -> Iterator[Problem]:
        if not self.train_files:
            yield Problem("train_files", self.train_files, "must name at least one file")
        if self.max_tokens_per_device < self.max_length:
            yield Problem(
                "max_tokens_per_device", self.max_tokens_per_device, f"must be at least max_length={self.max_length}"
            )
