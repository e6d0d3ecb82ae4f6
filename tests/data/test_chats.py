"""Chat messages as users' files hold them, and templates as models bring them."""

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
from rlhf_npu.data.prompts import load_prompts
from rlhf_npu.errors import DataError, ModelError

# Writes a message's keys, so that one sees what the template was given.
KEYS = "{% for m in messages %}{{ m.role }}({{ m | list | sort | join(',') }})={{ m.content }};{% endfor %}"
CONTENT = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %};{% endfor %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
USER = {"role": "user", "content": "1 + 2"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_NPU_CACHE", str(tmp_path / "cache"))


def tokenizer_with(template: str) -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def record(messages: Any) -> dict[str, Any]:
    return {"prompt": messages, "data_source": "sums", "reward_model": {"ground_truth": "3"}}


def load(path: Path, template: str) -> list[str]:
    config = DataConfig(
        train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=999, max_response_length=8
    )
    return [sample.prompt_text for sample in load_prompts([str(path)], tokenizer_with(template), config)]


def lines(folder: Path, *chats: Any) -> Path:
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record(chat)) + "\n" for chat in chats))
    return path


def refuses(path: Path, template: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        load(path, template)


def test_keys_that_another_row_has_are_missing_where_they_are_null(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    second = {"type": "function", "function": {"name": "halve", "arguments": {"b": 2}}}
    chats = [[USER], [USER, answer, {"role": "tool", "content": "3"}], [USER, {**answer, "tool_calls": [second]}, USER]]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record(chat) for chat in chats]), path)
    assert load(path, KEYS + "{{ messages[1].tool_calls[0].function.arguments | tojson if messages[1] }}") == [
        "user(content,role)=1 + 2;",
        'user(content,role)=1 + 2;assistant(role,tool_calls)=;tool(content,role)=3;{"a": 1}',
        'user(content,role)=1 + 2;assistant(role,tool_calls)=;user(content,role)=1 + 2;{"b": 2}',
    ]


def test_json_says_null_inside_arguments_because_it_means_it(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"unit": None}}}
    chat = [USER, {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}, USER]
    (text,) = load(lines(tmp_path, chat), KEYS + "{{ messages[1].tool_calls[0].function.arguments | tojson }}")
    assert text.endswith('assistant(role,tool_calls)=;user(content,role)=1 + 2;{"unit": null}')


@pytest.mark.parametrize(
    ("content", "joined", "as_parts"),
    [
        ([{"type": "text", "text": "1 + 2"}], "1 + 2", "1 + 2"),
        ([{"type": "text", "text": "1"}, {"type": "text", "text": "2", "image_url": None}], "1\n2", "12"),
        (["1", {"type": "text", "text": "2"}], "1\n2", "12"),
    ],
)
def test_text_parts_reach_the_template_as_it_takes_them(
    tmp_path: Path, content: list[Any], joined: str, as_parts: str
) -> None:
    path = lines(tmp_path, [{"role": "user", "content": content}])
    assert load(path, CONTENT) == [f"user={joined};"]
    assert load(path, PARTS) == [f"{as_parts};"]


def test_a_template_that_takes_only_parts_gets_strings_as_parts(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}={% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %};{% endfor %}"
    )
    path = lines(tmp_path, [{"role": "user", "content": "1 + 2"}], [{"role": "user", "content": ["1", "2"]}])
    assert load(path, template) == ["user=1 + 2;", "user=12;"]


def test_an_assistants_last_message_ends_its_turn(tmp_path: Path) -> None:
    path = lines(tmp_path, [USER, {"role": "assistant", "content": "3"}])
    assert load(path, CONTENT + "{% if add_generation_prompt %}assistant={% endif %}") == [
        "user=1 + 2;assistant=3;assistant="
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": None}], "its 'content' must be a string or a list of text parts"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "its 'content' must be a string"),
        ([{"role": "user", "content": 7}], "its 'content' must be a string"),
        ([{"role": None, "content": "1"}], "'prompt' is a list with {'role': None"),
        ([{"content": "1"}], "'prompt' is a list with {'content': '1'}; it must be a string, or a list of messages"),
        ([USER, [USER]], "'prompt' is a list with [{'role'"),
        ([{"role": "user", "content": " \n"}], "no message says anything"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}]}], "no message says anything"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "a part of type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "only text parts"),
        ([{"role": "user", "content": "\ud800"}], r"'prompt' has '\ud800' at character 5, half of a surrogate pair"),
        (json.dumps([USER]), "'prompt' is a string that holds a list of chat messages as JSON"),
        ({"role": "user", "content": "1"}, "'prompt' is {'role': 'user', 'content': '1'}; it must be a string"),
    ],
)
def test_messages_of_another_form_name_their_row(tmp_path: Path, messages: Any, message: str) -> None:
    path = lines(tmp_path, [USER], messages)
    refuses(path, CONTENT, message)
    refuses(path, CONTENT, f"{path}:2: 'prompt' ")


def test_messages_that_are_nested_too_deeply(tmp_path: Path) -> None:
    deep: Any = "1"
    for _ in range(200):
        deep = {"a": deep}
    path = lines(tmp_path, [{**USER, "tool_calls": deep}])
    refuses(path, CONTENT, f"{path}:1: 'prompt' is nested more than 64 deep")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        (r"{{ raise_exception('half\ud800\u001b\n of it') }}", r"half\ud800\x1b of it"),
        ("{% for m in messages %}{{ m.content + m.name }}{% endfor %}", "'dict object' has no attribute 'name'"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "can only concatenate str"),
        ("{{ messages[7].content }}", "list object has no element 7"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages | nothing }}", "No filter named 'nothing'"),
        ("{{ messages.__class__.__mro__ }}{{ ''.__class__.mro() }}", "access to attribute"),
    ],
)
def test_whatever_a_template_raises_names_the_row(tmp_path: Path, template: str, reason: str) -> None:
    path = lines(tmp_path, [USER])
    refuses(path, template, f"{path}:1: 'prompt': the tokenizer's chat template refuses the messages: ")
    refuses(path, template, reason)


def test_a_template_that_calls_itself_without_end(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be rendered: RecursionError: maximum recursion depth exceeded"):
        load(lines(tmp_path, [USER]), "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")


@pytest.mark.parametrize(("asked", "place"), [("probe", "one short message"), ("1 + 2", "{path}:2: 'prompt'")])
def test_a_template_that_never_ends_for_a_message_ends_at_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, place: str
) -> None:
    monkeypatch.setattr("rlhf_npu.data.chats.TEMPLATE_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if messages[0].content == '" + asked + "' %}" + endless + "{% endif %}{{ messages[0].content }}"
    path = lines(tmp_path, [{"role": "user", "content": "3"}], [USER], *[[USER]] * 50)
    with pytest.raises(ModelError, match=re.escape(f"takes more than 0.2 s for {place.format(path=path)}")):
        load(path, template)
