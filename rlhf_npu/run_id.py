"""The name of a run, after which its shared memory is named; processes of the run find it in their environment."""

from __future__ import annotations

import uuid

RUN_ID_VARIABLE = "RLHF_NPU_RUN_ID"
PREFIX = "rlhf_npu_"


def new_run_id() -> str:
    """A name for a run that no other has."""
    return f"{PREFIX}{uuid.uuid4().hex[:12]}"
