"""The names, and the shapes, that a model's weights have in a checkpoint.

transformers 5 renames some weights when it loads them, and joins others: a mixture's experts become one tensor a layer.
vLLM reads checkpoints, so what is sent to it is what transformers would save.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from rlhf_npu.errors import ModelError

Named = list[tuple[str, torch.Tensor]]


def check_convertible(policy: PreTrainedModel) -> None:
    """Each weight of the model by itself can be turned into weights of its checkpoint.

    Raises:
        ModelError: transformers cut a tensor of the checkpoint into several, which are sent in different buckets.
    """
    for conversion in getattr(policy, "_weight_conversions", None) or ():
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) > 1:
            raise ModelError(
                f"models of type {policy.config.model_type!r} cannot be trained: transformers cuts the weights "
                f"{conversion.source_patterns} of a checkpoint into {conversion.target_patterns}, and what must be put "
                "together again is not sent to the rollout engine yet"
            )


def as_in_checkpoint(policy: PreTrainedModel, weights: Named) -> Named:
    """Some of the policy's weights under the names, and in the shapes, of its checkpoint."""
    return list(revert_weight_conversion(policy, dict(weights)).items())
