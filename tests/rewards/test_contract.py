"""What a reward function may take, return and raise."""

from __future__ import annotations

import math
import re
import signal
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_npu.config import RewardConfig
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards import RewardFunction, UngradableError, load_reward
from rlhf_npu.rewards.contract import ContractError, arguments_taken, as_graded
from tests.rewards.samples import sample

RECORD = sample("5", "sums", {"level": 3})
NAMES = "arguments are passed by name, and there are response, finished, sample, prompt, solution_str, data_source, "


def load(tmp_path: Path, source: str, **kwargs: Any) -> RewardFunction:
    path = tmp_path / "reward.py"
    path.write_text(source)
    return load_reward(RewardConfig(f"{path}:score", kwargs))


@pytest.mark.parametrize(
    "source",
    [
        # verl's signature, the one of its recipes, and the order of arguments turned round
        (
            "def score(data_source, solution_str, ground_truth, extra_info=None):\n"
            "    return (data_source, solution_str, ground_truth, extra_info) == ('sums', '7', '5', {'level': 3})"
        ),
        (
            "def score(solution_str, ground_truth, method='strict', format_score=0.0, score=1.0):\n"
            "    return score * ((solution_str, ground_truth, method) == ('7', '5', 'strict'))"
        ),
        (
            "def score(ground_truth, solution_str, **kwargs):\n"
            "    return (solution_str, ground_truth, kwargs['finished']) == ('7', '5', True)"
        ),
        # ours
        "def score(response, finished, sample): return (response, finished, sample.ground_truth) == ('7', True, '5')",
        "def score(sample, response): return (response, sample.ground_truth) == ('7', '5')",
        "def score(prompt, response): return (prompt, response) == ('1', '7')",
        "def score(*, response): return response == '7'",
        "def score(**everything): return everything['response'] == '7' and everything['extra_info'] == {'level': 3}",
        "def score(*nothing, response): return response == '7' and not nothing",
        "score = lambda response, ground_truth: (response, ground_truth) == ('7', '5')",
        # objects, partial functions, methods, decorated functions
        "class Judge:\n    def __call__(self, solution_str, ground_truth): return solution_str == '7'\nscore = Judge()",
        "class Judge:\n    def grade(self, response): return response == '7'\nscore = Judge().grade",
        "from functools import partial\ndef judge(a, response): return response == a\nscore = partial(judge, '7')",
        (
            "from functools import partial\n"
            "def judge(response, ground_truth): return ground_truth == 'mine'\n"
            "score = partial(judge, ground_truth='mine')"
        ),
        (
            "import functools\n"
            "def logged(function):\n"
            "    @functools.wraps(function)\n"
            "    def call(*args, **kwargs): return function(*args, **kwargs)\n"
            "    return call\n"
            "@logged\n"
            "def score(solution_str, ground_truth): return (solution_str, ground_truth) == ('7', '5')"
        ),
    ],
)
def test_arguments_are_bound_by_their_names(tmp_path: Path, source: str) -> None:
    assert load(tmp_path, source)("7", True, RECORD) == 1.0


