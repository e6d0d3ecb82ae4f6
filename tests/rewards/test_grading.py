"""Reward functions of all kinds: concurrent ones, those of batches, sums of several; their limits and failures."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_npu.config import RewardConfig
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards import Graded, Response, RewardFunction, load_reward, numeric_parts
from rlhf_npu.roles.scoring import Scorer
from tests.rewards.samples import sample
from tests.tiny_model import tokenizer

FIRST = RewardConfig("digits", concurrency=8)


def load(folder: Path, source: str, **keys: Any) -> RewardFunction:
    (folder / "reward.py").write_text(source)
    return load_reward(replace(FIRST, function=f"{folder}/reward.py:score", **keys))


def responses(*texts: str) -> list[Response]:
    return [Response(text, True, sample("5", "sums", {"level": 3}, index)) for index, text in enumerate(texts)]


def scores(graded: Sequence[Graded]) -> list[float]:
    return [one.score for one in graded]


def failures(graded: Sequence[Graded]) -> list[int]:
    return [place for place, one in enumerate(graded) if one.failure is not None]


# Async functions

SLEEPER = """
import asyncio
running = most = 0

async def score(response, seconds=0.2):
    global running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(seconds)
    running -= 1
    return {"score": float(response), "most": most}
"""


def test_async_functions_run_at_the_same_time_and_as_many_as_may(tmp_path: Path) -> None:
    reward = load(tmp_path, SLEEPER)
    start = time.monotonic()
    graded = reward.grade_all(responses(*map(str, range(20))))
    assert time.monotonic() - start < 2  # one after the other: 4 s
    assert scores(graded) == list(range(20))
    assert max(one.extra_info["most"] for one in graded) == 8
    assert load(tmp_path, SLEEPER)("3", True, sample("5")) == 3.0


def test_async_objects_and_what_they_keep_between_calls(tmp_path: Path) -> None:
    source = (
        "import asyncio\n"
        "class Judge:\n"
        "    lock = None\n"
        "    async def __call__(self, response):\n"
        "        self.lock = self.lock or (asyncio.get_running_loop(), asyncio.Event())\n"
        "        assert self.lock[0] is asyncio.get_running_loop()\n"
        "        self.lock[1].set()\n"
        "        return await self.lock[1].wait()\n"
        "score = Judge()\n"
    )
    reward = load(tmp_path, source)
    assert scores(reward.grade_all(responses("a", "b"))) == [1, 1]
    assert scores(reward.grade_all(responses("c"))) == [1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('odd')", "raised ValueError: odd"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
        ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
        ("raise asyncio.CancelledError", "raised CancelledError"),
        ("raise TimeoutError('of its own')", "raised TimeoutError: of its own"),
        ("return None", "returned None; it must return a finite number"),
        ("await asyncio.sleep(60)", "took longer than reward.timeout=0.3 s"),
        ("time.sleep(60)", "took longer than reward.timeout=0.3 s"),
        ("\n        try: await asyncio.sleep(60)\n        except BaseException: return 0.0", "took longer than reward"),
    ],
)
def test_a_failing_call_costs_its_response_and_no_other(tmp_path: Path, body: str, message: str) -> None:
    source = f"import asyncio, time\nasync def score(response):\n    if response == 'b': {body}\n    return 1.0\n"
    reward = load(tmp_path, source, timeout=0.3, failed_score=-1.0)
    graded = reward.grade_all(responses("a", "b", "c"), may_fail=1)
    assert scores(graded) == [1, -1, 1]
    assert failures(graded) == [1]
    assert graded[1].failure is not None
    assert f"response 'b', it {message}" in graded[1].failure
    with pytest.raises(RewardError, match=re.escape(f"response 'b', it {message}")):
        reward.grade_all(responses("a", "b", "c"))
    assert scores(reward.grade_all(responses("a"))) == [1]


# Batches


def test_a_batch_function_gets_all_responses_at_once_by_the_names_of_verl(tmp_path: Path) -> None:
    source = (
        "def score(data_sources, solution_strs, ground_truths, extra_infos, bonus=0, **more):\n"
        "    assert data_sources == ['sums'] * 3 and ground_truths == ['5'] * 3 and extra_infos == [{'level': 3}] * 3\n"
        "    assert not more\n"
        "    return [{'score': len(text) + bonus, 'calls': 1} for text in solution_strs]\n"
    )
    graded = load(tmp_path, source, kwargs={"bonus": 10}).grade_all(responses("a", "bb", "ccc"))
    assert scores(graded) == [11, 12, 13]
    assert graded[0].extra_info == {"calls": 1}


@pytest.mark.parametrize(
    "body",
    [
        "def score(solution_strs): return tuple(map(len, solution_strs))",
        "import numpy\ndef score(solution_strs): return numpy.array([len(text) for text in solution_strs])",
        "import torch\ndef score(solution_strs): return torch.tensor([len(text) for text in solution_strs])",
        "async def score(solution_strs): return [len(text) for text in solution_strs]",
        "class Judge:\n    def __call__(self, solution_strs): return list(map(len, solution_strs))\nscore = Judge()",
    ],
)
def test_what_a_batch_function_may_be_and_return(tmp_path: Path, body: str) -> None:
    reward = load(tmp_path, body)
    assert reward.scores_batches
    assert scores(reward.grade_all(responses("a", "bb"))) == [1, 2]
    assert reward.grade_all([]) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.0", "returned 1.0; it must return a list with an item for each response"),
        ("return (1.0 for _ in solution_strs)", "it must return a list with an item for each response"),
        ("return [1.0]", "returned 1 items for 2 responses: [1.0]"),
        ("import numpy; return numpy.zeros((2, 1))", "it must return a list with an item for each response"),
        ("raise ValueError('odd')", "raised ValueError: odd"),
        ("import time; time.sleep(60)", "took longer than reward.timeout=0.3 s"),
    ],
)
def test_a_batch_function_that_fails_as_a_whole(tmp_path: Path, body: str, message: str) -> None:
    reward = load(tmp_path, f"def score(solution_strs):\n    {body}\n", timeout=0.3)
    with pytest.raises(RewardError, match=re.escape(message)):
        reward.grade_all(responses("a", "b"))
    assert failures(reward.grade_all(responses("a", "b"), may_fail=2)) == [0, 1]
    with pytest.raises(RewardError, match="allows 1 responses of a step to fail, and 2 have; the last"):
        reward.grade_all(responses("a", "b"), may_fail=1)


def test_an_async_batch_function_that_hangs(tmp_path: Path) -> None:
    source = "import asyncio\nasync def score(solution_strs):\n    await asyncio.sleep(60)\n"
    reward = load(tmp_path, source, timeout=0.3)
    with pytest.raises(RewardError, match=r"took longer than reward\.timeout=0\.3 s"):
        reward.grade_all(responses("a"))
    assert load(tmp_path, "async def score(response): return 1.0")("a", True, sample("5")) == 1.0


def test_one_item_of_a_batch_that_is_no_reward(tmp_path: Path) -> None:
    reward = load(tmp_path, "def score(solution_strs): return [1.0, float('nan'), {'score': 0.5}]")
    graded = reward.grade_all(responses("a", "b", "c"), may_fail=1)
    assert scores(graded) == [1, 0, 0.5]
    assert "prompt 1 of data source 'sums', response 'b', it returned nan" in str(graded[1].failure)


# Several functions

PARTS = """
def right(solution_str, ground_truth, bonus=0.0):
    return {"score": (solution_str == ground_truth) + bonus, "acc": solution_str == ground_truth}

