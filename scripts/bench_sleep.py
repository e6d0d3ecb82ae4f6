"""Measures how fast weights and a cache sleep and wake, beside plain copies on the same link and other pools.

    python scripts/bench_sleep.py                                   # sizes that fit this device, ours
    python scripts/bench_sleep.py --sizes 1 14.2 40 --compare 14.2  # and vLLM's and torch_memory_saver at 14.2 GiB

Each pool and size is measured in a process of its own. Prints a table; writes bench_sleep.json and bench_sleep.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sleep_contenders import CONTENDERS, GIB, Measurement, Order, missing

from rlhf_npu.errors import DeviceError
from rlhf_npu.platform import detect_platform

CONTENDER_SCRIPT = Path(__file__).with_name("sleep_contenders.py")
SIZES = {"cuda": [1.0, 4.0, 14.2, 40.0], "npu": [1.0, 4.0, 14.2, 40.0], "cpu": [0.25, 1.0]}
LARGEST_CACHE = 46.0
SPARE = 4.0  # left free beside weights and cache
CPU_CACHE = 1.0
Result = tuple[Order, Measurement]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0 or npu:0 (%(default)s)")
    parser.add_argument("--sizes", type=float, nargs="+", metavar="GIB", help="of the weights")
    parser.add_argument("--compare", type=float, nargs="*", default=[], metavar="GIB", help="sizes for the others, too")
    parser.add_argument("--cache", type=float, metavar="GIB", help="of the cache (what fits, 46 at most)")
    parser.add_argument("--cycles", type=int, default=5, help="after the first (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_sleep"), help="folder (%(default)s)")
    parsed = parser.parse_args()
    if parsed.cycles < 1 or min([*(parsed.sizes or [1]), *parsed.compare, parsed.cache or 1]) <= 0:
        parser.error("--sizes, --compare, --cache and --cycles must be positive")
    return parsed


def device_name(wanted: str) -> str:
    """torch's name of the device to measure."""
    try:
        platform = detect_platform(wanted.partition(":")[0])
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return wanted if ":" in wanted else str(platform.device())


def cache_gib(device: str, weights: float) -> float:
    """As much cache as fits beside the weights."""
    if device == "cpu":
        return CPU_CACHE
    free, _ = getattr(torch, torch.device(device).type).mem_get_info(device)
    return min(LARGEST_CACHE, free / GIB - weights - SPARE)


def orders(options: argparse.Namespace, device: str) -> Iterator[Order]:
    """What to measure, sizes that do not fit left out."""
    sizes = options.sizes or SIZES[torch.device(device).type]
    for size in sorted({*sizes, *options.compare}):
        cache = options.cache or cache_gib(device, size)
        if cache <= 0:
            print(f"{size} GiB of weights do not fit {device}: left out")
            continue
        for contender in CONTENDERS:
            if contender == "ours" or size in options.compare:
                yield Order(contender, device, int(size * GIB), int(cache * GIB), options.cycles)


def run(order: Order, console: Console) -> Measurement | None:
    """One measurement, in a process of its own; None when it failed, which is said."""
    what = f"{order.contender}, {order.weights / GIB:.4g} GiB of weights, {order.cache / GIB:.4g} GiB of cache"
    if reason := missing(order.contender, order.device):
        console.print(f"{what}: {reason}")
        return None
    with console.status(what):
        command = [sys.executable, str(CONTENDER_SCRIPT), json.dumps(asdict(order))]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        ended = f"killed by signal {-process.returncode}" if process.returncode < 0 else "failed"
        console.print(f"{what}: {ended}\n{process.stderr[-2000:]}", markup=False)
        return None
    return Measurement(**json.loads(process.stdout.splitlines()[-1]))


def table(results: list[Result], device: str) -> Table:
    made = Table(
        title=f"Sleep and wake-up on {device}: seconds, and share of the plain copies' rate", title_justify="left"
    )
    made.add_column("")
    for order, _ in results:
        made.add_column(f"{order.contender}\n{order.weights / GIB:.4g} + {order.cache / GIB:.4g} GiB", justify="right")
    for name, cells in rows(results):
        made.add_row(name, *cells)
    return made


