"""A child process that compares answers with math-verify: a JSON object a line in, one a line out.

First it writes an empty object: it is ready. In: `ground_truth` and `response`. Out: `right`, or `error`
where the ground truth cannot be parsed.
"""

from __future__ import annotations

import json
import logging
import resource
import sys

from math_verify import parse, verify

SECONDS = 5
MEMORY_BYTES = 4 << 30


def reply(ground_truth: str, response: str) -> dict[str, object]:
    """The answer to one line."""
    expected = parse(as_latex(ground_truth), parsing_timeout=SECONDS)
    if not expected:
        return {"error": f"the ground truth {ground_truth!r} is no mathematical expression"}
    given = parse(response, parsing_timeout=SECONDS)
    return {"right": verify(expected, given, timeout_seconds=SECONDS)}


def as_latex(ground_truth: str) -> str:
    """The ground truth where math-verify looks for an answer first; left alone if it is marked already."""
    marked = "$" in ground_truth or "\\boxed" in ground_truth
    return ground_truth if marked else f"\\boxed{{{ground_truth}}}"


def main() -> None:
    """Answer line by line until stdin closes."""
    logging.disable(logging.ERROR)  # math-verify reports each time limit, which is no fault here
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("{}", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(reply(question["ground_truth"], question["response"])), flush=True)


if __name__ == "__main__":
    main()
