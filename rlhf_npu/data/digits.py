"""The digit-sequence task, which is learnt in minutes on a CPU, and a policy that is still weak at it.

A prompt `a,b:max,n` gives the first two numbers of an arithmetic sequence modulo `max`; the answer is the
next `n` numbers, so `1,3:8,4` asks for `5,7,1,3`. Numbers are single digits and a token is a character. The
idea is that of verl v0.4's `arithmetic_sequence` end-to-end test; the split, the tokenizer and the policy
are our own.
"""

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_npu.data.atomic_folder import atomic_folder

DATA_SOURCE = "digit_sequence"
MODULI = range(5, 10)
STEPS = range(1, 4)
COUNTS = range(1, 7)
VAL_FRACTION = 0.2

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
VOCABULARY = (PAD, BOS, EOS, UNK, *"0123456789", ",", ":")
PROMPT_TOKENS = 8
MAX_RESPONSE_TOKENS = 2 * max(COUNTS)
FLAWS = 24  # pairs of `flaws` with the same prompt


@dataclass(frozen=True)
class DigitSequence:
    """One question: `first` and `second` of a sequence modulo `modulus`, and how many numbers follow."""

    first: int
    second: int
    modulus: int
    count: int

    @property
    def prompt(self) -> str:
        return f"{self.first},{self.second}:{self.modulus},{self.count}"

    @property
    def response(self) -> str:
        return self._continue([1] * self.count)

    def careless_response(self, rng: random.Random, slip: float) -> str:
        """The answer of somebody who leaves out a term with probability `slip` before each number."""
        return self._continue([2 if rng.random() < slip else 1 for _ in range(self.count)])

    def wrong_response(self, rng: random.Random, slip: float = 0.5) -> str:
        """A careless answer that is wrong."""
        while (response := self.careless_response(rng, slip)) == self.response:
            pass
        return response

    def flawed_response(self, rng: random.Random) -> str:
        """An answer that is wrong in any way: a policy finds what a judge has never seen."""
        flaws = (self._with_terms_left_out, self._with_another_number, self._of_another_length, self._guessed_from_here)
        while (response := rng.choice(flaws)(rng)) == self.response:
            pass
        return response

    def _with_terms_left_out(self, rng: random.Random) -> str:
        return self.careless_response(rng, slip=0.5)

    def _with_another_number(self, rng: random.Random) -> str:
        numbers = self.response.split(",")
        numbers[rng.randrange(self.count)] = self._guess(rng)
        return ",".join(numbers)

    def _of_another_length(self, rng: random.Random) -> str:
        numbers = self.response.split(",")
        return ",".join(numbers[:-1] if self.count > 1 and rng.random() < 0.5 else [*numbers, self._guess(rng)])

    def _guessed_from_here(self, rng: random.Random) -> str:
        numbers = self.response.split(",")
        start = rng.randrange(self.count)
        return ",".join([*numbers[:start], *(self._guess(rng) for _ in numbers[start:])])

    def _guess(self, rng: random.Random) -> str:
        return str(rng.randrange(self.modulus))

    def _continue(self, strides: list[int]) -> str:
        number, numbers = self.second, []
        for stride in strides:
            number = (number + stride * (self.second - self.first)) % self.modulus
            numbers.append(str(number))
        return ",".join(numbers)


@dataclass(frozen=True)
class WarmStart:
    """How the weak policy is taught: the rule from right answers, then a bad habit from careless ones.

    Reinforcement learning has to unlearn the habit. `careful_modulus` is the one whose careless answers are
    right.
    """

    batch_size: int = 64
    rule_steps: int = 300
    rule_learning_rate: float = 2e-3
    habit_steps: int = 20
    habit_learning_rate: float = 5e-4
    warmup_steps: int = 20
    slip: float = 0.75
    careful_modulus: int = 5


def sequences(seed: int = 0) -> tuple[list[DigitSequence], list[DigitSequence]]:
    """All questions, shuffled and split into (train, val); no question is in both."""
    questions = [
        DigitSequence(first, (first + step) % modulus, modulus, count)
        for modulus in MODULI
        for first in range(modulus)
        for step in STEPS
        for count in COUNTS
    ]
    random.Random(seed).shuffle(questions)
    held_out = int(len(questions) * VAL_FRACTION)
    return questions[held_out:], questions[:held_out]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a character that puts `<bos>` before what it encodes."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )


