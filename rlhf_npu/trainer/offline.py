"""The loop that learns from files: SFT, preferences and reward models, as the driver sees it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_npu.config import OfflineConfig
from rlhf_npu.data.dealing import deal
from rlhf_npu.data.examples import ExampleDataset
from rlhf_npu.data.loader import BatchOrder
from rlhf_npu.trainer.metrics import Metrics, StepClock
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.trackers import Trackers
from rlhf_npu.workers.offline_worker import Part
from rlhf_npu.workers.worker_group import WorkerGroup

VALIDATION_BATCH = 8  # micro-batches' worth of tokens a call and rank


class OfflineTrainer:
    """Trains a model on examples."""

    def __init__(
        self,
        config: OfflineConfig,
        workers: WorkerGroup,
        data: dict[str, ExampleDataset],
        reference: dict[str, np.ndarray],
        trackers: Trackers,
        output: OutputFolder,
        total_steps: int,
    ) -> None:
        """Prepare; `reference` has log-probabilities (examples, columns) for each data set, or is empty."""
        self._config = config
        self._workers = workers
        self._data = data
        self._reference = reference
        self._trackers = trackers
        self._output = output
        self._total_steps = total_steps

    def fit(self) -> None:
        """Train for `total_steps`, validating and saving as configured, and save the final model."""
        if self._config.trainer.val_before_train:
            self._trackers.log(self._validate(), step=0)
        for step, indices in self._batches():
            metrics = self._train_step(indices)
            if self._is_due(self._config.trainer.test_freq, step):
                metrics |= self._validate()
            if self._is_due(self._config.trainer.save_freq, step):
                metrics |= self._save(step)
            self._trackers.log(metrics, step)

    def _train_step(self, indices: Sequence[int]) -> Metrics:
        clock = StepClock()
        with clock("step"), clock("update"):
            found: Metrics = self._workers.call_each("train", self._parts("train", indices))[0]
        tokens = float(self._data["train"].tokens[list(indices)].sum())
        metrics = {name if "/" in name else f"train/{name}": value for name, value in found.items()}
        metrics |= clock.metrics() | {"perf/total_num_tokens": tokens}
        return metrics | {"perf/throughput": tokens / metrics["timing_s/step"] / self._workers.world_size}

    def _validate(self) -> Metrics:
        data = self._data.get("val")
        if data is None:
            return Metrics()
        clock = StepClock()
        sums, weights = Metrics(), 0
        with clock("testing"):
            for parts in self._validation_parts(data):
                found, weight = self._workers.call_each("evaluate", parts)[0]
                weights += weight
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value * weight
        means = {f"val-core/{name}": value / weights for name, value in sums.items()}
        return means | clock.metrics()

    def _validation_parts(self, data: ExampleDataset) -> Iterator[list[Part]]:
        """Batches for all ranks; of the last examples, fewer than ranks, some ranks repeat one."""
        ranks = self._workers.world_size
        data_config = self._config.data
        size = max(1, VALIDATION_BATCH * data_config.max_tokens_per_device // data_config.max_length) * ranks
        whole = len(data) // ranks * ranks
        for first in range(0, whole, size):
            yield self._parts("val", range(first, min(first + size, whole)))
        rest = list(range(whole, len(data)))
        if rest:
            padded = [*rest, *[rest[0]] * (ranks - len(rest))]
            yield [self._part("val", [[index]], is_repeated=place >= len(rest)) for place, index in enumerate(padded)]

    def _parts(self, of: str, indices: Sequence[int]) -> list[Part]:
        tokens = [int(self._data[of].tokens[index]) for index in indices]
        plans = deal(indices, tokens, self._workers.world_size, self._config.data.max_tokens_per_device)
        return [self._part(of, plan) for plan in plans]

    def _part(self, of: str, plan: list[list[int]], *, is_repeated: bool = False) -> Part:
        known = self._reference.get(of)
        return Part(of, plan, None if known is None else [known[indices] for indices in plan], is_repeated)

    def _save(self, step: int) -> Metrics:
        clock = StepClock()
        with clock("save_checkpoint"):
            self._workers.call("save", str(self._output.model_folder(step, final=step == self._total_steps)))
        return clock.metrics()

    def _batches(self) -> Iterator[tuple[int, list[int]]]:
        data = self._config.data
        order = BatchOrder(len(self._data["train"]), data.train_batch_size, data.shuffle, data.seed)
        return zip(range(1, self._total_steps + 1), order.stream(), strict=False)

    def _is_due(self, frequency: int, step: int) -> bool:
        return step == self._total_steps or (frequency > 0 and step % frequency == 0)


def steps_of(config: OfflineConfig, examples: int) -> int:
    """Optimizer steps of a run."""
    return config.trainer.total_training_steps or config.trainer.total_epochs * (
        examples // config.data.train_batch_size
    )
