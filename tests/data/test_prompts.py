from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import DataConfig
from rlhf_npu.data.digits import build_tokenizer
from rlhf_npu.data.prompts import PromptDataset, load_prompts
from rlhf_npu.errors import DataError

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<bos>{{ m.content }}:{% endfor %}{% if add_generation_prompt %}0{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token a character, and `<bos>` before a plain string."""
    return build_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def record(prompt: Any = "1,2", **changes: Any) -> dict[str, Any]:
    complete = {
        "prompt": prompt,
        "data_source": "digits",
        "reward_model": {"ground_truth": "3"},
        "extra_info": {"level": 1},
    }
    return {key: value for key, value in (complete | changes).items() if value is not ...}


def write_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in records))
    return str(path)


def load(tokenizer: PreTrainedTokenizerBase, *files: str, **changes: Any) -> PromptDataset:
    keys = {"max_prompt_length": 16, "max_response_length": 8, "train_batch_size": 1} | changes
    return load_prompts(files, tokenizer, DataConfig(train_files=list(files), val_files=[], **keys))


def test_json_lines(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = "\n".join([json.dumps(record("1,2")), "", json.dumps(record("3", extra_info=...))])
    (tmp_path / "a.jsonl").write_text(lines)
    other = write_lines(tmp_path / "b.json", record("4"))
    first, second, third = load(tokenizer, str(tmp_path / "a.jsonl"), other)
    assert (first.index, first.prompt_text, first.data_source) == (0, "1,2", "digits")
    assert (first.ground_truth, first.extra_info) == ("3", {"level": 1})
    assert first.prompt_ids == tuple(tokenizer("1,2")["input_ids"])
    assert first.prompt_ids[0] == tokenizer.bos_token_id
    assert (second.index, second.prompt_text, second.extra_info) == (1, "3", {})
    assert (third.index, third.prompt_text) == (2, "4")


def test_parquet(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "12"}]
    rows = [record(chat), record(chat, reward_model={"ground_truth": "9"})]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = load(chat_tokenizer, str(tmp_path / "a.parquet"))
    assert (first.prompt_text, first.ground_truth, first.extra_info) == ("<bos>12:0", "3", {"level": 1})
    assert second.ground_truth == "9"


def test_a_chat_gets_its_special_tokens_from_the_template(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    (prompt,) = load(chat_tokenizer, write_lines(tmp_path / "a.jsonl", record(messages)))
    assert prompt.prompt_text == "<bos>1:<bos>2:0"
    assert prompt.prompt_ids.count(chat_tokenizer.bos_token_id) == 2


def test_chats_and_strings_keep_their_order(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "2"}]
    path = write_lines(tmp_path / "a.jsonl", record("1"), record(chat), record(chat), record("4"))
    assert [p.prompt_text for p in load(chat_tokenizer, path)] == ["1", "<bos>2:0", "<bos>2:0", "4"]


def test_the_prompt_may_have_another_key(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record(..., question="7"))
    assert load(tokenizer, path, prompt_key="question")[0].prompt_text == "7"


def test_overlong_prompts_are_skipped_and_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record("1"), record("12345"), record("2"), record("123456"))
    prompts = load(tokenizer, path, max_prompt_length=4)
    assert [(p.index, p.prompt_text) for p in prompts] == [(0, "1"), (1, "2")]
    assert (prompts.skipped, prompts.truncated) == (2, 0)


@pytest.mark.parametrize(("side", "kept"), [("left", "2345"), ("right", "<bos>123")])
def test_overlong_prompts_are_cut_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, side: str, kept: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", record("1"), record("12345"))
    prompts = load(tokenizer, path, max_prompt_length=4, filter_overlong_prompts=False, truncation=side)
    assert [p.prompt_text for p in prompts] == ["1", kept]
    assert len(prompts[1].prompt_ids) == 4
    assert (prompts.skipped, prompts.truncated) == (0, 1)


def test_a_prompt_of_exactly_the_limit_is_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = load(tokenizer, write_lines(tmp_path / "a.jsonl", record("123")), max_prompt_length=4)
    assert (len(prompts), prompts.skipped) == (1, 0)


def test_a_dataset_can_be_sliced(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = load(tokenizer, write_lines(tmp_path / "a.jsonl", record("1"), record("2"), record("3")))
    assert [p.prompt_text for p in prompts[:2]] == ["1", "2"]
    assert len(prompts[:None]) == 3


def refuses(tokenizer: PreTrainedTokenizerBase, message: str, *files: str, **changes: Any) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        load(tokenizer, *files, **changes)


def test_a_missing_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    refuses(tokenizer, f"{tmp_path}/none.jsonl: no such file", str(tmp_path / "none.jsonl"))
    refuses(tokenizer, f"{tmp_path}: no such file", str(tmp_path))


@pytest.mark.parametrize(("name", "kind"), [("a.csv", ".csv"), ("a", "a file without a suffix")])
def test_another_kind_of_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, kind: str) -> None:
    (tmp_path / name).write_text("prompt\n")
    refuses(tokenizer, f"{name}: cannot read {kind}; use .parquet, .jsonl or .json", str(tmp_path / name))


@pytest.mark.parametrize("text", ["[\n", '{"prompt": "1"\n', "{}{}\n"])
def test_a_line_that_is_not_json(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record()) + "\n\n" + text)
    refuses(tokenizer, f"{path}:3: not JSON", str(path))


def test_bytes_that_are_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "\xff\xfe"}\n')
    refuses(tokenizer, f"{path}:1: not JSON", str(path))


def test_a_line_that_is_no_object(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record(), [record()])
    refuses(tokenizer, f"{path}:2: a list; a record is an object with a 'prompt'", path)


def test_a_broken_parquet_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    refuses(tokenizer, f"{tmp_path}/a.parquet: not a readable Parquet file", str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ...}, "no 'prompt'; the record has 'data_source', 'reward_model', 'extra_info'"),
        ({"data_source": ...}, "no 'data_source'"),
        ({"data_source": None}, "no 'data_source'"),
        ({"reward_model": ...}, "no 'reward_model'"),
        ({"reward_model": {"style": "rule"}}, "no 'reward_model.ground_truth'"),
        ({"reward_model": "3"}, "no 'reward_model.ground_truth'"),
        ({"extra_info": [1]}, "'extra_info' is [1]; it must be an object"),
    ],
)
def test_a_record_that_lacks_a_key(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", record(), record(), record(**changes))
    refuses(tokenizer, f"{path}:3: {message}", path)


def test_a_parquet_row_that_lacks_a_value(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [record(), record(data_source=None)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    refuses(tokenizer, f"{tmp_path}/a.parquet:2: no 'data_source'", str(tmp_path / "a.parquet"))


def test_a_ground_truth_may_be_null(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record(reward_model={"ground_truth": None}))
    assert load(tokenizer, path)[0].ground_truth is None


@pytest.mark.parametrize("prompt", [7, [], ["1"], [{"role": "user"}], [{"role": "user", "content": [1]}]])
def test_a_prompt_of_another_form(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase, prompt: object) -> None:
    path = write_lines(tmp_path / "a.jsonl", record(prompt))
    refuses(chat_tokenizer, f"{path}:1: 'prompt' is", path)


def test_a_chat_for_a_tokenizer_without_a_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record([{"role": "user", "content": "1"}]))
    refuses(tokenizer, "has no chat_template; use an instruction-tuned model", path)


def test_a_chat_that_the_template_refuses(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record([{"role": "system", "content": "1"}]))
    refuses(
        chat_tokenizer,
        f"{path}:1: 'prompt': the tokenizer's chat template refuses the messages: no system role",
        path,
    )


def test_a_prompt_without_tokens(tmp_path: Path) -> None:
    from tests.tiny_model import tokenizer as without_bos

    path = write_lines(tmp_path / "a.jsonl", record("1"), record(""))
    refuses(without_bos(), f"{path}:2: the prompt '' has no tokens", path)


def test_an_empty_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl")
    refuses(tokenizer, f"{path}: no prompts; a file needs at least one record", path)


def test_only_overlong_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record("12345"), record("123456"))
    message = f"{path}: all 2 prompts are longer than data.max_prompt_length=4 tokens; raise it"
    refuses(tokenizer, message, path, max_prompt_length=4)


def test_an_overlong_prompt_where_none_is_allowed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record("1"), record("12345"))
    message = f"{path}:2: 6 tokens, more than data.max_prompt_length=4; raise it"
    refuses(tokenizer, message, path, max_prompt_length=4, filter_overlong_prompts=False)
