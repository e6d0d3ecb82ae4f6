"""Pairs, single completions and conversations from files, as token ids that are made once and then kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.data.chats import ChatRenderer
from rlhf_npu.data.drafts import COMPLETIONS, Draft, Drafter, Kind
from rlhf_npu.data.encoding import Encoder, Limits
from rlhf_npu.data.example_files import ExampleBlock, ExampleDataset, block_of, write_examples
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.tokenizing import Job, Place, collect
from rlhf_npu.data.turns import TurnFinder
from rlhf_npu.errors import DataError

__all__ = ["ExampleDataset", "Kind", "collect_examples", "load_examples"]


@dataclass(frozen=True)
class ExampleJob(Job[ExampleBlock, ExampleDataset]):
    """How records become examples."""

    folder = "examples"
    noun = "examples"
    sources = ("drafts", "example_files", "examples", "turns")

    kind: Kind
    limits: Limits
    train_on: str

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.limits, self.train_on

    def encoder(self) -> RecordEncoder:
        return RecordEncoder(self)

    def write(self, folder: Path, blocks: Iterable[ExampleBlock]) -> None:
        write_examples(folder, self.kind, blocks)

    def opened(self, folder: Path, files: Sequence[str]) -> ExampleDataset:
        return ExampleDataset(folder, files)

    def all_overlong(self, count: int) -> str:
        return f"all {count} examples are longer than data.max_length={self.limits.max_length} tokens; raise it"


class RecordEncoder:
    """Makes blocks of examples of records."""

    def __init__(self, job: ExampleJob) -> None:
        chats = ChatRenderer(job.tokenizer)
        turns = TurnFinder(chats, job.tokenizer.eos_token, job.train_on)
        self._drafter = Drafter(job.kind, chats, turns)
        self._encoder = Encoder(job.tokenizer, job.limits)
        self._pieces = 1 + COMPLETIONS[job.kind]

    def block(self, records: Sequence[Place]) -> ExampleBlock:
        """The examples of records, each with the index of its file."""
        problems: dict[int, str] = {}
        drafts: dict[int, Draft] = {}
        for index, (_, record) in enumerate(records):
            try:
                drafts[index] = self._drafter.draft(record)
            except DataError as error:
                problems[index] = str(error)
        encoded = dict(zip(drafts, self._encoder.encode(list(drafts.values())), strict=True))
        problems |= {index: str(each) for index, each in encoded.items() if isinstance(each, DataError)}
        right = {index: each for index, each in encoded.items() if not isinstance(each, DataError)}
        kept = {index: each.example for index, each in right.items() if each.example is not None}
        places = [(records[index][0], records[index][1].row) for index in kept]
        block = block_of(list(kept.values()), places, self._pieces)
        for row, index in enumerate(kept):
            block.labels[row], block.margins[row] = drafts[index].label, drafts[index].margin
        block.skipped = len(right) - len(kept)
        block.truncated = sum(each.truncated for each in right.values())
        block.problems = problems
        return block


def load_examples(
    kind: Kind, files: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: OfflineDataConfig
) -> ExampleDataset:
    """Load, check and tokenize examples; those made before of the same files in the same way are taken as they are.

    A record of `pairs` has `chosen` and `rejected`, and `prompt` unless the two begin alike; one of `unpaired` has
    `prompt`, `completion` and `label`; one of `sft` has `messages`, `prompt` and `completion`, or `text`. See
    docs/data_and_rewards.md.

    Raises:
        DataError: a file is missing, of another kind, malformed or empty; a record has another form, holds nothing to
            learn or to predict it from, or is too long and neither skipped nor truncated; the template or the tokenizer
            fails on it, or what is trained cannot be told; nothing is left; the examples cannot be kept. Names file and
            row, from 1, of all that is wrong; see `DataProblems`.
        ModelError: the chat template takes too long.
    """
    problems = DataProblems()
    dataset = collect_examples(kind, files, tokenizer, config, problems)
    problems.check()
    return dataset


def collect_examples(
    kind: Kind,
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: OfflineDataConfig,
    problems: DataProblems,
) -> ExampleDataset:
    """`load_examples` for one of several data sets: what is wrong is added to `problems`, for the caller to check.

    With problems, and without files, the data set is empty.
    """
    limits = Limits(config.max_length, config.filter_overlong, config.truncation)
    return collect(ExampleJob(tokenizer, kind, limits, config.train_on), files, problems)
