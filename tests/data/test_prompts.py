from __future__ import annotations

import datetime
import json
import math
import pickle
import random
import re
import threading
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from filelock import FileLock
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_npu.config import DataConfig
from rlhf_npu.data import prompts as prompts_module
from rlhf_npu.data import tokenizing
from rlhf_npu.data.digits import build_tokenizer
from rlhf_npu.data.loader import Position, PromptLoader
from rlhf_npu.data.prompt_files import PromptBlock, prompt_block, write_prompts
from rlhf_npu.data.prompts import PromptDataset, PromptSample, load_prompts
from rlhf_npu.data.values import json_form
from rlhf_npu.errors import DataError

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<bos>{{ m.content }}:{% endfor %}{% if add_generation_prompt %}0{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_NPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


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
        f"{path}:1: 'prompt': the tokenizer's chat template refuses the messages: TemplateError: no system role",
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  \n"}, r"the prompt '  \n' has no tokens other than white space"),
        ({"prompt": "1\ud800"}, r"'prompt' has '\ud800' at character 1, half of a surrogate pair; remove it"),
        ({"data_source": ""}, "'data_source' is ''; it must be a name of printable characters, such as gsm8k"),
        ({"data_source": "a\nb"}, r"'data_source' is 'a\nb'; it must be a name"),
        ({"data_source": "\ud800"}, r"'data_source' is '\ud800'; it must be a name"),
        ({"data_source": ["a"]}, "'data_source' is ['a']; it must be a name"),
        ({"data_source": True}, "'data_source' is True; it must be a name"),
        ({"reward_model": {"ground_truth": math.nan}}, "not JSON (JSON has no NaN, only null)"),
        ({"extra_info": {"score": -math.inf}}, "not JSON (JSON has no -Infinity, only null)"),
        ({"reward_model": {"ground_truth": "\ud800"}}, r"'reward_model.ground_truth' has '\ud800' at character 0"),
        ({"reward_model": "3"}, "no 'reward_model.ground_truth'"),
        ({"extra_info": {"deep": nested(90)}}, "'extra_info' is nested"),
    ],
)
def test_a_record_with_a_value_that_cannot_be_used(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, changes: dict[str, Any], message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", record(), record(**changes))
    refuses(tokenizer, f"{path}:2: {message}", path)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_ground_truth_in_a_table_that_no_answer_equals(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, number: float
) -> None:
    path = tmp_path / "a.parquet"
    odd = record(reward_model={"ground_truth": number})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record(reward_model={"ground_truth": 1.0}), odd]), path)
    refuses(tokenizer, f"{path}:2: 'reward_model.ground_truth' is {number}; no answer equals it", str(path))


