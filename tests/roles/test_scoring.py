"""Scores of responses, and the file that people read them in."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from rlhf_npu.config import RewardConfig
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.errors import RewardError, WorkerError
from rlhf_npu.rewards import load_reward
from rlhf_npu.roles.scoring import ScoredResponse, Scorer, write_responses
from tests.rewards.samples import sample
from tests.tiny_model import tokenizer

SOURCE = """
from rlhf_npu.rewards import UngradableError

def score(solution_str, ground_truth):
    if ground_truth is None:
        raise UngradableError("no answer is known")
    if solution_str == "9":
        raise ValueError("an odd response")
    return {"score": solution_str == str(ground_truth), "seen": {solution_str}}
"""


@pytest.fixture
def scorer(tmp_path: Path) -> Scorer:
    (tmp_path / "reward.py").write_text(SOURCE)
    return Scorer(load_reward(RewardConfig(f"{tmp_path}/reward.py:score")), tokenizer())


def completion(text: str) -> Completion:
    ids = tuple(tokenizer()(text)["input_ids"])
    return Completion(token_ids=ids, log_probs=(0.0,) * len(ids), finished=True)


def lines_of(responses: list[ScoredResponse], path: Path) -> list[dict[str, Any]]:
    write_responses(responses, path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_responses_are_scored_and_written(scorer: Scorer, tmp_path: Path) -> None:
    prompts = [sample("3"), sample(None, "unknown", index=1)]
    answers = [[completion("3"), completion("4")], [completion("5"), completion("6")]]
    responses = scorer.score(prompts, answers, step=2)
    first, second, third, _ = lines_of(responses, tmp_path / "folder" / "a.jsonl")
    assert first == {
        "step": 2,
        "data_source": "test",
        "prompt": "1",
        "response": "3",
        "ground_truth": "3",
        "score": 1.0,
        "finished": True,
        "reward_extra_info": {"seen": ["3"]},
        "ungradable": None,
        "failed": None,
    }
    assert (second["score"], third["score"], third["ungradable"]) == (0.0, 0.0, "no answer is known")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["a.jsonl"]


def test_one_odd_response_names_itself(scorer: Scorer) -> None:
    with pytest.raises(RewardError, match=r"on prompt 0 .*response '9', it raised ValueError: an odd response"):
        scorer.score([sample("3")], [[completion("3"), completion("9")]], step=1)


@pytest.mark.parametrize(
    ("ground_truth", "written"),
    [
        (Decimal("0.90"), "0.90"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        ({"raw": b"\xff", "when": [datetime.datetime(2026, 1, 2, 3)]}, {"raw": "ff", "when": ["2026-01-02T03:00:00"]}),
        ([("key", float("nan"))], [["key", "nan"]]),
        ("\ud800 and 大", "\ud800 and 大"),
    ],
)
def test_ground_truths_that_json_lacks(scorer: Scorer, tmp_path: Path, ground_truth: Any, written: Any) -> None:
    responses = scorer.score([sample(ground_truth)], [[completion("3")]], step=1)
    (line,) = lines_of(responses, tmp_path / "a.jsonl")
    assert line["ground_truth"] == written


def test_a_folder_that_cannot_be_written(scorer: Scorer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkerError, match=r"cannot write .*/file/a\.jsonl: (File exists|Not a directory)"):
        write_responses([], tmp_path / "file" / "a.jsonl")
