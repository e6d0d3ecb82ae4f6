"""A reward function that is a service: each response is sent to it over HTTP."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import aiohttp

from rlhf_npu.data.values import json_form
from rlhf_npu.edges import one_line
from rlhf_npu.rewards.contract import shown

BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 30.0
_WORTH_ANOTHER = {408, 425, 429}  # and 5xx: the service may be busy, or away for a moment
_OK = 200


class ServiceError(Exception):
    """The service did not answer, or not with JSON."""


class BusyError(ServiceError):
    """The service did not answer this time."""


class RemoteReward:
    """POSTs `data_source`, `solution_str`, `ground_truth` and `extra_info` as JSON; is answered as a function returns.

    What JSON lacks is sent as `data.values.json_form` has it. A request that gets no connection, no answer in time or
    one of the statuses 408, 425, 429 and 5xx is sent again after 0.5 s, 1 s, 2 s and so on, each shortened at random by
    up to a half. Redirections are not followed.

    Args:
        url: of the service.
        timeout: seconds of one request; None = no limit.
        retries: times that a request is sent again.
    """

    def __init__(self, url: str, timeout: float | None, retries: int) -> None:
        self._url = url
        self._timeout = timeout
        self._retries = retries

    @property
    def longest(self) -> float | None:
        """Seconds that a call may take, with what is waited between requests; None = no limit."""
        if self._timeout is None:
            return None
        return sum(map(_backoff, range(self._retries))) + self._timeout * (self._retries + 1) + 1.0

    async def __call__(self, **arguments: Any) -> Any:
        """The service's answer.

        Raises:
            ServiceError: there is none, it is no JSON, or its status says that the request is wrong.
        """
        body = json_form(arguments)
        for attempt in range(self._retries):
            try:
                return await self._answer(body)
            except BusyError:
                await asyncio.sleep(_backoff(attempt) * random.SystemRandom().uniform(0.5, 1.0))
        try:
            return await self._answer(body)
        except BusyError as error:
            raise ServiceError(f"{error}; it was asked {self._retries + 1} times") from error

    async def _answer(self, body: Any) -> Any:
        timeout = aiohttp.ClientTimeout(total=self._timeout)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.post(self._url, json=body, allow_redirects=False) as reply,
            ):
                status, content = reply.status, await reply.read()
        except TimeoutError as error:
            raise BusyError(f"no answer within reward.timeout={self._timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise BusyError(f"no answer: {one_line(error)}") from error
        if status in _WORTH_ANOTHER or status >= 500:
            raise BusyError(f"status {status}: {shown(content)}")
        if status != _OK:
            raise ServiceError(f"status {status}: {shown(content)}")
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ServiceError(f"the answer {shown(content)} is no JSON") from error


def _backoff(attempt: int) -> float:
    """Seconds that are waited after a number of requests, at most."""
    return float(min(BACKOFF_SECONDS * 2 ** min(attempt, 10), LONGEST_BACKOFF_SECONDS))
