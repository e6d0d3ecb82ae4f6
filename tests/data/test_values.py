"""Values of records as JSON has them."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_npu.data.values import json_form


class Awkward:
    def __repr__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (None, None),
        (True, True),
        ("é", "é"),
        (3, 3),
        (10**30, 10**30),
        pytest.param(1 << 20000, hex(1 << 20000), id="more digits than Python writes"),
        (0.5, 0.5),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (Decimal("0.90"), "0.90"),
        (Fraction(1, 3), "1/3"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), "2026-01-02T03:04:05+00:00"),
        (datetime.time(3, 4), "03:04:00"),
        (datetime.timedelta(seconds=2), "0:00:02"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (b"text", "text"),
        (b"\xff\x00", "ff00"),
        ((1, [2, {3}]), [1, [2, [3]]]),
        (frozenset("ba"), ["a", "b"]),
        ({1: 2, None: 3, (4, 5): 6, b"k": 7}, {"1": 2, "None": 3, "[4, 5]": 6, "k": 7}),
        (OrderedDict(a=Decimal(1)), {"a": "1"}),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([[1, 2]]), [[1, 2]]),
        (np.array([Decimal("0.9"), None], dtype=object), ["0.9", None]),
        (np.datetime64("2026-01-02"), "2026-01-02"),
        (torch.tensor(2), 2),
        (torch.tensor([0.5], requires_grad=True), [0.5]),
        (Awkward(), "<Awkward whose repr raises ValueError>"),
        (len, "<built-in function len>"),
    ],
)
def test_every_value_has_a_form(value: Any, form: Any) -> None:
    assert json_form(value) == form
    json.dumps(json_form({"value": [value]}), allow_nan=False)


def test_a_value_that_holds_itself_ends() -> None:
    endless: list[Any] = [1]
    endless.append(endless)
    text = json.dumps(json_form(endless))
    assert text.startswith("[1, [1, ")
    assert '"..."' in text
