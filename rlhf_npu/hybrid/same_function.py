"""Do trainer and rollout engine compute the same function? Both score the same tokens, and the scores are compared.

What may differ is what rounding explains. That is measured, by Monte Carlo arithmetic (Parker 1997): the trainer scores
the tokens once more, with each layer's output disturbed at random by as much as one rounding can change it. So the
bound fits each model and precision, and does not have to be guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_npu.algorithms.token_probs import log_probs_from_logits
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.rounding import FLOOR, MAX_FACTOR, MEAN_FACTOR, rounding_noise

Scores = list[list[float]]
TokenIds = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Comparison:
    """The log-probabilities of the same tokens, by trainer and rollout engine.

    Attributes:
        what: which computations were compared, in words.
        tokens: how many tokens.
        mean, largest: the absolute differences in nats.
        mean_explained, largest_explained: those that rounding explains.
        trainer, rollout: both numbers where they differ most.
        place: that place: (sequence, token), from 0.
    """

    what: str
    tokens: int
    mean: float
    largest: float
    mean_explained: float
    largest_explained: float
    trainer: float
    rollout: float
    place: tuple[int, int]

    @property
    def same(self) -> bool:
        """Whether rounding explains the differences; a score that is no number is never explained."""
        return (
            self.mean <= FLOOR + MEAN_FACTOR * self.mean_explained
            and self.largest <= FLOOR + MAX_FACTOR * self.largest_explained
        )

    def __str__(self) -> str:
        row, column = self.place
        return (
            f"{self.what}: at token {column} of sequence {row} the trainer's log-probability is {self.trainer:.4f} and "
            f"the rollout engine's {self.rollout:.4f}; over {self.tokens} tokens they differ by {self.mean:.1e} on "
            f"average and {self.largest:.1e} at most, of which rounding explains {self.mean_explained:.1e} and "
            f"{self.largest_explained:.1e}"
        )


@dataclass(frozen=True)
class FunctionReport:
    """What `compare_functions` saw.

    Attributes:
        comparisons: one for each way in which the engines compute.
        trainer_attention, rollout_attention: the implementations.
    """

    comparisons: list[Comparison]
    trainer_attention: str
    rollout_attention: str

    @property
    def same(self) -> bool:
        return all(comparison.same for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison:
        """The comparison that is furthest from its bound."""
        return max(self.comparisons, key=lambda one: (not one.same, one.mean / (FLOOR + one.mean_explained)))


@dataclass(frozen=True)
class RolloutScores:
    """What a rollout engine made of prompts, and how it scores that.

    Attributes:
        sequences: the token ids of each prompt and its response.
        starts: the place of each prompt's last token.
        sampled: the log-probabilities of each response's tokens, as they were sampled.
        readable: the sequences, cut to what the engine can score.
        read: the log-probability of each token of those but the first.
        attention: the engine's implementation.
    """

    sequences: TokenIds
    starts: list[int]
    sampled: Scores
    readable: TokenIds
    read: Scores
    attention: str


def rollout_scores(rollout: RolloutEngine, prompts: TokenIds, response_length: int) -> RolloutScores:
    """Let the rollout engine continue `prompts` by `response_length` tokens at most, and read the sequences again."""
    rollout.reset_prefix_cache()
    answers = rollout.generate(prompts, n=1, seed=0, max_tokens=response_length)
    responses = [choices[0] for choices in answers]
    sequences = [[*prompt, *response.token_ids] for prompt, response in zip(prompts, responses, strict=True)]
    readable = [sequence[: rollout.longest_scored] for sequence in sequences]
    return RolloutScores(
        sequences=sequences,
        starts=[len(prompt) - 1 for prompt in prompts],
        sampled=[list(response.log_probs) for response in responses],
        readable=readable,
        read=rollout.score(readable),
        attention=rollout.attention,
    )


def compare_functions(
    policy: Any, rollout: RolloutEngine, prompts: TokenIds, temperature: float, response_length: int
) -> FunctionReport:
    """`rollout_scores` and `compare_scores`, where both engines are awake."""
    return compare_scores(policy, rollout_scores(rollout, prompts, response_length), temperature)


def compare_scores(policy: Any, rollout: RolloutScores, temperature: float) -> FunctionReport:
    """Score with the trainer what the rollout engine has scored.

    Compared with the trainer's scores are the rollout engine's of whole sequences, as it reads prompts, and of the
    responses, as it sampled them; and the trainer's in training mode with its own in evaluation mode. Every rank calls
    this together, with the same sequences.

    Args:
        policy: the trainer's model; under ZeRO its parameters may be partitioned.
        temperature: that of sampling.
    """
    plain, tempered = _trainer_scores(policy, rollout.sequences, (1.0, temperature))
    with rounding_noise(policy):
        noisy, noisy_tempered = _trainer_scores(policy, rollout.sequences, (1.0, temperature))
    in_training = _trainer_scores(policy, rollout.sequences, (1.0,), training=True)[0]
    readable, starts = rollout.readable, rollout.starts
    comparisons = [
        _compare("reading sequences", _cut(plain, readable), rollout.read, _cut(noisy, readable)),
        _compare("generating", _from(tempered, starts), rollout.sampled, _from(noisy_tempered, starts)),
        _compare("the trainer's training mode beside its evaluation mode", in_training, plain, noisy, plain),
    ]
    return FunctionReport(comparisons, policy.config._attn_implementation, rollout.attention)  # noqa: SLF001


def agrees_with_eager_attention(policy: Any, rollout: RolloutScores) -> bool:
    """Whether the trainer would read the sequences as the rollout engine does if its attention were eager.

    Every rank calls this together, with the same sequences.
    """
    before = policy.config._attn_implementation  # noqa: SLF001
    policy.set_attn_implementation("eager")
    try:
        plain = trainer_scores(policy, rollout.readable)
        with rounding_noise(policy):
            noisy = trainer_scores(policy, rollout.readable)
        return _compare("with eager attention", plain, rollout.read, noisy).same
    finally:
        policy.set_attn_implementation(before)


def trainer_scores(policy: Any, sequences: TokenIds) -> Scores:
    """The trainer's log-probability of each token of each sequence but its first; every rank calls this together."""
    return _trainer_scores(policy, sequences, (1.0,))[0]


