"""Checks a machine before sleep mode is relied on; run it first on a new one.

    python scripts/preflight.py --device npu:0 --size 4GiB

The same as `python -m rlhf_npu.preflight`, which needs no checkout.
"""

from __future__ import annotations

import sys

from rlhf_npu.preflight.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
