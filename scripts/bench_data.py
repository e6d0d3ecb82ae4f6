"""Seconds and memory of records from a file: python scripts/bench_data.py --prompts 1000000 --tokenizer MODEL_FOLDER

Generates chats (prompts of 50 to 350 tokens, or with --pairs pairs of a few hundred), tokenizes them, and starts a
second time from what was kept. With prompts each start then does what a run does with all of them before its first
step; then it goes on in the middle of a shuffled epoch. Each start is a process of its own; memory is the largest
resident set of the one that asks, without those that tokenize for it.
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

from rlhf_npu.config import DataConfig
from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.data.examples import load_examples
from rlhf_npu.data.loader import BatchOrder, Position, PromptLoader
from rlhf_npu.data.prompts import load_prompts
from rlhf_npu.engines.model_fit import check_prompt_ids
from rlhf_npu.rewards import load_sample_check, record_checks

WORDS = "the of a model token learns answer because number where price city three under water often light"


PROMPT_WORDS = 20, 310
BATCH, BATCHES = 512, 200


def write_pairs(path: Path, count: int) -> None:
    """`count` pairs of chats whose messages have about 60 words."""
    texts = _Texts()

    def messages(role: str) -> list[dict[str, str]]:
        return [{"role": role, "content": texts.of(30, 90)}]

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            answers = {key: messages("assistant") for key in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": messages("user"), **answers}) + "\n")


def write_prompts(path: Path, count: int) -> None:
    """`count` chats of `PROMPT_WORDS`, whose answers are numbers."""
    texts = _Texts()
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            record = {
                "prompt": [{"role": "user", "content": texts.of(*PROMPT_WORDS)}],
                "data_source": f"generated/{index % 3}",
                "reward_model": {"style": "rule", "ground_truth": str(index)},
                "extra_info": {"index": index, "split": "train"},
            }
            file.write(json.dumps(record) + "\n")


class _Texts:
    """Texts of words at random, the same in each run."""

    def __init__(self) -> None:
        self._rng, self._words = random.Random(0), WORDS.split()

    def of(self, least: int, most: int) -> str:
        """Between `least` and `most` words."""
        return " ".join(self._rng.choices(self._words, k=self._rng.randint(least, most)))


class Watch:
    """Says what each part of a start took."""

    def __init__(self) -> None:
        self._before = _peak_mib()
        self._begin, self._busy = time.monotonic(), _cpu_seconds()

    def say(self, what: str) -> None:
        """Seconds since it was last called, and the largest resident set until now."""
        begin, busy = time.monotonic(), _cpu_seconds()
        print(
            f"{what}: {begin - self._begin:.1f} s, {busy - self._busy:.1f} s of CPUs, {_peak_mib():.0f} MiB at most "
            f"({self._before:.0f} before)",
            flush=True,
        )
        self._begin, self._busy = time.monotonic(), _cpu_seconds()


def start_pairs(file: str, tokenizer: str) -> None:
    """One start, in this process."""
    loaded, config = AutoTokenizer.from_pretrained(tokenizer), OfflineDataConfig([file], [], 1, 0, 4096, 8192)
    watch = Watch()
    dataset = load_examples("pairs", [file], loaded, config)
    watch.say(f"{len(dataset):,} pairs, {int(dataset.tokens.sum()):,} tokens")
    middle = Position(epoch=3, offset=len(dataset) // 2)
    stream = BatchOrder(len(dataset), BATCH, shuffle=True, seed=1).stream(middle)
    tokens = sum(dataset[index].tokens for _ in range(BATCHES) for index in next(stream))
    watch.say(f"{BATCHES} batches of {BATCH} from the middle of the fourth epoch on, {tokens:,} tokens")


def start_prompts(file: str, tokenizer: str) -> None:
    """One start, what all prompts are checked for, and the middle of an epoch, in this process."""
    loaded, config = AutoTokenizer.from_pretrained(tokenizer), DataConfig([file], [], BATCH, 0, 4096, 1)
    watch = Watch()
    prompts = load_prompts([file], loaded, config)
    watch.say(f"{len(prompts):,} prompts")
    check_prompt_ids([prompts], loaded, len(loaded) - 1)
    prompts.first_of_each_source()
    watch.say("their largest ids and data sources")
    watch.say(str(record_checks.check_records(load_sample_check("math_verify"), [prompts], record_checks.SECONDS)))
    stream = PromptLoader(prompts, BATCH, shuffle=True, seed=1).stream(Position(epoch=3, offset=len(prompts) // 2))
    next(stream)
    watch.say("the first batch of a run that goes on in the middle of its fourth epoch")
    tokens = sum(len(sample.prompt_ids) for _ in range(BATCHES) for sample in next(stream))
    watch.say(f"{BATCHES} batches of {BATCH}, {tokens / BATCHES / BATCH:.0f} tokens a prompt; {stream.position}")


KINDS = {"pairs": (write_pairs, start_pairs), "prompts": (write_prompts, start_prompts)}


def _cpu_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    wanted = parser.add_mutually_exclusive_group(required=True)
    for kind in KINDS:
        wanted.add_argument(f"--{kind}", type=int, metavar="COUNT")
    parser.add_argument("--tokenizer", required=True, help="model folder with a chat template")
    parser.add_argument("--file", help="start with this file, instead of making one and starting twice")
    options = parser.parse_args()
    kind, count = next((kind, getattr(options, kind)) for kind in KINDS if getattr(options, kind) is not None)
    write, start = KINDS[kind]
    if options.file:
        start(options.file, options.tokenizer)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{kind}.jsonl"
        write(file, count)
        print(f"{file.stat().st_size / 2**20:.0f} MiB of JSON lines", flush=True)
        environment = {**os.environ, "RLHF_NPU_CACHE": folder}
        command = [sys.executable, __file__, f"--{kind}", "0", "--tokenizer", options.tokenizer, "--file", str(file)]
        for _ in range(2):
            subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
