from __future__ import annotations

import pytest

from rlhf_npu.rewards.digits import score
from tests.rewards.samples import sample


@pytest.mark.parametrize(
    ("response", "finished", "right"),
    [
        ("3,4,5", True, 6),
        ("3,4,5", False, 5),
        ("3,4", True, 3),
        ("3,4", False, 3),
        ("3,4,5,6", True, 5),
        ("3,9,5", True, 2),
        ("9,4,5", True, 0),
        ("", True, 0),
        ("", False, 0),
    ],
)
def test_tokens_count_until_the_first_miss(response: str, finished: bool, right: int) -> None:
    assert score(response, finished, sample("3,4,5")) == pytest.approx(right / 6)
