"""Bytes of what DeepSpeed keeps for a model, by ZeRO stage, and of what it makes while it trains.

The states are those of mixed-precision Adam (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training
Trillion Parameter Models", section 3.1): the parameters, and in float32 their masters and Adam's two moments. Which
buffers there are beside them, and when, is DeepSpeed 0.19.8's code (`runtime/zero/stage_1_and_2.py`, `stage3.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_npu.engines.trainer_engine import LARGEST_BUCKET

MASTER_BYTES = 4
MOMENT_BYTES = 8
GATHERED = 1_000_000_000 + 50_000_000
"""Elements that ZeRO-3 keeps gathered at most: `stage3_max_live_parameters` and `stage3_prefetch_bucket_size`."""
SUB_GROUP = 1_000_000_000
"""Elements that ZeRO-3 updates at a time: `sub_group_size`."""


@dataclass(frozen=True)
class TrainerBytes:
    """Bytes on one device.

    Attributes:
        params: the parameters, or this device's shard of them.
        grads: gradients and their buffers that outlive an optimizer step.
        optimizer: float32 masters and moments.
        gathered: whole parameters that a pass makes of shards, at most.
        backward: gradients, and buffers to reduce them, that are there between a mini-batch's first backward pass and
            its optimizer step.
        step: what the optimizer step makes while the activations are gone, gradients included.
    """

    params: int
    grads: int
    optimizer: int
    gathered: int
    backward: int
    step: int


def trainer_bytes(elements: int, *, zero_stage: int, item_bytes: int, world: int, fused: bool) -> TrainerBytes:
    """The bytes of a trained model of `elements` parameters.

    Args:
        item_bytes: of a parameter, 2 or 4.
        world: devices in all, over which ZeRO partitions.
        fused: whether Adam's step is one kernel, which makes nothing aside.
    """
    whole, part = elements, -(-elements // world)
    bucket = min(LARGEST_BUCKET, elements + elements % 2) * item_bytes
    aside = 0 if fused else 2 * MASTER_BYTES
    if zero_stage == 0:
        grads = whole * item_bytes
        return TrainerBytes(
            params=whole * item_bytes,
            grads=0,
            optimizer=whole * MOMENT_BYTES,
            gathered=0,
            backward=grads,
            step=grads + bucket,
        )
    optimizer = part * (MASTER_BYTES + MOMENT_BYTES)
    if zero_stage == 3:
        group = min(part, SUB_GROUP)
        return TrainerBytes(
            params=part * item_bytes,
            grads=part * MASTER_BYTES + bucket,
            optimizer=optimizer,
            gathered=min(whole, GATHERED) * item_bytes,
            backward=0,
            step=group * (MASTER_BYTES + aside),
        )
    # What accumulates, and what the step makes of it: this rank's part in one piece, in the type of the masters.
    kept = part * MASTER_BYTES if zero_stage == 2 else whole * item_bytes
    pieces = {1: part * item_bytes, 2: part * MASTER_BYTES if item_bytes == MASTER_BYTES else 0}[zero_stage]
    copied = part * MASTER_BYTES if zero_stage == 1 and item_bytes != MASTER_BYTES else 0
    return TrainerBytes(
        params=whole * item_bytes,
        grads=0,
        optimizer=optimizer,
        gathered=0,
        backward=kept + bucket,
        step=kept + pieces + copied + part * aside,
    )


def frozen_bytes(elements: int, *, zero_stage: int, item_bytes: int, world: int) -> TrainerBytes:
    """The bytes of a model that is only asked, whole or partitioned by ZeRO-3."""
    whole = elements * item_bytes
    if zero_stage != 3:
        return TrainerBytes(params=whole, grads=0, optimizer=0, gathered=0, backward=0, step=0)
    gathered = min(elements, GATHERED) * item_bytes
    return TrainerBytes(-(-elements // world) * item_bytes, 0, 0, gathered, 0, 0)
