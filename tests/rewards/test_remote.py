"""A service as a reward function: a real HTTP server on the loopback interface."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf_npu.config import RewardConfig
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards import Response, RewardFunction, load_reward
from rlhf_npu.rewards.trial import try_reward
from tests.rewards.samples import sample

Answer = tuple[int, bytes]


class Service:
    """Answers with what `answer` makes of a request and of how many came before it; counts them."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.url = ""

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            before = len(self.requests)
            self.requests.append(body)
            self.running += 1
            self.most = max(self.most, self.running)
        status, content = self.answer(body, before)
        with self.lock:
            self.running -= 1
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content)))
        if status == 302:
            handler.send_header("Location", "/elsewhere")
        handler.end_headers()
        handler.wfile.write(content)


@contextmanager
def service(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Service]:
    asked = Service(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with suppress(OSError):  # the client did not wait
                asked.serve(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    asked.url = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def load(url: str, **keys: Any) -> RewardFunction:
    return load_reward(RewardConfig(url, **keys))


def responses(*texts: str) -> list[Response]:
    return [Response(text, True, sample("5", "sums", {"level": 3}, index)) for index, text in enumerate(texts)]


def graded_by_length(body: dict[str, Any], before: int) -> Answer:
    return 200, json.dumps({"score": len(body["solution_str"]), "acc": True}).encode()


def test_it_gets_the_four_arguments_and_those_of_the_configuration() -> None:
    with service(graded_by_length) as asked:
        record = sample(Decimal("0.50"), "sums", {"raw": b"x"})
        graded = load(asked.url, kwargs={"scale": 2}).grade("大\ud800", True, record)
    assert (graded.score, graded.extra_info) == (2.0, {"acc": True})
    (body,) = asked.requests
    assert body == {
        "data_source": "sums",
        "solution_str": "大\ud800",
        "ground_truth": "0.50",
        "extra_info": {"raw": "x"},
        "scale": 2,
    }


def test_an_argument_that_the_run_passes_itself() -> None:
    with pytest.raises(RewardError, match=r"reward\.kwargs\.ground_truth: the run passes 'ground_truth' itself"):
        load("http://127.0.0.1:1/score", kwargs={"ground_truth": 2})


def test_requests_are_sent_at_the_same_time_and_as_many_as_may() -> None:
    def slow(body: dict[str, Any], before: int) -> Answer:
        time.sleep(0.2)
        return graded_by_length(body, before)

    with service(slow) as asked:
        graded = load(asked.url, concurrency=4).grade_all(responses(*(["x" * length for length in range(12)])))
    assert [one.score for one in graded] == list(range(12))
    assert 2 <= asked.most <= 4


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_service_that_is_busy_is_asked_again(status: int) -> None:
    def busy_once(body: dict[str, Any], before: int) -> Answer:
        return graded_by_length(body, before) if before else (status, b"later")

    with service(busy_once) as asked:
        assert load(asked.url)("xyz", True, sample("5")) == 3.0
    assert len(asked.requests) == 2


@pytest.mark.parametrize(
    ("status", "content", "message", "requests"),
    [
        (503, b"away", "raised ServiceError: status 503: b'away'; it was asked 2 times", 2),
        (422, b"no such field", "raised ServiceError: status 422: b'no such field'", 1),
        (302, b"", "raised ServiceError: status 302", 1),
        (200, b"<html>", "raised ServiceError: the answer b'<html>' is no JSON", 1),
        (200, b"\xff\xfe\xff", "is no JSON", 1),
        (200, b"", "is no JSON", 1),
        (200, b"[" * 100000, "is no JSON", 1),
        (200, b'"1.0"', "returned '1.0'; it must return a finite number", 1),
        (200, b"NaN", "returned nan; it must return a finite number", 1),
        (200, b'{"reward": 1}', "or a dict with a 'score'", 1),
    ],
)
def test_an_answer_that_is_no_reward(status: int, content: bytes, message: str, requests: int) -> None:
    with service(lambda *_: (status, content)) as asked, pytest.raises(RewardError) as caught:
        load(asked.url, retries=1)("xyz", True, sample("5"))
    assert message in str(caught.value)
    assert str(caught.value).startswith(
        f"reward.function={asked.url}: on prompt 0 of data source 'test', response 'xyz'"
    )
    assert len(asked.requests) == requests


def test_one_slow_answer_costs_one_response() -> None:
    def sometimes_slow(body: dict[str, Any], before: int) -> Answer:
        if body["solution_str"] == "b":
            time.sleep(1.5)
        return graded_by_length(body, before)

    with service(sometimes_slow) as asked:
        reward = load(asked.url, timeout=0.5, retries=1, failed_score=-1.0)
        graded = reward.grade_all(responses("a", "b", "ccc"), may_fail=1)
    assert [one.score for one in graded] == [1, -1, 3]
    assert "no answer within reward.timeout=0.5 s; it was asked 2 times" in str(graded[1].failure)


def test_a_service_that_drips_its_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    time.sleep(0.05)
                    try:
                        connection.sendall(b"1")
                    except OSError:
                        return

        thread = threading.Thread(target=drip)
        thread.start()
        reward = load(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.5, retries=0)
        with pytest.raises(RewardError, match=r"no answer within reward\.timeout=0\.5 s"):
            reward("x", True, sample("5"))
        thread.join()


def test_a_service_that_is_not_there_stops_a_run_before_it_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = RewardConfig(f"http://127.0.0.1:{port}/score", retries=1)
    with pytest.raises(RewardError, match=r"no answer: ClientConnectorError.*it was asked 2 times"):
        try_reward(config, [sample("5")], 60)


def test_a_service_is_tried_before_a_run() -> None:
    with service(graded_by_length) as asked:
        trial = try_reward(RewardConfig(asked.url), [sample("5", "sums"), sample("66", "others")], 60)
    assert (trial.answered, trial.warning) == (4, "")
    assert sorted(body["solution_str"] for body in asked.requests) == ["", "", "5", "66"]
