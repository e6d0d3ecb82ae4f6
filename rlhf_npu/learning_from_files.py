"""What the entry points `main_sft`, `main_dpo` and `main_reward` have in common."""

from __future__ import annotations

from rlhf_npu.config import OfflineConfig, Schema, run_from_command_line
from rlhf_npu.garbage import search_seldom
from rlhf_npu.installation import check_installation


def learn_from_files(schema: Schema) -> None:
    """Compose the configuration from the command line and train."""
    run_from_command_line(schema, train)


def train(config: OfflineConfig) -> None:
    """Train as `config` says; the engines are imported only now, so that `--help` need not wait for them.

    Raises:
        RlhfNpuError: what is wrong with the installation, the configuration, the data, the model or the devices.
    """
    check_installation()
    search_seldom()  # until the workers have started
    from rlhf_npu.trainer.offline_launch import train_offline

    train_offline(config)