async def short(response):
    return -len(response)

def score(solution_strs):
    return [{"score": 1.0, "tag": text} for text in solution_strs]
"""


def several(folder: Path, *functions: str, **keys: Any) -> RewardFunction:
    (folder / "parts.py").write_text(PARTS)
    names = [name if name == "digits" else f"{folder}/parts.py:{name}" for name in functions]
    return load_reward(replace(FIRST, function=None, functions=names, **keys))


def test_the_weighted_sum_of_several_functions_of_all_kinds(tmp_path: Path) -> None:
    keys = {"weights": [2.0, 0.5, 1.0, 4.0], "kwargs": {"bonus": 0.25}}
    graded = several(tmp_path, "right", "short", "score", "digits", **keys).grade_all(responses("5", "77"))
    assert scores(graded) == [2 * 1.25 - 0.5 + 1 + 4, 2 * 0.25 - 1 + 1 + 0]
    assert graded[0].extra_info == {
        "right": 1.25,
        "right/acc": True,
        "short": -1.0,
        "score": 1.0,
        "score/tag": "5",
        "digits": 1.0,
    }
    assert numeric_parts(graded[0].extra_info) == {
        "right": 1.25,
        "right/acc": 1.0,
        "short": -1.0,
        "score": 1.0,
        "digits": 1.0,
    }
    assert scores(several(tmp_path, "right", "score").grade_all(responses("5"))) == [2]


def test_functions_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("def right(response): return 0.0")
    (tmp_path / "parts.py").write_text(PARTS)
    names = [f"{tmp_path}/parts.py:right", f"{tmp_path}/other.py:right"]
    (graded,) = load_reward(replace(FIRST, function=None, functions=names)).grade_all(responses("5"))
    assert graded.extra_info == {"right": 1.0, "right/acc": True, "right_2": 0.0}


def test_a_keyword_argument_that_none_of_several_takes(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"reward\.kwargs\.scale: none of them has such a parameter"):
        several(tmp_path, "right", "short", kwargs={"scale": 2})
    with pytest.raises(RewardError, match=r"reward\.kwargs\.response: the run passes 'response' itself"):
        several(tmp_path, "right", "short", kwargs={"response": 2})


def test_a_response_that_one_of_several_fails_on_has_failed_once(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "def odd(response): return 1 / (response != 'b')\ndef also(response): return odd(response)"
    )
    names = [f"{tmp_path}/odd.py:odd", "digits", f"{tmp_path}/odd.py:also"]
    reward = load_reward(replace(FIRST, function=None, functions=names, failed_score=-3.0))
    graded = reward.grade_all(responses("a", "b"), may_fail=1)
    assert scores(graded) == [2, -3]
    assert failures(graded) == [1]
    with pytest.raises(RewardError, match=r"reward\.functions: .*odd\.py:odd: on prompt 1 .*ZeroDivisionError"):
        reward.grade_all(responses("a", "b"))


def test_a_reward_models_scores_are_a_part_and_fail_as_a_functions_do(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(PARTS)
    config = replace(FIRST, function=f"{tmp_path}/parts.py:right", failed_score=-1.0)
    said = [Graded(2.0), Graded(math.nan), Graded(0.0, failure="it is too long")]
    pairs = zip(responses("5", "5", "7"), said, strict=True)
    scored = [replace(response, by_model=graded) for response, graded in pairs]
    graded = load_reward(config, model_weight=0.5).grade_all(scored, may_fail=2)
    assert scores(graded) == [1 + 0.5 * 2, -1, -1]
    assert graded[0].extra_info == {"right": 1.0, "right/acc": True, "reward_model": 2.0}
    assert "response '5': the score is nan" in str(graded[1].failure)
    assert "response '7': it is too long" in str(graded[2].failure)
    with pytest.raises(RewardError, match=r"reward_model: on prompt 1 .*the score is nan"):
        load_reward(config, model_weight=0.5).grade_all(scored)
    (alone,) = load_reward(replace(FIRST, function=None), model_weight=1.0).grade_all(scored[:1])
    assert (alone.score, alone.extra_info) == (2.0, {"reward_model": 2.0})


def test_the_weight_of_a_single_function_counts(tmp_path: Path) -> None:
    (graded,) = several(tmp_path, "right", weights=[0.25]).grade_all(responses("5"))
    assert (graded.score, graded.extra_info) == (0.25, {"right": 1.0, "right/acc": True})


def test_a_sum_that_no_float_holds(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text("def large(response): return 3e38")
    reward = load_reward(
        replace(FIRST, function=None, functions=[f"{tmp_path}/large.py:large", "digits"], weights=[10.0, 1.0])
    )
    with pytest.raises(RewardError, match=r"reward\.weights=\[10\.0, 1\.0\]: the weighted sum of .* finite number"):
        reward.grade_all(responses("5"))


# Ordinary functions


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "\n        while True: pass",
        "threading.Event().wait()",
        "subprocess.run(['sleep', '60'])",
        "re.fullmatch('(a|aa)+b', 'a' * 100)",
        "\n        try: time.sleep(60)\n        except Exception: return 0.0",
        "\n        try: time.sleep(60)\n        except BaseException: return 0.0",
        "\n        try: time.sleep(60)\n        except BaseException: raise ValueError",
        "\n        signal.signal(signal.SIGALRM, lambda *_: None); signal.alarm(0); time.sleep(60)",
    ],
)
def test_a_call_that_takes_too_long_is_interrupted(tmp_path: Path, body: str) -> None:
    imports = "import re, signal, subprocess, threading, time"
    source = f"{imports}\ndef score(response):\n    if response == 'b': {body}\n    return 1.0\n"
    start = time.monotonic()
    graded = load(tmp_path, source, timeout=0.3).grade_all(responses("a", "b", "c"), may_fail=1)
    assert time.monotonic() - start < 10
    assert scores(graded) == [1, 0, 1]
    assert "response 'b', it took longer than reward.timeout=0.3 s" in str(graded[1].failure)


def test_each_call_has_the_whole_time(tmp_path: Path) -> None:
    reward = load(tmp_path, "import time\ndef score(response): return time.sleep(0.3) is None", timeout=0.6)
    assert scores(reward.grade_all(responses("a", "b", "c", "d"))) == [1] * 4


def test_no_limit(tmp_path: Path) -> None:
    reward = load(tmp_path, "import time\ndef score(response): return time.sleep(0.2) is None", timeout=None)
    assert scores(reward.grade_all(responses("a"))) == [1]


def test_a_scorer_allows_a_share_of_the_responses_of_all_ranks(tmp_path: Path) -> None:
    source = "def score(solution_str):\n    if solution_str == '9': raise ValueError\n    return 1.0\n"
    reward = load(tmp_path, source, max_failed_ratio=0.25)
    ids = {text: tuple(tokenizer()(text)["input_ids"]) for text in "39"}
    choices = [Completion(ids[text], (0.0,), finished=True) for text in "3939"]
    with pytest.raises(RewardError, match=r"max_failed_ratio=0\.25 allows 1 responses of a step to fail, and 2 have"):
        Scorer(reward, tokenizer(), 0.25, ranks=1).score([sample("3")], [choices], step=1)
    lines = Scorer(reward, tokenizer(), 0.25, ranks=2).score([sample("3")], [choices], step=1)
    assert [line.score for line in lines] == [1, 0, 1, 0]
    assert [line.failed is None for line in lines] == [True, False, True, False]
