"""The predicted peak of a pass against the bytes that a real one keeps alive, tensor by tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from rlhf_npu.algorithms.token_probs import entropy_from_logits, log_probs_from_logits
from rlhf_npu.hybrid.memory import activation_memory
from rlhf_npu.hybrid.memory.activation_memory import MicroBatch, forward_bytes, training_bytes
from rlhf_npu.hybrid.memory.model_shape import model_shape

SEQUENCES, PROMPT, RESPONSE = 2, 48, 80
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
}
CONFIGS = {"llama": LlamaConfig(**SIZES), "qwen2": Qwen2Config(**SIZES), "qwen3": Qwen3Config(head_dim=32, **SIZES)}


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make and something still holds."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        lasting = [tensor for parameter in model.parameters() for tensor in (parameter, parameter.grad)]
        self._lasting = {tensor.untyped_storage()._cdata for tensor in lasting if tensor is not None}
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._lasting:
                storage = tensor.untyped_storage()
                self._living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._living = {key: value for key, value in self._living.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._living.values()))
        return result


def build(name: str, dtype: torch.dtype, attention: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype, attn_implementation=attention)
    for parameter in model.parameters():  # gradients are counted elsewhere
        parameter.grad = torch.zeros_like(parameter)
    return model


def logits_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(SEQUENCES * (PROMPT + RESPONSE)).view(SEQUENCES, -1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits = model(**inputs, use_cache=False, logits_to_keep=RESPONSE + 1).logits[:, :-1]
    return logits, ids[:, PROMPT:]


def policy_loss(model: Any, entropy_coeff: float) -> torch.Tensor:
    """The passes that `roles/policy.py` makes."""
    logits, labels = logits_of(model)
    loss = log_probs_from_logits(logits, labels).mean()
    with torch.set_grad_enabled(entropy_coeff != 0):
        entropy = entropy_from_logits(logits).mean()
    return loss - entropy_coeff * entropy if entropy_coeff else loss


def training_peaks(
    name: str, dtype: torch.dtype, checkpointing: bool, attention: str = "sdpa", entropy_coeff: float = 0.0
) -> tuple[int, int]:
    """Predicted and seen."""
    model = build(name, dtype, attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with LivingTensors(model) as tensors:
        policy_loss(model, entropy_coeff).backward()
    batch = MicroBatch(SEQUENCES, PROMPT, RESPONSE, dtype.itemsize, attention == "eager")
    loss = activation_memory.POLICY_LOSS_WITH_ENTROPY if entropy_coeff else activation_memory.POLICY_LOSS
    return training_bytes(model_shape(model), batch, checkpointing=checkpointing, logits=loss), tensors.peak


@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", torch.float32), ("qwen2", torch.bfloat16), ("qwen3", torch.bfloat16)]
)
def test_training_takes_what_was_predicted(name: str, dtype: torch.dtype) -> None:
    for checkpointing in (False, True):
        predicted, seen = training_peaks(name, dtype, checkpointing)
        assert predicted == pytest.approx(seen, rel=0.05)


def test_so_it_does_with_eager_attention_and_with_an_entropy_bonus() -> None:
    predicted, seen = training_peaks("qwen2", torch.bfloat16, checkpointing=False, attention="eager")
    assert predicted == pytest.approx(seen, rel=0.05)
    predicted, seen = training_peaks("qwen2", torch.bfloat16, checkpointing=True, entropy_coeff=0.01)
    assert predicted == pytest.approx(seen, rel=0.05)


def test_scoring_takes_what_was_predicted() -> None:
    dtype = torch.bfloat16
    model = build("qwen2", dtype, "sdpa").eval()
    with torch.no_grad(), LivingTensors(model) as tensors:
        logits, labels = logits_of(model)
        log_probs_from_logits(logits, labels)
    batch = MicroBatch(SEQUENCES, PROMPT, RESPONSE, dtype.itemsize)
    predicted = forward_bytes(model_shape(model), batch, logits=activation_memory.LOG_PROBS)
    assert predicted == pytest.approx(tensors.peak, rel=0.1)
