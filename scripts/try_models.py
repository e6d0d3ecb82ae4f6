"""Tries tiny models of each family, and prints the table of docs/models.md; `--help` says how.

The same as `python -m rlhf_npu.preflight.models`, which needs no checkout.
"""

from __future__ import annotations

import sys

from rlhf_npu.preflight.models import main

if __name__ == "__main__":
    sys.exit(main())
