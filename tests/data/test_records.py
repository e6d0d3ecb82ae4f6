"""Files of records: what can be read is, and what cannot is said with file and row."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import random
import tracemalloc
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_npu.data import records as records_module
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.records import Record, read_records
from rlhf_npu.errors import DataError

ROWS = [{"prompt": "1"}, {"prompt": "2"}]


def read(path: Path | str) -> tuple[list[Record], str]:
    """The records, and what is wrong."""
    problems = DataProblems()
    records = list(read_records(str(path), problems))
    try:
        problems.check()
    except DataError as error:
        return records, str(error)
    return records, ""


def values(path: Path) -> list[Any]:
    records, wrong = read(path)
    assert wrong == ""
    assert [record.location for record in records] == [f"{path}:{record.row}" for record in records]
    return [record.value for record in records]


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize(
    "text",
    [
        b'{"prompt": "1"}\n{"prompt": "2"}\n',
        b'{"prompt": "1"}\n\n  \n{"prompt": "2"}',
        b'\xef\xbb\xbf{"prompt": "1"}\n{"prompt": "2"}\n',
        b'{"prompt": "1"}\r\n{"prompt": "2"}\r\n',
        b'{"prompt": "1"}\r{"prompt": "2"}\r',
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_lines_however_they_end(tmp_path: Path, text: bytes, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(text)
    assert values(path) == ROWS


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_may_be_one_array(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text("\n " + json.dumps(ROWS, indent=indent))
    records, wrong = read(path)
    assert ([record.value for record in records], [record.row for record in records], wrong) == (ROWS, [1, 2], "")


ARRAYS = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=9), st.lists, max_leaves=9)
BREAKS = st.sampled_from(["", ",", "]", "[", "NaN", '"', '{"a": 1, "a": 2}', " ", "1 2", "\udc80"])


@settings(deadline=None, max_examples=100)
@given(elements=st.lists(ARRAYS), indent=st.sampled_from([None, 1]), broken=BREAKS, place=st.floats(0, 1))
def test_an_array_is_read_in_pieces_as_it_would_be_whole(
    tmp_path_factory: pytest.TempPathFactory, elements: list[Any], indent: int | None, broken: str, place: float
) -> None:
    text = json.dumps(elements, indent=indent, ensure_ascii=False)
    cut = 1 + int(place * (len(text) - 1))
    text = text[:cut] + broken + text[cut:]
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    results = []
    for size in (3, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(records_module, "_ARRAY_CHARACTERS", size)
            results.append(read(path))
    (piecewise, wrong), (_, wrong_whole) = results
    assert wrong == wrong_whole
    if not wrong:
        assert [record.value for record in piecewise] == json.loads(text)
        assert [record.row for record in piecewise] == list(range(1, len(piecewise) + 1))


def test_an_array_takes_no_memory_but_a_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "_ARRAY_CHARACTERS", 1 << 10)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"prompt": "1" * 100, "row": row} for row in range(5000)]))
    tracemalloc.start()
    count = sum(1 for _ in read_records(str(path), DataProblems()))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000
    assert most < path.stat().st_size / 5


def test_characters_beyond_ascii(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Größe 大 \u2028 \\ud83d\\ude00"}\n', encoding="utf-8")
    assert values(path) == [{"prompt": "Größe 大 \u2028 😀"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"prompt": "1"\n'.encode("utf-16"), ": is UTF-16 text; save it as UTF-8"),
        (gzip.compress(b"{}\n", mtime=0), ": is compressed with gzip; decompress it"),
        (b"PAR1....", ": is a Parquet file; let its name end in .parquet"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2: not JSON (no UTF-8 at character 7); save the file as UTF-8"),
        ('{"a": 1}\n{"a": "x"}'.encode("utf-16-le"), ":1: not JSON"),
        (b'{"a": 1}\n{"a": 1, "a": 2}\n', ":2: not JSON (the key 'a' stands twice in one object)"),
        (b'{"a": {"b": 1, "b": 1}}\n', ":1: not JSON (the key 'b' stands twice in one object)"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ":1: nested too deeply to be read"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", ":1: not JSON (Exceeds the limit (4300 digits)"),
        (b"{'a': 1}\n", ":1: not JSON (Expecting property name"),
        (b'{\n  "a": 1\n}\n', ":1: not JSON (Expecting property name"),
        (b"\x00\x00\x00", ":1: not JSON"),
    ],
)
def test_what_is_no_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert f"{path}{message}" in read(path)[1]


def test_an_array_that_breaks_off(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"prompt": "1"},')
    assert read(path)[1].startswith(f"{path}: not JSON (")
    assert read(path)[1].endswith("; the file starts as an array of objects")


def test_the_lines_after_a_broken_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{\n{"a": 3}\n[\n{"a": 5}\n')
    records, wrong = read(path)
    assert [record.row for record in records] == [1, 3, 5]
    assert wrong.startswith(f"the data has 2 problems:\n  {path}:2: not JSON")
    assert f"\n  {path}:4: not JSON" in wrong


def test_values_of_a_table(tmp_path: Path) -> None:
    when = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    row = {
        "date": datetime.date(2026, 1, 2),
        "when": when,
        "price": Decimal("0.90"),
        "raw": b"\xff",
        "list": [1, None],
        "struct": {"a": None, "b": [{"c": 1}]},
        "took": datetime.timedelta(seconds=2),
    }
    table = pyarrow.Table.from_pylist([row, {}])
    counts = pyarrow.array([[("a", 1)], None], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    source = pyarrow.array(["x", "y"]).dictionary_encode()
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table.append_column("map", counts).append_column("source", source), path)
    first, second = values(path)
    assert first == row | {"map": [("a", 1)], "source": "x"}
    assert second == dict.fromkeys(row) | {"map": None, "source": "y"}
    assert all(record.columnar for record in read(path)[0])


def test_rows_beyond_one_batch_keep_their_numbers(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"a": number} for number in range(1, 3001)], row_group_size=700)
    records, _ = read(path)
    assert [record.row for record in records] == [record.value["a"] for record in records] == list(range(1, 3001))


def test_a_value_that_has_no_python_form_names_its_row(tmp_path: Path) -> None:
    days = pyarrow.array([0, 2**62, 1], pyarrow.timestamp("ms"))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"when": days}), path)
    records, wrong = read(path)
    assert [record.row for record in records] == [1, 3]
    assert wrong.startswith(f"{path}:2: a value that cannot be read: ")


def test_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, names=["a", "a"]), path)
    assert read(path) == ([], f"{path}: has the column 'a' more than once; give each a name of its own")


def test_broken_tables_are_refused_or_read_but_never_raise(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", [{"a": str(number)} for number in range(50)]).read_bytes()
    generator, path = random.Random(0), tmp_path / "a.parquet"
    refused = 0
    for _ in range(60):
        cut = bytearray(whole[: generator.randrange(len(whole))])
        changed = bytearray(whole)
        changed[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        for content in (cut, changed):
            path.write_bytes(content)
            refused += f"{path}:" in read(path)[1]
    assert refused > 60


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_broken_text_is_refused_or_read_but_never_raises(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": "1 ü 大", "extra_info": {"list": [number, None]}} for number in range(20)]
    text = json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    generator, path = random.Random(0), tmp_path / f"a.{suffix}"
    refused = 0
    for _ in range(100):
        content, place = bytearray(text.encode()), generator.randrange(len(text))
        content[place : place + generator.randrange(30)] = generator.randbytes(generator.randrange(4))
        path.write_bytes(content)
        refused += f"{path}:" in read(path)[1]
    assert refused > 60


def test_what_is_no_file(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "folder.jsonl", tmp_path / "pipe.jsonl"
    folder.mkdir()
    os.mkfifo(pipe)
    assert read(folder)[1] == f"{folder}: no such file, but a folder; name the files in it"
    assert read(pipe)[1].startswith(f"{pipe}: no regular file")
    assert read("~nobody-of-this-name/a.jsonl")[1].startswith("~nobody-of-this-name/a.jsonl: ")
    assert read(tmp_path / "none.jsonl")[1].startswith(f"{tmp_path}/none.jsonl: no such file")
    assert read(tmp_path / ("x" * 300 + ".jsonl"))[1].endswith(": cannot be read: File name too long")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.symlink_to("/proc/self/mem")  # opens, and fails when it is read
    assert read(path)[1] == f"{path}: cannot be read: Input/output error"


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n')
    assert [record.location for record in read("~/a.jsonl")[0]] == [f"{tmp_path}/a.jsonl:1"]


def test_a_file_that_vanishes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    problems = DataProblems()
    records = read_records(str(path), problems)
    path.unlink()
    assert list(records) == []
    assert len(problems) == 1
