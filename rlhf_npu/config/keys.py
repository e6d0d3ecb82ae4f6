"""What every configuration node is made of: documented keys that know which values are right."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from omegaconf import MISSING


@dataclass(frozen=True)
class Problem:
    """One key whose value cannot work.

    Attributes:
        key: dotted name, as typed on the command line.
        value: what it was set to.
        right: what would be right.
    """

    key: str
    value: Any
    right: str

    def __str__(self) -> str:
        return f"{self.key}={spell(self.value)}: {self.right}"


def spell(value: Any) -> str:
    """Writes a value as the command line takes it: `null`, `true`, `[a,b]`; what could not be printed, escaped."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(spell(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{spell(item)}" for name, item in value.items()) + "}"
    text = str(value)
    return text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()


@dataclass(frozen=True)
class Range:
    """Bounds of a number; `None` leaves a side open."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            -math.inf < value < math.inf
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return " and ".join(f"{word} {_number(bound)}" for word, bound in bounds.items() if bound is not None)


def _number(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


POSITIVE = Range(above=0)
AT_LEAST_ONE = Range(at_least=1)
NOT_NEGATIVE = Range(at_least=0)
SEED = Range(at_least=0, at_most=2**63 - 1)
LARGEST_COUNT = 2**31 - 1
FRACTION = Range(at_least=0, at_most=1)
GIBIBYTES = Range(above=0, at_most=1 << 20)


def key(
    meaning: str,
    default: Any = MISSING,
    *,
    choices: tuple[Any, ...] = (),
    words: tuple[str, ...] = (),
    within: Range | None = None,
    elsewhere: dict[str, str] | None = None,
    path: bool = False,
) -> Any:
    """Declares a leaf of the configuration.

    Args:
        meaning: one line for `--help`, with the unit.
        default: the only place where it is written; left out where the YAML sets the value.
        choices: the values allowed, for the value itself or for each item of a list.
        words: what a number may be instead.
        within: the bounds, for the value itself or for each item of a list.
        elsewhere: what other libraries call a choice, to the choice's name here.
        path: whether it, or each item of a list, is a file or folder; `~` is then the home folder.
    """
    metadata = {
        "meaning": meaning,
        "choices": choices,
        "words": words,
        "within": within,
        "elsewhere": elsewhere or {},
        "path": path,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=_copier(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _copier(default: Any) -> Callable[[], Any]:
    return lambda: type(default)(default)


class ConfigNode:
    """A dataclass that checks itself, and that nobody changes once it has been checked."""

    def relations(self) -> Iterator[Problem]:
        """Problems between this node's keys (names relative to it); each key alone is already right."""
        return iter(())

    def problems(self, prefix: str = "") -> list[Problem]:
        """All problems in this node and below, with full names."""
        own: list[Problem] = []
        below: list[Problem] = []
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, ConfigNode):
                below += value.problems(f"{prefix}{item.name}.")
            else:
                own += _leaf_problems(prefix + item.name, value, item.metadata)
        if not own:
            own += [dataclasses.replace(problem, key=prefix + problem.key) for problem in self.relations()]
        return own + below

    def expand_home(self) -> None:
        """Writes out `~` in paths, here and below."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, ConfigNode):
                value.expand_home()
            elif item.metadata["path"] and isinstance(value, list):
                setattr(self, item.name, [os.path.expanduser(path) for path in value])  # noqa: PTH111
            elif item.metadata["path"] and isinstance(value, str):
                setattr(self, item.name, os.path.expanduser(value))  # noqa: PTH111

    def freeze(self) -> None:
        """Makes this node and all below it read-only."""
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, ConfigNode):
                value.freeze()
        self.__dict__["_frozen"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_frozen", False):
            raise dataclasses.FrozenInstanceError(
                f"{type(self).__name__}.{name} is fixed once the configuration has been checked; "
                "make a changed copy with dataclasses.replace"
            )
        super().__setattr__(name, value)


def _leaf_problems(name: str, value: Any, metadata: Any) -> list[Problem]:
    if isinstance(value, str) and value == MISSING:
        return [Problem(name, value, f"has no value; set it: {metadata['meaning']}")]
    if unwritable := next(filter(_is_unwritable, _texts(value)), None):
        return [Problem(name, value, f"must be text that UTF-8 can hold, without null bytes, not {unwritable!r}")]
    items = value if isinstance(value, list) else [value]
    found = [_item_problem(name, value, item, metadata) for item in items if item is not None]
    return [problem for problem in found if problem is not None]


def _item_problem(name: str, value: Any, item: Any, metadata: Any) -> Problem | None:
    choices, words, within = metadata["choices"], metadata["words"], metadata["within"]
    if choices and item not in choices:
        allowed = ", ".join(map(spell, choices))
        hint = did_you_mean(metadata["elsewhere"].get(item) or nearest_choice(item, choices))
        return Problem(name, value, f"must be one of {allowed}{hint}")
    if words and isinstance(item, str):
        return None if item in words else Problem(name, value, f"must be {' or '.join(words)}, or a number {within}")
    if within is not None and not within.holds(item):
        return Problem(name, value, f"must be {within}")
    if within is not SEED and isinstance(item, int) and item > LARGEST_COUNT:
        return Problem(name, value, f"must be at most {LARGEST_COUNT}")
    if metadata["path"] and not item.strip():
        return Problem(name, value, "must name a file or a folder")
    if metadata["path"] and item.startswith("~"):
        return Problem(name, value, "there is no such user, whose home folder it would be")
    return None


def _texts(value: Any) -> Iterator[str]:
    """All text inside a value, names of a mapping included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _is_unwritable(text: str) -> bool:
    try:
        return b"\0" in text.encode()
    except UnicodeEncodeError:
        return True


def nearest_choice(item: Any, choices: tuple[Any, ...]) -> str | None:
    """The choice spelt most like `item`, if any is."""
    close = difflib.get_close_matches(str(item), [str(choice) for choice in choices], n=1)
    return close[0] if close else None


def did_you_mean(name: str | None) -> str:
    """The hint at the end of a message."""
    return f" (did you mean {name}?)" if name else ""


@dataclass(frozen=True)
class Leaf:
    """One leaf of a configuration class.

    Attributes:
        key: dotted name.
        owner: the dataclass that declares it.
        name: its name there.
        type: its annotation.
        meaning: one line, with the unit.
        choices: the values allowed; empty if it has no such list.
        has_default: whether the dataclass gives the value (otherwise the YAML does).
        default: that value; MISSING without one.
    """

    key: str
    owner: type[ConfigNode]
    name: str
    type: Any
    meaning: str
    choices: tuple[Any, ...]
    has_default: bool
    default: Any


def leaves(node: type[ConfigNode], prefix: str = "") -> Iterator[Leaf]:
    """Walks a configuration class in the order in which `--cfg job` prints it."""
    types = get_type_hints(node)
    for item in dataclasses.fields(node):  # type: ignore[arg-type]
        if "meaning" in item.metadata:
            yield Leaf(
                key=prefix + item.name,
                owner=node,
                name=item.name,
                type=types[item.name],
                meaning=item.metadata["meaning"],
                choices=item.metadata["choices"],
                has_default=item.default != MISSING,
                default=item.default if item.default_factory is dataclasses.MISSING else item.default_factory(),
            )
        else:
            yield from leaves(types[item.name], f"{prefix}{item.name}.")
