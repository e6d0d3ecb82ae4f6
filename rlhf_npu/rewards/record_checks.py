"""Finds the records that no response can be graded against, within a time that does not grow with the data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.prompt_files import PromptDataset
from rlhf_npu.rewards.contract import UngradableError
from rlhf_npu.rewards.loading import SampleCheck

SECONDS = 30.0


@dataclass(frozen=True)
class RecordCheck:
    """How many of how many records were checked, and how long that took."""

    checked: int
    records: int
    seconds: float

    def __str__(self) -> str:
        return f"checked {self.checked:,} of {self.records:,} ground truths in {self.seconds:.1f} s"


def check_records(check: SampleCheck, prompts: Sequence[PromptDataset], seconds: float) -> RecordCheck:
    """Check the prompts of all data sets for `seconds` at most, in an order that is the same each time and spread out.

    Only what is read beside prompts is checked: `check` gets each without ids and text.

    Raises:
        DataError: records cannot be graded; names file, row and reason of the first of them by row.
    """
    start = time.monotonic()
    starts = np.cumsum([0, *map(len, prompts)])
    records, checked = int(starts[-1]), 0
    faults: dict[int, str] = {}
    for place in np.random.default_rng(0).permutation(records):
        if checked and time.monotonic() - start > seconds:
            break
        number = int(np.searchsorted(starts, place, side="right")) - 1
        sample = prompts[number].without_prompt(int(place - starts[number]))
        try:
            check(sample)
        except UngradableError as error:
            faults[int(place)] = f"{sample.location}: {error}"
        checked += 1
    problems = DataProblems()
    for place in sorted(faults):
        problems.add(faults[place])
    problems.check()
    return RecordCheck(checked, records, time.monotonic() - start)
