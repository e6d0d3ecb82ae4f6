"""The set of keys: how many, where their defaults are, and what users are told about them."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf_npu.config import PPOConfig, compose_config
from rlhf_npu.config.compose import config_folder
from rlhf_npu.config.explain import is_known
from rlhf_npu.config.names_elsewhere import NAMES_HERE, NOT_HERE
from rlhf_npu.config.ppo import KEYS, LEAVES

PROJECT = Path(__file__).parents[2]


def yaml_leaves(node: Any, prefix: str = "") -> set[str]:
    if not isinstance(node, dict):
        return {prefix.rstrip(".")}
    return set().union(*(yaml_leaves(value, f"{prefix}{name}.") for name, value in node.items()))


def ppo_yaml() -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(config_folder() / "ppo.yaml"))
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items() if name not in ("defaults", "hydra")}


def test_there_are_at_most_150_keys() -> None:
    assert len(LEAVES) <= 150


def test_each_default_is_written_in_one_place() -> None:
    in_dataclass = {key for key, leaf in LEAVES.items() if leaf.has_default}
    in_yaml = yaml_leaves(ppo_yaml())
    assert in_yaml & in_dataclass == set()
    assert set(LEAVES) - in_dataclass == in_yaml


def test_the_help_page_and_the_readme_name_only_existing_keys() -> None:
    page = (PROJECT / "configs" / "hydra" / "help" / "rlhf_npu.yaml").read_text()
    readme = (PROJECT / "README.md").read_text()
    nodes = "|".join(field.name for field in dataclasses.fields(PPOConfig))
    named = re.findall(rf"(?<![\w/.])(?:{nodes})\.[a-z_.]+[a-z_]", page + readme)
    assert len(named) > 10
    shown_as_mistakes = {"actor_rollout_ref.rollout.temprature", "trainer.n_gpus_per_node"}
    assert {key for key in named if not is_known(key)} == shown_as_mistakes


def test_names_from_other_libraries_point_at_existing_keys_and_hide_none() -> None:
    targets = re.findall(r"[a-z_]+(?:\.[a-z_]+)+(?=$|[ ,=])", " ".join(NAMES_HERE.values()))
    assert [key for key in targets if key not in KEYS and "file.py" not in key] == []
    assert set(NAMES_HERE) & KEYS == set()


def test_names_that_are_not_here_are_not_here_and_their_reasons_name_keys_that_are() -> None:
    parts = {part for key in KEYS for part in key.split(".")}
    assert [name for name in NOT_HERE if name in parts or name in KEYS] == []
    nodes = "|".join({*parts - set(LEAVES), "rollout", "model"})
    reasons = " ".join(reason for _, reason in NOT_HERE.values())
    named = re.findall(rf"(?<![\w./])(?:{nodes})\.[a-z_.]+[a-z_]", reasons)
    assert [name for name in named if not any(f".{key}".endswith(f".{name}") for key in KEYS)] == []


def test_a_checked_configuration_is_read_only_and_can_be_copied_with_changes() -> None:
    config = compose_config()
    with pytest.raises(dataclasses.FrozenInstanceError, match=r"RolloutConfig\.n is fixed"):
        config.actor_rollout_ref.rollout.n = 8
    assert dataclasses.replace(config.actor_rollout_ref.rollout, n=8).n == 8
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_checked_configuration_can_be_saved_and_loaded() -> None:
    config = compose_config(["+reward.kwargs.scale=2"])
    saved = OmegaConf.to_yaml(OmegaConf.structured(config))
    again = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PPOConfig), OmegaConf.create(saved)))
    assert again == config
