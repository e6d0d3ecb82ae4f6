"""Measures the switch between generating and training: all that sleeps and wakes, beside plain copies on the same link.

    python scripts/bench_switch.py --layers 28 --hidden 3584 trainer.n_devices_per_node=2 \\
        actor_rollout_ref.actor.zero_stage=3 actor_rollout_ref.rollout.tensor_model_parallel_size=2   # a 7B, two GPUs
    python scripts/bench_switch.py --layers 2 --hidden 256 --vocabulary 512                          # for a CPU

What follows the options are keys of main_ppo; without others it is GRPO on one device, and all sleeps that is not
needed. Each cycle generates, scores, trains on random tokens, and switches as the loop does. With `--by deepspeed` the
trainer is outside of the pool: DeepSpeed's own offload_states and reload_states move its states, and the reshard
gathers and loads one parameter at a time; `--by both` measures one after the other. The results of rank 0 are written
to bench_switch_pool.json and bench_switch_deepspeed.json after every measurement, so a run that ends early leaves what
it saw.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from deepspeed_switch import DeepSpeedSwitch
from random_models import save_random_qwen2
from tensordict import TensorDict

from allocator import SleepPool
from rlhf_npu.algorithms.token_probs import log_probs_from_logits
from rlhf_npu.config import PPOConfig, compose_config
from rlhf_npu.engines.process_group import join_process_group
from rlhf_npu.engines.trainer_engine import MicroLoss, TrainerEngine
from rlhf_npu.hybrid.memory.memory_demand import device_of
from rlhf_npu.hybrid.memory.memory_plan import fitting_plan, models_of
from rlhf_npu.hybrid.switch_plan import Stage
from rlhf_npu.hybrid.switch_report import SwitchReport
from rlhf_npu.platform import Platform, detect_platform
from rlhf_npu.roles.tenants import Tenants, build_tenants
from rlhf_npu.run_id import new_run_id
from rlhf_npu.workers.environment import Rank, free_port, static_environment

GIB = 1 << 30
LINK_BYTES = {"cpu": 1 << 28}
DEFAULTS = ("algorithm.adv_estimator=grpo", "trainer.n_devices_per_node=1", "hybrid.plan=offload")
TO_TRAIN = (Stage.LOG_PROB, Stage.TRAIN_ACTOR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="(%(default)s)")
    parser.add_argument("--hidden", type=int, default=1536, help="a multiple of 128 (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=152064, help="(%(default)s)")
    parser.add_argument("--cycles", type=int, default=5, help="after the first (%(default)s)")
    parser.add_argument("--sequences", type=int, default=8, help="generated and trained on (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of a prompt and of a response (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_switch"), help="folder (%(default)s)")
    parser.add_argument(
        "--by", choices=("pool", "deepspeed", "both"), default="pool", help="who switches (%(default)s)"
    )
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="keys of main_ppo")
    options = parser.parse_args()
    if options.rank is None:
        start_ranks(options)
    else:
        {"pool": Bench, "deepspeed": DeepSpeedBench}[options.by](options).measure()


def start_ranks(options: argparse.Namespace) -> None:
    """Make the model and run one process a device, for one contender after the other."""
    with tempfile.TemporaryDirectory(prefix="rlhf_npu_model_") as folder:
        config = compose_config([*DEFAULTS, *options.overrides])
        platform = detect_platform(config.trainer.device)
        shape = options.layers, options.hidden, options.vocabulary
        save_random_qwen2(Path(folder), *shape, platform.device())
        platform.empty_cache()
        contenders = ("pool", "deepspeed") if options.by == "both" else (options.by,)
        sys.exit(
            max(measure_in_ranks(by, Path(folder), config.trainer.n_devices_per_node, platform) for by in contenders)
        )


def measure_in_ranks(by: str, model: Path, devices: int, platform: Platform) -> int:
    """Measure a contender in one process a device; returns their exit code."""
    run_id = new_run_id()
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for number in range(devices):
        rank = static_environment(Rank.of(number, devices, devices), platform, run_id)
        given = [f"actor_rollout_ref.model.path={model}", "--by", by, "--rank", str(number)]
        environment = os.environ | rank | meeting | platform.only_visible(number)
        ranks.append(subprocess.Popen([sys.executable, __file__, *sys.argv[1:], *given], env=environment))
    return exit_code(ranks)


def exit_code(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; one that fails ends the others, which would wait for it."""
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks):
            for rank in ranks:
                rank.terminate()
        time.sleep(0.2)
    return int(any(rank.returncode for rank in ranks))


