"""Seconds and memory of pairs from a file: python scripts/bench_data.py --pairs 200000 --tokenizer MODEL_FOLDER

Generates chats of a few hundred tokens, tokenizes them, and starts a second time from what was kept. Each start is a
process of its own; memory is the largest resident set of the one that asks, without those that tokenize for it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.data.examples import load_examples

WORDS = "the of a model token learns answer because number where price city three under water often light"


def write_pairs(path: Path, count: int, words: int) -> None:
    """`count` pairs of chats whose messages have about `words` words."""
    rng, words_known = random.Random(0), WORDS.split()

    def text() -> str:
        return " ".join(rng.choices(words_known, k=rng.randint(words // 2, words * 3 // 2)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = [{"role": "user", "content": text()}]
            answers = {key: [{"role": "assistant", "content": text()}] for key in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": prompt, **answers}) + "\n")


def start(file: str, tokenizer: str) -> None:
    """One start, in this process."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = OfflineDataConfig([file], [], 1, max_length=4096, max_tokens_per_device=8192)
    before, begin, busy = _peak_mib(), time.monotonic(), _cpu_seconds()
    dataset = load_examples("pairs", [file], loaded, config)
    seconds, busy = time.monotonic() - begin, _cpu_seconds() - busy
    print(
        f"{len(dataset):,} pairs, {int(dataset.tokens.sum()):,} tokens: {seconds:.1f} s, {busy:.1f} s of CPUs, "
        f"{_peak_mib():.0f} MiB at most ({before:.0f} before)",
        flush=True,
    )


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--words", type=int, default=60, help="words of a message, about")
    parser.add_argument("--tokenizer", required=True, help="model folder with a chat template")
    parser.add_argument("--file", help="start with this file, instead of making one and starting twice")
    options = parser.parse_args()
    if options.file:
        start(options.file, options.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pairs.jsonl"
        write_pairs(file, options.pairs, options.words)
        print(f"{file.stat().st_size / 2**20:.0f} MiB of JSON lines", flush=True)
        environment = {**os.environ, "RLHF_NPU_CACHE": folder}
        command = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--file", str(file)]
        for _ in range(2):
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
