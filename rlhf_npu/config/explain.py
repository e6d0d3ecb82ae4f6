"""Says in one readable line each what is wrong with overrides that Hydra refused."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_npu.config.keys import Leaf, Problem, did_you_mean, nearest_choice, spell
from rlhf_npu.config.names_elsewhere import name_here, why_not_here
from rlhf_npu.config.overrides import deletable
from rlhf_npu.config.root import problem_list
from rlhf_npu.config.schema import Schema
from rlhf_npu.edges import causes, one_line
from rlhf_npu.errors import ConfigError

TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def explain(error: Exception, overrides: Sequence[str], folders: Sequence[Path], schema: Schema) -> ConfigError:
    """Turns what Hydra or OmegaConf raised into a message about the user's own input.

    Args:
        error: what was raised.
        overrides: the command line's `key=value` arguments.
        folders: where YAML files and groups were looked for.
        schema: what could have been typed.
    """
    lines = [line for text in overrides for line in _override_problems(text, folders, schema)]
    return ConfigError(problem_list(lines or [_in_yaml(error, folders, schema)]))


def unknown_key(key: str, schema: Schema) -> str:
    """The line for a key that does not exist, with what was probably meant."""
    here, why = name_here(key, schema.names_here), why_not_here(key, schema.not_here)
    if here is not None:
        return f"unknown key {key}; here it is {here}"
    if why is not None:
        return f"unknown key {key}; {why}"
    meant = nearest_keys(key, schema)
    hint = f"did you mean {' or '.join(meant)}?" if meant else "--help lists all keys"
    return f"unknown key {key}; {hint}"


def nearest_keys(key: str, schema: Schema) -> list[str]:
    """The existing keys that were probably meant: the same name elsewhere, else the closest spelling of it.

    Names are compared, not whole keys, of which most is alike anyway.
    """
    last = key.rsplit(".", 1)[-1]
    names = {known.rsplit(".", 1)[-1] for known in (schema.leaves if "." in key else schema.keys)}
    close = [last] if last in names else difflib.get_close_matches(last, sorted(names), n=1, cutoff=0.75)
    named = [known for known in sorted(schema.keys) if known.rsplit(".", 1)[-1] in close]
    if key == last and last in names:
        return named
    return difflib.get_close_matches(key, named, n=1, cutoff=0)


def _override_problems(text: str, folders: Sequence[Path], schema: Schema) -> Iterator[str]:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        yield f"cannot read {spell(text)}: {reason}; write key=value, with quotes around spaces and brackets"
        return
    key = str(override.key_or_group)
    if not key:
        yield f"cannot read {spell(text)}: no key; write key=value"
        return
    options = _options(key, folders)
    if override.is_delete():
        yield from _deletion_problems(override, key, options, schema)
    elif options and not isinstance(override.value(), dict):
        yield from _option_problems(override, options)
    elif not key.startswith(("hydra.", "hydra/")) and not override.is_sweep_override():
        yield from _key_problems(override, key, schema)


def _deletion_problems(override: Override, key: str, options: tuple[str, ...], schema: Schema) -> Iterator[str]:
    """`~key` brings back the schema's default, `~group` takes a group's option away, `~reward.kwargs.x` an argument."""
    if options or key.startswith(("hydra.", "hydra/")):
        return
    if schema.is_free(key):
        yield f"~{key}: there is no such argument to delete"
    elif key == schema.free_node:
        yield f"~{key}: delete its arguments one by one, as in ~{key}.name"
    elif key not in schema.keys:
        yield unknown_key(key, schema)
    elif override.value() is not None:
        yield f"~{key}={spell(override.value())}: write ~{key}, which brings its default back"
    elif deletable(key, schema) is None:
        unset = next(
            leaf for name, leaf in schema.leaves.items() if f"{name}.".startswith(f"{key}.") and not leaf.has_default
        )
        yield f"~{key}: {unset.key} has no default to go back to; set it: {unset.meaning}"


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


def _key_problems(override: Override, key: str, schema: Schema) -> Iterator[str]:
    value, adds = override.value(), override.is_add() or override.is_force_add()
    if not schema.is_known(key):
        yield unknown_key(key, schema)
    elif schema.is_free(key) and not adds:
        yield f"{key} is new; put a plus before it: +{override.input_line}"
    elif key in schema.leaves:
        yield from _type_problems(schema.leaves[key], value, schema)
        if override.is_add() and value is not None and not isinstance(value, (dict, list)):
            yield f"+{key}: is there already; write it without the plus: {key}={spell(value)}"
    elif key in schema.keys and not isinstance(value, dict):
        inside = next(name for name in schema.leaves if name.startswith(f"{key}."))
        yield str(Problem(key, value, f"is a group of keys; set one of them, for example {inside}"))


def _type_problems(leaf: Leaf, value: Any, schema: Schema) -> Iterator[str]:
    structured = OmegaConf.structured(schema.root)
    try:
        OmegaConf.update(structured, leaf.key, value)
    except OmegaConfBaseException:
        yield str(Problem(leaf.key, value, f"must be {_type_name(leaf, value)}"))


def _type_name(leaf: Leaf, value: Any) -> str:
    if get_origin(leaf.type) is list:
        item = value if isinstance(value, (str, int, float)) else "a,b"
        return f"a list: {leaf.key}=[{item}]"
    if get_origin(leaf.type) is dict:
        return f"a set of names and values: {leaf.key}={{name:value}}"
    if get_origin(leaf.type) in (Union, types.UnionType):
        parts = get_args(leaf.type)
        told = [part for part in parts if part is not int or float not in parts]  # a whole number is a number
        return " or ".join(TYPE_NAMES.get(part, "null") for part in told)
    return TYPE_NAMES[leaf.type]


def _in_yaml(error: Exception, folders: Sequence[Path], schema: Schema) -> str:
    """The message for what no override caused: a YAML file, or Hydra itself."""
    links = list(causes(error))
    cause = next((link for link in links if isinstance(link, OmegaConfBaseException)), None)
    if cause is not None:
        told = _in_node(str(error), cause, schema)
        return told if cause.full_key else next(_unreadable(folders), told)
    if isinstance(error, HydraException):
        return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return next(_unreadable(folders), one_line(error))


def _in_node(message: str, cause: OmegaConfBaseException, schema: Schema) -> str:
    file = re.match(r"In '[^']+'", message)
    place = f"{file[0]}: " if file else ""
    key = str(cause.full_key or "")
    if key and not schema.is_known(key):
        return f"{place}{unknown_key(key, schema)}"
    detail = str(cause).splitlines()[0]
    return f"{place}{key}: {detail}" if key else f"{place}{detail}"


def _unreadable(folders: Sequence[Path]) -> Iterator[str]:
    """YAML files that are none, each with its fault: Hydra does not always say which file it read."""
    for folder in folders:
        for file in sorted(folder.rglob("*.yaml")):
            try:
                content = OmegaConf.load(file)
            except yaml.MarkedYAMLError as error:
                line = error.problem_mark.line + 1 if error.problem_mark else 1
                yield f"{file}:{line}: not YAML: {error.problem}"
            except Exception as error:  # noqa: BLE001  # whatever a broken file makes the parser raise
                yield f"{file}: not YAML: {one_line(error)}"
            else:
                if not isinstance(content, DictConfig):
                    yield f"{file}: holds a list; it must hold keys and values"
