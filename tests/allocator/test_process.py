"""The pool in the life of a process: import, fork, exit."""

from collections.abc import Callable


def test_a_program_ends_well_with_tensors_in_the_pool(run_python: Callable) -> None:
    program = """
import sys
from allocator import SleepPool
SleepPool.get("cpu")
print("torch" in sys.modules)

import threading, torch
pool = SleepPool.get(DEVICE)
torch.set_default_device(DEVICE)
kept = {}
def work():
    with pool.region("thread"):
        kept["thread"] = torch.ones(5000, device=DEVICE)
        kept["large"] = torch.ones(1 << 20, device=DEVICE)
thread = threading.Thread(target=work)
thread.start()
thread.join()
with pool.region("weights"):
    torch.kept_by_a_module = torch.ones(5000)
    cycle = [torch.ones(5000)]
    cycle.append(cycle)
pool.sleep(offload=["weights"], discard=["thread"])
print("end")
"""
    result = run_python(program)
    assert (result.stdout, result.stderr, result.returncode) == ("False\nend\n", "", 0)


def test_a_forked_child_reads_frees_and_has_its_own_pool(run_python: Callable) -> None:
    program = """
import os, subprocess, sys, torch
from allocator import ForkedProcessError, SleepPool
pool = SleepPool.get("cpu")
with pool.region("weights"):
    weights = [torch.full((1 << 20,), 3.0), torch.ones(100), torch.ones(100)]
    region_child = os.fork()
    if region_child == 0:
        outside = torch.ones(100)  # the region stayed with the parent
        assert not SleepPool.get("cpu").stats()
if region_child == 0:
    assert float(weights[0].mean()) == 3
    for forbidden in (pool.sleep, pool.wake_up, pool.stats, lambda: pool.region("weights").__enter__()):
        try:
            forbidden()
        except ForkedProcessError:
            continue
        os._exit(1)
    weights.clear()
    mine = SleepPool.get("cpu")
    with mine.region("weights"):
        own = torch.arange(1 << 20)
    mine.sleep()
    mine.wake_up()
    os._exit(0 if int(own[-1]) == (1 << 20) - 1 else 2)
_, status = os.waitpid(region_child, 0)
subprocess.run([sys.executable, "-c", "pass"], check=True)
pool.sleep()
pool.wake_up()
print(status, float(weights[0].mean()), float(weights[1].sum() + weights[2].sum()))
"""
    result = run_python(program, PYTHONWARNINGS="ignore")  # Python 3.12 warns of every fork beside threads
    assert (result.stdout, result.stderr) == ("0 3.0 200.0\n", "")
