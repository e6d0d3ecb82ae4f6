"""One process a device: a DeepSpeed trainer that learns from files. Tokens are read here; the driver names examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import DPOConfig, OfflineConfig, RewardModelConfig
from rlhf_npu.data.dealing import Plan
from rlhf_npu.data.examples import ExampleDataset
from rlhf_npu.data.packing import Example, cut, pack
from rlhf_npu.engines.collectives import all_reduce, gather
from rlhf_npu.engines.models import load_policy, load_reward_model, load_tokenizer, save_policy
from rlhf_npu.engines.packed_attention import check_packing
from rlhf_npu.engines.packed_model import PackedModel, PackedScores
from rlhf_npu.engines.reward_model_fit import ENDS_AT_EOS
from rlhf_npu.engines.trainer_engine import Sums, TrainerEngine, reduce_sums
from rlhf_npu.hybrid.resharding.gathered import whole_weights
from rlhf_npu.roles.mismatched import mismatched
from rlhf_npu.roles.objectives import Objective, bradley_terry, likelihood, pairs, unpaired
from rlhf_npu.roles.offline_batch import OfflineBatch, OfflineTotals, completion_sums
from rlhf_npu.workers.worker_process import WorkerProcess

SAVE_BUCKET = 64 << 20  # bytes


@dataclass(frozen=True)
class Part:
    """What one rank does of a batch.

    Attributes:
        of: "train" or "val".
        plan: its micro-batches of example numbers.
        reference: log-probabilities (examples, columns) under the reference for each micro-batch; None without one.
        is_repeated: it only keeps the ranks in step, and counts nothing.
    """

    of: str
    plan: Plan
    reference: list[np.ndarray] | None = None
    is_repeated: bool = False


class OfflineWorker(WorkerProcess):
    """The class of the Ray actors; the order of calls is that of `trainer.offline`."""

    def __init__(self, config: OfflineConfig, *place: Any) -> None:
        super().__init__(*place)
        self._config = config
        self._data: dict[str, ExampleDataset] = {}
        self._packed: PackedModel | PackedScores
        self._engine: TrainerEngine
        self._tokenizer: PreTrainedTokenizerBase
        self._objective: Objective

    def start(self, optimizer_steps: int, data: dict[str, ExampleDataset]) -> None:
        """Build the engine, and check that it computes packed examples as if each stood alone.

        Args:
            optimizer_steps: in the whole run, for the learning-rate schedule.
            data: by what `Part.of` calls it.

        Raises:
            ModelError: the model cannot be packed.
        """
        config, platform = self._config, self._platform
        self._data = data
        self._objective = objective_of(config)
        self._tokenizer = load_tokenizer(config.model)
        self._packed = self._load()
        self._engine = TrainerEngine(
            self._packed,
            config.optim,
            zero_stage=config.engine.zero_stage,
            dtype=config.model.dtype,
            grad_clip=config.engine.grad_clip,
            optimizer_steps=optimizer_steps,
            platform=platform,
        )
        check_packing(self._packed)

    def _load(self) -> PackedModel | PackedScores:
        model, stage, device = self._config.model, self._config.engine.zero_stage, self._platform.device()
        attention, shares_prompts = model.attn_implementation, self._shares_prompts
        if isinstance(self._config, RewardModelConfig):
            classifier = load_reward_model(model, zero_stage=stage, device=device)
            setattr(classifier.config, ENDS_AT_EOS, True)
            return PackedScores(classifier, attention=attention, shares_prompts=shares_prompts)
        policy = load_policy(model, zero_stage=stage, device=device)
        return PackedModel(policy, attention=attention, shares_prompts=shares_prompts)

    def train(self, part: Part) -> dict[str, float]:
        """One optimizer step on a batch; returns its metrics, the same on every rank."""
        return self._engine.train_mini_batch(self._batches(part), self._objective)

    @torch.no_grad()
    def evaluate(self, part: Part) -> tuple[dict[str, float], int]:
        """The means of held-out examples over all ranks, and of how many examples (SFT: tokens) they are means."""
        self._engine.module.eval()
        batches = self._batches(part)
        sums: Sums = {}
        for batch in batches:
            for name, value in self._objective(self._engine.module, batch).sums.items():
                share = value.double() * (not part.is_repeated)
                sums[name] = sums.get(name, 0.0) + share
        totals = batches[0].totals
        weight = totals.tokens if self._objective is likelihood else totals.examples
        return reduce_sums(sums, self._engine.engine.device), weight

    def score(self, part: Part) -> list[np.ndarray]:
        """Log-probabilities of each micro-batch's completions under the present weights, (examples, columns).

        KTO has one column more, of the completion that belongs to another prompt.
        """
        columns = [self._sums(part, self._data[part.of].__getitem__)]
        if self._is_unpaired:
            columns.append(self._sums(part, self._other(part.of)))
        return [np.concatenate(parts, axis=1) for parts in zip(*columns, strict=True)]

    def save(self, folder: str) -> None:
        """Write the model in Hugging Face format; rank 0 writes, every rank takes part."""
        model = self._packed.model
        weights = whole_weights(model, SAVE_BUCKET, keep=self._rank.rank == 0)
        if self._rank.rank == 0:
            save_policy(model, self._tokenizer, weights, Path(folder))

    @property
    def _is_unpaired(self) -> bool:
        return isinstance(self._config, DPOConfig) and self._config.loss.loss_type == "kto"

    @property
    def _shares_prompts(self) -> bool:
        return isinstance(self._config, (DPOConfig, RewardModelConfig)) and not self._is_unpaired

    def _other(self, of: str) -> Any:
        return partial(mismatched, self._data[of], max_length=self._config.data.max_length)

    def _batches(self, part: Part) -> list[OfflineBatch]:
        data, device = self._data[part.of], self._platform.device()
        examples = [[data[index] for index in indices] for indices in part.plan]
        totals = self._totals([] if part.is_repeated else examples)
        kl = self._kl(part) if self._is_unpaired else None
        found = []
        for place, indices in enumerate(part.plan):
            own = slice(len(examples[place][0].completions))
            reference = None if part.reference is None else part.reference[place][:, own].copy()
            found.append(
                OfflineBatch(
                    packed=pack(examples[place], device),
                    totals=totals,
                    reference=None if reference is None else torch.from_numpy(reference).flatten().to(device),
                    labels=torch.from_numpy(data.label[indices]).to(device) if self._is_unpaired else None,
                    margins=torch.from_numpy(data.margin[indices]).to(device) if self._shares_prompts else None,
                    kl=kl,
                )
            )
        return found

    def _totals(self, examples: Sequence[Sequence[Example]]) -> OfflineTotals:
        trained = sum(int(c.mask.sum()) for group in examples for example in group for c in example.completions)
        counts = torch.tensor([sum(map(len, examples)), trained], device=self._platform.device())
        return OfflineTotals(*(int(count) for count in all_reduce(counts).tolist()))

    @torch.no_grad()
    def _kl(self, part: Part) -> torch.Tensor:
        """KTO's estimate of KL(policy || reference): the mean log-ratio behind other prompts, at least 0."""
        assert part.reference is not None
        policy = np.concatenate(self._sums(part, self._other(part.of)))[:, 0]
        reference = np.concatenate(part.reference)[:, -1]
        counted = not part.is_repeated
        sums = torch.tensor([float((policy - reference).sum()) * counted, len(policy) * counted], dtype=torch.float64)
        total, count = all_reduce(sums.to(self._platform.device())).tolist()
        return torch.tensor(max(0.0, total / count), device=self._platform.device(), dtype=torch.float32)

    @torch.no_grad()
    def _sums(self, part: Part, example_of: Any) -> list[np.ndarray]:
        """Log-probabilities (examples, completions) of each micro-batch of `part`, whatever they are cut into here."""
        self._engine.module.eval()
        examples = [example_of(index) for indices in part.plan for index in indices]
        sizes = [example.tokens for example in examples]
        limit = self._config.data.max_tokens_per_device
        device = self._platform.device()
        own = torch.tensor([len(cut(sizes, limit))], device=device)
        parts = cut(sizes, limit, int(gather(own).max()))
        sums = np.empty((len(examples), len(examples[0].completions)), dtype=np.float32)
        for places in parts:
            packed = pack([examples[place] for place in places], device)
            found = completion_sums(self._engine.module(packed), packed)
            sums[places] = found.reshape(len(places), -1).cpu().numpy()
        ends = np.cumsum([len(indices) for indices in part.plan])[:-1]
        return np.split(sums, ends)


def objective_of(config: OfflineConfig) -> Objective:
    """What a run of this configuration trains on."""
    if isinstance(config, RewardModelConfig):
        return bradley_terry(config.loss)
    if isinstance(config, DPOConfig):
        return unpaired(config.loss) if config.loss.loss_type == "kto" else pairs(config.loss)
    return likelihood