def rows(results: list[Result]) -> Iterator[tuple[str, list[str]]]:
    """The table's lines."""

    def row(name: str, cell: Any) -> tuple[str, list[str]]:
        return name, [cell(order, measured) for order, measured in results]

    yield row("plain copy out, GB/s", lambda _, m: f"{m.link_out / 1e9:.1f}")
    yield row("plain copy in, GB/s", lambda _, m: f"{m.link_in / 1e9:.1f}")
    yield row("first sleep of the process", lambda o, m: rate(o, m.first_sleep, m.link_out))
    yield row("sleep, nothing prepared", lambda o, m: rate(o, m.unprepared_sleep, m.link_out))
    yield row("prepare_host", lambda _, m: seconds(m.prepare))
    yield row("sleep, prepared", lambda o, m: rate(o, m.prepared_sleep, m.link_out))
    yield row("later sleeps, median", lambda o, m: rate(o, median(m.sleeps), m.link_out))
    yield row("later sleeps, slowest", lambda o, m: rate(o, max(m.sleeps), m.link_out))
    yield row("wake-up, median", lambda o, m: rate(o, median(m.wakes), m.link_in))
    yield row("wake-up, slowest", lambda o, m: rate(o, max(m.wakes), m.link_in))
    yield row("wake weights, then", lambda o, m: rate(o, m.wake_weights, m.link_in))
    yield row("wake the cache", lambda _, m: seconds(m.wake_cache))
    yield row("sleep, level 2", lambda _, m: seconds(m.sleep_level_2))
    yield row("wake-up after level 2", lambda _, m: seconds(m.wake_level_2))
    yield row("device memory left asleep, MiB", lambda _, m: f"{m.left_on_device / (1 << 20):.0f}")
    yield row("host memory / weights", lambda o, m: f"{m.host / o.weights:.3f}")
    yield row("host left after release", lambda o, m: share(m.host_after_release, o.weights))
    yield row("weights intact", lambda _, m: "yes" if m.intact else "NO")


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def share(value: int | None, whole: int) -> str:
    return "-" if value is None else f"{value / whole:.1%}"


def rate(order: Order, value: float | None, link: float) -> str:
    return "-" if value is None else f"{value:.4f} ({order.weights / value / link:.0%})"


def plot(results: list[Result], path: Path) -> None:
    """Seconds of each operation, a group of bars a measurement, beside what the link alone takes."""
    from matplotlib.figure import Figure

    parts = {
        "first sleep": lambda m: m.first_sleep,
        "later sleep": lambda m: median(m.sleeps),
        "wake-up": lambda m: median(m.wakes),
    }
    figure = Figure(figsize=(1.5 + 2.2 * len(results), 4), layout="constrained")
    axes = figure.add_subplot()
    for position, (name, value) in enumerate(parts.items()):
        places = [index + 0.25 * position for index in range(len(results))]
        axes.bar(places, [value(measured) for _, measured in results], width=0.22, label=name)
    for index, (order, measured) in enumerate(results):
        link = order.weights / measured.link_out
        axes.hlines(link, index - 0.2, index + 0.7, linestyles="dotted", label="plain copy" if index == 0 else "")
    labels = [f"{order.contender}\n{order.weights / GIB:.4g} + {order.cache / GIB:.4g} GiB" for order, _ in results]
    axes.set_xticks([index + 0.25 for index in range(len(results))], labels)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5 * min(order.weights / measured.link_out for order, measured in results))
    axes.set_ylabel("seconds")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    options = arguments()
    console = Console()
    device = device_name(options.device)
    results = []
    for order in orders(options, device):
        measured = run(order, console)
        if measured is not None:
            results.append((order, measured))
    if not results:
        sys.exit("nothing was measured")
    options.out.mkdir(parents=True, exist_ok=True)
    records = [{"order": asdict(order), "measurement": asdict(measured)} for order, measured in results]
    (options.out / "bench_sleep.json").write_text(json.dumps(records, indent=1))
    plot(results, options.out / "bench_sleep.png")
    console.print(table(results, device))
    console.print(f"written to {options.out}")
    if not all(measured.intact for _, measured in results):
        sys.exit("weights were not intact after a wake-up")


if __name__ == "__main__":
    main()