class Bench:
    """One rank's measurements."""

    def __init__(self, options: argparse.Namespace) -> None:
        tokens, sequences = options.tokens, options.sequences
        sizes = (
            f"data.max_prompt_length={tokens}",
            f"data.max_response_length={tokens}",
            f"data.train_batch_size={sequences}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={sequences}",
            f"actor_rollout_ref.actor.ppo_micro_batch_size_per_device={sequences}",
            f"actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device={sequences}",
        )
        self._config: PPOConfig = compose_config([*DEFAULTS, *sizes, *options.overrides])
        self._platform: Platform = detect_platform(self._config.trainer.device)
        self._options = options
        self._results: dict[str, Any] = {"device": self._platform.name, "cycles": []}

    def measure(self) -> None:
        """Measure the link, the trainer's states, and whole cycles."""
        self._platform.activate()
        join_process_group(self._platform)
        self._record(link_gib_per_s=link(self._platform))
        self._platform.empty_cache()
        device = device_of(self._config, self._platform)
        tenants = build_tenants(
            self._config, self._platform, (1000, 1000), fitting_plan(self._config, models_of(self._config), device)
        )
        tenants.hybrid.rehearse_reshard()
        for number in range(1 + self._options.cycles):
            self._results["cycles"].append(self._cycle(tenants, seed=number))
            self._record()
        later = self._results["cycles"][1:]
        for way in ("to_train_s", "to_generate_s", "beside_the_pool_gib"):
            self._record(**{f"median_{way}": median(cycle[way] for cycle in later)})
        self._record(states=[self._states(tenants) for _ in range(1 + self._options.cycles)])
        tenants.rollout.shutdown()

    def _cycle(self, tenants: Tenants, seed: int) -> dict[str, Any]:
        """Generate, score, train, and what the switches between took."""
        enter, size = tenants.hybrid.enter, self._options.tokens
        generating = enter(Stage.GENERATE)
        ids = torch.randint(3, 100, (self._options.sequences, size), generator=torch.Generator().manual_seed(seed))
        tenants.rollout.generate(ids.tolist(), n=1, seed=seed, temperature=1.0)
        info, stats = self._pool.memory_info(), self._pool.stats()
        beside = generating.after.used - generating.after.pooled
        if self._platform.name != "cpu":
            beside = info.total - info.free - sum(tag.mapped for tag in stats.values())
        to_train = [enter(stage) for stage in TO_TRAIN]
        train(tenants.policy.engine, ids.to(self._platform.device()))
        back = enter(Stage.GENERATE)
        return {
            "beside_the_pool_gib": beside / GIB,
            "to_train_s": seconds(*to_train),
            "to_generate_s": seconds(back),
            "phases": [phase for report in (*to_train, back) for phase in phases(report)],
            "used_gib": {report.stage.value: report.after.used / GIB for report in (*to_train, back)},
            "tags_gib": {report.stage.value: in_gib(report.after.mapped) for report in (*to_train, back)},
        }

    def _states(self, tenants: Tenants) -> dict[str, float]:
        """The trainer's states to the host and back, nothing else; gradients are never copied."""
        tenants.hybrid.enter(Stage.TRAIN_ACTOR)
        tags = [tag for tag in tenants.policy.engine.tags if not tag.endswith(".grads")]
        size = sum(self._pool.stats()[tag].mapped for tag in tags)
        asleep = timed(self._platform, lambda: self._pool.sleep(offload=tags))
        awake = timed(self._platform, lambda: self._pool.wake_up(tags))
        rates = {"sleep_gib_per_s": size / GIB / asleep, "wake_up_gib_per_s": size / GIB / awake}
        return {"gib": size / GIB, "sleep_s": asleep, "wake_up_s": awake, **rates}

    @property
    def _pool(self) -> SleepPool:
        return SleepPool.get(self._platform.device())

    def _record(self, **results: Any) -> None:
        """Keep `results`, and write all that there are."""
        self._results |= results
        if self._options.rank > 0:
            return
        self._options.out.mkdir(parents=True, exist_ok=True)
        (self._options.out / f"bench_switch_{self._options.by}.json").write_text(json.dumps(self._results, indent=1))
        if results:
            print(json.dumps(results), flush=True)


