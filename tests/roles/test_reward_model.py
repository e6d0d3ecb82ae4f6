"""The reward model's scores are those that transformers computes of each conversation alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_npu.config import ModelConfig
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.engines.rollout import Completion
from tests.data.tokenizers_for_tests import CHATML, byte_level
from tests.devices import PLATFORM
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_reward_model, tokenizer

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "1,2:"}]
PROMPTS = [
    PromptSample(at, tuple(ids), "".join("1,2:"), "test", None, {}) for at, ids in enumerate([[4, 14, 5], [1, 7]])
]
CHATS = [PromptSample(0, (4, 5), "1,2:", "test", None, {}, messages=MESSAGES)]
TOO_LONG = (5,) * 130
# Of unequal length and number: rank 1 has one prompt less, and its passes must not wait for rank 0's for ever.
RESPONSES = [[(5, 13, 6, 2), (4, 2), (7, 7, 7, 7, 7), TOO_LONG], [(2,), (9, 13, 13, 2), (3, 4, 5), (6, 2)]]


def completions(ids: list[tuple[int, ...]]) -> list[Completion]:
    return [Completion(each, (0.0,) * len(each), each[-1] == 2) for each in ids]


def _graded(own: str, other: str) -> Any:
    """Of a model that writes as the policy, whole and sharded, and of one that does not."""
    import torch.distributed as dist

    from rlhf_npu.engines.models import load_reward_model, read_tokenizer
    from rlhf_npu.engines.reward_model_fit import conversations_of
    from rlhf_npu.engines.trainer_engine import InferenceEngine
    from rlhf_npu.roles.reward_model import RewardModel

    prompts, responses = ([PROMPTS, PROMPTS[:1]][dist.get_rank()], [RESPONSES, RESPONSES[:1]][dist.get_rank()])
    found = []
    for path, zero_stage in ((own, 0), (own, 3), (other, 0)):
        model = ModelConfig(path=path, dtype="float32")
        classifier = load_reward_model(model, zero_stage=zero_stage, device=PLATFORM.device())
        engine = InferenceEngine(classifier, zero_stage=zero_stage, dtype="float32", platform=PLATFORM)
        conversations = conversations_of(classifier.config, read_tokenizer(model), tokenizer())
        scoring = RewardModel(engine, classifier, conversations, 3, PLATFORM.device())
        asked = CHATS if path == other else prompts
        given = RESPONSES[:1] if path == other else responses
        found.append(scoring.grade(asked, [completions(ids) for ids in given]))
    return found


def expected(path: Path, ids: list[int]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return float(model(torch.tensor([ids])).logits)


def test_scores_are_transformers_own_at_zero_0_and_3_with_both_ways_to_write(tmp_path: Path) -> None:
    own = save_tiny_reward_model(tmp_path / "own")
    other = save_tiny_reward_model(tmp_path / "other", vocabulary=400, tokenizer=byte_level(CHATML))
    ranks = run_ranks(2, _graded, str(own), str(other))
    for found, count in zip(ranks, (2, 1), strict=True):
        for graded in found[:2]:
            rows = [[*prompt.prompt_ids, *ids] for prompt, many in zip(PROMPTS, RESPONSES, strict=True) for ids in many]
            assert len(graded) == 4 * count
            for one, row in zip(graded, rows, strict=False):
                if len(row) > 128:
                    assert one.failure == "it takes 133 tokens with its prompt, and the reward model has 128 positions"
                else:
                    assert one.score == pytest.approx(expected(own, row), abs=2e-6)
        reads = AutoTokenizer.from_pretrained(other)
        texts = [tokenizer().decode(ids, skip_special_tokens=True) for ids in RESPONSES[0]]
        for one, text in list(zip(found[2], texts, strict=True))[:3]:
            chat = [*MESSAGES, {"role": "assistant", "content": text}]
            ids = reads.apply_chat_template(chat, tokenize=True)["input_ids"]
            assert one.score == pytest.approx(expected(other, ids), abs=2e-6)
    spread = torch.tensor([graded.score for graded in ranks[0][0] if graded.failure is None])
    assert spread.std() > 0.05
