"""Entry point: `python -m rlhf_npu.plan [key=value ...]` shows what a run would hold on one device, and runs nothing.

Takes the keys and flags of `rlhf_npu.main_ppo`, and reads only the configuration and each model's `config.json`: no
device, no Ray, no weights. Ends with status 1 where the run would not fit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from rlhf_npu.interrupts import exit_at_once

if __name__ == "__main__":
    exit_at_once()  # before the imports below, which take a second, and those of the models, which take many

from rich.console import Console

from rlhf_npu.config import PPO, PPOConfig, run_from_command_line
from rlhf_npu.config.sizes import read_size
from rlhf_npu.edges import errors_as
from rlhf_npu.errors import ConfigError, PlanError
from rlhf_npu.installation import check_installation

DEVICE_MEMORY, PICTURE = "--device-memory", "--picture"
HELP_PAGE = "hydra/help=rlhf_npu_plan"
WIDTH = 140  # of a page that no terminal shows
DOES_NOT_FIT = 1


def main() -> None:
    """Compose the configuration from the command line and show its plan."""
    options = _own_options()
    run_from_command_line(PPO, partial(show, memory=options.device_memory, picture=options.picture))


def show(config: PPOConfig, memory: str | None, picture: str | None) -> None:
    """Print the plan of a run as `config` says; the models' libraries are imported only now.

    Args:
        memory: of a device, as `--device-memory` has it; None asks this machine's.
        picture: PNG file to draw.

    Raises:
        RlhfNpuError: what is wrong with the installation, the configuration, a model or the device.
        SystemExit: with status 1 if it does not fit.
    """
    check_installation()
    from rlhf_npu.hybrid.memory.memory_demand import Device, device_of
    from rlhf_npu.hybrid.memory.memory_plan import fitting_plan, models_of, occupancy
    from rlhf_npu.platform import detect_platform

    config = _with_resolved_models(config)
    if memory is None:
        device = device_of(config, detect_platform(config.trainer.device))
    else:
        size = read_size(memory, DEVICE_MEMORY)
        device = Device("npu" if config.trainer.device == "auto" else config.trainer.device, size, size)
    models = models_of(config)
    refusal = plan = None
    try:
        plan = fitting_plan(config, models, device)
    except PlanError as error:
        refusal = error
    page = occupancy(config, models, device, plan)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(page.table())
    if picture is not None:
        with errors_as(ConfigError, f"{PICTURE} {picture}: cannot be written"):
            page.draw(Path(picture))
    if refusal is not None:
        Console(stderr=True).print(f"[bold red]error:[/] {refusal}", soft_wrap=True, highlight=False)
        sys.exit(DOES_NOT_FIT)
    console.print(str(plan), soft_wrap=True, highlight=False)


def _own_options() -> argparse.Namespace:
    """This program's own flags, which are taken out of `sys.argv`: the rest is Hydra's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(DEVICE_MEMORY)
    parser.add_argument(PICTURE)
    options, rest = parser.parse_known_args()
    sys.argv[1:] = [*rest, HELP_PAGE] if {"--help", "-h"} & set(rest) else rest
    return options


def _with_resolved_models(config: PPOConfig) -> PPOConfig:
    """The configuration with the local folders that its models' builtin names stand for."""
    from rlhf_npu.data.builtin import resolve

    policy, critic = config.actor_rollout_ref, config.critic
    policy = replace(policy, model=replace(policy.model, path=resolve(policy.model.path)))
    if critic.model.path is not None:
        critic = replace(critic, model=replace(critic.model, path=resolve(critic.model.path)))
    scoring = config.reward_model
    if scoring.model.path is not None:
        scoring = replace(scoring, model=replace(scoring.model, path=resolve(scoring.model.path)))
    return replace(config, actor_rollout_ref=policy, critic=critic, reward_model=scoring)


if __name__ == "__main__":
    main()
