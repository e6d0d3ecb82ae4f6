"""The tags of the pool: which stages need them, and what becomes of them when they sleep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from rlhf_npu.config import PPOConfig
from rlhf_npu.hybrid.switch_plan import Fate, Stage, Tag

ROLLOUT_TAGS = ("weights", "kv_cache")
SHARED_TAG = "actor.params"  # where the weights are that trainer and rollout share
ROLLOUT = "rollout"  # the group of the rollout's tags: vLLM puts both to sleep in one call
_TRAIN = {"actor": Stage.TRAIN_ACTOR, "critic": Stage.TRAIN_CRITIC}
_PARAMS = {
    "actor": {Stage.LOG_PROB, Stage.TRAIN_ACTOR, Stage.RESHARD, Stage.SAVE},
    "critic": {Stage.VALUES, Stage.TRAIN_CRITIC},
    "ref": {Stage.REF},
    "reward": {Stage.REWARD_MODEL},
}


def make_tags(sizes: Mapping[str, int], sleep_level: str, shares_weights: bool = False) -> tuple[Tag, ...]:
    """The pool's tenants.

    Args:
        sizes: bytes of each tag on one device, by its name.
        sleep_level: "1" keeps the rollout's weights when it sleeps, "2" drops them; "auto" drops them too, since the
            reshard overwrites them, but lets them stay where memory suffices.
        shares_weights: whether the rollout generates with the actor's parameters: `weights` is what it has beside them.
    """
    tags = (_make_tag(name, size, sleep_level) for name, size in sizes.items())
    return tuple(_with_generation(tag) if shares_weights and tag.name == SHARED_TAG else tag for tag in tags)


def shares_weights(tags: Iterable[Tag]) -> bool:
    """Whether the rollout generates with the actor's parameters, by the plan's tags."""
    return any(tag.name == SHARED_TAG and Stage.GENERATE in tag.needed for tag in tags)


def _with_generation(tag: Tag) -> Tag:
    return replace(tag, needed=tag.needed | {Stage.GENERATE})


def cycle_of(config: PPOConfig) -> tuple[Stage, ...]:
    """The stages of a training step in their order."""
    stages = [Stage.GENERATE]
    stages += [Stage.REWARD_MODEL] if config.reward_model.enable else []
    stages += [Stage.LOG_PROB]
    stages += [Stage.REF] if config.has_reference else []
    stages += [Stage.VALUES, Stage.TRAIN_CRITIC] if config.has_critic else []
    return (*stages, Stage.TRAIN_ACTOR, Stage.RESHARD)


def _make_tag(name: str, size: int, sleep_level: str) -> Tag:
    must_sleep = sleep_level != "auto"
    if name == "kv_cache":
        return Tag(name, size, frozenset({Stage.GENERATE}), Fate.DISCARD, ROLLOUT, must_sleep)
    if name == "weights":
        fate = Fate.OFFLOAD if sleep_level == "1" else Fate.DISCARD
        return Tag(name, size, frozenset({Stage.RESHARD, Stage.GENERATE}), fate, ROLLOUT, must_sleep)
    role, part = name.split(".")
    if part == "params":
        return Tag(name, size, frozenset(_PARAMS[role]), Fate.OFFLOAD)
    return Tag(name, size, frozenset({_TRAIN[role]}), Fate.DISCARD if part == "grads" else Fate.OFFLOAD)