def test_values_that_are_odd_but_usable(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    odd = record(data_source=7, extra_info={"half": "\ud800"})
    first, second = load(tokenizer, write_lines(tmp_path / "a.jsonl", record(data_source="openai/gsm8k"), odd))
    assert (first.data_source, second.data_source) == ("openai/gsm8k", "7")
    assert second.extra_info["half"] == "\ud800"


def test_samples_know_where_they_stand(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", record("1"), record("12345"), record("2"))
    assert [prompt.location for prompt in load(tokenizer, path, max_prompt_length=4)] == [f"{path}:1", f"{path}:3"]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    first = write_lines(tmp_path / "a.jsonl", record(), record(data_source=...), 7)
    (tmp_path / "a.jsonl").open("a").write("{\n")
    overlong = write_lines(tmp_path / "b.jsonl", record("1234567"))
    empty, missing = write_lines(tmp_path / "c.jsonl"), str(tmp_path / "none.parquet")
    with pytest.raises(DataError) as caught:
        load(tokenizer, first, overlong, empty, missing, max_prompt_length=4, filter_overlong_prompts=False)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data has 6 problems:"
    starts = [f"{first}:2: ", f"{first}:3: ", f"{first}:4: ", f"{empty}: no prompts", f"{missing}: ", f"{overlong}:1: "]
    assert all(line.startswith(f"  {start}") for line, start in zip(lines[1:], starts, strict=True)), lines


def test_a_list_of_problems_ends_somewhere(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[record(data_source=...)] * 25)
    with pytest.raises(DataError) as caught:
        load(tokenizer, path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the data has 25 problems:"
    assert len(lines) == 12
    assert lines[-1] == "  and 15 more"


class Panic(BaseException):
    """What Rust's panics are to Python: no Exception."""


@pytest.mark.parametrize(
    "error", [Panic("index out of bounds"), OverflowError("no such id"), RecursionError("deep"), SystemExit("no")]
)
def test_what_a_tokenizer_raises_names_the_row(tmp_path: Path, error: BaseException) -> None:
    class Fragile(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            if any("9" in item for item in text):
                raise error
            return super().__call__(text, *args, **kwargs)

    fragile = Fragile(tokenizer_object=build_tokenizer().backend_tokenizer)
    path = write_lines(tmp_path / "a.jsonl", *(record(prompt) for prompt in ("1", "2", "39", "4", "9", "5")))
    with pytest.raises(DataError) as caught:
        load(fragile, path)
    assert str(caught.value).splitlines()[1:] == [
        f"  {path}:3: the tokenizer fails on '39': {type(error).__name__}: {error}",
        f"  {path}:5: the tokenizer fails on '9': {type(error).__name__}: {error}",
    ]


def test_ctrl_c_in_a_tokenizer_is_ctrl_c_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    class Interrupted(PreTrainedTokenizerFast):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(
            Interrupted(tokenizer_object=build_tokenizer().backend_tokenizer),
            write_lines(tmp_path / "a.jsonl", record()),
        )
    assert [path.suffix for path in (cache / "prompts").iterdir()] == [".lock"]


ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, math.nan, 10**400, "", " ", "1,2", "\ud800", "\x00", "x" * 5000, [], {}, [None], [[]]),
    *([{}], {"ground_truth": None}, {"ground_truth": "3"}, [{"role": "user", "content": "1"}], [{"role": "user"}]),
    *([{"role": 1, "content": []}], [{"role": "tool", "content": [{"type": "text", "text": "1"}, None]}]),
    *([{"role": "assistant", "content": None, "tool_calls": [{}]}], nested(80)),
)


def loaded_or_refused(tokenizer: PreTrainedTokenizerBase, path: str) -> tuple[PromptSample | None, str]:
    try:
        return load(tokenizer, path, max_prompt_length=9999)[0], ""
    except DataError as error:
        return None, str(error)


def test_generated_records_are_loaded_or_refused_with_their_row(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    generator = random.Random(0)
    loaded = 0
    for number in range(300):
        chosen = {key: generator.choice(ODD) for key in record() if generator.random() < 0.4}
        item: Any = record(**chosen) if number % 10 else generator.choice(ODD)
        path = tmp_path / "a.jsonl"
        text = json.dumps(item, ensure_ascii=number % 2 == 0) + "\n"
        path.write_bytes(text.encode(errors="surrogatepass"))
        prompt, refusal = loaded_or_refused(chat_tokenizer, str(path))
        if prompt is None:
            assert refusal.startswith(f"{path}:1: "), item
            assert "\n" not in refusal
            continue
        loaded += 1
        assert pickle.loads(pickle.dumps(prompt)).prompt_ids
        json.dumps(json_form(prompt.ground_truth), allow_nan=False)
    assert 30 < loaded < 270


TABLE = [
    record(
        f"{row % 7},{row % 10}",
        data_source=f"task {row % 3}",
        reward_model={"ground_truth": Decimal(row) / 8},
        extra_info={"when": datetime.datetime(2026, 1, 1, row % 24), "raw": bytes([row]), "list": [row, None]},
    )
    for row in range(40)
]


def samples_of(rows: Sequence[dict[str, Any]], file: str, tokenizer: PreTrainedTokenizerBase) -> list[PromptSample]:
    """What plain prompts must become, in the simplest way."""
    return [
        PromptSample(
            index,
            tuple(tokenizer(row["prompt"])["input_ids"]),
            row["prompt"],
            row["data_source"],
            row["reward_model"]["ground_truth"],
            row["extra_info"],
            file,
            index + 1,
        )
        for index, row in enumerate(rows)
    ]


def test_samples_are_the_records_values_and_types_included(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TABLE), path)
    for _ in range(2):  # made, and kept
        prompts = load(tokenizer, str(path))
        assert list(prompts) == samples_of(TABLE, str(path), tokenizer)
        assert {type(token) for sample in prompts for token in sample.prompt_ids} == {int}
        assert [prompts.location(place) for place in (0, -1)] == [f"{path}:1", f"{path}:40"]


def test_what_is_read_without_its_prompt_is_the_rest_of_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = load(
        tokenizer, write_lines(tmp_path / "a.jsonl", record("1"), record("2", extra_info={"half": "\ud800"}))
    )
    for place, prompt in enumerate(prompts):
        assert prompts.without_prompt(place) == replace(prompt, prompt_ids=(), prompt_text="")


def test_where_each_data_source_comes_first(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = [record(data_source=name) for name in ("b", "a", "b", "c", "a")]
    prompts = load(tokenizer, write_lines(tmp_path / "a.jsonl", *lines))
    assert prompts.first_of_each_source() == [0, 1, 3]
    assert prompts.first(3).first_of_each_source() == [0, 1]
    assert prompts[-1].data_source == "a"


def test_prompts_with_an_id_beyond_a_limit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = load(tokenizer, write_lines(tmp_path / "a.jsonl", record("1"), record("9"), record("19")))
    nine = tokenizer.convert_tokens_to_ids("9")
    assert prompts.with_ids_from(nine) == [(1, nine), (2, nine)]
    assert prompts.first(2).with_ids_from(nine) == [(1, nine)]
    assert prompts.with_ids_from(nine + 1) == []


def test_of_no_files_there_are_no_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = load_prompts([], tokenizer, DataConfig())
    assert list(prompts) == list(prompts.first(4)) == []


def test_a_dataset_that_is_sent_is_opened_again(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = load(tokenizer, write_lines(tmp_path / "a.jsonl", *map(record, "12345")))
    sent = pickle.dumps(prompts.first(3))
    assert len(sent) < 1000
    received = pickle.loads(sent)
    assert (list(received), received.digest) == (list(prompts)[:3], prompts.first(3).digest)


def test_a_kept_file_that_was_cut_short(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", record("1"), record("2"))
    load(tokenizer, path)
    (content,) = cache.glob("prompts/*/content.bin")
    content.write_bytes(content.read_bytes()[:-1])
    prompts = load(tokenizer, path)
    assert prompts[0].prompt_text == "1"
    with pytest.raises(DataError, match=r"content\.bin: ends within a prompt; delete its folder"):
        prompts[1]


def test_what_a_process_holds_does_not_grow_with_the_prompts(tmp_path: Path) -> None:
    block = prompt_block([PromptSample(0, (1,) * 350, "1" * 700, "digits", "3", {})] * 1000, [(0, 1)] * 1000)
    write_prompts(tmp_path, (block for _ in range(100)))
    tracemalloc.start()
    prompts = PromptDataset(tmp_path, ["a.jsonl"])
    stream = PromptLoader(prompts, 8, shuffle=True, seed=0).stream(Position(1, 50_000))
    batches = [len(next(stream)) for _ in range(20)]
    prompts.with_ids_from(2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batches == [8] * 20
    assert most < 100_000 * 10 + (1 << 19)  # 8 bytes a prompt are the order of an epoch


class NeverCalled(PreTrainedTokenizerFast):
    """A tokenizer that can be saved and nothing else."""

    def __call__(self, *args: Any, **keys: Any) -> Any:
        raise AssertionError("tokenizes again")


def test_a_second_start_does_not_tokenize(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    path = write_lines(tmp_path / "a.jsonl", record("1"), record("12345"), record("2"))
    first = load(tokenizer, path, max_prompt_length=4)
    NeverCalled.__name__ = NeverCalled.__qualname__ = type(tokenizer).__qualname__
    tokenizer.__class__ = NeverCalled
    second = load(tokenizer, path, max_prompt_length=4)
    assert list(second) == list(first)
    assert (second.skipped, second.digest) == (1, first.digest)
    with pytest.raises(DataError, match="tokenizes again"):
        load(tokenizer, path, max_prompt_length=5)


@pytest.mark.parametrize("what", ["content", "key", "limit", "cut", "template"])
def test_another_file_key_limit_or_template_is_another_data_set(tmp_path: Path, what: str) -> None:
    lines = [record("12345", question="7"), record([{"role": "user", "content": "2"}], question="8")]
    path = write_lines(tmp_path / "a.jsonl", *lines)

    def texts(template: str = TEMPLATE, **keys: Any) -> list[str]:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = template
        return [sample.prompt_text for sample in load(tokenizer, path, **keys)]

    cuts: dict[str, Any] = {"max_prompt_length": 4, "filter_overlong_prompts": False, "truncation": "left"}
    before = texts(), texts(**cuts)
    changes: dict[str, dict[str, Any]] = {
        "key": {"prompt_key": "question"},
        "limit": {"max_prompt_length": 5},
        "cut": cuts | {"truncation": "right"},
        "template": {"template": TEMPLATE.replace("0", "1")},
    }
    if what == "content":
        write_lines(tmp_path / "a.jsonl", *lines, record("3"))
    assert texts(**changes.get(what, {})) not in before
    assert what == "content" or (texts(), texts(**cuts)) == before


def test_problems_are_told_in_the_order_of_the_files(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = [json.dumps(record()), "{", json.dumps(record(data_source=...)), "[", "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    other = write_lines(tmp_path / "b.jsonl", record(7))
    with pytest.raises(DataError) as caught:
        load(tokenizer, str(tmp_path / "a.jsonl"), other)
    rows = [line.strip().split(": ")[0] for line in str(caught.value).splitlines()[1:]]
    assert rows == [*(f"{tmp_path}/a.jsonl:{row}" for row in (2, 3, 4, 5)), f"{other}:1"]


def test_a_missing_file_beside_large_ones_is_told_at_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "BYTES_FOR_PROCESSES", 10)
    large, missing = write_lines(tmp_path / "a.jsonl", record(7)), str(tmp_path / "none.jsonl")
    with pytest.raises(DataError) as caught:
        load(tokenizer, large, missing)
    assert str(caught.value).startswith(f"{missing}: no such file")


def test_what_failed_is_not_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    with pytest.raises(DataError):
        load(tokenizer, write_lines(tmp_path / "a.jsonl", record(), record(7)))
    assert [path.name for path in (cache / "prompts").iterdir() if path.is_dir()] == []


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write_lines(tmp_path / "a.jsonl", *[record("1")] * 3)

    class Meanwhile(prompts_module.PromptEncoder):
        def block(self, records: Any) -> PromptBlock:
            write_lines(tmp_path / "a.jsonl", record("2"))
            return super().block(records)

    monkeypatch.setattr(prompts_module, "PromptEncoder", Meanwhile)
    refuses(tokenizer, f"{path}: changed while they were read; start again when they are written", path)
    monkeypatch.undo()
    monkeypatch.setenv("RLHF_NPU_CACHE", str(cache))
    assert [sample.prompt_text for sample in load(tokenizer, path)] == ["2"]


def test_what_a_killed_run_left_is_removed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", record())
    load(tokenizer, path)
    (kept,) = (folder for folder in (cache / "prompts").iterdir() if folder.is_dir())
    kept.rename(kept.with_name(f".tokenizing.{kept.name}.killed"))
    other = kept.with_name(".tokenizing.prompts-of-another.running")
    other.mkdir()
    load(tokenizer, path)
    assert {folder for folder in (cache / "prompts").iterdir() if folder.is_dir()} == {kept, other}


def test_who_waits_for_another_run_is_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", record())
    load(tokenizer, path)
    assert capsys.readouterr().err == ""
    (lock,) = (cache / "prompts").glob("*.lock")
    with FileLock(lock):
        waiting = threading.Thread(target=load, args=(tokenizer, path))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
    waiting.join()
    assert capsys.readouterr().err == f"waiting for another run that tokenizes {path}\n"


def test_a_log_that_is_no_terminal_gets_a_line_now_and_then(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tokenizing, "SECONDS_BETWEEN_LINES", 0.0)
    load(tokenizer, write_lines(tmp_path / "a.jsonl", *[record()] * 300))
    said = re.sub(r"in \d+ s", "in 1 s", capsys.readouterr().err).splitlines()
    assert said == [f"tokenizing prompts, once: records: {count} in 1 s" for count in (256, 300)]
