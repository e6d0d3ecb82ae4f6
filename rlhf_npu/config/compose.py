"""Composes YAML, groups and overrides into a checked `PPOConfig`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import rlhf_npu
from rlhf_npu.config.explain import explain, is_known, unknown_key
from rlhf_npu.config.overrides import as_hydra_takes_them
from rlhf_npu.config.ppo import PPOConfig, problem_list
from rlhf_npu.errors import ConfigError, RlhfNpuError

HYDRA_VERSION_BASE = "1.3"
SCHEMA_NAME = "ppo_schema"

ConfigStore.instance().store(name=SCHEMA_NAME, node=PPOConfig)


def config_folder() -> Path:
    """The folder of YAML files: inside an installed package, beside it in a source tree."""
    package = Path(rlhf_npu.__file__).resolve().parent
    installed, source = package / "configs", package.parent / "configs"
    return installed if installed.is_dir() else source


def compose_config(overrides: Sequence[str] = (), config_name: str = "ppo") -> PPOConfig:
    """Composes a configuration as the command line would.

    Args:
        overrides: `key=value` and `group=option`, as typed.
        config_name: the primary YAML file, without its suffix.

    Raises:
        ConfigError: an unknown key, a wrong type or value, or batch sizes that do not divide.
    """
    folder = config_folder()
    try:
        with initialize_config_dir(str(folder), version_base=HYDRA_VERSION_BASE):
            return checked(compose(config_name, overrides=as_hydra_takes_them(overrides)))
    except RlhfNpuError:
        raise
    except Exception as error:
        raise explain(error, overrides, [folder]) from error


def checked(composed: DictConfig) -> PPOConfig:
    """Turns Hydra's result into the dataclass, checks it and freezes it."""
    unknown = [unknown_key(key) for key in _leaf_keys(OmegaConf.to_container(composed)) if not is_known(key)]
    unset = [f"{key}=???: has no value; --help says what it means" for key in OmegaConf.missing_keys(composed)]
    if unknown or unset:
        raise ConfigError(problem_list([*unknown, *sorted(unset)]))
    config = OmegaConf.to_object(composed)
    if not isinstance(config, PPOConfig):
        raise ConfigError(f"the primary configuration must have {SCHEMA_NAME} first in its defaults list")
    config.expand_home()
    config.check()
    return config


def _leaf_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Names of all leaves: `+key=value` adds some that the schema does not have."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaf_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
