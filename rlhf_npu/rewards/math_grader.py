"""A child process that compares answers with math-verify: a JSON object a line in, one a line out.

First it writes an empty object: it is ready. In: `ground_truth` and, unless only that is to be parsed, `response`.
Out: `right`, or `error` where the ground truth cannot be parsed.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
from collections.abc import Iterator
from typing import Any

from math_verify import parse, verify

SECONDS = 5
MEMORY_BYTES = 4 << 30
_DOLLAR_PAIR = re.compile(r"(?<!\\)\$.+?(?<!\\)\$", re.DOTALL)
_CURRENCY = re.compile(r"\\\$|[€£¥]|\\(?:pounds|euro)\b")
_SPACE = r"(?:\s|\\[ ,;:!])*"
_PERCENT = re.compile(rf"{_SPACE}\\?%")
_NUMBER_PERCENT = re.compile(rf"(-?(?:\d[\d,]*)?\.?\d+){_SPACE}\\?%")


def reply(ground_truth: str, response: str | None) -> dict[str, object]:
    """The answer to one line."""
    expected = [meaning for text in meanings(without_currency(ground_truth)) if (meaning := _parse(as_latex(text)))]
    if not expected:
        return {"error": f"the ground truth {ground_truth!r} is no mathematical expression"}
    if response is None:
        return {"right": True}
    given = (_parse(text) for text in meanings(_CURRENCY.sub("", response)))
    return {"right": any(verify(want, got, timeout_seconds=SECONDS) for got in given for want in expected)}


def meanings(text: str) -> Iterator[str]:
    """The text itself and, where it has percents, without their signs and as fractions: 50% is 50, and a half."""
    yield text
    if "%" in text:
        yield _PERCENT.sub("", text)
        yield _NUMBER_PERCENT.sub(r"\1/100", text)


def without_currency(text: str) -> str:
    r"""A ground truth without `\$` and the like; a dollar sign that opens no LaTeX is one of them."""
    text = _CURRENCY.sub("", text)
    return text if _DOLLAR_PAIR.search(text) else text.replace("$", "")


def as_latex(ground_truth: str) -> str:
    """The ground truth where math-verify looks for an answer first; left alone if it is marked already."""
    marked = "$" in ground_truth or "\\boxed" in ground_truth
    return ground_truth if marked else f"\\boxed{{{ground_truth}}}"


def _parse(text: str) -> Any:
    return parse(text, parsing_timeout=SECONDS)


def main() -> None:
    """Answer line by line until stdin closes."""
    logging.disable(logging.ERROR)  # math-verify reports each time limit, which is no fault here
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("{}", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(reply(question["ground_truth"], question.get("response"))), flush=True)


if __name__ == "__main__":
    main()
