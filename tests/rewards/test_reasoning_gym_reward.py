from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_npu.config import RewardConfig
from rlhf_npu.data.reasoning_gym import make_entries
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.rewards import UngradableError, load_reward
from rlhf_npu.rewards.reasoning_gym import check_sample, score
from tests.rewards.samples import sample


def chain_sum(answer_tags: bool) -> PromptSample:
    """A sum whose answer is 8, after a trip through JSON as in a prompt file."""
    entry: dict[str, Any] = {"question": "3 + 5 =", "answer": "8", "metadata": {"expression": "3 + 5"}}
    extra_info = json.loads(json.dumps({"entry": entry, "answer_tags": answer_tags}))
    return sample("8", "chain_sum", extra_info)


@pytest.mark.parametrize(
    ("response", "tagged", "plain"),
    [
        ("<answer>8</answer>", 1.0, 1.0),
        ("I think <answer>5</answer>, no: <answer> 8.0 </answer>", 1.0, 1.0),
        ("<answer>9</answer>", 0.0, 0.0),
        ("<answer>8 apples</answer>", 0.125, 0.125),
        ("8", 0.0, 1.0),
        (" 8\n", 0.0, 1.0),
        ("9", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_right_and_wrong_answers(response: str, tagged: float, plain: float) -> None:
    assert score(response, True, chain_sum(answer_tags=True)) == pytest.approx(tagged)
    assert score(response, True, chain_sum(answer_tags=False)) == pytest.approx(plain)


@pytest.mark.parametrize("task", ["leg_counting", "basic_arithmetic", "spell_backward", "gcd", "letter_counting"])
def test_the_tasks_own_answers_are_right(task: str) -> None:
    for entry in make_entries(task, size=3, seed=0):
        kept = json.loads(json.dumps(entry))
        prompt = sample(entry["answer"], task, {"entry": kept})
        assert score(f"<answer>{entry['answer']}</answer>", True, prompt) == 1.0
        assert score("<answer>nothing of the kind</answer>", True, prompt) < 0.5


@pytest.mark.parametrize(
    ("data_source", "extra_info", "message"),
    [
        ("chain_sum", {}, "no extra_info.entry"),
        ("chain_sum", {"entry": "3 + 5"}, "no extra_info.entry"),
        ("chain_sum", {"entry": {"question": "3 + 5"}}, "the verifier of 'chain_sum' fails .*KeyError: 'answer'"),
        ("gsm8k", {"entry": {}}, "reasoning-gym has no task 'gsm8k'"),
    ],
)
def test_a_record_of_another_origin(data_source: str, extra_info: dict[str, Any], message: str) -> None:
    with pytest.raises(UngradableError, match=message):
        check_sample(sample("1", data_source, extra_info))


def test_a_record_of_a_task() -> None:
    check_sample(chain_sum(answer_tags=True))


def test_a_response_to_a_record_of_another_origin_gets_nothing() -> None:
    graded = load_reward(RewardConfig("reasoning_gym")).grade("<answer>1</answer>", True, sample("1", "chain_sum"))
    assert graded.score == 0.0
    assert "no extra_info.entry" in str(graded.ungradable)
