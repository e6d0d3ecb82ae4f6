"""Says in one readable line each what is wrong with overrides that Hydra refused."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_npu.config.keys import Leaf, Problem, did_you_mean, leaves, nearest_choice
from rlhf_npu.config.names_elsewhere import name_here
from rlhf_npu.config.ppo import PPOConfig, problem_list
from rlhf_npu.errors import ConfigError

LEAVES: dict[str, Leaf] = {leaf.key: leaf for leaf in leaves(PPOConfig)}
KEYS = set(LEAVES) | {key.rsplit(".", depth)[0] for key in LEAVES for depth in range(1, key.count(".") + 1)}
FREE_NODE = "reward.kwargs."
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def explain(error: Exception, overrides: Sequence[str], folders: Sequence[Path]) -> ConfigError:
    """Turns what Hydra or OmegaConf raised into a message about the user's own input.

    Args:
        error: what was raised.
        overrides: the command line's `key=value` arguments.
        folders: where YAML files and groups were looked for.
    """
    lines = [line for text in overrides for line in _override_problems(text, folders)]
    return ConfigError(problem_list(lines or [_in_yaml(error)]))


def is_known(key: str) -> bool:
    """Whether the schema has this key; whatever is inside `reward.kwargs` belongs to the reward function."""
    return key in KEYS or key.startswith(FREE_NODE)


def unknown_key(key: str) -> str:
    """The line for a key that does not exist, with what was probably meant."""
    here = name_here(key)
    if here is not None:
        return f"unknown key {key}; here it is {here}"
    meant = nearest_keys(key)
    hint = f"did you mean {' or '.join(meant)}?" if meant else "--help lists all keys"
    return f"unknown key {key}; {hint}"


def nearest_keys(key: str) -> list[str]:
    """The existing keys that were probably meant: the same name elsewhere, else the closest spelling."""
    last = key.rsplit(".", 1)[-1]
    same_name = [known for known in LEAVES if known.rsplit(".", 1)[-1] == last]
    if same_name:
        return same_name if key == last else difflib.get_close_matches(key, same_name, n=1, cutoff=0)
    candidates = list(LEAVES) if "." in key else sorted(KEYS)
    close = difflib.get_close_matches(key, candidates, n=1, cutoff=0.75)
    if close:
        return close
    names = {known.rsplit(".", 1)[-1]: known for known in LEAVES}
    return [names[name] for name in difflib.get_close_matches(last, names, n=1, cutoff=0.75)]


def _override_problems(text: str, folders: Sequence[Path]) -> Iterator[str]:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        yield f"cannot read {text}: {reason}; write key=value, with quotes around spaces and brackets"
        return
    key = str(override.key_or_group)
    options = _options(key, folders)
    if options and not isinstance(override.value(), dict):
        yield from _option_problems(override, options)
    elif not key.startswith(("hydra.", "hydra/")) and not override.is_sweep_override():
        yield from _key_problems(override, key)


def _options(group: str, folders: Sequence[Path]) -> tuple[str, ...]:
    """The options of a group; none if there is no such group."""
    files = [file for folder in folders for file in sorted((folder / group).glob("*.yaml"))]
    return tuple(file.stem for file in files)


def _option_problems(override: Override, options: tuple[str, ...]) -> Iterator[str]:
    chosen = override.value()
    names = chosen if isinstance(chosen, list) else [chosen]
    for name in names:
        if name is not None and str(name) not in options:
            hint = did_you_mean(nearest_choice(name, options))
            yield str(Problem(str(override.key_or_group), name, f"must be one of {', '.join(options)}{hint}"))


def _key_problems(override: Override, key: str) -> Iterator[str]:
    if not is_known(key):
        yield unknown_key(key)
    elif key.startswith(FREE_NODE) and not (override.is_add() or override.is_force_add()):
        yield f"{key} is new; put a plus before it: +{override.input_line}"
    elif key in LEAVES and not override.is_delete():
        yield from _type_problems(LEAVES[key], override.value())


def _type_problems(leaf: Leaf, value: Any) -> Iterator[str]:
    schema = OmegaConf.structured(PPOConfig)
    try:
        OmegaConf.update(schema, leaf.key, value)
    except OmegaConfBaseException:
        yield str(Problem(leaf.key, value, f"must be {_type_name(leaf, value)}"))


def _type_name(leaf: Leaf, value: Any) -> str:
    if get_origin(leaf.type) is list:
        item = value if isinstance(value, (str, int, float)) else "a,b"
        return f"a list: {leaf.key}=[{item}]"
    if get_origin(leaf.type) is dict:
        return f"a set of names and values: {leaf.key}={{name:value}}"
    if get_origin(leaf.type) in (Union, types.UnionType):
        return " or ".join(TYPE_NAMES.get(part, "null") for part in get_args(leaf.type))
    return TYPE_NAMES[leaf.type]


def _in_yaml(error: Exception) -> str:
    """The message for what no override caused: a YAML file, or Hydra itself."""
    cause = next((link for link in _chain(error) if isinstance(link, OmegaConfBaseException)), None)
    if cause is None:
        return str(error).strip()
    file = re.match(r"In '[^']+'", str(error))
    place = f"{file[0]}: " if file else ""
    key = str(cause.full_key or "")
    if key and not is_known(key):
        return f"{place}{unknown_key(key)}"
    detail = str(cause).splitlines()[0]
    return f"{place}{key}: {detail}" if key else f"{place}{detail}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
