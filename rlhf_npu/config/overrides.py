"""Overrides as users type them, put into words that Hydra takes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from rlhf_npu.config.keys import Leaf, spell
from rlhf_npu.config.schema import Schema

# A path that begins in a home folder, as a value or an item of a list: Hydra knows `~` only before a key.
_HOME_PATH = re.compile(r"(?<=[=\[,])~[^,\[\]{}'\"\\]*")


def as_hydra_takes_them(overrides: Sequence[str], schema: Schema) -> list[str]:
    """The overrides, with deletions of schema keys written as assignments and `~` in paths quoted.

    A key of the schema cannot go away: deleting it (`~key`, or `~node` for all keys in it) brings back the default
    that the schema has for it, whatever YAML files set. Other deletions, of groups and of what was added to
    `reward.kwargs` for example, are Hydra's.
    """
    return [written for text in overrides for written in _written(text, schema)]


def deletable(key: str, schema: Schema) -> list[Leaf] | None:
    """The leaves that `~key` resets; None if the schema has no such key or one of them has no default to return to."""
    below = [leaf for name, leaf in schema.leaves.items() if name == key or name.startswith(f"{key}.")]
    return below if below and all(leaf.has_default and leaf.default != {} for leaf in below) else None


def _written(text: str, schema: Schema) -> Iterator[str]:
    if "~" not in text:  # parsing takes milliseconds
        yield text
        return
    override = _parsed(text)
    if override is None and _parsed(quoted := _HOME_PATH.sub(r"'\g<0>'", text)):
        yield quoted
        return
    leaves = deletable(str(override.key_or_group), schema) if override and override.is_delete() else None
    if override is None or leaves is None or override.value() is not None:
        yield text
    else:
        yield from (f"{leaf.key}={_quoted(leaf.default)}" for leaf in leaves)


def _parsed(text: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def _quoted(value: Any) -> str:
    """A default, as Hydra's grammar has it."""
    if isinstance(value, list):
        return "[" + ",".join(map(_quoted, value)) + "]"
    return f"'{value}'" if isinstance(value, str) else spell(value)
