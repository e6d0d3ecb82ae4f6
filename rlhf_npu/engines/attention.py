"""Which implementation of attention a trainer must compute with, to compute what its rollout engine computes."""

from __future__ import annotations

from typing import Any

AUTO = "auto"


def attention_implementation(wanted: str, config: Any) -> str | None:
    """The one for a model with this transformers `config`; None leaves the choice to transformers.

    Scores that are capped (Gemma 2: tanh(score / cap) * cap before the softmax) need eager attention: torch's scaled
    dot product has no cap, and transformers passes over it in silence.
    """
    if wanted != AUTO:
        return wanted
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
