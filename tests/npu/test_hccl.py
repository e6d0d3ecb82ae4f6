"""HCCL over shared memory: the same as gloo on the CPU; what hangs or is wrong is an error, in words and in time."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_npu

from tests.npu.rank_processes import Failure, RankProcesses

# A slot of the shared memory holds 512 KiB between two ranks: the last size takes several.
SIZES = (0, 1, 7, 1_000_003)
REDUCED = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8)
MOVED = (*REDUCED, torch.float64, torch.uint8, torch.bool)
WORLDS = [(2, "eager"), (3, "eager"), (2, "lazy")]
MIB = 1 << 20


@pytest.fixture(scope="module", params=WORLDS, ids=lambda world: f"{world[0]}-{world[1]}")
def world(request: pytest.FixtureRequest) -> Iterator[RankProcesses]:
    size, streams = request.param
    with RankProcesses(size, ACLSIM_STREAM=streams) as ranks:
        yield ranks


# ---- on a rank ----------------------------------------------------------------------------------------------------

Collective = Callable[["Data"], list[torch.Tensor]]


class Data:
    """What a rank gives: small whole numbers, so that sums and products are exact in each type."""

    def __init__(self, device: str, dtype: torch.dtype, size: int) -> None:
        self.device, self.dtype, self.size = device, dtype, size
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def tensor(self, parts: int = 1, *, seed: int = 0) -> torch.Tensor:
        count = parts * self.size
        numbers = (torch.arange(count) * 7 + self.rank * 3 + seed) % 3 + (1 if self.dtype != torch.bool else -1)
        return numbers.to(self.dtype).to(self.device)

    def empty(self, parts: int = 1) -> torch.Tensor:
        return torch.zeros(parts * self.size, dtype=self.dtype, device=self.device)

    def blank_list(self) -> list[torch.Tensor]:
        return [self.empty() for _ in range(self.world)]


def all_reduce(data: Data, op: Any = dist.ReduceOp.SUM) -> list[torch.Tensor]:
    tensor = data.tensor()
    dist.all_reduce(tensor, op)
    return [tensor]


def all_reduce_max(data: Data) -> list[torch.Tensor]:
    return all_reduce(data, dist.ReduceOp.MAX)


def all_reduce_min(data: Data) -> list[torch.Tensor]:
    return all_reduce(data, dist.ReduceOp.MIN)


def reduce(data: Data) -> list[torch.Tensor]:
    tensor = data.tensor()
    dist.reduce(tensor, dst=1)
    return [tensor] if data.rank == 1 else []


def broadcast(data: Data) -> list[torch.Tensor]:
    tensor = data.tensor()
    dist.broadcast(tensor, src=1)
    return [tensor]


def all_gather(data: Data) -> list[torch.Tensor]:
    parts = data.blank_list()
    dist.all_gather(parts, data.tensor())
    return parts


def all_gather_in_place(data: Data) -> list[torch.Tensor]:
    whole = data.empty(data.world)
    own = whole[data.rank * data.size : (data.rank + 1) * data.size]
    own.copy_(data.tensor())
    dist.all_gather_into_tensor(whole, own)
    return [whole]


def gather(data: Data) -> list[torch.Tensor]:
    parts = data.blank_list() if data.rank == 0 else None
    dist.gather(data.tensor(), parts, dst=0)
    return parts or []


def scatter(data: Data) -> list[torch.Tensor]:
    given = [data.tensor(seed=rank) for rank in range(data.world)] if data.rank == 1 else None
    own = data.empty()
    dist.scatter(own, given, src=1)
    return [own]


def reduce_scatter(data: Data) -> list[torch.Tensor]:
    whole, own = data.tensor(data.world), data.empty()
    if data.device == "cpu":
        dist.all_reduce(whole)
        return [whole[data.rank * data.size : (data.rank + 1) * data.size].clone()]
    dist.reduce_scatter_tensor(own, whole)
    in_place = whole[data.rank * data.size : (data.rank + 1) * data.size]
    dist.reduce_scatter_tensor(in_place, whole)
    assert torch.equal(in_place.cpu(), own.cpu())
    return [own]


def all_to_all(data: Data) -> list[torch.Tensor]:
    received = data.empty(data.world)
    dist.all_to_all_single(received, data.tensor(data.world))
    return [received]


def uneven_all_to_all(data: Data) -> list[torch.Tensor]:
    """Rank r sends rank t the size times (r + t) % 3, which may be nothing."""
    counts = [data.size * ((data.rank + other) % 3) for other in range(data.world)]
    sent = data.tensor(sum((data.rank + other) % 3 for other in range(data.world)))
    received = torch.zeros(sum(counts), dtype=data.dtype, device=data.device)
    dist.all_to_all_single(received, sent, counts, counts)
    return [received]


def ring(data: Data) -> list[torch.Tensor]:
    """Each rank hands its tensor on; even ranks send first, since a send waits for its receiver."""
    own, received = data.tensor(), data.empty()
    following, previous = (data.rank + 1) % data.world, (data.rank - 1) % data.world
    steps = [lambda: dist.send(own, following), lambda: dist.recv(received, previous)]
    for step in steps if data.rank % 2 == 0 else reversed(steps):
        step()
    return [received]


def batched_ring(data: Data) -> list[torch.Tensor]:
    received = data.empty()
    sending = dist.P2POp(dist.isend, data.tensor(), (data.rank + 1) % data.world)
    receiving = dist.P2POp(dist.irecv, received, (data.rank - 1) % data.world)
    for work in dist.batch_isend_irecv([sending, receiving]):
        work.wait()
    return [received]


def matches_gloo(collective: Collective, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """The types and sizes for which the NPU's result is not the CPU's."""
    wrong = []
    for dtype in dtypes:
        for size in SIZES if dtype in (torch.float32, torch.bfloat16) else SIZES[:-1]:
            expected = collective(Data("cpu", dtype, size))
            found = [tensor.cpu() for tensor in collective(Data("npu", dtype, size))]
            same = [torch.equal(one, other) for one, other in zip(expected, found, strict=True)]
            if not all(same):
                wrong.append(f"{dtype} of {size}")
    return wrong


# ---- right results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("collective", [all_reduce, all_reduce_max, all_reduce_min, reduce, reduce_scatter])
def test_a_reduction_is_the_same_as_with_gloo(world: RankProcesses, collective: Collective) -> None:
    assert world.run(matches_gloo, collective, REDUCED) == [[]] * world.size


MOVES = [
    broadcast,
    all_gather,
    all_gather_in_place,
    gather,
    scatter,
    all_to_all,
    uneven_all_to_all,
    ring,
    batched_ring,
]


@pytest.mark.parametrize("collective", MOVES)
def test_moved_data_is_the_same_as_with_gloo(world: RankProcesses, collective: Collective) -> None:
    assert world.run(matches_gloo, collective, MOVED) == [[]] * world.size


def barrier_times(late: int) -> tuple[float, float]:
    if dist.get_rank() == late:
        time.sleep(0.5)
    came = time.monotonic()
    dist.barrier(device_ids=[dist.get_rank()])
    torch_npu.npu.synchronize()
    return came, time.monotonic()


def test_nobody_passes_a_barrier_before_the_last_has_come(world: RankProcesses) -> None:
    for late in range(world.size):
        times = world.run(barrier_times, late)
        assert min(left for _, left in times) >= max(came for came, _ in times)


def sums_of_groups() -> list[float]:
    """Of rank + 1, in each pair of ranks that this rank is of; groups are made and ended twice."""
    sums = []
    rank, size = dist.get_rank(), dist.get_world_size()
    for _ in range(2):
        pairs = [(one, other) for one in range(size) for other in range(one + 1, size)]
        groups = {pair: dist.new_group(list(pair), backend="hccl") for pair in pairs}
        for pair, group in groups.items():
            if rank in pair:
                tensor = torch.full((3,), rank + 1.0, device="npu")
                dist.all_reduce(tensor, group=group)
                sums.append(tensor.cpu()[0].item())
        for group in groups.values():
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
    return sums


def test_groups_are_worlds_of_their_own(world: RankProcesses) -> None:
    pairs = {2: {0: [3.0], 1: [3.0]}, 3: {0: [3.0, 4.0], 1: [3.0, 5.0], 2: [4.0, 5.0]}}[world.size]
    assert world.run(sums_of_groups) == [pairs[rank] * 2 for rank in range(world.size)]


def reduced_while_elsewhere() -> float:
    """Rank 0 issues a collective and does something else until rank 1 has had its result.

    By HCCL's own function: torch_npu's watchdog, which asks for the state of its works, would move them on.
    """
    hccl = Hccl()
    tensor = torch.ones(MIB, device="npu")
    torch_npu.npu.synchronize()
    here = _address(tensor)
    assert hccl.call("HcclAllReduce", here, here, ctypes.c_uint64(MIB), FLOAT32, SUM)[0] == 0
    if dist.get_rank() == 1:
        torch_npu.npu.synchronize()
    dist.all_reduce(torch.zeros(1))
    torch_npu.npu.synchronize()
    hccl.library.HcclCommDestroy(hccl.handle)
    return float(tensor.cpu()[-1].item())


def test_a_collective_goes_on_while_its_process_does_something_else(world: RankProcesses) -> None:
    assert world.run(reduced_while_elsewhere) == [world.size] * world.size


def waits_in_opposite_order() -> list[float]:
    """Collectives of two communicators, each on a stream of its own; ranks wait for them in another order."""
    first, second = (dist.new_group(backend="hccl") for _ in range(2))
    tensors = [torch.full((MIB,), 1.0, device="npu") for _ in range(4)]
    works = [
        dist.all_reduce(tensor, group=group, async_op=True)
        for tensor, group in zip(tensors, (first, second, second, first), strict=True)
    ]
    for work in works if dist.get_rank() == 0 else reversed(works):
        work.wait()
        torch_npu.npu.current_stream().synchronize()
    for group in (first, second):
        dist.destroy_process_group(group)
    return [tensor.cpu().sum().item() / MIB for tensor in tensors]


def test_ranks_that_wait_in_another_order_do_not_hang(world: RankProcesses) -> None:
    assert world.run(waits_in_opposite_order) == [[world.size] * 4] * world.size


def small_all_reduce_seconds() -> float:
    tensor = torch.ones(8, device="npu")
    times = []
    for _ in range(50):
        start = time.monotonic()
        dist.all_reduce(tensor)
        torch_npu.npu.synchronize()
        times.append(time.monotonic() - start)
    return min(times)


def seconds_of_own_threads_while_waiting() -> float:
    """CPU time of a rank that waits for rank 0 for 1.5 s, less that of torch_npu's own threads."""
    if dist.get_rank() == 0:
        time.sleep(1.5)
    before = _cpu_seconds()
    dist.all_reduce(torch.ones(8, device="npu"))
    torch_npu.npu.synchronize()
    return _cpu_seconds() - before


