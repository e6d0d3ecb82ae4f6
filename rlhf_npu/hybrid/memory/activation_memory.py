"""Bytes of activations and logits of one micro-batch, from a model's shape.

What a decoder layer keeps for its backward pass is counted tensor by tensor, as Korthikanti et al. 2022 ("Reducing
Activation Recomputation in Large Transformer Models", section 4.1) do, for the layers of transformers: norms computed
in float32, rotary positions, attention in one kernel unless it is eager, a gated feed-forward part.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_npu.algorithms.token_probs import CHUNK_ELEMENTS
from rlhf_npu.hybrid.memory.model_shape import ModelShape

FLOAT32 = 4

Moments = tuple[tuple[int, int], ...]
"""How many copies of all logits, and of the part that is computed in float32 at a time, there are at once."""
NO_LOGITS: Moments = ()
LOG_PROBS: Moments = ((1, 2),)
"""Logits; their scaled part and its log-softmax (`algorithms/token_probs.py`)."""
POLICY_LOSS: Moments = ((1, 3), (2, 2))
"""Entropy as a metric, with three parts; then the backward pass, with the logits' gradient."""
POLICY_LOSS_WITH_ENTROPY: Moments = ((2, 3), (3, 2))
"""The backward pass of the entropy, then that of the log-probabilities, each of which makes a gradient."""


@dataclass(frozen=True)
class MicroBatch:
    """What one pass is given on one device.

    Attributes:
        sequences: of the micro-batch.
        prompt, response: tokens of each at most.
        item_bytes: of a parameter and an activation.
        eager_attention: whether the scores of all pairs of tokens are kept.
    """

    sequences: int
    prompt: int
    response: int
    item_bytes: int
    eager_attention: bool = False

    @property
    def length(self) -> int:
        return self.prompt + self.response

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def training_bytes(shape: ModelShape, batch: MicroBatch, *, checkpointing: bool, logits: Moments) -> int:
    """The peak of one forward and backward pass.

    Args:
        checkpointing: whether only each layer's input is kept, and a layer computed again in the backward pass.
        logits: (B, R, V), of which copies are made.
    """
    layer = _layer_bytes(shape, batch)
    inputs = batch.item_bytes * shape.hidden * batch.tokens
    kept = shape.layers * (inputs if checkpointing else layer) + _norm_bytes(shape.hidden, batch) + _mask_bytes(batch)
    in_layer = _layer_gradients(shape, batch) + (layer if checkpointing else 0)
    return kept + max(_logits_bytes(shape, batch, logits), in_layer)


def forward_bytes(shape: ModelShape, batch: MicroBatch, *, logits: Moments) -> int:
    """The peak of one pass without gradients; `logits` as in `training_bytes`."""
    item, attention = batch.item_bytes, shape.heads * shape.head_dim
    beside = 2 * item * shape.hidden
    widest = max(3 * item * shape.intermediate, 6 * item * attention, 3 * FLOAT32 * shape.hidden)
    in_layer = (beside + widest) * batch.tokens + _score_bytes(shape, batch)
    head = beside * batch.tokens + _logits_bytes(shape, batch, logits)
    return max(in_layer, head) + _mask_bytes(batch)


def _layer_bytes(shape: ModelShape, batch: MicroBatch) -> int:
    """What one layer keeps: two norms, attention's inputs and output, the feed-forward part's."""
    item, attention = batch.item_bytes, shape.heads * shape.head_dim
    in_attention = 4 * item * attention + FLOAT32 * shape.heads
    in_feed_forward = (4 if shape.gated else 2) * item * shape.intermediate
    in_norms = _norm_bytes(shape.normed, batch)
    return in_norms + (in_attention + in_feed_forward) * batch.tokens + _score_bytes(shape, batch)


def _norm_bytes(width: int, batch: MicroBatch) -> int:
    """A norm keeps its input in float32, the normalized input, and its output, which the next operator reads."""
    return (FLOAT32 + 2 * batch.item_bytes) * width * batch.tokens


def _layer_gradients(shape: ModelShape, batch: MicroBatch) -> int:
    item, attention = batch.item_bytes, shape.heads * shape.head_dim
    return item * batch.tokens * (2 * shape.hidden + max(3 * shape.intermediate, 4 * attention))


def _score_bytes(shape: ModelShape, batch: MicroBatch) -> int:
    """Eager attention keeps the softmax of its scores in float32, and once more as an activation."""
    if not batch.eager_attention:
        return 0
    return (FLOAT32 + batch.item_bytes) * shape.heads * batch.length * batch.tokens


def _mask_bytes(batch: MicroBatch) -> int:
    """Which token sees which, as truth values and as what is added to the scores."""
    return (1 + batch.item_bytes) * batch.length * batch.tokens


def _logits_bytes(shape: ModelShape, batch: MicroBatch, moments: Moments) -> int:
    row = batch.sequences * shape.vocabulary
    whole = row * (batch.response + 1)
    part = min(whole, max(CHUNK_ELEMENTS, row))
    return max((copies * whole * batch.item_bytes + parts * part * FLOAT32 for copies, parts in moments), default=0)
