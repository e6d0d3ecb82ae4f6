"""The page that `--help` prints: every key with its value and meaning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from rlhf_npu.config.keys import Leaf, spell
from rlhf_npu.config.schema import Schema

RESOLVER = "key_reference"
MEANING_COLUMN = 58


def register(schema: Schema) -> None:
    """Makes `${key_reference:}` known, which the pages in configs/hydra/help use."""

    def reference(*, _root_: DictConfig) -> str:
        # The page goes through string.Template, where a dollar sign is written twice.
        return key_reference(_root_, schema).replace("$", "$$")

    OmegaConf.register_new_resolver(RESOLVER, reference, replace=True)


def key_reference(composed: DictConfig, schema: Schema) -> str:
    """All keys as YAML, each with its value and its meaning."""
    lines: list[str] = []
    open_nodes: list[str] = []
    for leaf in schema.leaves.values():
        nodes = leaf.key.split(".")[:-1]
        lines += _node_lines(open_nodes, nodes)
        lines.append(_leaf_line(leaf, len(nodes), _value(composed, leaf.key)))
        open_nodes = nodes
    return "\n".join(lines)


def _node_lines(before: list[str], nodes: list[str]) -> Iterator[str]:
    shared = 0
    while shared < min(len(before), len(nodes)) and before[shared] == nodes[shared]:
        shared += 1
    for depth in range(shared, len(nodes)):
        yield f"{'  ' * depth}{nodes[depth]}:"


def _leaf_line(leaf: Leaf, depth: int, value: str) -> str:
    entry = f"{'  ' * depth}{leaf.name}: {value}"
    choices = f" ({' | '.join(map(spell, leaf.choices))})" if leaf.choices else ""
    return f"{entry.ljust(MEANING_COLUMN)} # {leaf.meaning}{choices}"


def _value(composed: DictConfig, key: str) -> str:
    container: Any = OmegaConf.to_container(composed, resolve=False)
    for part in key.split("."):
        container = container[part]
    return spell(container)
