"""What of a chat is trained, token for token, for templates of several kinds."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.data.examples import load_examples
from rlhf_npu.data.packing import Completion, Example
from rlhf_npu.errors import DataError
from tests.data.tokenizers_for_tests import (
    CHATML,
    CHATML_MARKED,
    INST,
    LLAMA_3,
    REASONING,
    THINKING,
    TOOLS,
    byte_level,
    write_lines,
)

TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "marked": (CHATML_MARKED, "<|im_end|>"),
    "llama 3": (LLAMA_3, "<|eot_id|>"),
    "inst": (INST, "<eos>"),
}
SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What is one plus two?"}
ANSWER = {"role": "assistant", "content": "It is three."}
AGAIN = {"role": "user", "content": "\nAnd then?"}
LAST = {"role": "assistant", "content": "\n\nFour.  "}
CONTENTS = st.text(st.sampled_from("ab \n\té.?三"), min_size=1, max_size=12).filter(str.strip)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_NPU_CACHE", str(tmp_path / "cache"))


def config(**keys: Any) -> OfflineDataConfig:
    return OfflineDataConfig(["x"], [], 1, **{"max_length": 999, "max_tokens_per_device": 9999, **keys})


def load(
    path: Path, tokenizer: PreTrainedTokenizerBase, *records: Any, kind: Any = "sft", **keys: Any
) -> list[Example]:
    file = write_lines(path / "a.jsonl", *records)
    return list(load_examples(kind, [file], tokenizer, config(**keys)))


def refuses(path: Path, tokenizer: PreTrainedTokenizerBase, message: str, *records: Any, **keys: Any) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load(path, tokenizer, *records, **keys)
    assert f"{path / 'a.jsonl'}:{len(records)}: " in str(caught.value)


def text(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def stretches(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> list[tuple[bool, str]]:
    """A completion's text in stretches that are trained or not."""
    borders = [0, *(np.flatnonzero(np.diff(completion.mask)) + 1).tolist(), len(completion.mask)]
    return [(bool(completion.mask[a]), text(tokenizer, completion.input_ids[a:b])) for a, b in pairwise(borders)]


def said(name: str, message: dict[str, str]) -> str:
    """What the template writes where the model generates."""
    content = message["content"].strip() if name == "llama 3" else message["content"]
    return f"{' ' if name == 'inst' else ''}{content}{TEMPLATES[name][1]}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_turns_are_trained_and_nothing_else(tmp_path: Path, name: str) -> None:
    tokenizer = byte_level(*TEMPLATES[name])
    chat = [SYSTEM, ASK, ANSWER, AGAIN, LAST]
    (example,) = load(tmp_path, tokenizer, {"messages": chat})
    asked = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
    assert text(tokenizer, example.prompt) == asked
    trained = [said for is_trained, said in stretches(tokenizer, example.completions[0]) if is_trained]
    assert trained == [said(name, ANSWER), said(name, LAST)]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = np.concatenate([example.prompt, example.completions[0].input_ids])
    assert text(tokenizer, ids) == whole.rstrip("\n")


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_last_turn_is_trained_where_that_is_wanted(tmp_path: Path, name: str) -> None:
    tokenizer = byte_level(*TEMPLATES[name])
    chat = [ASK, ANSWER, AGAIN, LAST]
    (example,) = load(tmp_path, tokenizer, {"messages": chat}, train_on="last_assistant")
    asked = tokenizer.apply_chat_template(chat[:3], tokenize=False, add_generation_prompt=True)
    assert text(tokenizer, example.prompt) == asked
    assert stretches(tokenizer, example.completions[0]) == [(True, said(name, LAST))]


