"""Measures a forward and a backward pass over pairs of completions: padded, packed, and packed with shared prompts.

    python scripts/bench_packing.py                           # sizes for a GPU or an NPU
    python scripts/bench_packing.py --layers 2 --hidden 128 --vocabulary 32000 --pairs 8    # for a CPU

Prompts have 64 to 256 tokens, completions 16 to 256. Each way is measured in a process of its own, on a Llama with
random weights. Prints a line a way, as JSON: positions that are computed, seconds (the median; on a CPU of all its
cores), and the most memory that was held beside the weights and their gradients.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_npu.algorithms.token_probs import log_probs_from_logits
from rlhf_npu.data.packing import Completion, Example, pack
from rlhf_npu.engines.packed_model import PackedModel
from rlhf_npu.platform import Platform, detect_platform

WAYS = ["padded", "packed", "shared"]
HEAD = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--hidden", type=int, default=2048, help=f"a multiple of {HEAD} (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=128256, help="(%(default)s)")
    parser.add_argument("--pairs", type=int, default=32, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="after the first (%(default)s)")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options)
        return
    for way in WAYS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--measure", way], check=True)


def measure(options: argparse.Namespace) -> None:
    """Measure one way, and print its line."""
    platform = detect_platform()
    model, pairs = random_model(options, platform), random_pairs(options)
    tokens, work = {"padded": padded, "packed": packed, "shared": shared}[options.measure](model, pairs, platform)
    work()
    before = platform.held_bytes()
    platform.reset_peak_held()
    seconds = [timed(platform, work) for _ in range(options.repeats)]
    peak = platform.peak_held_bytes() - before
    figures = {"positions": tokens, "seconds": round(median(seconds), 3), "peak_gb": round(peak / 1e9, 3)}
    print(json.dumps({"way": options.measure} | figures), flush=True)


def random_model(options: argparse.Namespace, platform: Platform) -> Any:
    """A Llama whose gradients are there already; bfloat16 but for a CPU."""
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // HEAD,
        num_key_value_heads=options.hidden // HEAD,
    )
    dtype = torch.float32 if platform.name == "cpu" else torch.bfloat16
    return LlamaForCausalLM(config).to(platform.device(), dtype).train()


def random_pairs(options: argparse.Namespace) -> list[Example]:
    """Prompts with two completions each."""
    generator = np.random.default_rng(0)

    def ids(shortest: int) -> np.ndarray:
        return generator.integers(0, options.vocabulary, generator.integers(shortest, 257))

    def completion() -> Completion:
        made = ids(16)
        return Completion(made, np.ones(len(made), dtype=bool))

    return [Example(ids(64), (completion(), completion())) for _ in range(options.pairs)]


def padded(model: Any, pairs: Sequence[Example], platform: Platform) -> tuple[int, Callable[[], None]]:
    """One row a completion, as long as the longest; logits of all places."""
    rows = [np.concatenate([pair.prompt, one.input_ids]) for pair in pairs for one in pair.completions]
    ids = pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True).to(platform.device())
    mask = pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True).to(platform.device())

    def work() -> None:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        (log_probs_from_logits(logits, ids[:, 1:]) * mask[:, 1:]).sum().backward()

    return ids.numel(), work


def packed(model: Any, pairs: Sequence[Example], platform: Platform) -> tuple[int, Callable[[], None]]:
    """One row, with the prompt before each completion."""
    return _packed(model, [Example(pair.prompt, (one,)) for pair in pairs for one in pair.completions], platform, False)


def shared(model: Any, pairs: Sequence[Example], platform: Platform) -> tuple[int, Callable[[], None]]:
    """One row, with each prompt once."""
    return _packed(model, pairs, platform, True)


def _packed(
    model: Any, examples: Sequence[Example], platform: Platform, shares_prompts: bool
) -> tuple[int, Callable[[], None]]:
    module = PackedModel(model, shares_prompts=shares_prompts, platform=platform)
    batch = pack(examples, platform.device())
    return batch.input_ids.numel(), lambda: module(batch).sum().backward()


def timed(platform: Platform, work: Callable[[], None]) -> float:
    """Seconds that `work` takes on the device; on the CPU those of all its cores, which others may use as well."""
    clock = time.process_time if platform.name == "cpu" else time.perf_counter
    platform.synchronize()
    start = clock()
    work()
    platform.synchronize()
    return clock() - start


if __name__ == "__main__":
    main()
