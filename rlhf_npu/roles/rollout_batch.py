"""The tensors of a rollout, from completions to what a model's forward pass takes.

A batch has B sequences; prompts are padded on the left to P tokens, responses on the right to R.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict

from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.engines.rollout import Completion

PAD = 0  # any id that the model has will do, which a tokenizer's padding token need not be: the masks decide


def build_batch(
    prompts: Sequence[PromptSample], completions: Sequence[Sequence[Completion]], mask_truncated: bool = False
) -> TensorDict:
    """One row for each completion, a prompt's completions side by side.

    Args:
        mask_truncated: leave responses that did not end by themselves out of `loss_mask`.

    Returns:
        prompts (B, P) and responses (B, R) int64; prompt_mask (B, P), response_mask (B, R) and loss_mask (B, R), the
        response tokens that are trained on, float32;
        rollout_log_probs (B, R) float32; group_ids (B,) int64, the place of the prompt among `prompts`.
    """
    rows = [(prompt, choice) for prompt, choices in zip(prompts, completions, strict=True) for choice in choices]
    group_ids = [place for place, choices in enumerate(completions) for _ in choices]
    prompt_ids = [prompt.prompt_ids for prompt, _ in rows]
    response_ids = [choice.token_ids for _, choice in rows]
    response_mask = _mask(response_ids)
    trained = torch.tensor([[float(choice.finished or not mask_truncated)] for _, choice in rows])
    return TensorDict(
        {
            "prompts": _pad(prompt_ids, PAD, torch.int64, left=True),
            "prompt_mask": _mask(prompt_ids, left=True),
            "responses": _pad(response_ids, PAD, torch.int64),
            "response_mask": response_mask,
            "loss_mask": response_mask * trained,
            "rollout_log_probs": _pad([choice.log_probs for _, choice in rows], 0.0, torch.float32),
            "group_ids": torch.tensor(group_ids),
        },
        batch_size=[len(rows)],
    )


def model_inputs(batch: TensorDict) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and position_ids (B, P + R) of a batch."""
    mask = torch.cat([batch["prompt_mask"], batch["response_mask"]], dim=1).long()
    return {
        "input_ids": torch.cat([batch["prompts"], batch["responses"]], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }


def trim(batch: TensorDict) -> TensorDict:
    """The batch without the columns that only pad: what a micro-batch must compute shrinks to what it holds."""
    prompt_width = int(batch["prompt_mask"].sum(1).max())
    response_width = max(1, int(batch["response_mask"].sum(1).max()))
    trimmed = {key: _trim_tensor(key, tensor, prompt_width, response_width) for key, tensor in batch.items()}
    return TensorDict(trimmed, batch_size=batch.batch_size)


def _trim_tensor(key: str, tensor: torch.Tensor, prompt_width: int, response_width: int) -> torch.Tensor:
    if tensor.ndim == 1:
        return tensor
    return tensor[:, tensor.shape[1] - prompt_width :] if key.startswith("prompt") else tensor[:, :response_width]


def _pad(rows: Sequence[Sequence], value: float, dtype: torch.dtype, left: bool = False) -> torch.Tensor:
    side = "left" if left else "right"
    tensors = [torch.tensor(row, dtype=dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)


def _mask(rows: Sequence[Sequence], left: bool = False) -> torch.Tensor:
    return _pad([[1.0] * len(row) for row in rows], 0.0, torch.float32, left)
