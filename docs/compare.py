"""Put measured comparisons into the pages of this folder: ``python docs/compare.py``.

The rows are those that ``fastdit bench quality`` writes to ``benches/results/``; older ones are of an
earlier form, without a head that says which benchmark they are of.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benches" / "results"


def read(name: str) -> list[dict]:
    """Return the rows of a results file, all in the earlier, flat form."""
    rows = [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
    return [flat(row) if "benchmark" in row else earlier(row) for row in rows if "absent" not in row]


def earlier(row: dict) -> dict:
    """Say the accuracy of a row of the earlier form as one number."""
    return row | {"accuracy": mean(row["right"][part] for part in ("color", "motion", "background"))}


def flat(row: dict) -> dict:
    """Say a row of ``fastdit bench quality`` in the earlier form."""
    setting = row["setting"]
    fields, schedule = setting["fields"], setting["schedule"] or {}
    order = {"plan": "searched", "paro": "axes", "draft": "tile", "profiled": "per head"}.get(
        setting["method"], fields.get("order", "raster")
    )
    return row | {
        "setting": row["part"],
        "method": setting["method"],
        "order": order
        + (", per row" if fields.get("per_row") else "")
        + (f", {fields['parts']} means" if fields.get("per_row") and fields.get("parts", 1) > 1 else ""),
        "compensate": fields.get("compensate"),
        "asked": round(row["density"], 1) if row["asked"] is None else row["asked"],
        "refresh": schedule.get("refresh_steps"),
    }


def average(rows: list[dict]) -> dict:
    """Average rows of one setting over clips."""
    numbers = ("density", "overall_density", "psnr", "ssim", "accuracy")
    return rows[0] | {name: mean(row[name] for row in rows) for name in numbers} | {"clips": len(rows)}


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
    rows = sorted(settings(read(name)), key=lambda row: (row["method"], row["refresh"]))
    names = {1: "every step", 30: "never"}  # of 30 steps
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
