"""Finds the records that no response can be graded against, within a time that does not grow with the data."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.sample import PromptSample
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


def check_records(check: SampleCheck, samples: Sequence[PromptSample], seconds: float) -> RecordCheck:
    """Check `samples` until `seconds` have passed, in an order that is the same each time and spread over all files.

    Raises:
        DataError: records cannot be graded; names file, row and reason of the first of them by row.
    """
    start = time.monotonic()
    order = list(range(len(samples)))
    random.Random(0).shuffle(order)
    faults: dict[int, str] = {}
    checked = 0
    for place in order:
        if checked and time.monotonic() - start > seconds:
            break
        try:
            check(samples[place])
        except UngradableError as error:
            faults[place] = f"{samples[place].location}: {error}"
        checked += 1
    problems = DataProblems()
    for place in sorted(faults):
        problems.add(faults[place])
    problems.check()
    return RecordCheck(checked, len(samples), time.monotonic() - start)
