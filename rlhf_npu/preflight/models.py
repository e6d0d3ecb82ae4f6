"""Tries tiny random models of each family and writes the table of docs/models.md.

    python scripts/try_models.py                     all families: about half an hour on two cores
    python scripts/try_models.py Mixtral "Gemma 2"   some of them

Each is tried twice: on one device with ZeRO-1, and on two with ZeRO-3 and a rollout engine of tensor parallel size 2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_npu.config import ModelConfig
from rlhf_npu.platform import detect_platform
from rlhf_npu.preflight.model_trial import Outcome, Trial, try_model
from rlhf_npu.preflight.tiny_models import FAMILIES, Family

COLUMNS = ("loaded", "level 1", "level 2", "saved")
HEADER = (
    "| family | precision | as loaded | new weights, level 1 | new weights, level 2 | saved, loaded again "
    "| ZeRO-3 and TP 2: the same four |\n| --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True)
class Row:
    """What became of one family: the outcomes on one device, and on two."""

    family: Family
    alone: list[Outcome]
    together: list[Outcome]

    @property
    def right(self) -> bool:
        """Whether each part of both trials was right."""
        outcomes = [*self.alone, *self.together]
        return len(outcomes) == 2 * len(COLUMNS) and all(outcome.right for outcome in outcomes)

    def __str__(self) -> str:
        cells = [_cell(self.alone, part) for part in COLUMNS]
        return "| " + " | ".join([self.family.name, self.family.dtype, *cells, _all_cells(self.together)]) + " |"

    def refusals(self) -> list[str]:
        """What was said of what is not right."""
        return [
            f"{self.family.name}, {where}, {outcome.part}: {outcome.words}"
            for where, outcomes in (("one device", self.alone), ("two devices", self.together))
            for outcome in outcomes
            if not outcome.right
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the families that the command line names; 0 when all of them are right."""
    parser = argparse.ArgumentParser(
        prog="try_models", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"some of: {', '.join(FAMILIES)}")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.families if name not in FAMILIES]:
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    device = detect_platform().name
    print(HEADER, flush=True)
    rows = [_try(FAMILIES[name], device) for name in options.families or FAMILIES]
    for row in rows:
        for refusal in row.refusals():
            print(f"\n{refusal}")
    return int(not all(row.right for row in rows))


def _try(family: Family, device: str) -> Row:
    with tempfile.TemporaryDirectory(prefix="rlhf_npu_model_") as folder:
        model = ModelConfig(path=str(family.save(Path(folder) / "model")), dtype=family.dtype)
        alone = list(try_model(Trial(model, device, zero_stage=1, save=True)))
        together = list(try_model(Trial(model, device, ranks=2, zero_stage=3, save=True)))
    row = Row(family, alone, together)
    print(row, flush=True)
    return row


def _cell(outcomes: list[Outcome], part: str) -> str:
    for outcome in outcomes:
        if outcome.part == part and outcome.right:
            return f"{outcome.mean:.0e} of {outcome.explained:.0e}" if outcome.explained else "yes"
    return "refused" if outcomes and not outcomes[-1].right else ""


def _all_cells(outcomes: list[Outcome]) -> str:
    parts = [outcome.part for outcome in outcomes if outcome.right]
    return "yes" if parts == list(COLUMNS) else f"refused after {', '.join(parts) or 'nothing'}"


if __name__ == "__main__":
    sys.exit(main())
