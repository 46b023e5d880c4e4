"""Results tables of docs/benchmarks.md: ``python docs/benchmarks.py RESULTS...``.

The results come from ``fastdit bench all --quick -o benches/results/quick.jsonl``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from compare import fill

from fastdit.bench.report.page import markdown
from fastdit.bench.report.result_store import read_rows

PAGE = Path(__file__).parent / "benchmarks.md"


def main(paths: list[str]) -> None:
    """Write the tables into the page.

    Args:
        paths: Results files.
    """
    rows = [row for path in paths for row in read_rows(Path(path))]
    text = fill(PAGE.read_text(encoding="utf-8"), "results", markdown(rows).strip())
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
