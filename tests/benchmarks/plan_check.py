"""What `prefix-ds plan` says beside what happens: memory of a rank at the peak of a step, and bytes gathered.

    python -m tests.benchmarks.plan_check [PART OF A NAME]

Bases of 100 to 300 MiB, random, in real processes on CPUs. A row is a run; memory is what the kernel counts
above what the process had before, after a base in one piece has run the same step in it.
"""

import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.planned import CASES, made_base, measured, planned
from tests.resident import MIB


def main():
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    cases = [case for case in CASES if part in case.name]
    table = Table(
        "run",
        "MiB planned",
        "measured",
        "ratio",
        "MiB gathered, planned",
        "measured",
        "ratio",
        "kept by oneDNN",
        "terms",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in dict.fromkeys(case.family for case in cases):
            made_base(folder, family)
        for case in cases:
            (terms, gathers), (peak, found, kept) = planned(case, folder), measured(case, folder)
            total = sum(terms.values())
            row = [
                total / MIB,
                peak / MIB,
                total / peak,
                gathers / MIB,
                found / MIB,
                gathers / found if found else 1,
                kept / MIB,
            ]
            told = ", ".join(f"{name} {size / MIB:.0f}" for name, size in terms.items())
            print(case.name, " ".join(f"{number:.3f}" for number in row), told, flush=True)
            table.add_row(case.name, *(f"{number:.2f}" for number in row), told)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
