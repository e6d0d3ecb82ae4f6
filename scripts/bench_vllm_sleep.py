"""Measures vLLM's sleep mode in this project's pool beside vLLM's own, on a GPU.

    python scripts/bench_vllm_sleep.py                      # a model of Qwen2-7B's shapes, random weights
    python scripts/bench_vllm_sleep.py --model path/to/model --cycles 5

Each engine has a process of its own, one after the other. Prints a table; writes bench_vllm_sleep.json.
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_npu.sleep_mode.vllm_plugin import SWITCH

GIB = 1 << 30
PROMPTS = [{"prompt_token_ids": [1000 + number, *range(2000, 2032)]} for number in range(8)]
ENGINES = {"rlhf_npu": "1", "vllm": "0"}  # the switch of the plug-in
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


@dataclass
class Measurement:
    """Seconds, and bytes; of calls to `LLM.sleep` and `LLM.wake_up`.

    Attributes:
        start: of making the engine, imports left out.
        weights: bytes of the model's parameters.
        first_sleep, first_wake: of the process.
        sleeps, wakes: later ones, level 1, all tags.
        sleeps_level_2, wakes_level_2: level 2; weights are not loaded again within these times.
        freed: what the driver counts as freed by the first sleep.
        host: resident memory that the first sleep added.
        same_text: whether greedy tokens were the same after each wake-up at level 1.
    """

    start: float
    weights: int
    first_sleep: float = 0.0
    first_wake: float = 0.0
    sleeps: list[float] = field(default_factory=list)
    wakes: list[float] = field(default_factory=list)
    sleeps_level_2: list[float] = field(default_factory=list)
    wakes_level_2: list[float] = field(default_factory=list)
    freed: int = 0
    host: int = 0
    same_text: bool = True


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model folder (random weights of Qwen2-7B's shapes)")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--cycles", type=int, default=5, help="after the first (%(default)s)")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between any two calls (%(default)s)")
    parser.add_argument("--memory", type=float, default=0.9, help="gpu_memory_utilization (%(default)s)")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_vllm_sleep"), help="folder (%(default)s)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)  # this process is the engine's
    return parser.parse_args()


def measure(options: argparse.Namespace) -> Measurement:
    """One engine, in this process."""
    import torch
    from vllm import LLM, SamplingParams

    from rlhf_npu.platform import resident_bytes

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            enable_sleep_mode=True,
            max_model_len=1024,
            gpu_memory_utilization=options.memory,
            enforce_eager=options.eager,
            seed=0,
            **_model(options.model, Path(folder)),
        )
    worker = llm.llm_engine.model_executor.driver_worker
    weights = sum(parameter.nbytes for parameter in worker.get_model().parameters())
    result = Measurement(time.perf_counter() - begin, weights)
    sampling = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)

    def text() -> list[list[int]]:
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def timed(call: Callable[[], Any]) -> float:
        time.sleep(options.pause)
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    before = text()
    resident, free = resident_bytes(), torch.cuda.mem_get_info()[0]
    result.first_sleep = timed(lambda: llm.sleep(level=1))
    result.host, result.freed = resident_bytes() - resident, torch.cuda.mem_get_info()[0] - free
    result.first_wake = timed(llm.wake_up)
    result.same_text &= text() == before
    for _ in range(options.cycles):
        result.sleeps.append(timed(lambda: llm.sleep(level=1)))
        result.wakes.append(timed(llm.wake_up))
        result.same_text &= text() == before
    for _ in range(options.cycles):
        result.sleeps_level_2.append(timed(lambda: llm.sleep(level=2)))
        result.wakes_level_2.append(timed(llm.wake_up))
    return result


def _model(model: Path | None, folder: Path) -> dict[str, Any]:
    if model is not None:
        return {"model": str(model), "skip_tokenizer_init": True}
    (folder / "config.json").write_text(json.dumps(QWEN2_7B))
    return {"model": str(folder), "load_format": "dummy", "skip_tokenizer_init": True}


def run(engine: str, console: Console) -> Measurement | None:
    """One engine in a process of its own; None when it failed, which is said."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", SWITCH: ENGINES[engine]}
    command = [sys.executable, *sys.argv, "--measure"]
    with console.status(f"{engine}: starts, sleeps and wakes"):
        result = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        console.print(f"{engine}: failed\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}", markup=False)
        return None
    return Measurement(**json.loads(result.stdout.splitlines()[-1]))


def table(results: dict[str, Measurement]) -> Table:
    made = Table(title="vLLM's sleep mode: seconds, and how many times the first one's", title_justify="left")
    made.add_column("")
    for engine in results:
        made.add_column(engine, justify="right")
    rows: dict[str, Callable[[Measurement], float]] = {
        "first sleep": lambda m: m.first_sleep,
        "first wake-up": lambda m: m.first_wake,
        "later sleeps, level 1, median": lambda m: median(m.sleeps),
        "later sleeps, slowest": lambda m: max(m.sleeps),
        "wake-ups, median": lambda m: median(m.wakes),
        "wake-ups, slowest": lambda m: max(m.wakes),
        "sleep, level 2, median": lambda m: median(m.sleeps_level_2),
        "wake-up after level 2, median": lambda m: median(m.wakes_level_2),
        "host memory / weights": lambda m: m.host / m.weights,
    }
    first = next(iter(results.values()))
    for name, value in rows.items():
        made.add_row(name, *(f"{value(m):.3f} ({value(m) / value(first):.1f}x)" for m in results.values()))
    made.add_row("weights, GiB", *(f"{m.weights / GIB:.1f}" for m in results.values()))
    made.add_row("freed by the first sleep, GiB", *(f"{m.freed / GIB:.1f}" for m in results.values()))
    made.add_row("engine ready after", *(f"{m.start:.0f}" for m in results.values()))
    made.add_row("the same text", *("yes" if m.same_text else "NO" for m in results.values()))
    return made


def main() -> None:
    options = arguments()
    if options.cycles < 1:
        sys.exit("error: --cycles must be positive")
    if options.measure:
        print(json.dumps(asdict(measure(options))), flush=True)
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("error: this compares with vLLM's own pool, which needs a GPU; scripts/bench_sleep.py runs anywhere")
    console = Console()
    results = {engine: measured for engine in options.engines if (measured := run(engine, console)) is not None}
    if not results:
        sys.exit("nothing was measured")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench_vllm_sleep.json").write_text(
        json.dumps({engine: asdict(measured) for engine, measured in results.items()}, indent=1)
    )
    console.print(table(results))
    console.print(f"written to {options.out}")
    if not all(measured.same_text for measured in results.values()):
        sys.exit("an engine said something else after a wake-up")


if __name__ == "__main__":
    main()