@torch.no_grad()
def _trainer_scores(
    policy: Any, sequences: TokenIds, temperatures: Sequence[float], training: bool = False
) -> list[Scores]:
    """For each temperature, the log-probability of each token of each sequence but its first."""
    policy.train(training)
    device = next(policy.parameters()).device
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left").to(device)
    ones = [torch.ones_like(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side="left").to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = policy(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, :-1]
    scores = []
    for temperature in temperatures:
        log_probs = log_probs_from_logits(logits, ids[:, 1:], temperature).tolist()
        scores.append([row[len(row) - len(sequence) + 1 :] for row, sequence in zip(log_probs, sequences, strict=True)])
    return scores


def _from(scores: Scores, starts: Sequence[int]) -> Scores:
    return [row[start:] for row, start in zip(scores, starts, strict=True)]


def _cut(scores: Scores, sequences: TokenIds) -> Scores:
    return [row[: len(sequence) - 1] for row, sequence in zip(scores, sequences, strict=True)]


def _compare(what: str, trainer: Scores, rollout: Scores, noisy: Scores, exact: Scores | None = None) -> Comparison:
    """Compare `trainer` with `rollout`; rounding explains what `noisy` differs from `exact`, or from `trainer`."""
    pairs = [
        (mine - theirs, mine - disturbed if exact is None else exact[row][column] - disturbed, (row, column))
        for row, columns in enumerate(zip(trainer, rollout, noisy, strict=True))
        for column, (mine, theirs, disturbed) in enumerate(zip(*columns, strict=True))
    ]
    differences = torch.tensor([pair[0] for pair in pairs]).abs().nan_to_num(nan=torch.inf)
    explained = torch.tensor([pair[1] for pair in pairs]).abs()
    row, column = pairs[int(differences.argmax())][2]
    return Comparison(
        what=what,
        tokens=len(pairs),
        mean=float(differences.mean()),
        largest=float(differences.max()),
        mean_explained=float(explained.mean()),
        largest_explained=float(explained.max()),
        trainer=trainer[row][column],
        rollout=rollout[row][column],
        place=(row, column + 1),
    )
