"""The policy in its three roles: trained (actor), generating (rollout) and frozen (ref)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf_npu.config.keys import AT_LEAST_ONE, GIBIBYTES, NOT_NEGATIVE, POSITIVE, ConfigNode, Problem, Range, key
from rlhf_npu.config.optim import OptimConfig
from rlhf_npu.config.policy_loss import PolicyLossConfig

KL_ESTIMATOR_NAMES = ("k1", "k2", "k3", "abs", "k1+", "k3+")
KL_ESTIMATORS_ELSEWHERE = {
    "kl": "k1",
    "kl+": "k1+",
    "mse": "k2",
    "mse+": "k2",
    "k2+": "k2",
    "low_var_kl": "k3",
    "low_var_kl+": "k3+",
}
LOSS_AGG_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ZERO_STAGES = (0, 1, 2, 3)


@dataclass
class ModelConfig(ConfigNode):
    """The policy's checkpoint."""

    path: str = key("model folder in Hugging Face format, or builtin:<task>/model", path=True)
    dtype: str = key(
        "compute type of trainer and rollout",
        choices=("float32", "bfloat16"),
        elsewhere={"fp32": "float32", "float": "float32", "bf16": "bfloat16"},
    )
    attn_implementation: str = key(
        "the trainer's attention; auto = torch's, or eager where the model caps its scores",
        "auto",
        choices=("auto", "eager", "sdpa", "flash_attention_2", "flex_attention"),
    )
    enable_gradient_checkpointing: bool = key("recompute activations: less memory, slower", False)
    trust_remote_code: bool = key("run Python code that the model folder brings", False)


@dataclass
class ActorConfig(ConfigNode):
    """The trained policy: batch sizes, policy loss, optimizer."""

    ppo_mini_batch_size: int = key("PROMPTS an optimizer step, over all devices", within=AT_LEAST_ONE)
    ppo_micro_batch_size_per_device: int = key(
        "SEQUENCES a forward and backward pass, on one device", within=AT_LEAST_ONE
    )
    ppo_epochs: int = key("passes over each step's batch", 1, within=AT_LEAST_ONE)
    policy_loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    clip_ratio_low: float = key("the ratio is clipped below 1 - this", 0.2, within=Range(above=0, at_most=1))
    clip_ratio_high: float = key("the ratio is clipped above 1 + this", 0.2, within=POSITIVE)
    clip_ratio_c: float = key("vanilla: dual clip for negative advantages, above 1; 0 = off", 3.0, within=NOT_NEGATIVE)
    tau_pos: float = key("sapo: how soon the gate closes where advantages are positive", 1.0, within=POSITIVE)
    tau_neg: float = key("sapo: the same for the others", 1.05, within=POSITIVE)
    loss_agg_mode: str = key("how token losses become one number", "token-mean", choices=LOSS_AGG_MODES)
    entropy_coeff: float = key("weight of the entropy bonus", within=Range(at_least=-1, at_most=1))
    use_kl_loss: bool = key("add KL against the reference to the loss", False)
    kl_loss_coef: float = key("weight of that KL", 0.001, within=NOT_NEGATIVE)
    kl_loss_type: str = key(
        "its estimator; k1+ and k3+ have k2's gradient",
        "k3",
        choices=KL_ESTIMATOR_NAMES,
        elsewhere=KL_ESTIMATORS_ELSEWHERE,
    )
    grad_clip: float = key("gradient norm at most", 1.0, within=POSITIVE)
    zero_stage: int = key("DeepSpeed ZeRO stage", choices=ZERO_STAGES)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def relations(self) -> Iterator[Problem]:
        if 0 < self.clip_ratio_c <= 1:
            yield Problem("clip_ratio_c", self.clip_ratio_c, "must be above 1, or 0 to turn dual clip off")


@dataclass
class RefConfig(ConfigNode):
    """The frozen reference; built only if a KL term is on."""

    log_prob_micro_batch_size_per_device: int = key("SEQUENCES a forward pass, on one device", within=AT_LEAST_ONE)
    zero_stage: int = key("0 = whole on each device, 3 = sharded", 0, choices=(0, 3))


@dataclass
class ValKwargsConfig(ConfigNode):
    """How held-out prompts are answered."""

    n: int = key("responses a held-out prompt", 1, within=AT_LEAST_ONE)
    temperature: float = key("0 = greedy", 0.0, within=NOT_NEGATIVE)

    def relations(self) -> Iterator[Problem]:
        if self.n > 1 and self.temperature == 0:
            yield Problem("n", self.n, "greedy responses are all alike; set 1, or temperature above 0")


@dataclass
class RolloutConfig(ConfigNode):
    """vLLM, in the trainer's process."""

    n: int = key("responses a prompt", within=AT_LEAST_ONE)
    temperature: float = key("sampling temperature in training", 1.0, within=POSITIVE)
    tensor_model_parallel_size: int = key("devices that share one rollout engine", 1, within=AT_LEAST_ONE)
    gpu_memory_utilization: float | int | str = key(
        "share of a device's memory for the rollout, auto = what training leaves (CUDA, NPU)",
        0.5,
        words=("auto",),
        within=Range(above=0, at_most=1),
    )
    kv_cache_memory_gb: float = key("KV cache of one engine in GiB (CPU only)", within=GIBIBYTES)
    max_num_seqs: int = key("sequences generated at the same time by one engine", 256, within=AT_LEAST_ONE)
    enforce_eager: bool = key("no graph capture and no compilation", True)
    sleep_level: int | str = key(
        "1 = always asleep, weights to the host, 2 = weights dropped, auto = 2, if need be",
        "auto",
        choices=("auto", 1, 2),
    )
    reshard_bucket_mb: int = key("size of a reshard bucket, in MiB", 64, within=AT_LEAST_ONE)
    log_prob_micro_batch_size_per_device: int = key(
        "SEQUENCES a forward pass for old log-probabilities, on one device", within=AT_LEAST_ONE
    )
    val_kwargs: ValKwargsConfig = field(default_factory=ValKwargsConfig)


@dataclass
class ActorRolloutRefConfig(ConfigNode):
    """The policy."""

    model: ModelConfig = field(default_factory=ModelConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
