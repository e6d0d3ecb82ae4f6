"""Measures how fast new weights reach the rollout engine: a dense model and a mixture of experts of as many bytes.

    python scripts/bench_reshard.py                           # sizes for a GPU or an NPU: about 5 GB each
    python scripts/bench_reshard.py --ranks 2                 # ZeRO-3 over two devices, tensor parallel 2
    python scripts/bench_reshard.py --share                   # what both have in one layout is kept once, ZeRO 2
    python scripts/bench_reshard.py --layers 2 --hidden 64    # for a CPU

Each model is made with random weights and measured in processes of its own, beside a plain copy of as many bytes on the
device. Prints a line a model, as JSON.
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
import transformers

from rlhf_npu.config import DataConfig, ModelConfig, OptimConfig, RolloutConfig
from rlhf_npu.engines.model_fit import build_skeleton
from rlhf_npu.engines.models import load_policy
from rlhf_npu.engines.process_group import join_process_group
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.shared_storage import SharedStorage
from rlhf_npu.engines.trainer_engine import InferenceEngine, TrainerEngine
from rlhf_npu.hybrid.resharding.reshard import Resharder
from rlhf_npu.hybrid.resharding.shared_layout import WeightSharing
from rlhf_npu.hybrid.same_function import compare_functions
from rlhf_npu.hybrid.tags import SHARED_TAG
from rlhf_npu.platform import Platform, detect_platform
from rlhf_npu.preflight.tiny_models import tokenizer
from rlhf_npu.run_id import new_run_id
from rlhf_npu.workers.environment import Rank, free_port, static_environment
from rlhf_npu.workers.shared_memory import shared_memory_of

BUCKET = 64 << 20
VOCABULARY = 32000
EXPERTS = 64
HEAD = 32
KINDS = ["dense", "mixture"]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64 (%(default)s)")
    parser.add_argument(
        "--ranks", type=int, default=1, help="devices; several share the trainer's weights (%(default)s)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of models (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="reshards after the first (%(default)s)")
    parser.add_argument("--share", action="store_true", help="weights, as hybrid.share_weights=auto does")
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hidden < 64 or options.hidden % 64 or min(options.layers, options.repeats, options.ranks) < 1:
        parser.error("--hidden must be a multiple of 64, --layers, --repeats and --ranks at least 1")
    if options.measure:
        measure(options)
        return
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(prefix="rlhf_npu_model_") as folder:
            save_model(kind, options, Path(folder))
            measure_in_processes(kind, options.ranks, folder)


def measure_in_processes(kind: str, ranks: int, folder: str) -> None:
    """One process a rank; the first one prints."""
    platform, run_id = detect_platform(), new_run_id()
    command = [sys.executable, __file__, *sys.argv[1:], "--measure", kind, "--model", folder]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with shared_memory_of(run_id):
        processes = [
            subprocess.Popen(
                command,
                env=os.environ
                | static_environment(Rank.of(rank, ranks, ranks), platform, run_id)
                | meeting
                | platform.only_visible(rank),
            )
            for rank in range(ranks)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(1)


def measure(options: argparse.Namespace) -> None:
    """Build both engines and reshard; prints what was seen."""
    platform = detect_platform()
    platform.activate()
    join_process_group(platform)
    model = ModelConfig(path=options.model, dtype="bfloat16")
    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=64, max_response_length=32)
    rollout_config = RolloutConfig(
        n=1,
        kv_cache_memory_gb=0.25,
        log_prob_micro_batch_size_per_device=1,
        gpu_memory_utilization=0.4,
        tensor_model_parallel_size=1 if options.share else options.ranks,
    )
    sharing = weight_sharing(model, options.ranks) if options.share else None
    lay_out = sharing.lay_out if sharing else None
    rollout = RolloutEngine(model, rollout_config, data, platform, [2], reads_weights=not sharing, lay_out=lay_out)
    storage = sharing.storage_of(rollout) if sharing else None
    policy: Any = load_policy(model)
    size = sum(parameter.nbytes for parameter in policy.parameters())
    policy = engine_module(policy, options, model.dtype, platform, storage)
    resharder = Resharder(policy, rollout, BUCKET, storage)
    rehearsed = timed(platform, resharder.rehearse)
    first, *seconds = [timed(platform, resharder.reshard) for _ in range(1 + options.repeats)]
    report = compare_functions(policy, rollout, [list(range(3, 60))], temperature=1.0, response_length=8)
    result: dict[str, Any] = {
        "model": options.measure,
        "device": platform.name,
        "ranks": options.ranks,
        "gb": size / 1e9,
        "moved_gb": resharder.reshard().moved_bytes / 1e9,
        "rehearsed_s": rehearsed,
        "first_s": first,
        "median_s": median(seconds),
        "slowest_s": max(seconds),
        "gb_per_s": size / median(seconds) / 1e9,
        "plain_copy_gb_per_s": size / copy_seconds(platform, size) / 1e9,
        "transformed_layers": len(rollout.transformations.transformed),
        "same_function": report.same,
    }
    if os.environ["RANK"] == "0":
        print(json.dumps(result), flush=True)
    rollout.shutdown()


def weight_sharing(model: ModelConfig, ranks: int) -> WeightSharing:
    """What lays out the weights that trainer and rollout share."""
    skeleton = build_skeleton(model, "--model", transformers.AutoModelForCausalLM)
    return WeightSharing(skeleton.module, getattr(torch, model.dtype), ranks, SHARED_TAG)


def engine_module(
    policy: Any, options: argparse.Namespace, dtype: str, platform: Platform, storage: SharedStorage | None
) -> Any:
    """The policy as a trainer has it: whole, in shards of ZeRO 3, or in the storage that it shares under ZeRO 2."""
    if options.share:
        return TrainerEngine(
            policy,
            OptimConfig(lr=1e-6),
            zero_stage=2,
            dtype=dtype,
            grad_clip=1.0,
            optimizer_steps=1,
            platform=platform,
            role="actor",
            storage=storage,
        ).module
    zero_stage = 3 if options.ranks > 1 else 0
    module = InferenceEngine(policy, zero_stage=zero_stage, dtype=dtype, platform=platform).module
    return module.module if zero_stage else module


def save_model(kind: str, options: argparse.Namespace, folder: Path) -> None:
    """A Qwen3 whose layers have as many weights as those of the Qwen3-MoE with 64 experts."""
    hidden, expert = options.hidden, max(32, options.hidden * 3 // 8)
    shapes = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": hidden // HEAD,
        "num_key_value_heads": hidden // HEAD // 2,
        "head_dim": HEAD,
        "max_position_embeddings": 128,
        **IDS,
    }
    if kind == "dense":
        config: Any = transformers.Qwen3Config(**shapes, intermediate_size=EXPERTS * expert)
    else:
        config = transformers.Qwen3MoeConfig(
            **shapes, intermediate_size=expert, num_experts=EXPERTS, num_experts_per_tok=8, moe_intermediate_size=expert
        )
    with torch.device(detect_platform().device()):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def timed(platform: Platform, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes on the device."""
    platform.synchronize()
    start = time.perf_counter()
    work()
    platform.synchronize()
    return time.perf_counter() - start


def copy_seconds(platform: Platform, size: int) -> float:
    """Seconds of a plain copy of `size` bytes on the device, the better of two."""
    source = torch.empty(size, dtype=torch.uint8, device=platform.device())
    target = torch.empty_like(source)
    return min(timed(platform, lambda: target.copy_(source)) for _ in range(2))


if __name__ == "__main__":
    main()
