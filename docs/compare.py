"""Put measured comparisons into the pages of this folder: ``python docs/compare.py``.

The rows are those that ``python -m benches.quality`` writes to ``benches/results/``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benches" / "results"


def read(name: str) -> list[dict]:
    """Return the rows of a results file."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def average(rows: list[dict]) -> dict:
    """Average rows of one setting over clips."""
    numbers = ("density", "overall_density", "psnr", "ssim")
    out = rows[0] | {name: mean(row[name] for row in rows) for name in numbers}
    rights = [row["right"][part] for row in rows for part in ("color", "motion", "background")]
    return out | {"accuracy": mean(rights), "clips": len(rows)}


def settings(rows: list[dict]) -> list[dict]:
    """Return one averaged row for each setting, in the order in which they came."""
    found = defaultdict(list)
    for row in rows:
        found[row["setting"]].append(row)
    return [average(group) for group in found.values()]


def methods_table(name: str) -> str:
    """Return a comparison at equal density."""
    rows = settings(read(name))
    names = ("asked", "method", "order", "compensate", "density", "over all steps", "PSNR", "SSIM", "prompt", "clips")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in sorted(rows, key=lambda row: (row["asked"], -row["psnr"])):
        how = f"`{row['method']}` | {row['order']} | {row['compensate'] or '-'}"
        quality = f"{row['psnr']:.1f} | {row['ssim']:.3f} | {row['accuracy']:.2f}"
        density = f"{row['density']:.3f} | {row['overall_density']:.3f}"
        lines.append(f"| {row['asked']} | {how} | {density} | {quality} | {row['clips']} |")
    return "\n".join(lines)


def reuse_table(name: str) -> str:
    """Return what reusing masks costs."""
    rows = settings(read(name))
    names = {1: "every step", 30: "never"}
    lines = ["| method | masks rebuilt | density | PSNR | SSIM | clips |", "|" + "---|" * 6]
    for row in rows:
        when = names.get(row["refresh"], f"every {row['refresh']} steps")
        lines.append(
            f"| `{row['method']}` | {when} | {row['density']:.3f} | {row['psnr']:.1f} | {row['ssim']:.3f} "
            f"| {row['clips']} |"
        )
    return "\n".join(lines)


def fill(text: str, name: str, table: str) -> str:
    """Put a table between its marks."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


def main() -> None:
    """Fill the tables of which there are results."""
    for page, name, table in (
        ("methods.md", "methods", methods_table),
        ("methods.md", "reuse", reuse_table),
        ("search.md", "search", methods_table),
    ):
        if (RESULTS / f"demo-{name}.jsonl").exists():
            path = ROOT / "docs" / page
            text = fill(path.read_text(encoding="utf-8"), name, table(f"demo-{name}.jsonl"))
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