def _cpu_seconds() -> float:
    ticks = 0
    for task in Path("/proc/self/task").iterdir():
        name, fields = (task / "stat").read_text().split("(")[1].rsplit(")", 1)
        if not name.startswith(("release", "acl")):
            ticks += sum(int(field) for field in fields.split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def test_waits_are_quick_and_burn_no_core(world: RankProcesses) -> None:
    assert max(world.run(small_all_reduce_seconds)) < 0.002
    assert max(world.run(seconds_of_own_threads_while_waiting)) < 0.3


# ---- HCCL's own functions -----------------------------------------------------------------------------------------

SUM, PROD = 0, 1
INT32, FLOAT32, UINT8, FLOAT64, BFLOAT16, INT128 = 2, 4, 7, 10, 11, 12


class Hccl:
    """A communicator of the world, by HCCL's functions."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libhccl.so")
        self.library.HcclGetErrorString.restype = ctypes.c_char_p
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        info = ctypes.create_string_buffer(4108)
        if self.rank == 0:
            assert self.library.HcclGetRootInfo(info) == 0
        shared = [info.raw]
        dist.broadcast_object_list(shared, device=torch.device("cpu"))
        self.handle = ctypes.c_void_p()
        assert self.library.HcclCommInitRootInfo(self.size, shared[0], self.rank, ctypes.byref(self.handle)) == 0

    def call(self, name: str, *args: Any) -> tuple[int, str]:
        """The result, and the words that AscendCL has for it."""
        stream = ctypes.c_void_p(torch_npu.npu.current_stream().npu_stream)
        result = getattr(self.library, name)(*args, self.handle, stream)
        return result, recent_words() if result else ""


def recent_words() -> str:
    runtime = ctypes.CDLL("libascendcl.so")
    runtime.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return (runtime.aclGetRecentErrMsg() or b"").decode()


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _counts(*values: int) -> Any:
    return (ctypes.c_uint64 * len(values))(*values)


def refusals() -> dict[str, tuple[int, str]]:
    hccl = Hccl()
    tensor = torch.ones(8, device="npu")
    here, count = _address(tensor), ctypes.c_uint64(4)
    found = {
        "type": hccl.call("HcclBroadcast", here, count, INT128, 0),
        "reduced type": hccl.call("HcclAllReduce", here, here, count, FLOAT64, SUM),
        "product": hccl.call("HcclAllReduce", here, here, count, BFLOAT16, PROD),
        "reduction": hccl.call("HcclAllReduce", here, here, count, FLOAT32, 9),
        "root": hccl.call("HcclBroadcast", here, count, FLOAT32, hccl.size),
        "itself": hccl.call("HcclSend", here, count, FLOAT32, hccl.rank),
        "null": hccl.call("HcclAllReduce", None, here, count, FLOAT32, SUM),
        "overlap": hccl.call("HcclAlltoAll", here, ctypes.c_uint64(1), FLOAT32, here, ctypes.c_uint64(1), FLOAT32),
        "missing": hccl.call("HcclCommSuspend"),
    }
    assert hccl.library.HcclCommDestroy(hccl.handle) == 0
    found["destroyed"] = hccl.call("HcclBarrier")
    return found


def test_what_hccl_cannot_do_is_refused_in_words(world: RankProcesses) -> None:
    for found in world.run(refusals):
        assert {name: result for name, (result, _) in found.items()} == {
            "type": 5,
            "reduced type": 5,
            "product": 5,
            "reduction": 5,
            "root": 1,
            "itself": 1,
            "null": 2,
            "overlap": 1,
            "missing": 5,
            "destroyed": 2,
        }
        assert "HcclBroadcast: data type 12 is not simulated" in found["type"][1]
        assert "HcclAllReduce: no reduction 0 of data type 10" in found["reduced type"][1]
        assert "HcclAllReduce: no reduction 9 of data type 4" in found["reduction"][1]
        assert "HcclCommSuspend is not simulated" in found["missing"][1]


def by_own_functions() -> list[list[float]]:
    """Out of place, and what torch.distributed has no call for: AllGatherV, ReduceScatterV, AlltoAllVC."""
    hccl = Hccl()
    rank, size = hccl.rank, hccl.size
    counts = list(range(1, size + 1))
    places = [sum(counts[:other]) for other in range(size)]
    total = sum(counts)
    own = torch.full((rank + 1,), rank + 1.0, device="npu")
    whole = torch.arange(total, dtype=torch.float32, device="npu")
    reduced, gathered, scattered = (torch.zeros(total, device="npu") for _ in range(3))
    matrix = _counts(*(counts * size))  # each rank sends rank t t + 1 elements
    columns = torch.zeros(size * (rank + 1), device="npu")
    torch_npu.npu.synchronize()
    results = [
        hccl.call("HcclAllReduce", _address(whole), _address(reduced), ctypes.c_uint64(total), FLOAT32, SUM),
        hccl.call(
            "HcclAllGatherV",
            _address(own),
            ctypes.c_uint64(rank + 1),
            _address(gathered),
            _counts(*counts),
            _counts(*places),
            FLOAT32,
        ),
        hccl.call(
            "HcclReduceScatterV",
            _address(whole),
            _counts(*counts),
            _counts(*places),
            _address(scattered),
            ctypes.c_uint64(rank + 1),
            FLOAT32,
            SUM,
        ),
        hccl.call("HcclAlltoAllVC", _address(whole), matrix, FLOAT32, _address(columns), FLOAT32),
    ]
    assert [result for result, _ in results] == [0] * 4, results
    torch_npu.npu.synchronize()
    assert torch.equal(whole.cpu(), torch.arange(total, dtype=torch.float32)), "out of place, the operand stays"
    hccl.library.HcclCommDestroy(hccl.handle)
    return [reduced.tolist(), gathered.tolist(), scattered.tolist(), columns.tolist()]


def test_hccls_own_functions_by_closed_form(world: RankProcesses) -> None:
    size = world.size
    total = size * (size + 1) // 2
    for rank, (reduced, gathered, scattered, columns) in enumerate(world.run(by_own_functions)):
        own = range(rank * (rank + 1) // 2, (rank + 1) * (rank + 2) // 2)
        assert reduced == [size * i for i in range(total)]
        assert gathered == [other + 1 for other in range(size) for _ in range(other + 1)]
        assert scattered == [size * i for i in own] + [0] * (total - rank - 1)
        assert columns == [*own] * size


def sums_of_sub_communicators() -> list[float]:
    """Ranks 1 and 0, in this order, make a communicator of the same identity twice; other ranks are outside."""
    hccl = Hccl()
    members = (ctypes.c_uint32 * 2)(1, 0)
    outside = hccl.rank > 1
    sums = []
    for _ in range(2):
        sub = ctypes.c_void_p()
        result = hccl.library.HcclCreateSubCommConfig(
            ctypes.byref(hccl.handle),
            ctypes.c_uint32(2),
            None if outside else members,
            ctypes.c_uint64(0xFFFFFFFF if outside else 7),
            ctypes.c_uint32(0 if outside else 1 - hccl.rank),
            None,
            ctypes.byref(sub),
        )
        assert result == 0, recent_words()
        assert (sub.value is None) == outside
        if outside:
            continue
        rank = ctypes.c_uint32()
        assert hccl.library.HcclGetRankId(sub, ctypes.byref(rank)) == 0
        assert rank.value == 1 - hccl.rank
        tensor = torch.full((5,), hccl.rank + 1.0, device="npu")
        whole, hccl.handle = hccl.handle, sub
        assert hccl.call("HcclAllReduce", _address(tensor), _address(tensor), ctypes.c_uint64(5), FLOAT32, SUM)[0] == 0
        torch_npu.npu.synchronize()
        sums.append(tensor.cpu()[4].item())
        hccl.library.HcclCommDestroy(sub)
        hccl.handle = whole
    hccl.library.HcclCommDestroy(hccl.handle)
    return sums


def test_sub_communicators_may_be_made_again(world: RankProcesses) -> None:
    assert world.run(sums_of_sub_communicators) == [[3.0, 3.0] if rank < 2 else [] for rank in range(world.size)]


# ---- what is wrong or would hang ----------------------------------------------------------------------------------


def all_reduced(count: int = 4) -> float:
    tensor = torch.ones(count, device="npu")
    dist.all_reduce(tensor)
    torch_npu.npu.current_stream().synchronize()
    return float(tensor.cpu()[0].item())


def no_shared_memory_is_left() -> bool:
    return not list(Path("/dev/shm").glob("*aclsim*"))


@pytest.mark.parametrize("streams", ["eager", "lazy"])
def test_a_killed_rank_is_an_exception_for_the_others(streams: str) -> None:
    with RankProcesses(3, ACLSIM_STREAM=streams) as ranks:
        assert ranks.run(all_reduced) == [3.0] * 3
        ranks.start(0, all_reduced)
        ranks.start(1, all_reduced)
        time.sleep(0.5)
        ranks.kill(2)
        for rank in (0, 1):
            failure = ranks.result(rank, seconds=10)
            assert isinstance(failure, Failure)
            assert "507048" in failure.words
            assert "HcclAllReduce" in failure.words
            assert "rank 2 (process " in failure.words
            assert ") has died" in failure.words
        # The communicator is no more, and says so at once.
        again = ranks.attempt_of(0, all_reduced)
        assert isinstance(again, Failure)
        assert "rank 2 (process " in again.words
    assert no_shared_memory_is_left()


def test_a_rank_that_never_comes_ends_the_wait_in_an_operation() -> None:
    with RankProcesses(2, HCCL_EXEC_TIMEOUT="1") as ranks:
        assert ranks.run(all_reduced) == [2.0] * 2
        failure = ranks.attempt_of(0, all_reduced)
        assert isinstance(failure, Failure)
        assert "no answer from rank 1 within 1 s (HCCL_EXEC_TIMEOUT)" in failure.words


def test_a_rank_that_never_comes_ends_the_wait_for_a_communicator() -> None:
    with RankProcesses(2, HCCL_CONNECT_TIMEOUT="1") as ranks:
        failure = ranks.attempt_of(0, all_reduced)
        assert isinstance(failure, Failure)
        assert "ranks 1 of 2 did not come within 1 s (HCCL_CONNECT_TIMEOUT)" in failure.words
    assert no_shared_memory_is_left()


def root_information() -> bytes:
    info = ctypes.create_string_buffer(4108)
    assert ctypes.CDLL("libhccl.so").HcclGetRootInfo(info) == 0
    return info.raw


def joined(info: bytes) -> tuple[int, str]:
    handle = ctypes.c_void_p()
    result = ctypes.CDLL("libhccl.so").HcclCommInitRootInfo(2, info, 1, ctypes.byref(handle))
    return result, recent_words()


@pytest.mark.parametrize("early", [False, True])
def test_a_root_that_dies_before_the_others_come_is_an_error_for_them(early: bool) -> None:
    with RankProcesses(2) as ranks:
        ranks.start(0, root_information)
        info = ranks.result(0)
        if early:
            ranks.kill(0)
            time.sleep(0.2)
        ranks.start(1, joined, info)
        time.sleep(0.2)
        if not early:
            ranks.kill(0)
        result, words = ranks.result(1, seconds=10)
        assert result == 9
        assert "the process of the root rank has died" in words
    assert no_shared_memory_is_left()


def test_two_ranks_on_a_device_are_refused() -> None:
    with RankProcesses(2, ASCEND_RT_VISIBLE_DEVICES="0,1") as ranks:
        for failure in ranks.attempt(all_reduced_on_device_0):
            assert isinstance(failure, Failure)
            assert "ranks 0 and 1 are both on device 0" in failure.words


def all_reduced_on_device_0() -> float:
    torch_npu.npu.set_device(0)
    return all_reduced()


def of_different_sizes() -> float:
    return all_reduced(4 + dist.get_rank())


def of_different_kinds() -> None:
    tensor = torch.ones(4, device="npu")
    if dist.get_rank() == 0:
        dist.all_reduce(tensor)
    else:
        dist.broadcast(tensor, src=0)
    torch_npu.npu.current_stream().synchronize()


@pytest.mark.parametrize(
    ("calls", "words"),
    [
        (of_different_sizes, ["HcclAllReduce of 16 bytes", "HcclAllReduce of 20 bytes"]),
        (of_different_kinds, ["HcclAllReduce of 16 bytes", "HcclBroadcast of 16 bytes"]),
    ],
)
def test_ranks_of_different_minds_are_told_so(calls: Callable[[], object], words: list[str]) -> None:
    with RankProcesses(2) as ranks:
        for failure in ranks.attempt(calls):
            assert isinstance(failure, Failure)
            assert all(word in failure.words for word in words), failure.words


def reduces_sleeping_memory(late: bool) -> float:
    """The operand goes to sleep before the collective is issued or, `late`, while it waits for rank 1."""
    from allocator import SleepPool

    torch_npu.npu.init()
    pool = SleepPool.get(f"npu:{dist.get_rank()}")
    with pool.region("weights"):
        tensor = torch.ones(MIB, device="npu")
    dist.all_reduce(tensor)
    torch_npu.npu.synchronize()
    if dist.get_rank() == 1:
        time.sleep(1)
    elif late:
        dist.all_reduce(tensor, async_op=True)
        time.sleep(0.3)
        libcall = ctypes.CDLL("libascendcl.so")
        assert libcall.aclrtUnmapMem(_address(tensor)) == 0
    else:
        pool.sleep()
        dist.all_reduce(tensor, async_op=True)
    if dist.get_rank() == 1:
        dist.all_reduce(tensor)
    torch_npu.npu.synchronize()
    return 0.0


@pytest.mark.parametrize("late", [False, True])
def test_sleeping_memory_is_an_error_that_names_collective_and_operand(late: bool) -> None:
    with RankProcesses(2) as ranks:
        for failure in ranks.attempt(reduces_sleeping_memory, late):
            assert isinstance(failure, Failure)
            assert "rank 0: HcclAllReduce: sendBuf has no memory behind it (4194304 bytes)" in failure.words