def test_a_marked_templates_mask_is_transformers_own(tmp_path: Path) -> None:
    tokenizer = byte_level(*TEMPLATES["marked"])
    chat = [SYSTEM, ASK, ANSWER, {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Four."}]
    (example,) = load(tmp_path, tokenizer, {"messages": chat})
    theirs = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    completion = example.completions[0]
    ids = [*example.prompt.tolist(), *completion.input_ids.tolist()]
    mask = [0] * len(example.prompt) + completion.mask.astype(int).tolist()
    assert ids == theirs["input_ids"][: len(ids)]
    assert mask == theirs["assistant_masks"][: len(ids)]
    assert sum(theirs["assistant_masks"][len(ids) :]) == 0


@pytest.mark.parametrize("name", TEMPLATES)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chat_comes_back_from_its_tokens(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]
    turns = data.draw(st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
    chat = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    (example,) = load(tmp_path_factory.mktemp("chat"), tokenizer, {"messages": chat})
    completion = example.completions[0]
    assert [said for is_trained, said in stretches(tokenizer, completion) if is_trained] == [
        said(name, message) for message in chat[1::2]
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    end = "\n" if name in ("chatml", "marked") else ""
    assert text(tokenizer, np.concatenate([example.prompt, completion.input_ids])) + end == whole
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert example.prompt.tolist() == tokenizer(asked, add_special_tokens=False)["input_ids"]


TOKENIZERS = {name: byte_level(*of) for name, of in TEMPLATES.items()}


def test_a_pair_of_chats_shares_its_prompt(tmp_path: Path) -> None:
    tokenizer = TOKENIZERS["chatml"]
    rejected = {"role": "assistant", "content": "It is four."}
    records = [
        {"prompt": [SYSTEM, ASK], "chosen": [ANSWER], "rejected": [rejected]},
        {"prompt": [SYSTEM, ASK], "chosen": ANSWER["content"], "rejected": rejected["content"]},
        {"chosen": [SYSTEM, ASK, ANSWER], "rejected": [SYSTEM, ASK, rejected]},
        {"prompt": ASK["content"], "chosen": [SYSTEM, ASK, ANSWER], "rejected": [SYSTEM, ASK, rejected]},
        {"prompt": [SYSTEM, ASK], "chosen": [SYSTEM, ASK, ANSWER], "rejected": [SYSTEM, ASK, rejected]},
    ]
    for example in load(tmp_path, tokenizer, *records, kind="pairs"):
        asked = tokenizer.apply_chat_template([SYSTEM, ASK], tokenize=False, add_generation_prompt=True)
        assert text(tokenizer, example.prompt) == asked
        assert [stretches(tokenizer, each) for each in example.completions] == [
            [(True, "It is three.<|im_end|>")],
            [(True, "It is four.<|im_end|>")],
        ]


def test_tool_results_within_a_completion_are_not_trained(tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "3"}
    answers = [[ANSWER, tool, {"role": "assistant", "content": word}] for word in ("Three.", "Four.")]
    record = {"prompt": [ASK], "chosen": answers[0], "rejected": answers[1]}
    (example,) = load(tmp_path, TOKENIZERS["chatml"], record, kind="pairs")
    assert stretches(TOKENIZERS["chatml"], example.completions[1]) == [
        (True, "It is three.<|im_end|>"),
        (False, "\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Four.<|im_end|>"),
    ]


def test_tools_reach_the_template(tmp_path: Path) -> None:
    tokenizer, tools = byte_level(TOOLS, "<|im_end|>"), [{"type": "function", "function": {"name": "add"}}]
    chat = [ASK, ANSWER]
    for given_tools in (tools, '[{"type": "function", "function": {"name": "add"}}]'):
        (example,) = load(tmp_path, tokenizer, {"messages": chat, "tools": given_tools})
        assert '"name": "add"' in text(tokenizer, example.prompt)
    refuses(tmp_path, tokenizer, "'tools' is 7; it must be a list of JSON schemas", {"messages": chat, "tools": 7})
    refuses(tmp_path, tokenizer, "'tools' is text that is no JSON", {"messages": chat, "tools": "[add"})


def test_parts_of_text_are_taken(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "now?"}]}, ANSWER]
    (example,) = load(tmp_path, TOKENIZERS["chatml"], {"messages": chat})
    assert "What\nnow?" in text(TOKENIZERS["chatml"], example.prompt)


def test_what_comes_after_the_last_turn_is_left_out(tmp_path: Path) -> None:
    (example,) = load(tmp_path, TOKENIZERS["chatml"], {"messages": [ASK, ANSWER, AGAIN]})
    assert stretches(TOKENIZERS["chatml"], example.completions[0]) == [(True, "It is three.<|im_end|>")]


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(THINKING, "<|im_end|>")
    thought = {"role": "assistant", "content": "<think>hm</think>Three."}
    right = {"messages": [ASK, ANSWER]}
    refuses(
        tmp_path,
        tokenizer,
        "writes the first 2 of 4 messages otherwise when the rest follows ('<think>hm",
        right,
        {"messages": [ASK, thought, AGAIN, LAST]},
    )
    (example,) = load(tmp_path, tokenizer, {"messages": [ASK, thought, AGAIN, LAST]}, train_on="last_assistant")
    assert "hm" not in text(tokenizer, example.prompt)
    assert stretches(tokenizer, example.completions[0]) == [(True, LAST["content"] + "<|im_end|>")]


def test_a_generation_prompt_that_no_answer_follows(tmp_path: Path) -> None:
    tokenizer = byte_level(REASONING, "<|im_end|>")
    thought = {"role": "assistant", "content": "<think>hm</think>Three."}
    records = [{"prompt": [ASK], "chosen": [thought], "rejected": [LAST]}]
    (example,) = load(tmp_path, tokenizer, *records, kind="pairs")
    assert text(tokenizer, example.prompt).endswith("plus two?<|im_end|>\n")
    assert [stretches(tokenizer, each) for each in example.completions] == [
        [(False, "<|im_start|>assistant\n"), (True, f"{answer}<|im_end|>")] for answer in ("Three.", LAST["content"])
    ]
    unmarked = byte_level(re.sub(r"{% (end)?generation %}", "", REASONING), "<|im_end|>")
    message = "the first 1 of 2 messages and the generation prompt otherwise when the rest follows ('<think>"
    refuses(tmp_path, unmarked, message, *records, kind="pairs")


def test_two_answers_that_begin_their_prompt_differently(tmp_path: Path) -> None:
    """The template above, where one answer happens to begin as it asks."""
    template = REASONING.replace("m.content.split('</think>')[-1]", "m.content").replace(
        "{% generation %}", "{{ m.content[:8] }}{% generation %}"
    )
    begun = {"role": "assistant", "content": "<think>\nhm"}
    record = {"prompt": [ASK], "chosen": [begun], "rejected": [LAST]}
    refuses(tmp_path, byte_level(template, "<|im_end|>"), "writes the prompt otherwise", record, kind="pairs")


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (CHATML, [ASK], "no message of the role 'assistant' to train on"),
        (CHATML, [ANSWER, ASK], "begins with the assistant's message"),
        (CHATML, [{**ASK, "content": 7}, ANSWER], "its 'content' must be a string"),
        (CHATML, [{**ASK, "content": "\ud800"}, ANSWER], "half of a surrogate pair"),
        (CHATML, "no chat", "it must be a string, or a list of messages"),
        (None, [ASK, ANSWER], "has no chat_template"),
        ("{{ raise_exception('no') }}", [ASK, ANSWER], "the tokenizer's chat template refuses the messages"),
        ("{% generation %}{% endgeneration %}" + CHATML, [ASK, ANSWER], "marks nothing of the assistant's"),
        ("{% generation %}" + CHATML + "{% endgeneration %}", [ASK, ANSWER], "marks the prompt as generated"),
    ],
)
def test_chats_that_cannot_be_trained_on_name_their_row(
    tmp_path: Path, template: str | None, chat: Any, message: str
) -> None:
    refuses(tmp_path, byte_level(template, "<|im_end|>"), message, {"messages": chat})
