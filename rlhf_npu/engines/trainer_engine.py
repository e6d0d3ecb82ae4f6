"""One model under DeepSpeed: micro-batched forward passes and mini-batch optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tensordict import TensorDict

from rlhf_npu.config import OptimConfig
from rlhf_npu.engines.collectives import all_reduce
from rlhf_npu.engines.shared_storage import SharedStorage
from rlhf_npu.engines.trainer_states import clear_gradients, own_module, own_trainer, place, release_gathered
from rlhf_npu.platform import Platform

Sums = dict[str, torch.Tensor]
Batch = TypeVar("Batch")
LARGEST_BUCKET = 500_000_000  # elements; DeepSpeed's default


@dataclass(frozen=True)
class MicroLoss:
    """What one micro-batch adds to its mini-batch.

    Attributes:
        loss: scalar share of the mini-batch's loss; shares of all micro-batches and ranks add up to it.
        sums: metric shares that add up the same way.
    """

    loss: torch.Tensor
    sums: Sums


class TrainerEngine:
    """A trainable model; all ranks are data-parallel and call every method together.

    The number of micro-batches of a call must be the same on every rank (ZeRO-3 gathers in lockstep).

    Attributes:
        tags: those of the sleep pool that hold the engine's states, `<role>.params`, `.grads` and `.optimizer` as far
            as there is memory in them; none without a role. While one sleeps only `tags` and `lr` may be asked for.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optim: OptimConfig,
        *,
        zero_stage: int,
        dtype: str,
        grad_clip: float,
        optimizer_steps: int,
        platform: Platform,
        role: str | None = None,
        storage: SharedStorage | None = None,
    ) -> None:
        """Build DeepSpeed's engine around `module`.

        Args:
            role: what the states' tags begin with; None keeps them out of the pool.
            storage: where the parameters are to be, in the tag `<role>.params`; below ZeRO 3 only.

        Raises:
            HookError: a state's memory could not be had from the pool.
            SharingError: DeepSpeed does not keep the parameters in `storage`.
        """
        import deepspeed

        self._platform = platform
        self._grad_clip = grad_clip
        self._clips_itself = zero_stage == 0 and dtype == "float32"
        config = _deepspeed_config(module, zero_stage, dtype, 0.0 if self._clips_itself else grad_clip)
        config["optimizer"] = _adamw(optim, platform)
        trained = storage.in_order(module) if storage else [p for p in module.parameters() if p.requires_grad]
        self.engine, *_ = deepspeed.initialize(
            model=place(module, platform.device(), role and f"{role}.params"),
            model_parameters=trained,
            config=config,
            lr_scheduler=lambda optimizer: _schedule(optimizer, optim, optimizer_steps),
        )
        if storage:
            storage.give_to(self.engine)
        self.tags = own_trainer(self.engine, role, storage) if role else ()

    @property
    def module(self) -> torch.nn.Module:
        """The model; under ZeRO-3 its parameters are partitioned between uses."""
        return self.engine.module

    @property
    def lr(self) -> float:
        """The learning rate of the next optimizer step."""
        return float(self.engine.get_lr()[0])

    def train_mini_batch(
        self,
        micro_batches: Sequence[Batch],
        loss_of: Callable[[torch.nn.Module, Batch], MicroLoss],
    ) -> dict[str, float]:
        """One optimizer step on this rank's part of a mini-batch.

        The gradient is that of the sum of all shares, however the mini-batch is cut and whatever the number of ranks.

        Returns:
            the summed metrics of the whole mini-batch, with `grad_norm` before clipping and the `lr` used.
        """
        lr = self.lr
        sums = self.accumulate(micro_batches, loss_of)
        return reduce_sums(sums, self.engine.device) | {"grad_norm": self._step(), "lr": lr}

    def accumulate(
        self,
        micro_batches: Sequence[Batch],
        loss_of: Callable[[torch.nn.Module, Batch], MicroLoss],
    ) -> Sums:
        """Add up the gradients and the metric shares of this rank's part of a mini-batch."""
        self.module.train()
        clear_gradients(self.engine)
        sums: Sums = {}
        for index, micro_batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            share = loss_of(self.engine, micro_batch)
            # DeepSpeed averages over ranks; the shares are to be summed.
            self.engine.backward(share.loss * dist.get_world_size(), scale_wrt_gas=False)
            for name, value in share.sums.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        return sums

    def _step(self) -> float:
        """Take the optimizer step; returns the gradient's norm before clipping.

        What torch has cached of the activations is given back before: DeepSpeed makes flat tensors as large as the
        model here, which would not fit into the pieces that activations leave.
        """
        if self._platform.name != "cpu":
            self._platform.empty_cache()
        grad_norm = self._clip() if self._clips_itself else None
        self.engine.step()
        return grad_norm if grad_norm is not None else float(self.engine.get_global_grad_norm())

    def _clip(self) -> float:
        limit = self._grad_clip or math.inf
        return float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), limit))

    def release_gathered(self) -> None:
        """Partition what ZeRO-3 holds gathered, so that no weight is left outside of the tags."""
        release_gathered(self.engine.optimizer)

    def close(self) -> None:
        """Remove DeepSpeed's hooks and let its buffers go."""
        self.engine.destroy()


