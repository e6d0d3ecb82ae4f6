from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_npu.data.chain_sum import ChainSum, prepare
from rlhf_npu.data.reasoning_gym import PromptStyle, make_entries, write_prompts
from rlhf_npu.errors import DataError


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def question(record: dict) -> str:
    return str(record["prompt"][-1]["content"])


def test_chain_sum_as_it_comes(tmp_path: Path) -> None:
    folder = prepare(tmp_path / "chain_sum")
    train, val = records(folder / "train.jsonl"), records(folder / "val.jsonl")
    assert (len(train), len(val)) == (2000, 100)
    held_out = {question(record) for record in val}
    assert len(held_out) == 100
    assert held_out.isdisjoint(question(record) for record in train)
    first = train[0]
    assert [message["role"] for message in first["prompt"]] == ["user", "assistant"] * 2 + ["user"]
    assert first["data_source"] == "chain_sum"
    assert first["reward_model"]["ground_truth"] == first["extra_info"]["entry"]["answer"]
    examples = {message["content"] for message in first["prompt"][:-1] if message["role"] == "user"}
    assert examples.isdisjoint(question(record) for record in train + val)


def test_chain_sum_can_be_harder(tmp_path: Path) -> None:
    task = ChainSum(train_size=20, val_size=5, min_terms=4, max_terms=4, min_digits=3, max_digits=3)
    folder = prepare(tmp_path / "hard", task)
    metadata = [record["extra_info"]["entry"]["metadata"] for record in records(folder / "train.jsonl")]
    assert {(entry["num_terms"], entry["num_digits"]) for entry in metadata} == {(4, 3)}
    again = prepare(tmp_path / "again", task)
    assert (again / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()
    other = prepare(tmp_path / "other", replace(task, seed=1))
    assert (other / "train.jsonl").read_bytes() != (folder / "train.jsonl").read_bytes()


def test_too_few_different_sums_are_refused(tmp_path: Path) -> None:
    task = ChainSum(train_size=10, val_size=300, max_terms=2)
    with pytest.raises(DataError, match="300 held-out"):
        prepare(tmp_path / "few", task)
    assert list(tmp_path.iterdir()) == []


def test_any_task_with_tags_and_a_system_prompt(tmp_path: Path) -> None:
    entries = make_entries("leg_counting", size=3, seed=1, max_animals=4)
    write_prompts(tmp_path / "a.jsonl", "leg_counting", entries, PromptStyle("Be brief."), entries[:1])
    (first, *_) = records(tmp_path / "a.jsonl")
    assert [message["role"] for message in first["prompt"]] == ["system", "user", "assistant", "user"]
    assert first["prompt"][2]["content"] == f"<answer>{entries[0]['answer']}</answer>"
    assert first["extra_info"]["answer_tags"] is True


def test_an_unknown_task() -> None:
    with pytest.raises(DataError, match=r"no task 'chain_sums'; it has .*chain_sum"):
        make_entries("chain_sums", size=1, seed=0)


@pytest.mark.parametrize("config", [{"min_terms": 0}, {"terms": 2}])
def test_a_configuration_that_the_task_refuses(config: dict[str, int]) -> None:
    with pytest.raises(DataError, match="'chain_sum' refuses"):
        make_entries("chain_sum", size=1, seed=0, **config)


def test_an_entry_that_json_cannot_hold(tmp_path: Path) -> None:
    entry = {"question": "1", "answer": "2", "metadata": {"graph": {1, 2}}}
    with pytest.raises(DataError, match="'graphs' cannot be kept as JSON"):
        write_prompts(tmp_path / "a.jsonl", "graphs", [entry], PromptStyle())
