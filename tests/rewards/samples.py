"""Prompts as reward functions see them."""

from __future__ import annotations

from typing import Any

from rlhf_npu.data.prompts import PromptSample


def sample(
    ground_truth: Any, data_source: str = "test", extra_info: dict[str, Any] | None = None, index: int = 0
) -> PromptSample:
    """A prompt with this ground truth."""
    return PromptSample(index, (1,), "1", data_source, ground_truth, extra_info or {})
