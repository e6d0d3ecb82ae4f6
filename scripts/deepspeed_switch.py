"""The switch as DeepSpeed offers it, for bench_switch.py to measure beside this project's.

The trainer's states are outside of the sleep pool. `offload_states` copies all of them to pinned host memory, and
`reload_states` back; the reshard gathers one parameter after the other and hands it to vLLM's `load_weights`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import torch

from rlhf_npu.algorithms.token_probs import log_probs_from_logits
from rlhf_npu.config import PPOConfig
from rlhf_npu.engines.models import load_policy
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.platform import Platform


class DeepSpeedSwitch:
    """A trainer and a rollout engine on one device, generating first; every rank calls every method together."""

    def __init__(self, config: PPOConfig, platform: Platform, kv_cache_bytes: int) -> None:
        model, rollout, zero_stage = (
            config.actor_rollout_ref.model,
            config.actor_rollout_ref.rollout,
            config.actor_rollout_ref.actor.zero_stage,
        )
        self._platform = platform
        self.rollout = RolloutEngine(
            model, rollout, config.data, platform, (), kv_cache_bytes=kv_cache_bytes, reads_weights=False
        )
        self.rollout.sleep(level=2)
        module = load_policy(model, zero_stage=zero_stage, device=platform.device()).to(platform.device())
        self._module: Any = module
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=list(module.parameters()), config=settings(config, platform)
        )
        self.train(torch.ones(1, 8, dtype=torch.int64, device=platform.device()))  # makes Adam's moments
        for _, do in self.to_generate():
            do()

    def to_train(self) -> None:
        """Let the rollout sleep, and fetch the trainer's states."""
        self.rollout.sleep(level=2)
        self._engine.reload_states()

    def train(self, ids: torch.Tensor) -> None:
        """One optimizer step on `ids`, int64 of (sequences, tokens)."""
        logits = self._engine(input_ids=ids, use_cache=False).logits
        self._engine.backward(-log_probs_from_logits(logits[:, :-1], ids[:, 1:]).mean())
        self._engine.step()

    def to_generate(self) -> list[tuple[str, Callable[[], None]]]:
        """What is to be done, in order, to generate with the trainer's weights."""
        return [
            ("wake_weights_s", lambda: self.rollout.wake_up(["weights"])),
            ("reshard_s", self._reshard),
            ("offload_states_s", self._offload),
            ("wake_kv_cache_s", lambda: self.rollout.wake_up(["kv_cache"])),
        ]

    def _reshard(self) -> None:
        with self.rollout.receiving_weights(), self.rollout.updating_weights():
            for name, parameter in self._module.named_parameters():
                with deepspeed.zero.GatheredParameters([parameter]):
                    self.rollout.load_weights([(name, parameter.data)])
        self.rollout.reset_prefix_cache()

    def _offload(self) -> None:
        self._engine.offload_states()
        self._platform.empty_cache()


def settings(config: PPOConfig, platform: Platform) -> dict[str, Any]:
    """DeepSpeed's configuration, with its own fused Adam where there is one: ZeRO 3 offloads no other."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": config.actor_rollout_ref.model.dtype == "bfloat16"},
        "zero_optimization": {"stage": config.actor_rollout_ref.actor.zero_stage},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": platform.name != "cuda", "lr": 1e-6}},
        "steps_per_print": 1 << 30,
    }
