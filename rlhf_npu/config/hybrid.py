"""How generating and training share a device's memory."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_npu.config.keys import GIBIBYTES, ConfigNode, key

PLANS = ("auto", "offload", "keep")
SHARES = ("auto", "off")


@dataclass
class HybridConfig(ConfigNode):
    """What sleeps while it is not needed; `python -m rlhf_npu.plan` shows it."""

    plan: str = key(
        "what sleeps: auto = as little as fits, offload = all that can, keep = the rollout alone", "auto", choices=PLANS
    )
    share_weights: str = key(
        "weights that trainer and rollout keep once: auto = all that have the same layout in both, off = none",
        "off",
        choices=SHARES,
    )
    device_memory_gb: float | None = key(
        "GiB of a device that may be used; null = all that the driver says", None, within=GIBIBYTES
    )
