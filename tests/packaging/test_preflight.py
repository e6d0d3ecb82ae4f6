"""scripts/preflight.py on the CPU: what it reports, and what each failure makes of its status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator import SleepPool
from rlhf_npu.installation import pinned_versions
from rlhf_npu.preflight.device import granularity_check
from rlhf_npu.preflight.facts import scrubbed, without_addresses
from rlhf_npu.preflight.host import available_check, container_check, huge_pages_check
from rlhf_npu.preflight.report import Check, Status
from rlhf_npu.preflight.self_test import SelfTest
from rlhf_npu.preflight.tiny_models import FAMILIES
from rlhf_npu.preflight.versions import files_version

PROJECT = Path(__file__).parents[2]
MIB = 1 << 20
GIB = 1 << 30


def preflight(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROJECT / "scripts" / "preflight.py"), *options]
    variables = os.environ | {"COLUMNS": "300", "PYTHONPATH": str(PROJECT)} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def reported(tmp_path: Path, *options: str, **environment: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the checks of the JSON report by their names."""
    file = tmp_path / "report.json"
    done = preflight("--size", "64MiB", "--report", str(file), *options, **environment)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    report = json.loads(file.read_text())
    assert report["failed"] == (done.returncode == 1)
    return done.returncode, {check["name"]: check for check in report["checks"]}


def test_the_cpu_passes_and_the_report_holds_what_was_measured(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, "--device", "cpu")
    assert status == 0
    assert {check["status"] for check in checks.values()} <= {"ok", "info"}
    assert checks["torch"]["value"].startswith(torch.__version__)
    assert checks["granularity"]["measured"] == {"bytes": os.sysconf("SC_PAGE_SIZE")}
    # The first sleep makes the backup in the memory that it frees; the second finds it there.
    assert checks["first sleep, level 1"]["measured"]["expected"] == 64 * MIB
    assert checks["second sleep, level 1"]["measured"]["expected"] == 128 * MIB
    for name in ("first sleep, level 1", "first wake-up", "second sleep, level 1", "plain copy to the host"):
        measured = checks[name]["measured"]
        assert measured["bytes"] == 64 * MIB
        assert measured["gib_per_s"] == pytest.approx(64 / 1024 / measured["seconds"])


def test_a_size_is_chosen_where_none_is_given_and_auto_finds_a_device() -> None:
    done = preflight()
    assert done.returncode == 0, done.stdout
    size = re.search(r"(\d+) MiB of weights, (\d+) MiB of cache", done.stdout)
    assert size is not None
    assert 32 <= int(size[1]) == int(size[2]) <= 512


def test_a_wake_up_that_fails_names_the_tag_and_the_bytes(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, "--device", "cpu", SLEEP_POOL_FAULT="copy_in:1")
    assert status == 1
    assert list(checks)[-1] == "first wake-up"
    assert checks["first wake-up"]["status"] == "failed"
    assert "copy_in of tag 'weights': injected fault" in checks["first wake-up"]["value"]
    assert f"[{16 * MIB} bytes at 0x" in checks["first wake-up"]["value"]


def test_an_allocation_that_fails_is_told_in_the_words_of_the_driver(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, "--device", "cpu", SLEEP_POOL_FAULT="create:2")
    assert status == 1
    assert checks["fill"]["status"] == "failed"
    assert "create of tag 'weights': injected fault" in checks["fill"]["value"]


def test_expandable_segments_are_pointed_out_on_the_cpu_where_they_do_nothing(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, "--device", "cpu", PYTORCH_NPU_ALLOC_CONF="expandable_segments:True")
    assert status == 0
    assert checks["expandable segments"]["status"] == "warning"
    assert "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True" in checks["expandable segments"]["value"]


def test_more_than_the_memory_there_is_fails_before_anything_is_made(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, "--device", "cpu", "--size", "100000GiB")
    assert status == 1
    measured = checks["memory for it"]["measured"]
    assert measured["needed"] > 300000 * GIB > measured["free"] > 0
    assert "fill" not in checks


def test_a_device_that_is_not_there_fails_and_the_self_test_is_left_out(tmp_path: Path) -> None:
    status, checks = reported(tmp_path, "--device", "cuda:0", CUDA_VISIBLE_DEVICES="")
    assert status == 1
    assert checks["driver"]["status"] == checks["devices"]["status"] == "failed"
    assert "CUDA_VISIBLE_DEVICES=" in checks["devices"]["value"]
    assert "self-test" not in checks
    assert "fill" not in checks


