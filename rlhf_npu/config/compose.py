"""Composes YAML, groups and overrides into a checked configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

import rlhf_npu
from rlhf_npu.config.explain import explain, unknown_key
from rlhf_npu.config.overrides import as_hydra_takes_them
from rlhf_npu.config.ppo import PPOConfig
from rlhf_npu.config.root import RootConfig, problem_list
from rlhf_npu.config.schema import PPO, SCHEMAS, Schema
from rlhf_npu.errors import ConfigError, RlhfNpuError

HYDRA_VERSION_BASE = "1.3"


def config_folder() -> Path:
    """The folder of YAML files: inside an installed package, beside it in a source tree."""
    package = Path(rlhf_npu.__file__).resolve().parent
    installed, source = package / "configs", package.parent / "configs"
    return installed if installed.is_dir() else source


def compose_config(overrides: Sequence[str] = (), config_name: str = "ppo") -> PPOConfig:
    """Composes a configuration of PPO's loop as the command line would.

    Args:
        overrides: `key=value` and `group=option`, as typed.
        config_name: the primary YAML file, without its suffix.

    Raises:
        ConfigError: an unknown key, a wrong type or value, or batch sizes that do not divide.
    """
    config = compose_as(PPO, overrides, config_name)
    assert isinstance(config, PPOConfig)
    return config


def compose_as(schema: Schema, overrides: Sequence[str] = (), config_name: str | None = None) -> RootConfig:
    """The same for any entry point; without `config_name`, from its own YAML file."""
    folder = config_folder()
    try:
        with initialize_config_dir(str(folder), version_base=HYDRA_VERSION_BASE):
            return checked(compose(config_name or schema.name, overrides=as_hydra_takes_them(overrides, schema)))
    except RlhfNpuError:
        raise
    except Exception as error:
        raise explain(error, overrides, [folder], schema) from error


def checked(composed: DictConfig) -> RootConfig:
    """Turns Hydra's result into the dataclass, checks it and freezes it."""
    schema = _schema_of(composed)
    names = _leaf_keys(OmegaConf.to_container(composed))
    unknown = [unknown_key(key, schema) for key in names if not schema.is_known(key)]
    unset = [f"{key}=???: has no value; --help says what it means" for key in OmegaConf.missing_keys(composed)]
    if unknown or unset:
        raise ConfigError(problem_list([*unknown, *sorted(unset)]))
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema.root)
    config.expand_home()
    config.check()
    return config


def _schema_of(composed: DictConfig) -> Schema:
    for schema in SCHEMAS.values():
        if OmegaConf.get_type(composed) is schema.root:
            return schema
    names = ", ".join(schema.stored_as for schema in SCHEMAS.values())
    raise ConfigError(f"the primary configuration must have one of {names} first in its defaults list")


def _leaf_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Names of all leaves: `+key=value` adds some that the schema does not have."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaf_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
