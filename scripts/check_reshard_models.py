"""Checks, bit by bit, that a rollout engine after a reshard is a fresh one that loads the saved model.

    python scripts/check_reshard_models.py                                    # the whole table: 100 cells
    python scripts/check_reshard_models.py --models Llama --worlds 2 --zero 3 # some of it

Each cell is a tiny random model that is trained by one step of DeepSpeed at a ZeRO stage on some processes, a device
each, and generates with vLLM at a tensor-parallel size. The rollout's parameters are NaN before the reshard. Afterwards
the trained model is saved, a second vLLM engine loads it, and on each rank all tensors that the two models compute with
must have the same bits, and greedy answers the same tokens and log-probabilities.

A line of JSON a cell goes to --out as soon as it is known; cells that are there already are not tried again. The table
of all comes at the end. The status is 1 where a cell is not right.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict

from rlhf_npu.algorithms.token_probs import log_probs_from_logits
from rlhf_npu.config import DataConfig, ModelConfig, OptimConfig, RolloutConfig
from rlhf_npu.engines.models import load_policy, load_tokenizer, save_policy
from rlhf_npu.engines.process_group import join_process_group
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.trainer_engine import MicroLoss, TrainerEngine
from rlhf_npu.hybrid.resharding.gathered import whole_weights
from rlhf_npu.hybrid.resharding.reshard import Resharder
from rlhf_npu.platform import Platform, detect_platform
from rlhf_npu.preflight.model_trial import last_words
from rlhf_npu.preflight.tiny_models import FAMILIES
from rlhf_npu.run_id import RUN_ID_VARIABLE, new_run_id
from rlhf_npu.sleep_mode.tensor_bits import bits_of
from rlhf_npu.sleep_mode.weight_update import own_tensors
from rlhf_npu.workers.environment import Rank, free_port, static_environment
from rlhf_npu.workers.shared_memory import join_run, shared_memory_of

# The mixture first: vLLM makes the group of its experts' ranks only for a process's first model.
MODELS = ("Qwen3-MoE", "Llama", "Qwen2", "Qwen3", "Gemma 2")
WORLDS, TENSOR_PARALLEL, ZERO_STAGES = (4, 2, 1), (2, 1), (3, 2, 1, 0)
BUCKET = 20_000  # bytes: several collectives a model
PROMPTS = [[1, 40, 50, 60], list(range(3, 15))]
NAMED = 3  # tensors that a complaint spells out


@dataclass(frozen=True)
class Cell:
    """One place in the table: `world` processes, each `tensor_parallel` of which share a rollout engine."""

    model: str
    world: int
    tensor_parallel: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.model}, world {self.world}, TP {self.tensor_parallel}, ZeRO {self.zero_stage}"


@dataclass(frozen=True)
class Finding:
    """What became of a cell.

    Attributes:
        tensors: that were compared on rank 0.
        trained: those of them that the reshard changed.
        words: what differs, by rank; or how the processes ended.
        seconds: for all of it, from the building of the trainer on.
    """

    cell: Cell
    dtype: str
    right: bool
    tensors: int = 0
    trained: int = 0
    words: str = ""
    seconds: float = 0.0

    @classmethod
    def from_json(cls, line: str) -> Finding:
        fields = json.loads(line)
        return cls(**{**fields, "cell": Cell(**fields["cell"])})

    def __str__(self) -> str:
        said = f"{self.tensors} tensors, {self.trained} of them trained" if self.right else f"WRONG: {self.words}"
        return f"{self.cell}: {said} ({self.seconds:.1f} s)"


def main() -> int:
    """Check what the command line selects; 0 when all of it is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--worlds", nargs="+", type=int, choices=WORLDS, default=WORLDS, help="processes")
    parser.add_argument("--tensor-parallel", nargs="+", type=int, choices=TENSOR_PARALLEL, default=TENSOR_PARALLEL)
    parser.add_argument("--zero", nargs="+", type=int, choices=ZERO_STAGES, default=ZERO_STAGES, help="ZeRO stages")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=300, help="that a cell may take (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/check_reshard_models.jsonl"), help="(%(default)s)")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options, json.loads(options.rank))
        return 0
    if options.dtype == "bfloat16" and 0 in options.zero:
        parser.error("bfloat16 needs --zero 1, 2 or 3: DeepSpeed trains it with float32 masters only from ZeRO 1 on")
    findings = Findings(options.out, options.dtype)
    for world, tensor_parallel in ((world, size) for world in options.worlds for size in options.tensor_parallel):
        if world % tensor_parallel == 0:
            cells = [
                Cell(model, world, tensor_parallel, stage)
                for model in MODELS
                if model in options.models
                for stage in options.zero
            ]
            check(cells, findings, options.seconds)
    print(findings.table())
    return int(not all(finding.right for finding in findings.all.values()))