def test_a_torch_that_does_not_load_is_reported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")
    done = preflight("--device", "npu:0", PYTHONPATH=f"{tmp_path}:{PROJECT}")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "libhccl.so: cannot open shared object file" in done.stdout
    assert "set_env.sh" in done.stdout


def planted(tmp_path: Path, first: str) -> dict[str, Any]:
    """The report of a run whose settings and errors hold what must not be told."""
    home = tmp_path / "home" / "annelotte"
    home.mkdir(parents=True)
    program = f"import sys, socket; socket.gethostname = lambda: 'node7.lab.example'; {first}; "
    program += "from rlhf_npu.preflight.__main__ import main; sys.exit(main())"
    environment = {
        "HOME": str(home),
        "LOGNAME": "annelotte",
        "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwx",
        "HTTPS_PROXY": "http://annelotte:secret@10.1.2.3:3128",
        "LD_LIBRARY_PATH": f"{home}/lib:/home/bob/lib:/opt/lib",
        "ASCEND_RT_VISIBLE_DEVICES": "10.20.30.40",
        "TASK_QUEUE_ENABLE": "2",
    }
    command = [sys.executable, "-c", program, "--device", "cpu", "--size", "32MiB", "--report"]
    variables = os.environ | {"PYTHONPATH": str(PROJECT)} | environment
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    text = (tmp_path / "preflight-report.json").read_text()
    for secret in ("annelotte", "bob", "node7", "lab.example", "hf_abc", "secret@", "10.1.2.3", "10.20.30.40", "3128"):
        assert secret not in text, secret
    report: dict[str, Any] = json.loads(text)
    assert report["failed"] == (done.returncode == 1), done.stderr
    return report


def test_the_report_says_what_the_machine_is_and_whose_it_is_not(tmp_path: Path) -> None:
    report = planted(tmp_path, "pass")
    assert not report["failed"]
    assert report["packages"]["torch"] == torch.__version__
    assert report["system"]["machine"] == os.uname().machine
    assert report["system"]["kernel"] == os.uname().release
    environment = report["environment"]
    assert environment["LD_LIBRARY_PATH"] == "~/lib:~/lib:/opt/lib"
    assert environment["TASK_QUEUE_ENABLE"] == "2"
    assert not {"HF_TOKEN", "HTTPS_PROXY", "HOME", "LOGNAME"} & set(environment)


def test_an_error_that_no_check_expects_is_in_the_report_with_its_traceback(tmp_path: Path) -> None:
    breaks = (
        "import rlhf_npu.preflight.host as host; "
        "host.container_check = lambda *_: {}['no key of annelotte at 10.1.2.3 in /home/bob/x']"
    )
    report = planted(tmp_path, breaks)
    assert report["failed"]
    error = report["checks"][-1]
    assert error["section"] == "unexpected"
    assert error["status"] == "failed"
    assert "KeyError: 'no key of (user) at (address) in ~/x'" in error["value"]
    assert error["traceback"].startswith("Traceback (most recent call last)")
    assert "host_checks" in error["traceback"]
    # What was found before it is there too.
    assert "granularity" in {check["name"] for check in report["checks"]}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("CANN 8.5.0, firmware 7.8.0.2.212, driver 25.5.0", "CANN 8.5.0, firmware 7.8.0.2.212, driver 25.5.0"),
        ("link to 192.168.10.7:50000 refused", "link to (address):50000 refused"),
        ("fe80::1ff:fe23:4567:890a and 0a:1b:2c:3d:4e:5f", "(address) and (address)"),
        ("took 12:34:56", "took 12:34:56"),
        ("ghp_abcdefghijklmnop1234, http://me:pw@host/", "(secret), http://(secret)@host/"),
        ("/home/someone/run, /data/home", "~/run, /data/home"),
    ],
)
def test_only_what_tells_a_person_or_a_network_is_taken_out(text: str, clean: str) -> None:
    assert without_addresses(text) == clean


def test_a_version_of_four_numbers_is_no_address() -> None:
    assert scrubbed("driver 24.1.0.3") == "driver 24.1.0.3"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "tpu:0"], "none of auto, npu:0, cuda:0, cpu"),
        (["--size", "12"], "such as 64MiB or 2GiB"),
        (["--size", "31MiB"], "at least 32MiB"),
        (["--report", "/no/such/folder/report.json"], "cannot be written"),
    ],
)
def test_bad_options_end_with_status_two(options: list[str], words: str) -> None:
    done = preflight(*options)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.fixture
def filled(request: pytest.FixtureRequest) -> tuple[SelfTest, SleepPool]:
    pool = SleepPool.get("cpu", namespace=request.node.name)
    test = SelfTest(pool, 32 * MIB)
    assert test.fill().status is Status.OK
    return test, pool


