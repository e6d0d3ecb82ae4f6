"""Model folders that are whole and still do not go together with what is asked of them; saving them as they were."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig

from rlhf_npu.config import ModelConfig, PPOConfig, compose_config
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.engines.model_fit import check_fit, check_prompt_ids, positions
from rlhf_npu.engines.models import load_policy, load_tokenizer, save_policy, stop_token_ids
from rlhf_npu.errors import DataError, ModelError, SaveError
from tests.prompt_data import dataset_of
from tests.tiny_model import save_tiny_model, tokenizer

CONTRADICTION = '{"do_sample": false, "temperature": 0.6, "top_p": 0.9,\n "eos_token_id": [2, 5]}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "model")


def configured(model: Path, *overrides: str) -> PPOConfig:
    return compose_config([f"actor_rollout_ref.model.path={model}", "algorithm.adv_estimator=grpo", *overrides])


def refusal(config: PPOConfig) -> str:
    with pytest.raises(ModelError) as caught:
        check_fit(config)
    return str(caught.value)


def save_gpt2(folder: Path, n_positions: int = 32) -> Path:
    config = GPT2Config(vocab_size=15, n_embd=32, n_layer=1, n_head=2, n_positions=n_positions, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def test_prompt_and_response_must_fit_the_positions_of_policy_and_critic(folder: Path, tmp_path: Path) -> None:
    lengths = ("data.max_prompt_length=100", "data.max_response_length=28")
    check_fit(configured(folder, *lengths))
    message = refusal(configured(folder, lengths[0], "data.max_response_length=29"))
    assert "data.max_prompt_length + data.max_response_length = 100 + 29 = 129 tokens" in message
    assert "128 positions (max_position_embeddings)" in message
    gpt2 = save_gpt2(tmp_path / "gpt2")
    assert "32 positions (max_position_embeddings)" in refusal(configured(gpt2, "data.max_prompt_length=17"))
    critic = compose_config(
        [f"actor_rollout_ref.model.path={folder}", f"critic.model.path={gpt2}", "data.max_prompt_length=17"]
    )
    assert f"critic.model.path={gpt2} has 32 positions" in refusal(critic)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            128,
        ),
    ],
)
def test_scaled_rope_counts_as_in_vllm(rope: dict[str, object], expected: int) -> None:
    config = LlamaConfig(max_position_embeddings=128, rope_parameters={"rope_theta": 10000.0, **rope})
    assert positions(config) == (expected, "max_position_embeddings")


def test_tensor_parallel_shares_out_heads_and_key_value_heads(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", kv_heads=4)
    tensor_parallel = "actor_rollout_ref.rollout.tensor_model_parallel_size"
    two = ("trainer.n_devices_per_node=2", f"{tensor_parallel}=2")
    three = ("trainer.n_devices_per_node=3", f"{tensor_parallel}=3", "data.train_batch_size=3")
    sizes = (
        "actor_rollout_ref.actor.ppo_mini_batch_size=3",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=1",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=1",
    )
    check_fit(configured(model, *two))
    assert f"{tensor_parallel}=3: must divide the model's 4 (num_attention_heads)" in refusal(
        configured(model, *three, *sizes)
    )


def edit_tokenizer(model: Path, **tokens: int) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= tokens
    file.write_text(json.dumps(content))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_but_for_padding_and_special_tokens(
    tmp_path: Path,
) -> None:
    model = save_tiny_model(tmp_path / "padded")
    grown = tokenizer()
    grown.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<tool>"]})
    grown.save_pretrained(model)
    skeleton, loaded = check_fit(configured(model))
    assert (loaded.pad_token_id, skeleton.vocabulary) == (15, 15)
    sample = PromptSample(0, (4, 16), "1<tool>", "", None, {}, "a.jsonl", 7)
    message = r"a\.jsonl:7: the prompt holds the token '<tool>', whose id 16 the policy has no embedding for"
    with pytest.raises(DataError, match=message):
        check_prompt_ids([dataset_of([sample])], loaded, skeleton.vocabulary)
    check_prompt_ids([dataset_of([dataclasses.replace(sample, prompt_ids=(4, 14))])], loaded, skeleton.vocabulary)
    edit_tokenizer(model, x=30)
    assert "1 tokens that the model" in refusal(configured(model))


def test_a_critic_must_read_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    critic = save_tiny_model(tmp_path / "critic")
    both = [f"actor_rollout_ref.model.path={folder}", f"critic.model.path={critic}"]
    check_fit(compose_config(both))
    edit_tokenizer(critic, **{"1": 6, "3": 4})
    assert "its tokenizer gives '1' the id 6, the policy's 4" in refusal(compose_config(both))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda config: config | {"num_hidden_layers": 3},
            "lacks weights that its config.json asks for: model.layers.2",
        ),
        (lambda config: config | {"num_hidden_layers": 1}, "has weights that its config.json does not ask for"),
        (lambda config: config | {"vocab_size": 16}, "has weights of other shapes than its config.json says"),
        (lambda config: config | {"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ],
)
def test_weights_and_config_must_agree(
    tmp_path: Path, change: Callable[[dict[str, object]], dict[str, object]], words: str
) -> None:
    model = save_tiny_model(tmp_path / "model")
    file = model / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert words in refusal(configured(model))


def test_a_model_is_saved_with_its_generation_config_as_it_was(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model")
    (path / "generation_config.json").write_text(CONTRADICTION)
    model = ModelConfig(path=str(path), dtype="float32")
    policy, words = load_policy(model), load_tokenizer(model)
    assert stop_token_ids(model, words) == [2, 5]
    weights = {name: value.clone() for name, value in policy.state_dict().items()}
    save_policy(policy, words, weights, tmp_path / "saved")
    assert (tmp_path / "saved" / "generation_config.json").read_text() == CONTRADICTION
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == words.get_vocab()
    assert not list(tmp_path.glob("*.partial"))


def test_a_model_that_cannot_be_saved_says_where_its_parts_are(folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(folder), dtype="float32")
    policy, words = load_policy(model), load_tokenizer(model)
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"file/model.partial: Not a directory"):
        save_policy(policy, words, dict(policy.state_dict()), tmp_path / "file" / "model")
