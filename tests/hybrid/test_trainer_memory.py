"""What DeepSpeed's states are predicted to take is what `tests/engines/test_trainer_states.py` sees them take."""

from __future__ import annotations

import pytest

from rlhf_npu.hybrid.memory.trainer_memory import trainer_bytes
from tests.engines.test_trainer_states import BYTES, WORLD

ELEMENTS = 1_000_000
SUPPORTED = [case for case in BYTES if case != (0, "bfloat16")]


@pytest.mark.parametrize(("stage", "dtype"), SUPPORTED)
def test_tags_are_as_large_as_they_were_seen(stage: int, dtype: str) -> None:
    item = {"float32": 4, "bfloat16": 2}[dtype]
    predicted = trainer_bytes(ELEMENTS, zero_stage=stage, item_bytes=item, world=WORLD, fused=False)
    seen = {part: int(size * ELEMENTS) for part, size in BYTES[stage, dtype].items()}
    assert {"params": predicted.params, "optimizer": predicted.optimizer} | (
        {"grads": predicted.grads} if predicted.grads else {}
    ) == seen