def test_one_wrong_byte_is_found(filled: tuple[SelfTest, SleepPool]) -> None:
    test, _ = filled
    assert test.compare("compare").status is Status.OK
    test.weights[2].view(torch.uint8)[12345] ^= 1
    check = test.compare("compare")
    assert check.status is Status.FAILED
    assert check.measured["wrong_bytes"] == 1


def test_weights_in_each_others_place_and_moved_weights_are_found(filled: tuple[SelfTest, SleepPool]) -> None:
    test, _ = filled
    first, second = test.weights[0].clone(), test.weights[1].clone()
    test.weights[0].copy_(second)
    assert test.compare("compare").status is Status.FAILED
    test.weights[0] = first
    assert "moved" in test.compare("compare").value


def test_what_stays_on_the_device_is_found(filled: tuple[SelfTest, SleepPool]) -> None:
    test, pool = filled
    pool.set_persistent("kv_cache")
    check = test.sleep(1, "sleep")
    assert check.status is Status.FAILED
    assert "still holds 32 MiB" in check.value


def test_memory_that_does_not_come_back_is_found(filled: tuple[SelfTest, SleepPool]) -> None:
    test, pool = filled
    assert test.sleep(1, "sleep").status is Status.OK
    # The pool holds the woken cache, but the system gives memory only to what is written.
    pool.wake_up()
    check = test.sleep(1, "sleep")
    assert check.status is Status.FAILED
    assert check.measured["expected"] == 64 * MIB
    assert check.measured["returned"] < 40 * MIB


def test_the_pins_are_those_of_the_extras() -> None:
    assert pinned_versions("npu")["vllm-ascend"] == "0.23.0"
    assert f'"ray[default]=={pinned_versions("cpu")["ray"]}"' in (PROJECT / "pyproject.toml").read_text()
    assert "tensordict" not in pinned_versions("npu")  # named there, but not pinned


def test_versions_of_an_npus_driver_and_firmware_come_from_its_installation(tmp_path: Path) -> None:
    installation = tmp_path / "ascend_install.info"
    installation.write_text(f"Firmware_Install_Path_Param={tmp_path}\nDriver_Install_Path_Param={tmp_path}\n")
    (tmp_path / "firmware").mkdir()
    (tmp_path / "firmware" / "version.info").write_text("Version=7.8.0.2.212\nfirmware_version=1.0\n")
    assert files_version("firmware", installation) == "7.8.0.2.212"
    assert files_version("driver", installation) == ""


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (granularity_check(2 * MIB), Status.OK),
        (granularity_check(32 * MIB), Status.WARNING),
        (available_check(free=512 * GIB, device_memory=64 * GIB, devices=8), Status.OK),
        (available_check(free=511 * GIB, device_memory=64 * GIB, devices=8), Status.WARNING),
        (container_check(limit=64 * GIB, machine=64 * GIB), Status.OK),
        (container_check(limit=63 * GIB, machine=64 * GIB), Status.INFO),
        (huge_pages_check("always [madvise] never\n"), Status.OK),
        (huge_pages_check("always madvise [never]\n"), Status.WARNING),
    ],
)
def test_limits(check: Check, status: Status) -> None:
    assert check.status is status
    assert (check.advice == "") is (status is Status.OK)


@pytest.mark.slow
def test_a_model_that_both_engines_compute_alike_passes(tmp_path: Path) -> None:
    folder = FAMILIES["Gemma 2"].save(tmp_path / "model")
    status, checks = reported(tmp_path, "--device", "cpu", "--model", str(folder), "--dtype", "float32")
    assert status == 0
    names = ["same scores, as loaded", "same scores, new weights", "the same, weights dropped"]
    assert [checks[name]["status"] for name in names] == ["ok"] * 3
    assert all(0 < checks[name]["measured"]["mean_nats"] < 1e-4 for name in names)


@pytest.mark.slow
def test_a_model_that_the_trainer_would_compute_otherwise_fails(tmp_path: Path) -> None:
    folder = FAMILIES["Gemma 2"].save(tmp_path / "model")
    status, checks = reported(tmp_path, "--device", "cpu", "--model", str(folder), "--attn-implementation", "sdpa")
    assert status == 1
    check = checks["same scores, as loaded"]
    assert check["status"] == "failed"
    assert "attention: sdpa and CPU_ATTN" in check["value"]
    assert "do not train this model" in check["advice"]


def test_a_folder_that_is_no_model_is_refused_at_once(tmp_path: Path) -> None:
    done = preflight("--model", str(tmp_path))
    assert done.returncode == 2
    assert "has no config.json" in done.stderr
