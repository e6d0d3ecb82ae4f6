"""Measures whole steps of GRPO at the shapes that people train: seconds of each part, and memory beside the plan's.

    python scripts/bench_step.py actor_rollout_ref.rollout.enforce_eager=false     # 1.78 B parameters on one GPU
    python scripts/bench_step.py --layers 2 --hidden 256 --vocabulary 512 --prompts 4 --n 2 --prompt-tokens 32 \\
        --response-tokens 16 trainer.device=cpu                                    # for a CPU

The model is a Qwen2 with random weights, which hardly ever ends a response: all are of --response-tokens, so that two
runs, or another trainer's, can be compared. Compare steps of equal response lengths only: a policy that learns to
answer in four tokens halves its step. What follows the options are keys of main_ppo. The results are in
bench_step.json in the folder --out, beside the run's own files.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_models import save_random_qwen2

from rlhf_npu.config import PPOConfig, compose_config
from rlhf_npu.hybrid.memory.memory_demand import device_of
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan, fitting_plan, models_of
from rlhf_npu.platform import detect_platform

GIB = 1 << 30
TEMPLATE_TOKENS = 6  # of the tokenizer of characters: the role's mark before a message, and the answer's
SWITCH = ("sleep", "wake_up", "reshard")
REWARD = '''"""A reward that differs between responses and cannot be learned: there is always something to train on."""

import zlib


def score(data_source, solution_str, ground_truth, extra_info=None):
    return zlib.crc32(solution_str.encode()) % 1000 / 1000
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="(%(default)s)")
    parser.add_argument("--hidden", type=int, default=1536, help="a multiple of 128 (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=152064, help="(%(default)s)")
    parser.add_argument("--prompts", type=int, default=16, help="a step (%(default)s)")
    parser.add_argument("--n", type=int, default=8, help="responses a prompt (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=264, help="(%(default)s)")
    parser.add_argument("--response-tokens", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="with the first, which is not measured (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_step"), help="folder (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="keys of main_ppo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlhf_npu_bench_step_") as folder:
        keys = [*keys_of(options, Path(folder)), *options.overrides]
        prepare(options, Path(folder), compose_config(keys))
        plan = planned(compose_config(keys))
        if code := subprocess.run([sys.executable, "-m", "rlhf_npu.main_ppo", *keys], check=False).returncode:
            sys.exit(code)
    results = measured(options.out, plan)
    (options.out / "bench_step.json").write_text(json.dumps(results, indent=1))
    print(json.dumps(results["summary"], indent=1))


def keys_of(options: argparse.Namespace, folder: Path) -> list[str]:
    """GRPO on one device, all of it in bfloat16, one optimizer step a step; nothing is written between steps."""
    return [
        f"actor_rollout_ref.model.path={folder / 'model'}",
        "actor_rollout_ref.model.dtype=bfloat16",
        f"data.train_files=[{folder / 'train.jsonl'}]",
        "data.val_files=[]",
        f"data.train_batch_size={options.prompts}",
        f"data.max_prompt_length={options.prompt_tokens}",
        f"data.max_response_length={options.response_tokens}",
        f"reward.function={folder / 'reward.py'}:score",
        "algorithm.adv_estimator=grpo",
        f"actor_rollout_ref.rollout.n={options.n}",
        f"actor_rollout_ref.rollout.max_num_seqs={options.prompts * options.n}",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={options.prompts}",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=4",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=4",
        "actor_rollout_ref.actor.entropy_coeff=0",
        "actor_rollout_ref.actor.optim.lr=1e-6",
        "trainer.n_devices_per_node=1",
        "trainer.val_before_train=false",
        "trainer.test_freq=0",
        f"trainer.total_training_steps={options.steps}",
        "trainer.logger=[console,jsonl]",
        f"trainer.default_local_dir={options.out}",
    ]


def prepare(options: argparse.Namespace, folder: Path, config: PPOConfig) -> None:
    """The model, as many prompts as all steps need, and the reward."""
    shape = options.layers, options.hidden, options.vocabulary
    platform = detect_platform(config.trainer.device)
    save_random_qwen2(folder / "model", *shape, platform.device())
    platform.empty_cache()
    draw = random.Random(0)
    letters = string.ascii_letters + string.digits
    with (folder / "train.jsonl").open("w") as lines:
        for number in range(options.prompts * options.steps):
            text = "".join(draw.choices(letters, k=options.prompt_tokens - TEMPLATE_TOKENS))
            message = {"role": "user", "content": text}
            record = {"data_source": "random", "prompt": [message], "reward_model": {"ground_truth": str(number)}}
            lines.write(json.dumps(record) + "\n")
    (folder / "reward.py").write_text(REWARD)


def planned(config: PPOConfig) -> MemoryPlan:
    """What the run will expect of its devices."""
    return fitting_plan(config, models_of(config), device_of(config, detect_platform(config.trainer.device)))


def measured(out: Path, plan: MemoryPlan) -> dict[str, Any]:
    """All steps' metrics, and a summary of those after the first."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    later = [step for step in steps if step["step"] > 1]
    timings = {name: median(step[name] for step in later) for name in sorted(later[0]) if name.startswith("timing_s/")}
    switch = sum(timings.get(f"timing_s/{part}", 0.0) for part in SWITCH)
    peaks = {
        stage.value: max(step.get(f"memory/{stage.value}/peak_gb", 0.0) for step in steps) * 1e9 / GIB
        for stage in plan.switch_plan.cycle
    }
    summary = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "seconds": timings,
        "switch_share": switch / timings["timing_s/step"],
        "planned_gib": {stage.value: plan.used(stage) / GIB for stage in plan.switch_plan.cycle},
        "measured_peak_gib": peaks,
        "kv_cache_gib": plan.kv_cache_bytes / GIB,
        "response_tokens": median(step["response_length/mean"] for step in later),
    }
    return {"summary": summary, "steps": steps}


if __name__ == "__main__":
    main()
