"""Policies compute in training mode what they compute in evaluation mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from rlhf_npu.config import ModelConfig
from rlhf_npu.engines.models import load_critic, load_policy, save_policy
from rlhf_npu.preflight.tiny_models import FAMILIES, tokenizer

NOISY = {
    "Llama": {"attention_dropout": 0.2},
    "GPT-2": {"attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "OPT": {"dropout": 0.2, "attention_dropout": 0.2, "layerdrop": 0.5},
    "Phi-3": {"attention_dropout": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "GPT-NeoX": {"attention_dropout": 0.2, "hidden_dropout": 0.2},
    "Mixtral": {"attention_dropout": 0.2, "router_jitter_noise": 0.2},
    "Falcon": {"attention_dropout": 0.2, "hidden_dropout": 0.2},
    "StarCoder 2": {"attention_dropout": 0.2, "residual_dropout": 0.2, "embedding_dropout": 0.2},
}


@pytest.mark.parametrize("name", NOISY)
def test_policy_and_critic_compute_without_noise_and_are_saved_as_configured(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    replace(family, arguments=family.arguments | NOISY[name]).save(tmp_path)
    model = ModelConfig(path=str(tmp_path), dtype="float32")
    ids = torch.arange(3, 43)[None]
    policy, critic = load_policy(model), load_critic(model)
    torch.nn.init.normal_(critic.value_head.weight)
    with torch.no_grad():
        assert torch.equal(policy.train()(ids).logits, policy.eval()(ids).logits)
        assert torch.equal(critic.train()(input_ids=ids), critic.eval()(input_ids=ids))
    weights = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    save_policy(policy, tokenizer(), weights, tmp_path / "saved")
    saved = AutoConfig.from_pretrained(tmp_path / "saved")
    assert {key: getattr(saved, key) for key in NOISY[name]} == NOISY[name]