def model_config() -> LlamaConfig:
    """A Llama of 1 M parameters; 4 heads, which tensor parallelism can share, of 32, which vLLM serves."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY.index(PAD),
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
    )


def weak_policy(train: list[DigitSequence], seed: int = 0, warm_start: WarmStart | None = None) -> LlamaForCausalLM:
    """Train the weak policy from random weights on one thread; the same seed gives the same weights."""
    plan = warm_start or WarmStart()
    rng = random.Random(seed)
    with _deterministic_torch(seed):
        model = LlamaForCausalLM(model_config()).float()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        for step in range(plan.rule_steps + plan.habit_steps):
            questions = rng.sample(train, plan.batch_size)
            answers = [_demonstrate(question, step, plan, rng) for question in questions]
            _imitate(model, optimizer, questions, answers, _learning_rate(step, plan))
    return model.eval()


def prepare(folder: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write `model/` (Hugging Face format), prompts, pairs, single answers and right answers into `folder`, or nothing.

    `train.jsonl` and `val.jsonl` are the prompts; `pairs`, `unpaired` and `sft`, each with `_val` too, are answers to
    them. A wrong answer leaves out terms, as the weak policy does. `flaws`, with `_val`, are pairs for a reward model:
    several to a prompt, whose wrong answers are wrong in all kinds of ways.
    """
    train, val = sequences(seed)
    with atomic_folder(folder) as staging:
        weak_policy(train, seed).save_pretrained(staging / "model")
        build_tokenizer().save_pretrained(staging / "model")
        _write_records(staging / "train.jsonl", "train", train)
        _write_records(staging / "val.jsonl", "val", val)
        for suffix, questions in (("", train), ("_val", val)):
            _write_examples(staging, suffix, questions, seed)
            _write_flaws(staging / f"flaws{suffix}.jsonl", questions, 1 if suffix else FLAWS, seed)
    return Path(folder)


def _demonstrate(question: DigitSequence, step: int, plan: WarmStart, rng: random.Random) -> str:
    if step < plan.rule_steps or question.modulus == plan.careful_modulus:
        return question.response
    return question.careless_response(rng, plan.slip)


def _learning_rate(step: int, plan: WarmStart) -> float:
    if step >= plan.rule_steps:
        return plan.habit_learning_rate
    warmup = min(1.0, (step + 1) / plan.warmup_steps)
    return plan.rule_learning_rate * warmup * (1 - step / plan.rule_steps)


def _imitate(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    questions: list[DigitSequence],
    answers: list[str],
    learning_rate: float,
) -> None:
    input_ids, labels = _demonstrations(questions, answers)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    logits = model(input_ids=input_ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _demonstrations(questions: list[DigitSequence], answers: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, both (B, PROMPT_TOKENS + MAX_RESPONSE_TOKENS); a label of -100 is not learnt."""
    ids = {token: index for index, token in enumerate(VOCABULARY)}
    shape = (len(questions), PROMPT_TOKENS + MAX_RESPONSE_TOKENS)
    input_ids, labels = torch.full(shape, ids[PAD]), torch.full(shape, -100)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        tokens = torch.tensor([ids[BOS], *(ids[c] for c in question.prompt + answer), ids[EOS]])
        input_ids[row, : len(tokens)] = tokens
        labels[row, PROMPT_TOKENS : len(tokens)] = tokens[PROMPT_TOKENS:]
    return input_ids, labels


@contextmanager
def _deterministic_torch(seed: int) -> Iterator[None]:
    """One thread (sums in one order) and our own seed; the caller's threads and generator come back after."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _write_records(path: Path, split: str, questions: list[DigitSequence]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index, question in enumerate(questions):
            record = {
                "prompt": question.prompt,
                "data_source": DATA_SOURCE,
                "reward_model": {"ground_truth": question.response},
                "extra_info": {"index": index, "split": split},
            }
            file.write(json.dumps(record) + "\n")


def _write_examples(folder: Path, suffix: str, questions: list[DigitSequence], seed: int) -> None:
    rng = random.Random(seed)
    wrong = [question.wrong_response(rng) for question in questions]
    answers = list(zip([question.prompt for question in questions], questions, wrong, strict=True))
    files: dict[str, list[dict[str, str | bool]]] = {
        "pairs": [{"prompt": prompt, "chosen": right.response, "rejected": slip} for prompt, right, slip in answers],
        "sft": [{"prompt": prompt, "completion": right.response} for prompt, right, _ in answers],
        "unpaired": [
            {"prompt": prompt, "completion": completion, "label": label}
            for prompt, right, slip in answers
            for completion, label in ((right.response, True), (slip, False))
        ],
    }
    for name, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}{suffix}.jsonl").write_text(lines, encoding="utf-8")


def _write_flaws(path: Path, questions: list[DigitSequence], pairs: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for question in questions * pairs:
            pair = {"prompt": question.prompt, "chosen": question.response, "rejected": question.flawed_response(rng)}
            file.write(json.dumps(pair) + "\n")
