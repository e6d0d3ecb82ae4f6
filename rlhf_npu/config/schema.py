"""The configuration of each entry point: its class, its keys, and the YAML file that composes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from hydra.core.config_store import ConfigStore

from rlhf_npu.config.keys import Leaf, leaves
from rlhf_npu.config.names_elsewhere import NAMES_HERE, NOT_HERE
from rlhf_npu.config.offline import DPOConfig, RewardModelConfig, SFTConfig
from rlhf_npu.config.offline_names_elsewhere import OFFLINE_NAMES_HERE, OFFLINE_NOT_HERE
from rlhf_npu.config.ppo import PPOConfig
from rlhf_npu.config.root import RootConfig


@dataclass(frozen=True)
class Schema:
    """What an entry point can be told.

    Attributes:
        name: of the primary YAML file, and what Hydra's store calls the class is `<name>_schema`.
        names_here: what keys of other libraries are called here.
        not_here: keys of other libraries that do not exist here: whose they are, and why.
        free_node: a key under which the user's own keys stand; None if there is none.
    """

    name: str
    root: type[RootConfig]
    names_here: Mapping[str, str]
    not_here: Mapping[str, tuple[str, str]]
    free_node: str | None = None

    @property
    def stored_as(self) -> str:
        """What the defaults list of a YAML file calls it."""
        return f"{self.name}_schema"

    @cached_property
    def leaves(self) -> dict[str, Leaf]:
        """All keys that have a value."""
        return {leaf.key: leaf for leaf in leaves(self.root)}

    @cached_property
    def keys(self) -> frozenset[str]:
        """All keys, those of nodes too."""
        nodes = {key.rsplit(".", depth)[0] for key in self.leaves for depth in range(1, key.count(".") + 1)}
        return frozenset({*self.leaves, *nodes})

    def is_free(self, key: str) -> bool:
        """Whether `key` is the user's own."""
        return self.free_node is not None and key.startswith(f"{self.free_node}.")

    def is_known(self, key: str) -> bool:
        """Whether the schema has this key, or leaves it to the user."""
        return key in self.keys or self.is_free(key)


PPO = Schema("ppo", PPOConfig, NAMES_HERE, NOT_HERE, free_node="reward.kwargs")
SFT = Schema("sft", SFTConfig, OFFLINE_NAMES_HERE, OFFLINE_NOT_HERE)
DPO = Schema("dpo", DPOConfig, OFFLINE_NAMES_HERE, OFFLINE_NOT_HERE)
REWARD = Schema("reward", RewardModelConfig, OFFLINE_NAMES_HERE, OFFLINE_NOT_HERE)
SCHEMAS = {schema.name: schema for schema in (PPO, SFT, DPO, REWARD)}

for schema in SCHEMAS.values():
    ConfigStore.instance().store(name=schema.stored_as, node=schema.root)