class Findings:
    """What is known of cells, also from earlier calls with the same file."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._path, self.dtype = path, dtype
        self.all: dict[Cell, Finding] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        for finding in map(Finding.from_json, lines):
            if finding.dtype == dtype:
                self.all[finding.cell] = finding

    def add(self, finding: Finding) -> None:
        """Keep, write and print it."""
        self.all[finding.cell] = finding
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(finding)) + "\n")
        print(finding, flush=True)

    def table(self) -> str:
        """In Markdown: a row a model, a column a pair of sizes, and in each what became of each ZeRO stage."""
        pairs = sorted({(cell.world, cell.tensor_parallel) for cell in self.all})
        models = [model for model in MODELS if any(cell.model == model for cell in self.all)]
        rows = [["model", *(f"world {world}, TP {size}" for world, size in pairs)], ["---"] * (len(pairs) + 1)]
        rows += [[model, *(self._words(model, *pair) for pair in pairs)] for model in models]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _words(self, model: str, world: int, tensor_parallel: int) -> str:
        stages = {
            stage: self.all[cell].right
            for stage in sorted(ZERO_STAGES)
            if (cell := Cell(model, world, tensor_parallel, stage)) in self.all
        }
        right = " ".join(str(stage) for stage in stages if stages[stage])
        wrong = " ".join(str(stage) for stage in stages if not stages[stage])
        words = [f"ZeRO {right}"] if right else []
        return "; ".join([*words, *([f"**not {wrong}**"] if wrong else [])])


def check(cells: list[Cell], findings: Findings, seconds: float) -> None:
    """Cells of one world and tensor-parallel size; processes that end are started again for those that are left."""
    while left := [cell for cell in cells if cell not in findings.all]:
        print(f"starting {left[0].world} processes for {len(left)} cells", flush=True)
        with tempfile.TemporaryDirectory(prefix="rlhf_npu_reshard_") as folder:
            for name in {cell.model for cell in left}:
                FAMILIES[name].save(Path(folder) / name)
            began = time.monotonic()
            for finding in findings_of_processes(left, findings.dtype, Path(folder), seconds):
                findings.add(finding)
            undone = [cell for cell in left if cell not in findings.all]
            if undone:
                words = "; ".join(last_words(log) for log in sorted(Path(folder).glob("rank_*.log")))
                finding = Finding(undone[0], findings.dtype, right=False, words=words)
                findings.add(Finding(**{**vars(finding), "seconds": time.monotonic() - began}))


def findings_of_processes(cells: Sequence[Cell], dtype: str, folder: Path, seconds: float) -> Iterator[Finding]:
    """Start a process a rank, and hand on what the first one says of the cells, in their order."""
    platform, run_id, world = detect_platform(), new_run_id(), cells[0].world
    work = json.dumps({"folder": str(folder), "cells": [asdict(cell) for cell in cells]})
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes: list[subprocess.Popen[str]] = []
    with shared_memory_of(run_id):
        for number in range(world):
            rank = static_environment(Rank.of(number, world, world), platform, run_id)
            with (folder / f"rank_{number}.log").open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, __file__, "--dtype", dtype, "--rank", work],
                    env=os.environ | rank | meeting | platform.only_visible(number),
                    stdout=subprocess.PIPE if number == 0 else subprocess.DEVNULL,
                    stderr=log,
                    text=True,
                )
            processes.append(process)
        watch = Watch(processes, seconds)
        try:
            assert processes[0].stdout is not None
            for line in processes[0].stdout:
                if line.startswith("{"):
                    watch.goes_on()
                    yield Finding.from_json(line)
        finally:
            watch.end()


class Watch:
    """Ends all processes when one of them has failed, or when nothing was said of them for too long."""

    def __init__(self, processes: list[subprocess.Popen[str]], seconds: float) -> None:
        self._processes, self._seconds = processes, seconds
        self.goes_on()
        threading.Thread(target=self._run, daemon=True).start()

    def goes_on(self) -> None:
        """A cell is done."""
        self._deadline = time.monotonic() + self._seconds

    def end(self) -> None:
        """End what still runs."""
        for process in self._processes:
            process.kill()
            process.wait()

    def _run(self) -> None:
        while any(process.poll() is None for process in self._processes):
            if any(process.poll() for process in self._processes) or time.monotonic() > self._deadline:
                for process in self._processes:
                    process.kill()
            time.sleep(0.2)


def run_rank(options: argparse.Namespace, work: dict[str, Any]) -> None:
    """One rank's part of all cells."""
    join_run(os.environ[RUN_ID_VARIABLE], may_be_first=False)
    platform = detect_platform()
    platform.activate()
    join_process_group(platform)
    checker = Checker(Path(work["folder"]), options.dtype, platform)
    for cell in (Cell(**fields) for fields in work["cells"]):
        finding = checker.check(cell)
        if dist.get_rank() == 0:
            print(json.dumps(asdict(finding)), flush=True)
    dist.barrier()
    os._exit(0)  # the engines' ends would take the process group from each other


