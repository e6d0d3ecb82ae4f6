"""Records of a data file, each with the row it stands in."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet

from rlhf_npu.data.problems import DataProblems
from rlhf_npu.edges import one_line
from rlhf_npu.errors import DataError

_KINDS = ".parquet, .jsonl or .json"
_BATCH_ROWS = 1024
_ARRAY_CHARACTERS = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")
_NOT_TEXT = {
    b"\xff\xfe": "is UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "is UTF-16 text; save it as UTF-8",
    b"\x1f\x8b": "is compressed with gzip; decompress it",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it",
    b"PAR1": "is a Parquet file; let its name end in .parquet",
}


@dataclass(frozen=True)
class Record:
    """What stands in one row, unchecked.

    Attributes:
        row: line, row or element of the array, from 1.
        columnar: it comes from a table, where a key that one row lacks is there as a null.
    """

    file: str
    row: int
    value: Any
    columnar: bool

    @property
    def location(self) -> str:
        """`file:row`, for people to read."""
        return f"{self.file}:{self.row}"


def read_records(file: str, problems: DataProblems) -> Iterator[Record]:
    """Each record of a Parquet file, of a file of JSON lines, or of a .json file that is one array.

    What cannot be read is added to `problems`; reading goes on with the next row where there is one.
    """
    try:
        path = _expanded(file)
        yield from _reader(path)(path, problems)
    except DataError as error:
        problems.add(str(error))
    except OSError as error:
        problems.add(f"{file}: cannot be read: {error.strerror or error}")


def _expanded(file: str) -> Path:
    try:
        return Path(file).expanduser()
    except RuntimeError as error:
        raise DataError(f"{file}: {error}") from error


def _reader(path: Path) -> Any:
    if path.is_dir():
        raise DataError(f"{path}: no such file, but a folder; name the files in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; data.train_files and data.val_files name files of prompts")
    if not path.is_file():
        raise DataError(f"{path}: no regular file; name one that can be read more than once")
    readers = {".parquet": _parquet_records, ".jsonl": _json_lines, ".json": _json_records}
    if path.suffix not in readers:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; use {_KINDS}")
    return readers[path.suffix]


def _parquet_records(path: Path, problems: DataProblems) -> Iterator[Record]:
    row = 0
    for batch in _parquet_batches(path):
        try:
            values = batch.to_pylist()
        except Exception:  # noqa: BLE001  # a value without a Python form: find its row
            values = _row_by_row(path, batch, row, problems)
        for value in values:
            row += 1
            if value is not None:
                yield Record(str(path), row, value, columnar=True)


def _parquet_batches(path: Path) -> Iterator[Any]:
    # pyarrow raises its own exceptions, OSError, ValueError and more, as the bytes have it.
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if not twice:
                yield from file.iter_batches(_BATCH_ROWS)
    except Exception as error:
        raise DataError(f"{path}: not a readable Parquet file: {one_line(error)}") from error
    if twice:
        raise DataError(f"{path}: has the column {twice[0]!r} more than once; give each a name of its own")


def _row_by_row(path: Path, batch: Any, before: int, problems: DataProblems) -> list[Any]:
    """The rows of `batch`; None for those that have no Python form, which are problems."""
    values: list[Any] = []
    for place in range(batch.num_rows):
        try:
            values += batch.slice(place, 1).to_pylist()
        except Exception as error:  # noqa: BLE001  # reported, with its row
            problems.add(f"{path}:{before + place + 1}: a value that cannot be read: {one_line(error)}")
            values.append(None)
    return values


def _json_records(path: Path, problems: DataProblems) -> Iterator[Record]:
    """JSON lines, or one array of objects."""
    _check_is_text(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
    return _json_array(path) if start == "[" else _json_lines(path, problems)


def _json_array(path: Path) -> Iterator[Record]:
    read = 0
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            for read, value in enumerate(_elements(file), start=1):
                yield Record(str(path), read, value, columnar=False)
    except (ValueError, RecursionError):  # the whole text says where it is wrong
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        values = _parse_json(text, str(path), "the file starts as an array of objects")
        for number, value in enumerate(values[read:], start=read + 1):
            yield Record(str(path), number, value, columnar=False)


def _elements(file: TextIO) -> Iterator[Any]:
    """The elements of an array, of which a piece at a time is in memory.

    Raises:
        ValueError, RecursionError: the text is no such array; those before were right.
    """
    size, text = _ARRAY_CHARACTERS, file.read(_ARRAY_CHARACTERS)
    text.encode()
    place, behind = _space_end(text, 0) + 1, "["
    if text[place - 1 : place] != "[":
        raise ValueError("no array")
    while behind != "]":
        try:
            value, place, behind = _element(text, place, behind)
        except (ValueError, IndexError):
            piece = file.read(size)
            piece.encode()
            if not piece:
                raise ValueError("the array does not end") from None
            text, place = text[place:] + piece, 0
            size = max(_ARRAY_CHARACTERS, len(text))
        else:
            yield from value
    if text[place:].strip() or file.read().strip():
        raise ValueError("something follows the array")


def _element(text: str, place: int, behind: str) -> tuple[list[Any], int, str]:
    """The element behind `[` or `,`, if there is one, where it ends, and what stands behind it.

    Raises:
        ValueError, IndexError: `text` holds no whole one.
    """
    place = _space_end(text, place)
    if behind == "[" and text[place] == "]":
        return [], place + 1, "]"
    value, place = _DECODER.raw_decode(text, place)
    place = _space_end(text, place)
    if text[place] not in ",]":
        raise ValueError("neither a comma nor the array's end")
    return [value], place + 1, text[place]


def _space_end(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _json_lines(path: Path, problems: DataProblems) -> Iterator[Record]:
    _check_is_text(path)
    # Bytes that are no UTF-8 become lone surrogates, which are found line by line. A carriage return ends a line too.
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = _parse_json(line, f"{path}:{number}", "a line holds one whole JSON object")
            except DataError as error:
                problems.add(str(error))
            else:
                yield Record(str(path), number, value, columnar=False)


def _check_is_text(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(4)
    for magic, problem in _NOT_TEXT.items():
        if start.startswith(magic):
            raise DataError(f"{path}: {problem}")


def _parse_json(text: str, location: str, right: str) -> Any:
    try:
        text.encode()
        return _DECODER.decode(text)
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location}: not JSON (no UTF-8 at character {error.start}); save the file as UTF-8"
        ) from error
    except RecursionError as error:
        raise DataError(f"{location}: nested too deeply to be read") from error
    except ValueError as error:
        raise DataError(f"{location}: not JSON ({error}); {right}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"JSON has no {name}, only null")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repetition, parse_constant=_refuse_constant, parse_float=_finite)
