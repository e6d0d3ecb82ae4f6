"""What a record may hold beside its prompt: anything that can be sent to a worker and written as JSON."""

from __future__ import annotations

import datetime
import math
import uuid
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from rlhf_npu.edges import repr_of
from rlhf_npu.errors import DataError

MAX_DEPTH = 64
_MAX_DIGITS_BITS = 4096  # Python writes integers of at most 4,300 digits
_AS_TEXT = (Decimal, Fraction, datetime.timedelta, uuid.UUID)
_AS_ISO = (datetime.date, datetime.time)


def check_text(text: str, what: str) -> None:
    r"""Refuse half of a surrogate pair, such as "\ud800": no tokenizer takes it and no text file holds it.

    Raises:
        DataError: names `what` and the character's place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} has {text[error.start]!r} at character {error.start}, half of a surrogate pair; remove it"
        ) from error


def check_depth(value: Any, what: str, depth: int = MAX_DEPTH) -> None:
    """Refuse what is nested more than `MAX_DEPTH` deep: it could not be sent to a worker.

    Raises:
        DataError: names `what`.
    """
    if depth == 0:
        raise DataError(f"{what} is nested more than {MAX_DEPTH} deep; make it flatter")
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return
    for item in value:
        check_depth(item, what, depth - 1)


def json_form(value: Any, depth: int = MAX_DEPTH) -> Any:
    """`value` as JSON has it, for files that people read.

    Dates become ISO 8601, decimals and fractions text, bytes text if they are UTF-8 and hexadecimal otherwise,
    arrays, tensors, tuples and sets lists, numbers that JSON lacks text, and everything else its `repr`.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _MAX_DIGITS_BITS else hex(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if depth == 0:
        return "..."
    if isinstance(value, Mapping):
        return {_key(key): json_form(item, depth - 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_form(item, depth - 1) for item in value]
    return _other_form(value, depth)


def _other_form(value: Any, depth: int) -> Any:
    if isinstance(value, set | frozenset):
        return [json_form(item, depth - 1) for item in sorted(value, key=repr)]
    if isinstance(value, bytes | bytearray | memoryview):
        return _bytes_form(bytes(value))
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, _AS_ISO):
        return value.isoformat()
    if hasattr(value, "tolist"):  # arrays and tensors of any library, and numpy's scalars
        return _array_form(value, depth)
    return repr_of(value)


def _array_form(value: Any, depth: int) -> Any:
    try:
        listed = value.tolist()
    except Exception:  # noqa: BLE001  # a sparse tensor, or a class of a user's
        return repr_of(value)
    return json_form(listed, depth - 1) if type(listed) is not type(value) else repr_of(value)


def _bytes_form(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex()


def _key(key: Any) -> str:
    return key if isinstance(key, str) else str(json_form(key))
