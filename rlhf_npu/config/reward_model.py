"""A trained reward model that scores responses, alone or beside reward functions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf_npu.config.keys import AT_LEAST_ONE, ConfigNode, Problem, key
from rlhf_npu.config.reward import REWARD_SIZE


@dataclass
class ScoringModelConfig(ConfigNode):
    """Where the reward model is; what else a model needs to know is `actor_rollout_ref.model`'s."""

    path: str | None = key("folder of a sequence classifier with one label, such as main_reward saves", None, path=True)


@dataclass
class ScoringConfig(ConfigNode):
    """The reward model of a run: its score is added to what reward functions give."""

    enable: bool = key("score responses with a trained reward model", False)
    model: ScoringModelConfig = field(default_factory=ScoringModelConfig)
    weight: float = key("weight of its score in the reward", 1.0, within=REWARD_SIZE)
    micro_batch_size_per_device: int = key("SEQUENCES a forward pass at most, on one device", within=AT_LEAST_ONE)
    zero_stage: int = key("0 = whole on each device, 3 = sharded", 0, choices=(0, 3))

    def relations(self) -> Iterator[Problem]:
        if self.enable and self.model.path is None:
            yield Problem("model.path", None, "must name the folder of the reward model, or set enable=false")
        if self.model.path is not None and not self.enable:
            yield Problem("enable", False, f"model.path={self.model.path} would score nothing; set true, or path=null")