class Checker:
    """Engines of one rank. All are kept: the end of one takes the process group from the others."""

    def __init__(self, folder: Path, dtype: str, platform: Platform) -> None:
        self._folder, self._dtype, self._platform = folder, dtype, platform
        self._rollouts: dict[str, RolloutEngine] = {}
        self._fresh: list[RolloutEngine] = []

    def check(self, cell: Cell) -> Finding:
        """Train, reshard, save, load, compare; every rank calls this together."""
        start = time.perf_counter()
        model = ModelConfig(path=str(self._folder / cell.model), dtype=self._dtype)
        rollout = self._rollout_of(cell, model)
        trainer = TrainerEngine(
            load_policy(model, zero_stage=cell.zero_stage, device=self._platform.device()),
            OptimConfig(lr=1e-3),
            zero_stage=cell.zero_stage,
            dtype=self._dtype,
            grad_clip=1.0,
            optimizer_steps=1,
            platform=self._platform,
        )
        policy: Any = trainer.module
        resharder = Resharder(policy, rollout, BUCKET)
        resharder.rehearse()
        before = state_of(rollout)
        train(trainer, self._platform)
        forget_weights(rollout)
        resharder.reshard()
        rollout.reset_prefix_cache()
        fresh = self._fresh_engine(cell, model, policy)
        held, loaded = state_of(rollout), state_of(fresh)
        differing = [f"{name} differs" for name in sorted(held.keys() | loaded.keys()) if not same(name, held, loaded)]
        differing += [] if answers(rollout) == answers(fresh) else ["greedy answers differ"]
        trained = sum(not same(name, before, held) for name in held)
        differing += [] if trained else ["training changed nothing"]
        trainer.close()
        seconds = time.perf_counter() - start
        words = in_words(differing)
        return Finding(cell, self._dtype, not words, len(held), trained, words, round(seconds, 2))

    def _rollout_of(self, cell: Cell, model: ModelConfig) -> RolloutEngine:
        if cell.model not in self._rollouts:
            self._rollouts[cell.model] = self._engine(cell, model, reads_weights=False)
        return self._rollouts[cell.model]

    def _fresh_engine(self, cell: Cell, model: ModelConfig, policy: Any) -> RolloutEngine:
        folder = self._folder / f"{cell.model} saved at ZeRO {cell.zero_stage}"
        weights = whole_weights(policy, BUCKET, keep=dist.get_rank() == 0)
        if weights:
            save_policy(policy, load_tokenizer(model), weights, folder)
        dist.barrier()
        self._fresh.append(self._engine(cell, ModelConfig(path=str(folder), dtype=self._dtype), reads_weights=True))
        return self._fresh[-1]

    def _engine(self, cell: Cell, model: ModelConfig, *, reads_weights: bool) -> RolloutEngine:
        data = DataConfig(
            train_files=["none"], val_files=[], train_batch_size=1, max_prompt_length=16, max_response_length=8
        )
        config = RolloutConfig(
            n=1,
            kv_cache_memory_gb=0.01,
            gpu_memory_utilization=0.02,
            log_prob_micro_batch_size_per_device=1,
            tensor_model_parallel_size=cell.tensor_parallel,
        )
        return RolloutEngine(model, config, data, self._platform, [2], reads_weights=reads_weights)


def train(trainer: TrainerEngine, platform: Platform) -> None:
    """One optimizer step on random tokens, others on each rank."""

    def likelihood(module: torch.nn.Module, batch: TensorDict) -> MicroLoss:
        logits = module(input_ids=batch["ids"], use_cache=False).logits
        loss = -log_probs_from_logits(logits[:, :-1], batch["ids"][:, 1:]).mean()
        return MicroLoss(loss, {"loss": loss})

    ids = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    mini_batch = TensorDict({"ids": ids}, batch_size=[2]).to(platform.device())
    trainer.train_mini_batch(mini_batch.split(1), likelihood)


@torch.no_grad()
def forget_weights(rollout: RolloutEngine) -> None:
    """Nothing of what the rollout holds may be taken for something that arrived."""
    for parameter in rollout.module.parameters():
        if parameter.is_floating_point():
            parameter.fill_(torch.nan)


def state_of(rollout: RolloutEngine) -> dict[str, torch.Tensor]:
    """All that the model computes with on this rank: parameters, buffers, and what layers made of them."""
    return {
        f"{path}.{name}": tensor.detach().cpu().clone()
        for path, layer in rollout.module.named_modules()
        for name, tensor in own_tensors(layer).items()
        if not tensor.is_meta and not name.endswith("kv_cache")
    }


def same(name: str, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Whether both have that tensor, with the same shape and bits."""
    if name not in left or name not in right:
        return False
    one, other = left[name], right[name]
    return (one.shape, one.dtype) == (other.shape, other.dtype) and torch.equal(bits_of(one), bits_of(other))


def answers(rollout: RolloutEngine) -> list[Any]:
    """What it says, with log-probabilities."""
    return rollout.generate(PROMPTS, n=1, seed=0, temperature=0.0)


def in_words(problems: list[str]) -> str:
    """What is wrong on any rank; the same on all ranks, which call this together."""
    of_ranks: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, problems)
    return "; ".join(
        f"rank {rank}: {', '.join(found[:NAMED])}" + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
        for rank, found in enumerate(of_ranks)
        if found
    )


if __name__ == "__main__":
    sys.exit(main())
