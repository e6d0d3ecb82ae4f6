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
from rlhf_npu.config.names_elsewhere import NAMES_HERE, NOT_HERE
from rlhf_npu.config.offline_names_elsewhere import OFFLINE_NAMES_HERE, OFFLINE_NOT_HERE
from rlhf_npu.config.schema import DPO, PPO, REWARD, SCHEMAS, SFT, Schema

PROJECT = Path(__file__).parents[2]


def yaml_leaves(node: Any, prefix: str = "") -> set[str]:
    if not isinstance(node, dict):
        return {prefix.rstrip(".")}
    return set().union(*(yaml_leaves(value, f"{prefix}{name}.") for name, value in node.items()))


def yaml_of(name: str) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(config_folder() / f"{name}.yaml"))
    assert isinstance(content, dict)
    return {str(name): value for name, value in content.items() if name not in ("defaults", "hydra")}


def test_no_entry_point_has_more_than_150_keys() -> None:
    assert {schema.name: len(schema.leaves) for schema in SCHEMAS.values() if len(schema.leaves) > 150} == {}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=list(SCHEMAS))
def test_each_default_is_written_in_one_place(schema: Schema) -> None:
    in_dataclass = {key for key, leaf in schema.leaves.items() if leaf.has_default}
    in_yaml = yaml_leaves(yaml_of(schema.name))
    assert in_yaml & in_dataclass == set()
    assert set(schema.leaves) - in_dataclass == in_yaml


def test_the_offline_loops_help_page_names_only_existing_keys() -> None:
    page = (PROJECT / "configs" / "hydra" / "help" / "rlhf_npu_offline.yaml").read_text()
    named = re.findall(r"(?<![\w/.])(?:data|model|optim|trainer)\.[a-z_.]+[a-z_]", page)
    assert len(named) > 8
    assert {(key, schema.name) for schema in (SFT, DPO, REWARD) for key in named if not schema.is_known(key)} == set()


def test_names_from_other_offline_trainers_point_at_existing_keys_and_hide_none() -> None:
    targets = re.findall(r"[a-z_]+(?:\.[a-z_]+)+(?=$|[ ,=])", " ".join(OFFLINE_NAMES_HERE.values()))
    known = SFT.keys | DPO.keys | REWARD.keys
    assert [key for key in targets if key not in known] == []
    assert set(OFFLINE_NAMES_HERE) & known == set()
    parts = {part for key in known for part in key.split(".")}
    assert [name for name in OFFLINE_NOT_HERE if name in parts] == []


def test_the_help_page_and_the_readme_name_only_existing_keys() -> None:
    page = (PROJECT / "configs" / "hydra" / "help" / "rlhf_npu.yaml").read_text()
    readme = (PROJECT / "README.md").read_text()
    nodes = "|".join(field.name for field in dataclasses.fields(PPOConfig))
    named = re.findall(rf"(?<![\w/.])(?:{nodes})\.[a-z_.]+[a-z_]", page + readme)
    assert len(named) > 10
    shown_as_mistakes = {"actor_rollout_ref.rollout.temprature", "trainer.n_gpus_per_node"}
    assert {key for key in named if not PPO.is_known(key)} == shown_as_mistakes


def test_names_from_other_libraries_point_at_existing_keys_and_hide_none() -> None:
    targets = re.findall(r"[a-z_]+(?:\.[a-z_]+)+(?=$|[ ,=])", " ".join(NAMES_HERE.values()))
    assert [key for key in targets if key not in PPO.keys and "file.py" not in key] == []
    assert set(NAMES_HERE) & PPO.keys == set()


def test_names_that_are_not_here_are_not_here_and_their_reasons_name_keys_that_are() -> None:
    parts = {part for key in PPO.keys for part in key.split(".")}
    assert [name for name in NOT_HERE if name in parts or name in PPO.keys] == []
    nodes = "|".join({*parts - set(PPO.leaves), "rollout", "model"})
    reasons = " ".join(reason for _, reason in NOT_HERE.values())
    named = re.findall(rf"(?<![\w./])(?:{nodes})\.[a-z_.]+[a-z_]", reasons)
    assert [name for name in named if not any(f".{key}".endswith(f".{name}") for key in PPO.keys)] == []


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
