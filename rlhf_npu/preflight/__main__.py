"""The command line: the options, the order of the checks, and the exit status."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from allocator import SleepPool
from rlhf_npu.config import ModelConfig
from rlhf_npu.preflight.report import Check, Report, Status
from rlhf_npu.preflight.versions import npu_driver_checks, torch_check, version_checks

_DESCRIPTION = """Checks a machine before sleep mode is relied on: versions, the device's driver, memory, settings;
then puts real memory to sleep and compares every byte after it woke. Ends with status 0 when nothing
failed, 1 when something did, 2 when an option is wrong."""
_MIB = 1 << 20
_NOT_TRIED = Check("same scores", Status.INFO, "not tried: what it needs failed above")
_PARTS = {
    "loaded": "same scores, as loaded",
    "level 1": "same scores, new weights",
    "level 2": "the same, weights dropped",
}
_REPORT = "preflight-report.json"
_UNITS = {"mib": _MIB, "gib": 1024 * _MIB}
_DEFAULT_SIZE = 512 * _MIB
# The system counts this process's memory in steps, and Python uses some: less could not be told from that.
_SMALLEST_SIZE = 32 * _MIB


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    report = Report(Console())
    with report.guard():
        check_machine(report, options.device, options.size)
        if options.model is not None:
            model = ModelConfig(options.model, options.dtype, options.attn_implementation)
            report.add(
                "model", _model_checks(model, report.device.partition(":")[0]) if not report.failed else [_NOT_TRIED]
            )
    report.show_summary()
    if options.report is not None:
        report.write(options.report)
    return int(report.failed)


def check_machine(report: Report, device: str, size: int | None) -> None:
    """All checks in their order; those that need what failed before are left out."""
    report.device = device
    torch_loads = torch_check()
    if torch_loads.status is Status.FAILED:
        report.add("versions", [torch_loads, *npu_driver_checks()])
    else:
        _check_device(report, _resolved(device), size)


def _check_device(report: Report, device: str, size: int | None) -> None:
    from rlhf_npu.preflight.device import memory_checks, open_pool, visible_check
    from rlhf_npu.preflight.host import host_checks
    from rlhf_npu.preflight.settings import environment_checks, expandable_check, region_check

    report.device, kind = device, device.partition(":")[0]
    report.add("versions", version_checks(kind))
    driver, pool = open_pool(device)
    found = report.add("device", [driver, visible_check(kind), *(memory_checks(pool) if pool else [])])
    fit = report.add("settings", [expandable_check(kind), *environment_checks(kind)])
    if pool is None:
        return
    report.add("host", host_checks(pool))
    if found and fit and report.add("torch", [region_check(pool)]):
        report.add("self-test", _self_test(pool, size))
    else:
        report.add("self-test", [Check("self-test", Status.INFO, "not run: what it needs failed above")])


def _self_test(pool: SleepPool, size: int | None) -> Iterator[Check]:
    from rlhf_npu.preflight.self_test import SelfTest

    return SelfTest(pool, size or _default_size(pool)).checks()


def _model_checks(model: ModelConfig, device: str) -> Iterator[Check]:
    from rlhf_npu.preflight.model_trial import Trial, try_model

    advice = "do not train this model with these settings: trainer and rollout engine compute different functions"
    for outcome in try_model(Trial(model, device)):
        measured = {"mean_nats": outcome.mean, "explained_nats": outcome.explained}
        status = Status.OK if outcome.right else Status.FAILED
        yield Check(
            _PARTS.get(outcome.part, outcome.part), status, outcome.words, "" if outcome.right else advice, measured
        )


def _default_size(pool: SleepPool) -> int:
    """On the CPU at most an eighth of the free memory, since others need it too."""
    if pool.device != "cpu":
        return _DEFAULT_SIZE
    return max(_SMALLEST_SIZE, min(_DEFAULT_SIZE, pool.memory_info().free // 8 // _MIB * _MIB))


def _resolved(device: str) -> str:
    if device != "auto":
        return device
    from rlhf_npu.platform import detect_platform

    kind = detect_platform().name
    return kind if kind == "cpu" else f"{kind}:0"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preflight", description=_DESCRIPTION)
    parser.add_argument("--device", type=_device, default="auto", help="auto, npu:0, cuda:0 or cpu (%(default)s)")
    parser.add_argument(
        "--size",
        type=_size,
        help="weights, and as much cache, of the self-test: 2GiB, 64MiB (512MiB; less on a small CPU)",
    )
    parser.add_argument(
        "--model",
        type=_model,
        metavar="PATH",
        help="also let vLLM and the trainer score the same tokens with this model, before and after new weights",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="for --model (%(default)s)"
    )
    parser.add_argument("--attn-implementation", default="auto", help="the trainer's, for --model (%(default)s)")
    parser.add_argument(
        "--report",
        type=_file,
        nargs="?",
        const=_REPORT,
        metavar="FILE",
        help="also write a file to send when something fails: checks, versions and settings as JSON, "
        f"no personal data ({_REPORT})",
    )
    return parser.parse_args(arguments)


def _device(text: str) -> str:
    if text in ("auto", "cpu") or re.fullmatch(r"(npu|cuda):\d+", text):
        return text
    if text in ("npu", "cuda"):
        return f"{text}:0"
    raise argparse.ArgumentTypeError(f"{text!r} is none of auto, npu:0, cuda:0, cpu")


def _model(text: str) -> str:
    from rlhf_npu.engines.model_folder import check_model
    from rlhf_npu.errors import ModelError

    try:
        return str(check_model(text).absolute())
    except ModelError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([mg]ib)", text.lower())
    size = int(float(match[1]) * _UNITS[match[2]]) // _MIB * _MIB if match else 0
    if size < _SMALLEST_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least 32MiB, such as 64MiB or 2GiB")
    return size


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: not a file in a folder that is there")
    return path


if __name__ == "__main__":
    sys.exit(main())