class InferenceEngine:
    """A frozen model: whole on each rank, or partitioned by ZeRO-3 between uses.

    Attributes:
        tags: that of the sleep pool which holds the weights, `<role>.params`; none without a role.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        zero_stage: int,
        dtype: str,
        platform: Platform,
        role: str | None = None,
    ) -> None:
        """Freeze `module`.

        Args:
            role: what the weights' tag begins with; None keeps them out of the pool.

        Raises:
            HookError: a weight's memory could not be had from the pool.
        """
        module = place(module, platform.device(), role and f"{role}.params").eval().requires_grad_(False)
        self.module, self._partitioned = module, None
        if zero_stage == 3:
            import deepspeed

            self.module, self._partitioned, *_ = deepspeed.initialize(
                model=module, config=_deepspeed_config(module, 3, dtype, 0.0)
            )
        self.tags = own_module(module, platform.device(), role) if role else ()

    def release_gathered(self) -> None:
        """Partition what ZeRO-3 holds gathered, so that no weight is left outside of the tag."""
        release_gathered(self._partitioned)


@torch.no_grad()
def infer(
    module: torch.nn.Module,
    batch: TensorDict,
    micro_size: int,
    forward: Callable[[torch.nn.Module, TensorDict], torch.Tensor],
) -> torch.Tensor:
    """`forward` over `batch` in micro-batches of `micro_size` sequences; results are joined along B."""
    module.eval()
    return torch.cat([forward(module, micro_batch) for micro_batch in batch.split(micro_size)])


def reduce_sums(sums: Sums, device: torch.device) -> dict[str, float]:
    """Add `sums` up over all ranks; every rank passes the same names."""
    names = sorted(sums)
    values = torch.stack([torch.as_tensor(sums[name], dtype=torch.float64) for name in names]).to(device)
    return dict(zip(names, all_reduce(values).tolist(), strict=True))


def _deepspeed_config(module: torch.nn.Module, zero_stage: int, dtype: str, grad_clip: float) -> dict[str, Any]:
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters())
    # DeepSpeed's buffers are as large as its buckets, and its buckets must be even.
    largest_bucket = min(LARGEST_BUCKET, elements + elements % 2)
    bfloat16 = dtype == "bfloat16"
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": grad_clip,
        "bf16": {"enabled": bfloat16},
        # Below ZeRO 2 DeepSpeed either refuses it or keeps all gradients in float32 on each rank.
        "data_types": {"grad_accum_dtype": "fp32" if bfloat16 and zero_stage >= 2 else None},
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": largest_bucket,
            "allgather_bucket_size": largest_bucket,
        },
        "steps_per_print": 1 << 30,
    }


def _adamw(optim: OptimConfig, platform: Platform) -> dict[str, Any]:
    parameters = {
        "torch_adam": True,
        "fused": True if platform.name == "cuda" else None,  # False would rule out foreach as well
        "lr": optim.lr,
        "betas": list(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
    }
    return {"type": "AdamW", "params": parameters}


def _schedule(optimizer: Any, optim: OptimConfig, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, optim, total))


def lr_factor(step: int, optim: OptimConfig, total: int) -> float:
    """The learning rate of optimizer step `step` (from 0) as a fraction of `optim.lr`.

    Rises linearly over `lr_warmup_steps`, then stays, or falls to `min_lr_ratio` at step `total`.
    """
    if step < optim.lr_warmup_steps:
        return (step + 1) / (optim.lr_warmup_steps + 1)
    if optim.lr_scheduler_type == "constant":
        return 1.0
    done = min(1.0, (step - optim.lr_warmup_steps) / max(1, total - optim.lr_warmup_steps))
    fall = done if optim.lr_scheduler_type == "linear" else (1 - math.cos(math.pi * done)) / 2
    return 1.0 - (1.0 - optim.min_lr_ratio) * fall
