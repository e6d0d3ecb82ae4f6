"""What of the policy trainer and rollout will keep once, by the configuration and the model's shape.

The rollout's loading decides (`resharding/shared_layout.py`); this foretells it for the plan of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_npu.config import PPOConfig
from rlhf_npu.engines.shared_storage import ALIGNMENT
from rlhf_npu.hybrid.memory.model_shape import ModelShape, Weight
from rlhf_npu.hybrid.memory.rollout_memory import VOCABULARY_UNIT

MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class SharedWeights:
    """The policy's weights by where the rollout has them.

    Attributes:
        asked: whether the configuration asks for sharing at all.
        shared, apart: bytes of those that are the trainer's parameters themselves, and of those that are copied.
        reasons: why some are copied; nothing where all are shared.
    """

    asked: bool
    shared: int
    apart: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        if not self.asked:
            return ""
        why = f": {'; '.join(self.reasons)}" if self.reasons else ""
        if not self.shared:
            return f"trainer and rollout share no weights{why}"
        beside = f"; {_in_words(self.apart)} are copied{why}" if self.apart else ""
        return f"trainer and rollout share {_in_words(self.shared)} of weights{beside}"


def foretell_sharing(config: PPOConfig, shape: ModelShape, item_bytes: int) -> SharedWeights:
    """What the run that `config` describes will share.

    Args:
        item_bytes: of a weight.
    """
    asked = config.hybrid.share_weights == "auto"
    why_none = cannot_share(config)
    why = {weight.name: why_none or _why_apart(weight, shape, item_bytes) for weight in shape.weights}
    sizes = {weight.name: weight.elements * item_bytes for weight in shape.weights}
    shared = sum(size for name, size in sizes.items() if not why[name])
    reasons = tuple(dict.fromkeys(reason for reason in why.values() if reason))
    return SharedWeights(asked, shared, sum(sizes.values()) - shared, reasons)


def cannot_share(config: PPOConfig) -> str:
    """Why trainer and rollout keep nothing in common, whatever the model; empty if they can."""
    policy = config.actor_rollout_ref
    if config.hybrid.share_weights == "off":
        return "hybrid.share_weights=off"
    if policy.actor.zero_stage == 3:
        return "actor_rollout_ref.actor.zero_stage=3 leaves a device only a shard of the weights; at most 2 shares them"
    parallel = policy.rollout.tensor_model_parallel_size
    if parallel > 1:
        return (
            f"actor_rollout_ref.rollout.tensor_model_parallel_size={parallel} leaves the rollout a part of the weights "
            "that the trainer has whole; 1 shares them"
        )
    return ""


def _in_words(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"


def _why_apart(weight: Weight, shape: ModelShape, item_bytes: int) -> str:
    rows = weight.shape[0]
    if rows == shape.vocabulary and len(weight.shape) == 2 and rows % VOCABULARY_UNIT:
        padded = -(-rows // VOCABULARY_UNIT) * VOCABULARY_UNIT
        return f"vLLM pads the vocabulary to {padded} rows, and the trainer has {rows}"
    if len(weight.shape) > 2 or ".experts." in weight.name:
        return "vLLM packs the experts of a mixture for its kernels"
    if weight.elements * item_bytes % ALIGNMENT:
        return f"tensors must have multiples of {ALIGNMENT} bytes, and {weight.name} has not"
    return ""