def test_kwargs_come_beside_them(tmp_path: Path) -> None:
    reward = load(tmp_path, "def score(scale, response, offset=0): return scale * len(response) + offset", scale=2)
    assert reward("xyz", True, RECORD) == 6.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def score(response, tokenizer): pass", "its parameter 'tokenizer' is not among what it could get; " + NAMES),
        ("def score(text, truth): pass", "its parameter 'text' is not among"),
        (
            "def score(response, answer): pass",
            "its parameter 'answer' is not among what it could get; here it is ground",
        ),
        ("def score(response, answer=None): pass", "its parameter 'answer' is not among"),
        (
            "def score(prompts, completions, **kwargs): pass",
            "'prompts' is that of a function that scores whole batches",
        ),
        (
            "def score(completions, answer, **kwargs): pass",
            "'completions' is that of a function that scores whole batch",
        ),
        (
            "def score(completions=None, **kwargs): pass",
            "'completions' is that of a function that scores whole batches",
        ),
        ("def score(queries, prompts, labels): pass", "'queries' is that of a function that scores whole batches"),
        ("def score(response, /, ground_truth): pass", "its parameter 'response' takes no name"),
        ("def score(*arguments): pass", "it takes none of the arguments that it could score by"),
        ("def score(): return 1.0", "it takes none of the arguments that it could score by"),
        ("def score(scale=1.0): return scale", "it takes none of the arguments that it could score by"),
        (
            "def score(solution_strs, response): pass",
            "solution_strs, ground_truths, extra_infos say, and its parameter 'response' is of one response",
        ),
        ("def score(solution_strs, tokenizer): pass", "its parameter 'tokenizer' is not among"),
        ("def score(solution_strs, completions=None): pass", "'completions' is that of a function that scores whole"),
        ("def score(response): yield 1.0", "it is a generator function"),
        ("async def score(response): yield 1.0", "it is a generator function"),
        ("class score:\n    def __init__(self, response): pass", "it is a class; make an object of it"),
        ("score = print", "it takes none of the arguments"),
        ("score = len", "its parameter 'obj' takes no name"),
        ("score = dict.fromkeys", "takes no name"),
        ("score = max", "the names of its parameters cannot be read"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(RewardError, match=re.escape(message)) as caught:
        load(tmp_path, source)
    assert f"reward.function={tmp_path}/reward.py:score: " in str(caught.value)


def test_what_the_run_passes_cannot_be_set(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"reward\.kwargs\.ground_truth: the run passes 'ground_truth' itself"):
        load(tmp_path, "def score(response, ground_truth): pass", ground_truth="5")
    with pytest.raises(RewardError, match=r"reward\.kwargs\.extra_infos: the run passes 'extra_infos' itself"):
        load(tmp_path, "def score(solution_strs, extra_infos): pass", extra_infos=[])


def test_a_name_used_elsewhere_may_be_an_argument_of_ones_own() -> None:
    assert arguments_taken(lambda response, target=1: 0.0, {"target": 2}) == ("response",)


class Awkward:
    """Something whose text and representation fail."""

    def __repr__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (1, 1.0),
        (True, 1.0),
        (-0.5, -0.5),
        (10**30, 1e30),
        (Fraction(1, 4), 0.25),
        (Decimal("0.25"), 0.25),
        (np.float16(0.5), 0.5),
        (np.int8(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (torch.tensor(True), 1.0),
        ({"score": 0.5, "acc": True}, 0.5),
        ({"score": torch.tensor(1)}, 1.0),
    ],
)
def test_numbers_of_all_kinds_are_rewards(value: Any, score: float) -> None:
    graded = as_graded(value)
    assert type(graded.score) is float
    assert graded.score == score


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned None; it must return a finite number"),
        ("1.0", "returned '1.0'; it must return a finite number"),
        (math.nan, "returned nan; it must return a finite number of at most 3.4e+38"),
        (-math.inf, "returned -inf; it must return a finite number"),
        (np.float32("inf"), "it must return a finite number"),
        (torch.tensor(math.nan), "returned tensor(nan); it must return a finite number"),
        (Decimal("NaN"), "returned Decimal('NaN'); it must"),
        (Decimal("sNaN"), "returned Decimal('sNaN'); it must"),
        (Decimal("1e400"), "it must return a finite number"),
        (1e300, "returned 1e+300; it must return a finite number of at most 3.4e+38"),
        (10**400, "it must return a finite number of at most"),
        pytest.param(
            10**5000, "whose repr raises ValueError>; it must return a finite", id="more digits than Python writes"
        ),
        (1j, "returned 1j; it must return a finite number"),
        (torch.tensor([0.5]), "and this has the shape torch.Size([1])"),
        (np.zeros((2, 1)), "and this has the shape (2, 1)"),
        ((0.5, "because"), "or a dict with a 'score' if there is more to tell"),
        ([0.5], "or a dict with a 'score' if there is more to tell"),
        ({"reward": 0.5}, "or a dict with a 'score'"),
        ({"score": None}, "returned {'score': None}; it must return a finite number"),
        ((1.0 for _ in "x"), "not something to wait for or to go through"),
        (Awkward(), "returned <Awkward whose repr raises ValueError>; it must"),
    ],
)
def test_anything_else_is_none(value: Any, message: str) -> None:
    with pytest.raises(ContractError, match=re.escape(message)):
        as_graded(value)


def test_what_a_dict_holds_beside_its_score_is_kept(tmp_path: Path) -> None:
    reward = load(tmp_path, "def score(response): return {'score': 1, 'acc': True, 3: response}")
    assert reward.grade("x", True, RECORD).extra_info == {"acc": True, "3": "x"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit('no key')", "raised SystemExit: no key"),
        ("exit()", "raised SystemExit"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("raise GeneratorExit", "raised GeneratorExit"),
        ("return float(10**400)", "raised OverflowError: int too large to convert to float"),
        ("raise ValueError('one\\ntwo')", "raised ValueError: one two"),
        (r"raise ValueError('\ud800\x1b[0m')", r"raised ValueError: \ud800\x1b[0m"),
        (
            "class E(Exception):\n        def __str__(self): 1/0\n    raise E",
            "raised E: (its text raises ZeroDivisionErro",
        ),
        ("return score(response)", "raised RecursionError: "),
        ("raise MemoryError", "raised MemoryError"),
        ("import torch; return torch.zeros(1, device='meta').sum()", "raised RuntimeError: Tensor.item() cannot"),
    ],
)
def test_whatever_it_raises_names_the_function(tmp_path: Path, body: str, message: str) -> None:
    reward = load(tmp_path, f"def score(response):\n    {body}")
    with pytest.raises(RewardError, match=re.escape(f"response 'xyz', it {message}")) as caught:
        reward("xyz", True, RECORD)
    assert f"reward.function={tmp_path}/reward.py:score: on prompt 0 of data source 'sums'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_that_it_cannot_grade(tmp_path: Path) -> None:
    source = "from rlhf_npu.rewards import UngradableError\ndef score(response):\n    raise UngradableError('no unit')"
    graded = load(tmp_path, source).grade("x", True, RECORD)
    assert (graded.score, graded.ungradable) == (0.0, "no unit")
    assert issubclass(UngradableError, ValueError)


def test_exits_at_import_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"cannot import .*reward\.py: SystemExit: no key"):
        load(tmp_path, "import sys; sys.exit('no key')")


def test_ctrl_c_while_a_file_is_imported_is_no_fault_of_the_file(tmp_path: Path) -> None:
    timer = threading.Timer(0.3, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path, "import time; time.sleep(20)")
    timer.join()


def test_a_partial_function_of_a_builtin_may_be_named() -> None:
    scored: Callable[..., Any] = partial(lambda ground_truth, response: ground_truth == response, "5")
    assert arguments_taken(scored, {}) == ("response",)
