"""Folders that hold a reward model, and those that only look as if they did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from rlhf_npu.config import PPOConfig, compose_config
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.engines.model_fit import check_alone
from rlhf_npu.engines.models import load_tokenizer
from rlhf_npu.engines.reward_model_fit import ScoringFit, check_reward_model
from rlhf_npu.errors import DataError, ModelError
from tests.data.tokenizers_for_tests import CHATML, byte_level
from tests.tiny_model import save_tiny_model, save_tiny_reward_model

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_reward_model(tmp_path_factory.mktemp("models") / "reward")


def configured(policy: Path, reward: Path, *overrides: str) -> PPOConfig:
    model = ["reward_model.enable=true", f"reward_model.model.path={reward}"]
    return compose_config([f"actor_rollout_ref.model.path={policy}", *model, *overrides])


def check(policy: Path, reward: Path, *overrides: str) -> ScoringFit:
    config = configured(policy, reward, *overrides)
    return check_reward_model(config, load_tokenizer(config.actor_rollout_ref.model))


def edit(file: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        content |= values
        kept = {name: value for name, value in content.items() if value is not None}
        (folder / file).write_text(json.dumps(kept))

    return change


def rename_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name.replace("score", "v_head"): each for name, each in weights.items()}, folder / "model.safetensors")


def leave_something(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"gating.weight": torch.zeros(2)}, folder / "model.safetensors")


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def two_labels(folder: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=2, ignore_mismatched_sizes=True)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename_head, "the model has no classification head (score.weight), which would be drawn at random"),
        (leave_something, "has weights that its config.json does not ask for: gating.weight"),
        (two_labels, "the model has 2 labels, and a reward is one number; it must have 1"),
        (without_tokenizer, "holds no tokenizer; save the one that the reward model was trained with there"),
        (edit("tokenizer_config.json", pad_token=None), "its tokenizer has no padding token"),
        (edit("tokenizer_config.json", pad_token="<eos>"), "its padding token '<eos>' is its EOS as well"),
        (
            edit("config.json", pad_token_id=1),
            "says pad_token_id=1, and the tokenizer pads with '<pad>', whose id is 0",
        ),
        (
            edit("config.json", max_position_embeddings=31),
            "= 16 + 16 = 32 tokens, but the model in reward_model.model.p",
        ),
    ],
)
def test_what_would_score_at_random_or_somewhere_else_is_refused(
    policy: Path, trained: Path, tmp_path: Path, change: Change, words: str
) -> None:
    assert check(policy, trained).conversations.as_they_are
    folder = shutil.copytree(trained, tmp_path / "reward")
    change(folder)
    with pytest.raises(ModelError) as caught:
        check(policy, folder)
    assert words in str(caught.value)
    assert f"reward_model.model.path={folder}" in str(caught.value)


def test_a_language_model_is_no_reward_model(policy: Path) -> None:
    with pytest.raises(ModelError, match=r"no classification head \(score\.weight\)"):
        check(policy, policy)


def test_a_padding_token_without_an_embedding(policy: Path, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"padding token '<new>' has the id 15, and the model has embeddings for 15"):
        check(policy, folder)


def test_main_reward_trains_none_that_would_be_read_before_the_end(policy: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = shutil.copytree(policy, tmp_path / "model")
    edit("tokenizer_config.json", pad_token=None)(folder)  # EOS stands in for it
    config = configured(folder, folder)
    with pytest.raises(ModelError, match="its padding token '<eos>' is its EOS as well"):
        check_alone(config.actor_rollout_ref.model, 32, AutoModelForSequenceClassification)


def other_reward_model(folder: Path, template: str | None, positions: int = 64) -> Path:
    tokenizer = byte_level(template)
    save_tiny_reward_model(folder, vocabulary=len(tokenizer), positions=positions, tokenizer=tokenizer)
    return folder


def chat(row: int, text: str) -> PromptSample:
    messages = [{"role": "user", "content": text}]
    return PromptSample(row, (3,), text, "test", None, {}, "chats.jsonl", row, messages)


def test_chats_need_a_template_and_room_in_another_reward_model(policy: Path, tmp_path: Path) -> None:
    fit = check(policy, other_reward_model(tmp_path / "plain", None))
    assert not fit.conversations.as_they_are
    with pytest.raises(ModelError, match=r"another than the policy's and has no chat_template, and prompts are lists"):
        fit.check_prompts([[chat(1, "1")]])
    fit.check_prompts([[PromptSample(1, (3,), "1", "test", None, {})]])
    fit = check(policy, other_reward_model(tmp_path / "chats", CHATML))
    with pytest.raises(DataError, match=r"chats\.jsonl:2: with a response of one character the prompt takes 91 tokens"):
        fit.check_prompts([[chat(1, "1"), chat(2, "x " * 40)]])


def test_positions_of_another_tokenizer_are_not_counted_in_the_policys_tokens(policy: Path, tmp_path: Path) -> None:
    assert check(policy, other_reward_model(tmp_path / "short", CHATML, positions=20)).positions == 20


def test_the_shape_that_memory_is_planned_for(policy: Path, trained: Path) -> None:
    from rlhf_npu.hybrid.memory.memory_plan import models_of

    shape = models_of(configured(policy, trained)).reward
    assert shape is not None
    model = LlamaForSequenceClassification(LlamaConfig.from_pretrained(trained))
    assert shape.elements == sum(parameter.numel() for parameter in model.parameters())
