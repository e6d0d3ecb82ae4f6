"""AdamW and its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_npu.config.keys import FRACTION, NOT_NEGATIVE, POSITIVE, ConfigNode, Problem, Range, key


@dataclass
class OptimConfig(ConfigNode):
    """AdamW (Loshchilov and Hutter 2019) with warm-up; the schedule counts optimizer steps."""

    lr: float = key("learning rate at its highest", within=POSITIVE)
    betas: list[float] = key("AdamW's decay rates of both moments", [0.9, 0.999], within=Range(at_least=0, below=1))
    eps: float = key("AdamW's epsilon", 1e-8, within=POSITIVE)
    weight_decay: float = key("decoupled weight decay", 0.0, within=NOT_NEGATIVE)
    lr_scheduler_type: str = key("shape after warm-up", "constant", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = key("optimizer steps of linear warm-up", 0, within=NOT_NEGATIVE)
    min_lr_ratio: float = key("where linear and cosine end, as a share of lr", 0.0, within=FRACTION)

    def relations(self) -> Iterator[Problem]:
        if len(self.betas) != 2:
            yield Problem("betas", self.betas, "must be two numbers, for example [0.9,0.999]")
