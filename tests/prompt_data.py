"""Data sets of prompts that were not read from files of records."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rlhf_npu.data.prompt_files import PromptDataset, prompt_block, write_prompts
from rlhf_npu.data.sample import PromptSample


def dataset_of(samples: Sequence[PromptSample], skipped: int = 0) -> PromptDataset:
    """A data set of `samples`; its files are gone from the disk, and stay open."""
    files = list(dict.fromkeys(sample.file for sample in samples))
    block = prompt_block(samples, [(files.index(sample.file), sample.row) for sample in samples])
    block.skipped = skipped
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder), [block])
        return PromptDataset(Path(folder), files)
