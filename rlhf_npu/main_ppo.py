"""Entry point: `python -m rlhf_npu.main_ppo [key=value ...]` trains a policy with PPO or GRPO."""

from __future__ import annotations

from rlhf_npu.interrupts import exit_at_once

if __name__ == "__main__":
    exit_at_once()  # before the imports below, which take a second, and those of the engines, which take many

from rlhf_npu.config import PPO, PPOConfig, run_from_command_line
from rlhf_npu.garbage import search_seldom
from rlhf_npu.installation import check_installation


def main() -> None:
    """Compose the configuration from the command line and train."""
    run_from_command_line(PPO, train)


def train(config: PPOConfig) -> None:
    """Train as `config` says; the engines are imported only now, so that `--help` need not wait for them.

    Raises:
        RlhfNpuError: what is wrong with the installation, the configuration, the data, the model or the devices.
    """
    check_installation()
    search_seldom()  # until the workers have started
    from rlhf_npu.trainer.launch import train_ppo

    train_ppo(config)


if __name__ == "__main__":
    main()
