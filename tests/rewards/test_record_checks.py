"""Records that cannot be graded are found at the start, in a bounded time."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest

from rlhf_npu.data.prompt_files import PromptDataset
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.errors import DataError
from rlhf_npu.rewards import UngradableError, load_sample_check
from rlhf_npu.rewards.record_checks import SampleCheck, check_records
from tests.prompt_data import dataset_of
from tests.rewards.samples import sample


def samples(*ground_truths: object) -> list[PromptSample]:
    return [replace(sample(truth), file="prices.jsonl", row=row) for row, truth in enumerate(ground_truths, start=1)]


def records(*ground_truths: object) -> list[PromptDataset]:
    return [dataset_of(samples(*ground_truths))]


def check_of(name: str) -> SampleCheck:
    return load_sample_check(name)


def test_ground_truths_that_can_be_graded() -> None:
    result = check_records(check_of("math_verify"), records(r"\$0.90", "50%", "72", 72, "x = 5"), 60)
    assert (result.checked, result.records) == (5, 5)
    assert re.fullmatch(r"checked 5 of 5 ground truths in \d+\.\d s", str(result))


def test_those_that_cannot_be_are_named_with_their_rows() -> None:
    with pytest.raises(DataError) as caught:
        check_records(check_of("math_verify"), records("1", "", "3", None, ["5"]), 60)
    assert str(caught.value).splitlines() == [
        "the data has 3 problems:",
        "  prices.jsonl:2: the ground truth '' is no mathematical expression",
        "  prices.jsonl:4: the ground truth None is no mathematical expression; it must be text or a number",
        "  prices.jsonl:5: the ground truth ['5'] is no mathematical expression; it must be text or a number",
    ]


def test_a_ground_truth_of_digits_that_is_no_text() -> None:
    with pytest.raises(DataError, match=r"prices\.jsonl:1: the ground truth 5 is no string of digits"):
        check_records(check_of("digits"), records(5), 60)


def test_an_entry_that_its_verifier_cannot_read() -> None:
    with pytest.raises(DataError, match=r"prices\.jsonl:1: reasoning-gym has no task 'test'"):
        check_records(check_of("reasoning_gym"), [dataset_of([replace(samples("5")[0], extra_info={"entry": {}})])], 60)


def test_the_time_is_bounded_and_spread_over_the_data() -> None:
    seen: list[int] = []

    def slow(record: PromptSample) -> None:
        seen.append(record.row)
        time.sleep(0.01)

    many = records(*range(10_000))
    result = check_records(slow, many, seconds=0.5)
    assert 5 < result.checked < 100
    assert result.records == 10_000
    assert min(seen) < 3000 < 7000 < max(seen)
    before, seen = seen, []
    check_records(slow, many, seconds=0.2)
    assert seen[:5] == before[:5]


def test_no_more_problems_are_listed_than_a_person_reads() -> None:
    def refuse(record: PromptSample) -> None:
        raise UngradableError("no")

    with pytest.raises(DataError) as caught:
        check_records(refuse, records(*range(1500)), 60)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data has 1,500 problems:"
    assert lines[1:11] == [f"  prices.jsonl:{row}: no" for row in range(1, 11)]
    assert lines[11:] == ["  and 1,490 more"]
