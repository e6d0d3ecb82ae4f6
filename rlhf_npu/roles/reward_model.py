"""The trained reward model: the score of each response, read at the last token of its conversation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf_npu.data.conversations import Answer, Conversations
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.engines.collectives import MAX, all_reduce
from rlhf_npu.engines.model_fit import positions
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.engines.trainer_engine import InferenceEngine
from rlhf_npu.rewards import Graded

Ids = list[int]


class RewardModel:
    """A frozen sequence classifier with one label.

    Args:
        engine: that holds the classifier.
        classifier: as it was loaded, with the padding token in its configuration.
        micro_size: conversations of a forward pass at most.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        classifier: PreTrainedModel,
        conversations: Conversations,
        micro_size: int,
        device: torch.device,
    ) -> None:
        self.engine = engine
        self._conversations = conversations
        self._micro_size = micro_size
        self._device = device
        config = classifier.config.get_text_config()
        config.use_cache = False
        self._pad = int(config.pad_token_id)
        self._positions, _ = positions(classifier.config)
        self._vocabulary = int(config.vocab_size)

    def grade(self, prompts: Sequence[PromptSample], completions: Sequence[Sequence[Completion]]) -> list[Graded]:
        """The score of each completion, in order, or why it has none; all ranks call this together."""
        answers = [
            Answer(prompt, choice.token_ids, choice.finished)
            for prompt, choices in zip(prompts, completions, strict=True)
            for choice in choices
        ]
        read = [self._readable(ids) for ids in self._conversations.ids(answers)]
        scores = iter(self.scores([ids for ids in read if isinstance(ids, list)]))
        return [Graded(next(scores)) if isinstance(ids, list) else Graded(0.0, failure=ids) for ids in read]

    @torch.no_grad()
    def scores(self, rows: Sequence[Ids]) -> list[float]:
        """The score of each conversation; all ranks call this together, each with as many as it has."""
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        parts = [order[first : first + self._micro_size] for first in range(0, len(order), self._micro_size)]
        idle = self._most(len(parts)) - len(parts)
        found = [0.0] * len(rows)
        for part in parts:
            for place, score in zip(part, self._forward([rows[place] for place in part]).tolist(), strict=True):
                found[place] = score
        for _ in range(idle):  # ZeRO-3 gathers in lockstep
            self._forward([[self._pad]])
        return found

    def _forward(self, rows: Sequence[Ids]) -> torch.Tensor:
        """Scores (B,) float32, padded on the right: transformers takes the last token that is not padding."""
        tensors = [torch.tensor(row, dtype=torch.int64) for row in rows]
        ids = pad_sequence(tensors, batch_first=True, padding_value=self._pad)
        mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
        scores: torch.Tensor = self.engine.module(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device)
        ).logits
        return scores[:, 0].float()

    def _most(self, passes: int) -> int:
        """The largest number of passes of all ranks."""
        return int(all_reduce(torch.tensor([passes], device=self._device), MAX))

    def _readable(self, ids: Ids | str) -> Ids | str:
        if isinstance(ids, str):
            return ids
        if len(ids) > self._positions:
            return (
                f"it takes {len(ids)} tokens with its prompt, and the reward model has {self._positions:.0f} positions"
            )
        if max(ids) >= self._vocabulary:
            return f"it has the token id {max(ids)}, and the reward model has embeddings for {self._vocabulary}"
        return ids
