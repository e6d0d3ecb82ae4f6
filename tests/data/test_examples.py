"""Pairs, single completions and texts from files: forms, limits, what is refused, and what is kept."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.data import examples, tokenizing
from rlhf_npu.data.digits import build_tokenizer
from rlhf_npu.data.example_files import ExampleBlock, ExampleDataset, block_of, write_examples
from rlhf_npu.data.examples import collect_examples, load_examples
from rlhf_npu.data.packing import Completion, Example
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.errors import DataError
from tests.data.tokenizers_for_tests import byte_level, metaspace, write_lines

DIGITS = build_tokenizer()
BYTES = byte_level()
PAIR = {"prompt": "1,3:8,4", "chosen": "5,7,1,3", "rejected": "7,3"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLHF_NPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config(**keys: Any) -> OfflineDataConfig:
    return OfflineDataConfig(["x"], [], 1, **{"max_length": 64, "max_tokens_per_device": 128, **keys})


def load(
    path: Path, kind: Any, *records: Any, tokenizer: PreTrainedTokenizerBase = DIGITS, **keys: Any
) -> ExampleDataset:
    return load_examples(kind, [write_lines(path / "a.jsonl", *records)], tokenizer, config(**keys))


def texts(example: Example, tokenizer: PreTrainedTokenizerBase = DIGITS) -> list[str]:
    parts = [example.prompt, *(each.input_ids for each in example.completions)]
    return [str(tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False)) for part in parts]


def all_trained(example: Example) -> bool:
    return all(bool(each.mask.all()) for each in example.completions)


def test_a_pair_of_texts(tmp_path: Path) -> None:
    dataset = load(tmp_path, "pairs", PAIR, {**PAIR, "margin": 1.5})
    assert (len(dataset), dataset.kind, dataset.skipped, dataset.truncated) == (2, "pairs", 0, 0)
    assert texts(dataset[0]) == ["<bos>1,3:8,4", "5,7,1,3<eos>", "7,3<eos>"]
    assert all_trained(dataset[0])
    assert dataset.tokens.tolist() == [8 + 8 + 4] * 2 == [dataset[0].tokens] * 2
    assert dataset.margin.tolist() == [0.0, 1.5]
    assert dataset.largest_token == max(DIGITS.convert_tokens_to_ids([":", ",", "8"]))
    assert dataset.location(1) == f"{tmp_path / 'a.jsonl'}:2"
    assert dataset[0].prompt.dtype == dataset[0].completions[0].input_ids.dtype == np.int32


def test_a_pair_without_a_prompt_shares_what_it_begins_with(tmp_path: Path) -> None:
    pairs = [("1,3:8,45,7", "1,3:8,43"), ("1,3", "1,3:8"), ("5", "7")]
    dataset = load(tmp_path, "pairs", *({"chosen": a, "rejected": b} for a, b in pairs))
    assert [texts(example) for example in dataset] == [
        ["<bos>1,3:8,4", "5,7<eos>", "3<eos>"],
        ["<bos>1,3", "<eos>", ":8<eos>"],
        ["<bos>", "5<eos>", "7<eos>"],
    ]
    assert all(all_trained(example) for example in dataset)


def test_single_completions(tmp_path: Path) -> None:
    good, bad = ({"prompt": "1,3:8,1", "completion": word, "label": word == "5"} for word in ("5", "7"))
    dataset = load(tmp_path, "unpaired", good, bad, {**good, "prompt": ""})
    assert dataset.label.tolist() == [True, False, True]
    assert [texts(example) for example in dataset] == [
        ["<bos>1,3:8,1", "5<eos>"],
        ["<bos>1,3:8,1", "7<eos>"],
        ["<bos>", "5<eos>"],
    ]


def test_texts_and_completions_for_sft(tmp_path: Path) -> None:
    dataset = load(tmp_path, "sft", {"prompt": "1:", "completion": "5"}, {"text": "1,3"}, {"text": "1<eos>"})
    assert [texts(example) for example in dataset] == [
        ["<bos>1:", "5<eos>"],
        ["<bos>", "1,3<eos>"],
        ["<bos>", "1<eos>"],
    ]
    plain = load(tmp_path, "sft", {"text": "What is it?"}, tokenizer=BYTES)
    assert texts(plain[0], BYTES)[1].endswith("?<eos>")
    assert len(plain[0].prompt) == 1
    assert all_trained(plain[0])


def test_parquet_and_several_files(tmp_path: Path) -> None:
    table = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**PAIR, "margin": 2.0}, {**PAIR, "margin": None}]), table)
    files = [write_lines(tmp_path / "a.jsonl", PAIR), str(table)]
    dataset = load_examples("pairs", files, DIGITS, config())
    assert [dataset.location(index) for index in range(3)] == [f"{files[0]}:1", f"{table}:1", f"{table}:2"]
    assert dataset.margin.tolist() == [0.0, 2.0, 0.0]


def test_a_border_that_the_tokenizer_would_join_keeps_the_prompts_tokens(tmp_path: Path) -> None:
    record = {"prompt": "What is it? \n", "completion": "\n\nIt is three."}
    (example,) = load(tmp_path, "sft", record, tokenizer=BYTES)
    joined = BYTES(record["prompt"] + record["completion"])["input_ids"]
    prompt = BYTES(record["prompt"])["input_ids"]
    assert joined[: len(prompt)] != prompt
    assert example.prompt.tolist() == prompt
    assert texts(example, BYTES) == [record["prompt"], record["completion"] + "<eos>"]


WRITTEN = st.text(st.sampled_from("ab \n\té.?三"), min_size=1, max_size=12).filter(str.strip)


@settings(deadline=None, max_examples=60)
@given(prompt=WRITTEN, chosen=WRITTEN, rejected=WRITTEN)
def test_any_texts_come_back_from_their_tokens(
    tmp_path_factory: pytest.TempPathFactory, prompt: str, chosen: str, rejected: str
) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    if chosen == rejected:
        with pytest.raises(DataError, match="are the same"):
            load(folder, "pairs", {"prompt": prompt, "chosen": chosen, "rejected": rejected}, tokenizer=BYTES)
        return
    (example,) = load(folder, "pairs", {"prompt": prompt, "chosen": chosen, "rejected": rejected}, tokenizer=BYTES)
    assert texts(example, BYTES) == [prompt, f"{chosen}<eos>", f"{rejected}<eos>"]
    assert example.prompt.tolist() == BYTES(prompt)["input_ids"]
    assert all_trained(example)
    (whole,) = load(folder, "pairs", {"chosen": prompt + chosen, "rejected": prompt + rejected}, tokenizer=BYTES)
    ids = [[*whole.prompt.tolist(), *each.input_ids.tolist()] for each in whole.completions]
    assert ids == [[*BYTES(prompt + answer)["input_ids"], BYTES.eos_token_id] for answer in (chosen, rejected)]
    assert ids[0][: len(whole.prompt)] == ids[1][: len(whole.prompt)]
    assert len({each.input_ids[0] for each in whole.completions}) == 2


def test_a_tokenizer_that_puts_a_space_before_each_text(tmp_path: Path) -> None:
    tokenizer = metaspace()
    dataset = load(
        tmp_path,
        "sft",
        {"prompt": "x=", "completion": "12"},
        {"prompt": "What is it?", "completion": " It is three."},
        tokenizer=tokenizer,
    )
    for example, whole in zip(dataset, ("x=12", "What is it? It is three."), strict=True):
        ids = np.concatenate([example.prompt, example.completions[0].input_ids]).tolist()
        assert ids == [*tokenizer(whole)["input_ids"], tokenizer.eos_token_id]
    with pytest.raises(DataError, match=r"a\.jsonl:1: the tokenizer joins the prompt's end and the completion's"):
        load(tmp_path, "sft", {"prompt": "What is it? ", "completion": "It is three."}, tokenizer=tokenizer)


def test_a_tokenizer_that_ends_each_text_ends_no_prompt(tmp_path: Path) -> None:
    tokenizer = metaspace(eos=True)
    assert tokenizer("x=")["input_ids"][-1] == tokenizer.eos_token_id
    (example,) = load(tmp_path, "sft", {"prompt": "x=", "completion": "12"}, tokenizer=tokenizer)
    ids = [*example.prompt.tolist(), *example.completions[0].input_ids.tolist()]
    assert ids == tokenizer("x=12")["input_ids"]
    assert tokenizer.eos_token_id not in example.prompt.tolist()


OVERLONG = {**PAIR, "chosen": "5,7,1,3,5,7"}


def test_what_is_too_long_is_skipped_and_counted(tmp_path: Path) -> None:
    dataset = load(tmp_path, "pairs", OVERLONG, PAIR, OVERLONG, max_length=16)
    assert (len(dataset), dataset.skipped, dataset.location(0)) == (1, 2, f"{tmp_path / 'a.jsonl'}:2")
    with pytest.raises(DataError, match=r"all 1 examples are longer than data\.max_length=16 tokens; raise it"):
        load(tmp_path, "pairs", OVERLONG, max_length=16)


def test_what_is_too_long_can_be_cut(tmp_path: Path) -> None:
    keys = {"max_length": 16, "filter_overlong": False}
    left = load(tmp_path, "pairs", PAIR, OVERLONG, truncation="left", **keys)
    assert texts(left[1]) == [":8,4", "5,7,1,3,5,7<eos>", "7,3<eos>"]
    right = load(tmp_path, "pairs", PAIR, OVERLONG, truncation="right", **keys)
    assert texts(right[1]) == ["<bos>1,3:8,4", "5,7,1,3,", "7,3<eos>"]
    assert (left.truncated, right.truncated) == (1, 1)
    assert texts(left[0]) == texts(right[0]) == ["<bos>1,3:8,4", "5,7,1,3<eos>", "7,3<eos>"]
    for truncation, max_length, message in (
        ("error", 16, "20 tokens, more than data.max_length=16; raise it"),
        ("left", 12, "a completion of 12 tokens leaves nothing of its prompt within data.max_length=12"),
        ("right", 8, "a prompt of 8 tokens leaves nothing of its completion within data.max_length=8"),
        ("right", 9, "chosen and rejected have the same tokens"),
    ):
        record = OVERLONG if max_length != 9 else {**PAIR, "rejected": "5,7"}
        with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'a.jsonl'}:1: {message}")):
            load(tmp_path, "pairs", record, max_length=max_length, filter_overlong=False, truncation=truncation)


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("pairs", [PAIR], "a list; a record is an object"),
        ("pairs", {"prompt": "1", "chosen": "1"}, "no 'rejected'; the record has 'prompt', 'chosen'"),
        ("pairs", {**PAIR, "rejected": PAIR["chosen"]}, "'chosen' and 'rejected' are the same"),
        ("pairs", {**PAIR, "chosen": "5a", "rejected": "5b"}, "chosen and rejected have the same tokens"),
        ("pairs", {**PAIR, "chosen": ""}, "'chosen' is '', which says nothing"),
        ("pairs", {**PAIR, "rejected": " \n"}, r"'rejected' is ' \n', which says nothing"),
        ("pairs", {**PAIR, "chosen": 5}, "'chosen' and 'rejected' must both be text, or both lists of messages"),
        ("pairs", {**PAIR, "chosen": [{"role": "assistant", "content": "5"}]}, "must both be text, or both lists"),
        ("pairs", {**PAIR, "prompt": 7}, "'prompt' is 7; it must be a string, or a list of messages"),
        ("pairs", {**PAIR, "margin": "2"}, "'margin' is '2'; it must be a finite number"),
        ("pairs", {**PAIR, "margin": True}, "'margin' is True; it must be a finite number"),
        ("pairs", {**PAIR, "chosen": "\ud800"}, r"'chosen' has '\ud800' at character 0, half of a surrogate pair"),
        ("pairs", {**PAIR, "prompt": '[{"role": "user", "content": "1"}]'}, "holds a list of chat messages as JSON"),
        ("pairs", {"prompt": [{"role": "user", "content": "1"}], "chosen": "5", "rejected": "7"}, "no chat_template"),
        ("unpaired", {"prompt": "1", "completion": "5"}, "no 'label'"),
        ("unpaired", {"prompt": "1", "completion": "5", "label": 1}, "'label' is 1; it must be true or false"),
        ("unpaired", {"completion": "5", "label": True}, "no 'prompt'; the record has 'completion', 'label'"),
        ("sft", {"prompt": "1"}, "has 'prompt'; it needs one of 'messages', 'prompt' with 'completion', and 'text'"),
        ("sft", {"prompt": "1", "completion": "5", "text": "15"}, "has prompt and completion as well as text"),
        ("sft", {"prompt": "1", "completion": ["5"]}, "'completion' is ['5']; it must be a string"),
        ("sft", {}, "has no keys; it needs one of"),
    ],
)
def test_a_record_that_cannot_be_used_names_its_row(tmp_path: Path, kind: Any, record: Any, message: str) -> None:
    right = {**PAIR, "completion": "5", "label": True}
    right = {key: value for key, value in right.items() if kind == "pairs" or key not in ("chosen", "rejected")}
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'a.jsonl'}:2: ")) as caught:
        load(tmp_path, kind, right, record)
    assert message in str(caught.value)


USER, OTHER = {"role": "user", "content": "1"}, {"role": "user", "content": "2"}
FIVE, SEVEN = {"role": "assistant", "content": "5"}, {"role": "assistant", "content": "7"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": [FIVE], "rejected": [SEVEN]}, "'chosen' and 'rejected' have no first message in common"),
        ({"chosen": [USER, OTHER, FIVE], "rejected": [USER, USER, SEVEN]}, "with a message of the role 'user'"),
        ({"prompt": "2", "chosen": [USER, FIVE], "rejected": [USER, SEVEN]}, "chats that both answer '1'"),
        ({"prompt": [USER], "chosen": [OTHER, FIVE], "rejected": [SEVEN]}, "'chosen' continues the prompt with"),
        ({"prompt": [USER], "chosen": [FIVE], "rejected": []}, "'rejected' is []; it must be a string, or a list"),
        ({"prompt": [USER], "chosen": [{**FIVE, "content": " "}], "rejected": [SEVEN]}, "no message says anything"),
    ],
)
def test_pairs_of_chats_that_answer_no_common_prompt(tmp_path: Path, record: Any, message: str) -> None:
    template = "{% for m in messages %}{{ m.role[0] + m.content + ';' }}{% endfor %}"
    right = {"prompt": [USER], "chosen": [FIVE], "rejected": [SEVEN]}
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'a.jsonl'}:2: ")) as caught:
        load(tmp_path, "pairs", right, record, tokenizer=byte_level(template))
    assert message in str(caught.value)


def test_all_problems_of_several_data_sets_are_told_at_once(tmp_path: Path) -> None:
    problems = DataProblems()
    for name, kind in (("a", "pairs"), ("b", "sft"), ("none", "sft")):
        file = tmp_path / f"{name}.jsonl"
        if name != "none":
            write_lines(file, {"prompt": "1"}, {"prompt": "1"})
        dataset = collect_examples(kind, [str(file)], DIGITS, config(), problems)  # type: ignore[arg-type]
        assert len(dataset) == 0
    with pytest.raises(DataError, match=r"the data has 5 problems:\n.*a\.jsonl:1: .*\n.*a\.jsonl:2: ") as caught:
        problems.check()
    assert "none.jsonl: no such file" in str(caught.value)


def test_no_files_are_no_examples() -> None:
    assert len(load_examples("pairs", [], DIGITS, config())) == 0


def test_an_empty_file_a_prompt_without_tokens_and_a_tokenizer_without_eos(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: no examples; a file needs at least one record"):
        load(tmp_path, "pairs")
    with pytest.raises(DataError, match=r"a\.jsonl:1: the prompt has no tokens, so there is nothing to predict"):
        load(tmp_path, "sft", {"prompt": "", "completion": "one"}, tokenizer=BYTES)
    endless = byte_level()
    endless.eos_token = None
    with pytest.raises(DataError, match=r"a\.jsonl:1: a completion that is text ends with the tokenizer's eos_token"):
        load(tmp_path, "sft", {"prompt": "one", "completion": "two"}, tokenizer=endless)


class NeverCalled(type(DIGITS)):  # type: ignore[misc]
    """A tokenizer that can be saved and nothing else."""

    def __call__(self, *args: Any, **keys: Any) -> Any:
        raise AssertionError("tokenizes again")


def test_a_second_start_does_not_tokenize(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    first = load(tmp_path, "pairs", PAIR, OVERLONG, tokenizer=tokenizer, max_length=16)
    stored = (tmp_path / "cache" / "examples").glob("pairs-*/tokens.bin")
    times = [path.stat().st_mtime_ns for path in stored]
    NeverCalled.__name__ = NeverCalled.__qualname__ = type(tokenizer).__qualname__
    tokenizer.__class__ = NeverCalled
    second = load(tmp_path, "pairs", PAIR, OVERLONG, tokenizer=tokenizer, max_length=16)
    assert texts(second[0]) == texts(first[0])
    assert (second.skipped, second.tokens.tolist(), second.location(0)) == (1, first.tokens.tolist(), first.location(0))
    assert len(times) == 1
    with pytest.raises(DataError, match="tokenizes again"):
        load(tmp_path, "pairs", PAIR, OVERLONG, tokenizer=tokenizer, max_length=15)


@pytest.mark.parametrize("what", ["content", "kind", "limit", "template", "order"])
def test_another_file_tokenizer_or_limit_is_another_data_set(tmp_path: Path, what: str) -> None:
    chat = {"messages": [USER, FIVE]}
    files = [write_lines(tmp_path / name, chat, {"text": name[0]}) for name in ("a.jsonl", "b.jsonl")]
    template = "{% for m in messages %}{{ m.role[0] + m.content + ';' }}{% endfor %}"

    def loaded(files: list[str], template: str, **keys: Any) -> list[list[str]]:
        tokenizer = byte_level(template)
        return [texts(example, tokenizer) for example in load_examples("sft", files, tokenizer, config(**keys))]

    before = loaded(files, template)
    changed = {"template": template.replace(";", "!")}.get(what, template)
    if what == "content":
        write_lines(tmp_path / "a.jsonl", chat, {"text": "c"})
    if what == "kind":
        with pytest.raises(DataError, match="no 'label'"):
            load_examples("unpaired", files, byte_level(template), config())
        return
    limits = {"max_length": 2} if what == "limit" else {}
    after = loaded(files[::-1] if what == "order" else files, changed, **limits)
    assert after != before
    assert loaded(files, template) != before if what == "content" else loaded(files, template) == before


def test_a_tokenizer_that_cannot_be_saved(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.init_kwargs["secret"] = object()
    with pytest.raises(DataError, match=r"^the tokenizer of '' cannot be saved to be told from others: TypeError: "):
        load(tmp_path, "pairs", PAIR, tokenizer=tokenizer)


def test_what_failed_is_not_kept(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError):
        load(tmp_path, "pairs", PAIR, {**PAIR, "chosen": ""})
    assert [path.name for path in (cache / "examples").iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_NPU_CACHE", "/dev/null/cache")
    with pytest.raises(DataError, match=r"a\.jsonl: their tokens cannot be kept: .*; set RLHF_NPU_CACHE to a folder"):
        load(tmp_path, "pairs", PAIR)


def test_two_that_ask_together_tokenize_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(examples.RecordEncoder):
        def block(self, records: Any) -> ExampleBlock:
            made.append(len(records))
            return super().block(records)

    monkeypatch.setattr(examples, "RecordEncoder", Counted)
    file = write_lines(tmp_path / "a.jsonl", *[PAIR] * 600)
    threads = [threading.Thread(target=load_examples, args=("pairs", [file], DIGITS, config())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [256, 256, 88]


@pytest.mark.slow
def test_several_processes_make_the_same_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{**PAIR, "prompt": f"{index},3:8,4", "margin": index} for index in range(1000)]
    records[700]["prompt"] = 7
    file = write_lines(tmp_path / "a.jsonl", *records)

    def loaded(cache: str) -> tuple[list[bytes], str]:
        monkeypatch.setenv("RLHF_NPU_CACHE", str(tmp_path / cache))
        with pytest.raises(DataError) as caught:
            load_examples("pairs", [file], DIGITS, config())
        right = write_lines(tmp_path / "b.jsonl", *records[:700])
        load_examples("pairs", [right], DIGITS, config())
        (folder,) = (tmp_path / cache / "examples").glob("pairs-*/")
        return [path.read_bytes() for path in sorted(folder.iterdir())], str(caught.value)

    alone = loaded("alone")
    monkeypatch.setattr(tokenizing, "BYTES_FOR_PROCESSES", 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert loaded("together") == alone
    assert f"{file}:701: 'prompt' is 7" in alone[1]


IDS = st.lists(st.integers(0, 2**31 - 2), min_size=1, max_size=6)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("examples")

    def completion() -> Completion:
        ids = data.draw(IDS)
        mask = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        return Completion(np.array(ids, np.int32), np.array(mask))

    made = [
        [Example(np.array(data.draw(IDS), np.int32), (completion(), completion())) for _ in range(size)]
        for size in sizes
    ]
    blocks = (block_of(part, [(0, row) for row in range(len(part))], 3) for part in made)
    write_examples(folder, "pairs", blocks)
    read = ExampleDataset(folder, ["a"])
    whole = [example for part in made for example in part]
    assert len(read) == len(whole)
    assert read.tokens.tolist() == [example.tokens for example in whole]
    for ours, theirs in zip(read, whole, strict=True):
        np.testing.assert_array_equal(ours.prompt, theirs.prompt)
        for one, other in zip(ours.completions, theirs.completions, strict=True):
            np.testing.assert_array_equal(one.input_ids, other.input_ids)
            np.testing.assert_array_equal(one.mask, other.mask)
    with pytest.raises(IndexError):
        read[len(whole)]


def test_the_digit_tasks_examples_are_right_and_wrong(digits_folder: Path) -> None:
    from rlhf_npu.data.sample import PromptSample
    from rlhf_npu.rewards.digits import score

    def reward(prompt: str, answer: str) -> float:
        return score(answer, True, PromptSample(0, (), prompt, "digits", answers[prompt], {}))

    for suffix, split, count in (("", "train", 504), ("_val", "val", 126)):
        rows = {name: read_rows(digits_folder / f"{name}{suffix}.jsonl") for name in ("pairs", "sft", "unpaired")}
        prompts = read_rows(digits_folder / f"{split}.jsonl")
        answers = {row["prompt"]: row["reward_model"]["ground_truth"] for row in prompts}
        assert [len(each) for each in rows.values()] == [count, count, 2 * count]
        assert all(reward(row["prompt"], row["chosen"]) == 1.0 for row in rows["pairs"])
        assert all(reward(row["prompt"], row["rejected"]) < 1.0 for row in rows["pairs"])
        assert all(reward(row["prompt"], row["completion"]) == 1.0 for row in rows["sft"])
        assert all((reward(row["prompt"], row["completion"]) == 1.0) == row["label"] for row in rows["unpaired"])
        assert {row["prompt"] for row in rows["sft"]} == set(answers)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
