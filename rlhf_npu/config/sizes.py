"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from rlhf_npu.errors import ConfigError

UNITS = {
    "": 1,
    "b": 1,
    "mb": 10**6,
    "mib": 1 << 20,
    "gb": 10**9,
    "gib": 1 << 30,
    "tb": 10**12,
    "tib": 1 << 40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def read_size(text: str, name: str) -> int:
    """Bytes of "64GiB", "80GB" or "85899345920".

    Args:
        name: of what was set to it, for the message.

    Raises:
        ConfigError: it is no amount of memory.
    """
    match = _SIZE.fullmatch(text.strip())
    unit = UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or not (size := int(float(match[1]) * unit)):
        raise ConfigError(f"{name} {text}: must be an amount of memory, for example 64GiB, 80GB or a number of bytes")
    return size