class DeepSpeedBench(Bench):
    """One rank's measurements of a trainer that DeepSpeed's own offload moves; the rollout sleeps as before."""

    def measure(self) -> None:
        """Measure whole cycles."""
        self._platform.activate()
        join_process_group(self._platform)
        plan = fitting_plan(self._config, models_of(self._config), device_of(self._config, self._platform))
        switch = DeepSpeedSwitch(self._config, self._platform, plan.kv_cache_bytes)
        for number in range(1 + self._options.cycles):
            self._results["cycles"].append(self._turn(switch, seed=number))
            self._record()
        for way in ("to_train_s", "to_generate_s"):
            self._record(**{f"median_{way}": median(cycle[way] for cycle in self._results["cycles"][1:])})
        switch.rollout.shutdown()

    def _turn(self, switch: DeepSpeedSwitch, seed: int) -> dict[str, float]:
        size = self._options.tokens
        ids = torch.randint(3, 100, (self._options.sequences, size), generator=torch.Generator().manual_seed(seed))
        switch.rollout.generate(ids.tolist(), n=1, seed=seed, temperature=1.0)
        to_train = timed(self._platform, switch.to_train)
        switch.train(ids.to(self._platform.device()))
        times = {part: timed(self._platform, do) for part, do in switch.to_generate()}
        return {"to_train_s": to_train, "to_generate_s": sum(times.values()), **times}


def link(platform: Platform) -> dict[str, float]:
    """GiB a second of plain copies between the device and pinned host memory, the best of three."""
    size, pinned = LINK_BYTES.get(platform.name, 2 * GIB), platform.name != "cpu"
    host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    device = torch.ones(size, dtype=torch.uint8, device=platform.device())
    ways: dict[str, Callable[[], Any]] = {
        "out": lambda: host.copy_(device, non_blocking=pinned),
        "in": lambda: device.copy_(host, non_blocking=pinned),
    }
    return {way: size / GIB / min(timed(platform, copy) for _ in range(3)) for way, copy in ways.items()}


def train(engine: TrainerEngine, ids: torch.Tensor) -> None:
    """One optimizer step on `ids`, int64 of (sequences, tokens)."""

    def likelihood(module: torch.nn.Module, batch: TensorDict) -> MicroLoss:
        logits = module(input_ids=batch["ids"], use_cache=False).logits
        loss = -log_probs_from_logits(logits[:, :-1], batch["ids"][:, 1:]).mean()
        return MicroLoss(loss, {"loss": loss})

    engine.train_mini_batch([TensorDict({"ids": ids}, batch_size=[len(ids)])], likelihood)


def timed(platform: Platform, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes on the device."""
    platform.synchronize()
    start = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - start


def seconds(*reports: SwitchReport) -> float:
    """Of all phases."""
    return sum(phase.seconds for report in reports for phase in report.phases)


def phases(report: SwitchReport) -> list[dict[str, Any]]:
    """What a switch did, in order."""
    return [
        {"for": report.stage.value, "phase": phase.name, "tags": phase.tags, "s": phase.seconds}
        for phase in report.phases
    ]


def in_gib(sizes: Any) -> dict[str, float]:
    """Sizes by tag."""
    return {tag: size / GIB for tag, size in sizes.items()}


if __name__ == "__main__":
    main()
