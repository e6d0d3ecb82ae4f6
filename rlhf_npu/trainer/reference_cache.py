"""The reference's log-probabilities, computed once by the model before it trains, and kept on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rlhf_npu.config import DPOConfig
from rlhf_npu.data.builtin import CACHE_VARIABLE, cache_folder
from rlhf_npu.data.dealing import deal
from rlhf_npu.data.examples import ExampleDataset
from rlhf_npu.edges import errors_as
from rlhf_npu.errors import DataError
from rlhf_npu.trainer.terminal import Terminal
from rlhf_npu.workers.offline_worker import Part
from rlhf_npu.workers.worker_group import WorkerGroup

BATCH_TOKENS = 1 << 16  # a call and rank


def reference_of(
    config: DPOConfig, device: str, workers: WorkerGroup, data: dict[str, ExampleDataset], terminal: Terminal
) -> dict[str, np.ndarray]:
    """Log-probabilities (examples, columns) of all completions; KTO has one column more.

    Read from the cache where the same model has scored the same examples before. Call it before the first step.

    Args:
        device: kind of the workers' devices: each rounds in its own way.

    Raises:
        DataError: the cache cannot be written.
    """
    found: dict[str, np.ndarray] = {}
    for name, examples in data.items():
        file = cache_folder() / "reference" / f"{_key(config, device, examples)}.npy"
        if file.is_file():
            terminal.say(f"the reference's log-probabilities of {len(examples):,} {name} examples are those in {file}")
            found[name] = np.load(file)
            continue
        found[name] = _score(config, workers, name, examples, terminal)
        with errors_as(DataError, f"{file} cannot be written; set {CACHE_VARIABLE} to a folder that can be"):
            _write(file, found[name])
    return found


def _score(
    config: DPOConfig, workers: WorkerGroup, name: str, examples: ExampleDataset, terminal: Terminal
) -> np.ndarray:
    columns = 2  # chosen and rejected; or KTO's own completion and another prompt's
    scores = np.full((len(examples), columns), np.nan, dtype=np.float32)
    with terminal.counting(f"scoring {len(examples):,} {name} examples with the reference", len(examples)) as advance:
        for indices in _batches(config, examples, workers.world_size):
            tokens = [int(examples.tokens[index]) for index in indices]
            plans = deal(indices, tokens, workers.world_size, config.data.max_tokens_per_device)
            scored = workers.call_each("score", [Part(name, plan) for plan in plans])
            for plan, parts in zip(plans, scored, strict=True):
                for numbers, part in zip(plan, parts, strict=True):
                    scores[numbers] = part
            advance(len(indices))
    assert not np.isnan(scores).any()
    return scores


def _batches(config: DPOConfig, examples: ExampleDataset, ranks: int) -> Iterator[list[int]]:
    """All examples in batches of a multiple of `ranks`; the last one repeats some."""
    size = max(1, BATCH_TOKENS // config.data.max_length) * ranks
    for first in range(0, len(examples), size):
        batch = list(range(first, min(first + size, len(examples))))
        yield [*batch, *[batch[0]] * (-len(batch) % ranks)]


def _key(config: DPOConfig, device: str, examples: ExampleDataset) -> str:
    """What decides the log-probabilities: the model's files, how it computes, the tokens, and KTO's pairing."""
    folder = Path(config.model.path)
    stats = {file.name: file.stat() for file in sorted(folder.glob("*")) if file.is_file()}
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]
    parts = [
        str(folder),
        files,
        asdict(config.model),
        device,
        examples.digest,
        config.loss.loss_type == "kto",
        config.data.max_length,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _write(file: Path, scores: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, scores)
    partial.replace(file)
