from __future__ import annotations

import math
import pickle
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_npu.config import RewardConfig, reward
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards import BUILTIN_REWARDS, RewardFunction, load_reward
from tests.rewards.samples import sample

SOURCE = """
from dataclasses import dataclass

@dataclass
class Length:
    target: int

    def __call__(self, response, finished, sample):
        return -abs(len(response) - self.target)

short = Length(2)
answer = 42

def returns(response, finished, sample, value=1.0):
    return value

def raises(response, finished, sample):
    return {}["no such key"]
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(SOURCE)
    return path


def returning(source: Path, value: Any) -> RewardFunction:
    return load_reward(RewardConfig(f"{source}:returns", {"value": value}))


@pytest.mark.parametrize("name", sorted({*BUILTIN_REWARDS, *reward.BUILTIN_REWARDS}))
def test_builtins_are_what_the_configuration_offers(name: str) -> None:
    assert name in reward.BUILTIN_REWARDS
    assert callable(load_reward(RewardConfig(name)))


def test_a_function_in_a_file(source: Path) -> None:
    assert load_reward(RewardConfig(f"{source}:returns"))("x", True, sample("1")) == 1.0
    assert returning(source, 0.25)("x", True, sample("1")) == 0.25


def test_an_object_in_a_file_that_can_be_pickled(source: Path) -> None:
    reward = pickle.loads(pickle.dumps(load_reward(RewardConfig(f"{source}:short"))))
    assert reward("xyz", True, sample("1")) == -1.0


def test_a_function_in_a_module() -> None:
    reward = load_reward(RewardConfig("rlhf_npu.rewards.digits:score"))
    assert reward("1", True, sample("1")) == 1.0


@pytest.mark.parametrize("value", [1, True, 0.5, Fraction(1, 2), np.float32(0.5), np.int64(2), -3])
def test_any_finite_number_becomes_a_float(source: Path, value: Any) -> None:
    reward = returning(source, value)("x", True, sample("1"))
    assert type(reward) is float
    assert reward == float(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1.0", [1.0], 1j])
def test_anything_else_is_refused(source: Path, value: Any) -> None:
    message = f"returned {value!r}; it must return a finite number"
    with pytest.raises(RewardError, match=re.escape(message)):
        returning(source, value)("x", True, sample("1"))


def test_a_function_that_raises_is_named_with_its_sample(source: Path) -> None:
    reward = load_reward(RewardConfig(f"{source}:raises"))
    with pytest.raises(RewardError) as caught:
        reward("long " * 100, True, sample("1", data_source="gsm8k", index=17))
    message = str(caught.value)
    assert f"reward.function={source}:raises: on prompt 17 of data source 'gsm8k'" in message
    assert "KeyError: 'no such key'" in message
    assert "long long" in message
    assert len(message) < 600
    assert isinstance(caught.value.__cause__, KeyError)
    assert caught.value.__cause__.__traceback__ is not None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("digit", "must be digits, math_verify, reasoning_gym, path/to/file.py:name, package.module:name or http"),
        ("{folder}/none.py:score", "none.py is no file"),
        ("{file}:scores", "has no function 'scores'"),
        ("{file}:answer", "has no function 'answer'"),
        ("{folder}/broken.py:score", "broken.py: ZeroDivisionError: division by zero"),
        ("{folder}/syntax.py:score", "syntax.py: SyntaxError"),
        ("no_such_package.rewards:score", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("rlhf_npu.rewards.digits:scores", "rlhf_npu.rewards.digits has no function 'scores'"),
    ],
)
def test_a_function_that_cannot_be_found(source: Path, function: str, message: str) -> None:
    (source.parent / "broken.py").write_text("1 / 0\n")
    (source.parent / "syntax.py").write_text("def score(:\n")
    name = function.format(file=source, folder=source.parent)
    with pytest.raises(RewardError, match=re.escape(message)) as caught:
        load_reward(RewardConfig(name))
    assert f"reward.function={name}" in str(caught.value)


def test_keyword_arguments_that_the_function_does_not_take(source: Path) -> None:
    message = r"reward\.kwargs\.scale: it has no such parameter; it has finished, response, sample, value"
    with pytest.raises(RewardError, match=message):
        load_reward(RewardConfig(f"{source}:returns", {"scale": 2}))
