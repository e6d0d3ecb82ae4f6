"""What sharing weights is foretold to save, figure by figure, and why it cannot be."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from rlhf_npu.config import PPOConfig
from rlhf_npu.errors import PlanError
from rlhf_npu.hybrid.memory.memory_demand import Device
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan, fitting_plan
from rlhf_npu.hybrid.memory.model_shape import model_shape
from rlhf_npu.hybrid.memory.shared_weights import cannot_share, foretell_sharing
from rlhf_npu.hybrid.switch_plan import Stage
from tests.hybrid.shapes import qwen2_7b, without_weights
from tests.hybrid.test_memory_plan import ACTOR, ELEMENTS, ROLLOUT, config_of, models

GIB = 1 << 30
WEIGHTS = ELEMENTS * 2  # bytes of a 7B in bfloat16
# Eight nodes of eight devices, of which each holds all weights.
WHOLE = (
    "trainer.nnodes=8",
    "trainer.n_devices_per_node=8",
    "data.train_batch_size=64",
    f"{ACTOR}.zero_stage=2",
    f"{ACTOR}.ppo_mini_batch_size=64",
    f"{ACTOR}.ppo_micro_batch_size_per_device=1",
    f"{ROLLOUT}.tensor_model_parallel_size=1",
    f"{ROLLOUT}.gpu_memory_utilization=auto",
)
SHARE = "hybrid.share_weights=auto"


def whole(*overrides: str, gib: int = 79) -> MemoryPlan:
    size = gib * GIB
    return fitting_plan(config_of(*WHOLE, *overrides), models(), Device("npu", size, size))


def bytes_of(plan: MemoryPlan) -> dict[str, int]:
    return {tag.name: tag.bytes for tag in plan.switch_plan.tags}


def test_shared_weights_are_in_one_tag_that_generates_as_well() -> None:
    copies, shares = whole("hybrid.plan=offload"), whole("hybrid.plan=offload", SHARE)
    assert bytes_of(copies) == bytes_of(shares) | {"weights": WEIGHTS}
    assert bytes_of(shares)["weights"] == 0
    assert shares.switch_plan.awake[Stage.GENERATE] == {"weights", "kv_cache", "actor.params"}
    assert copies.used(Stage.GENERATE) == shares.used(Stage.GENERATE)
    assert copies.used(Stage.RESHARD) - shares.used(Stage.RESHARD) == WEIGHTS
    assert copies.switch_plan.copied_bytes() - shares.switch_plan.copied_bytes() == 2 * WEIGHTS
    assert "actor.params" not in shares.switch_plan.offloaded()
    assert "trainer and rollout share 14.19 GiB of weights" in str(shares)
    assert "share" not in str(copies)


def test_a_run_that_bursts_while_it_reshards_is_told_to_share() -> None:
    """Both copies of the weights are 28.4 GiB."""
    with pytest.raises(PlanError, match=r"stage 'reshard' does not fit.*would fit with hybrid.share_weights=auto$"):
        whole("data.max_response_length=32", "data.max_prompt_length=32", gib=28)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("hybrid.share_weights=off",), "hybrid.share_weights=off"),
        ((SHARE, f"{ACTOR}.zero_stage=3"), r"zero_stage=3 leaves a device only a shard"),
        ((SHARE, f"{ROLLOUT}.tensor_model_parallel_size=2"), r"tensor_model_parallel_size=2 leaves the rollout a part"),
    ],
)
def test_where_nothing_can_be_shared_nothing_is_and_the_reason_is_told(overrides: tuple[str, ...], reason: str) -> None:
    config = config_of(*WHOLE, *overrides)
    assert reason in cannot_share(config)
    foretold = foretell_sharing(config, qwen2_7b(), 2)
    assert (foretold.shared, foretold.apart) == (0, WEIGHTS)
    assert str(foretold) == "" if overrides[0].endswith("off") else reason in str(foretold)
    planned = fitting_plan(config, models(), Device("npu", 200 * GIB, 200 * GIB))
    (params,) = (tag for tag in planned.switch_plan.tags if tag.name == "actor.params")
    assert Stage.GENERATE not in params.needed


def sharing_of(vocabulary: int, config: PPOConfig) -> str:
    shape = {"hidden_size": 1 << 14, "intermediate_size": 1 << 14, "num_hidden_layers": 1, "num_attention_heads": 128}
    return str(foretell_sharing(config, model_shape(without_weights(LlamaConfig(**shape, vocab_size=vocabulary))), 2))


def test_a_vocabulary_that_vllm_pads_is_copied_and_the_rest_is_shared() -> None:
    config = config_of(*WHOLE, SHARE)
    seven_matrices = "3.50 GiB of weights"
    assert sharing_of(1 << 14, config) == "trainer and rollout share 4.50 GiB of weights"
    assert sharing_of((1 << 14) + 1, config) == (
        f"trainer and rollout share {seven_matrices}; 1.00 GiB are copied: "
        "vLLM pads the vocabulary to 16448 rows, and the trainer has 16385"
    )
