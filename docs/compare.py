"""Comparison tables of the pages in this folder: ``python docs/compare.py``.

The rows come from ``fastdit bench quality`` and are in ``benches/results/``. Older rows have an earlier form, which
does not name the benchmark.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

from fastdit.attention import get_method
from fastdit.metrics import mean_psnr
from fastdit.search.candidates import read_call

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benches" / "results"
SAME = 0.01
"""Largest difference between densities that count as equal."""


def read(name: str) -> list[dict]:
    """Return the rows of a results file in one flat form."""
    rows = [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
    return [flat(row) if "benchmark" in row else earlier(row) for row in rows if "absent" not in row]


def earlier(row: dict) -> dict:
    """Convert a row of the earlier form to the flat one."""
    method, fields = read_call(row["setting"].partition("@")[0])
    return row | {
        "order": order_of(method, get_method(method, **fields).describe()),
        "accuracy": mean(row["right"][part] for part in ("color", "motion", "background")),
    }


def flat(row: dict) -> dict:
    """Convert a row of ``fastdit bench quality`` to the flat form."""
    setting = row["setting"]
    fields, schedule = setting["fields"], setting["schedule"] or {}
    return row | {
        "setting": row["part"],
        "method": setting["method"],
        "order": order_of(setting["method"], fields),
        "compensate": fields.get("compensate"),
        "asked": round(row["density"], 1) if row["asked"] is None else row["asked"],
        "refresh": schedule.get("refresh_steps"),
    }


def order_of(method: str, fields: dict) -> str:
    """Describe which tokens share a block, and how blocks are chosen if the method has several ways."""
    fixed = {"plan": "searched", "paro": "axes", "profiled": "per head"}
    order = fixed.get(method) or ("tile" if method == "draft" else fields.get("order", "raster"))
    words = [f"tile {'x'.join(map(str, fields['tile']))}" if order == "tile" else order]
    if fields.get("per_row"):
        words.append("per row")
        words += [f"{fields['parts']} means"] if fields["parts"] > 1 else []
    return ", ".join(words)


def average(rows: list[dict]) -> dict:
    """Average the rows of one setting over clips; PSNR is that of the mean squared error."""
    numbers = ("density", "overall_density", "ssim", "accuracy")
    found = {name: mean(row[name] for row in rows) for name in numbers}
    psnr = mean_psnr(float(row["psnr"]) for row in rows)
    return rows[0] | found | {"psnr": psnr, "clips": len(rows), "each": {row["prompt"]: row["psnr"] for row in rows}}


def settings(rows: list[dict]) -> list[dict]:
    """Return one averaged row per setting, in order of first appearance."""
    found = defaultdict(list)
    for row in rows:
        found[row["setting"]].append(row)
    return [average(group) for group in found.values()]


def methods_table(name: str) -> str:
    """Return the comparison of methods at equal density."""
    rows = settings(read(name))
    names = ("asked", "method", "order", "compensate", "density", "over all steps", "PSNR", "SSIM", "prompt", "clips")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in sorted(rows, key=lambda row: (row["asked"], -row["psnr"])):
        how = f"`{row['method']}` | {row['order']} | {row['compensate'] or '-'}"
        quality = f"{row['psnr']:.1f} | {row['ssim']:.3f} | {row['accuracy']:.2f}"
        density = f"{row['density']:.3f} | {row['overall_density']:.3f}"
        lines.append(f"| {row['asked']} | {how} | {density} | {quality} | {row['clips']} |")
    return "\n".join(lines)


def margins_table(name: str) -> str:
    """Return the gain of each plan over the best single setting that computes no more."""
    rows = settings(read(name))
    lines = [
        "| density | plan | best single setting | plan nearer by | clip by clip | mean of the clips |",
        "|" + "---|" * 6,
    ]
    for plan in sorted((row for row in rows if row["method"] == "plan"), key=lambda row: row["asked"]):
        no_more = [row for row in rows if row["method"] != "plan" and row["density"] <= plan["density"] + SAME]
        others = [row for row in no_more if row["each"].keys() == plan["each"].keys()]
        best = max(others, key=lambda row: row["psnr"])
        each = [value - best["each"][prompt] for prompt, value in plan["each"].items()]
        how = f"{best['psnr']:.1f} dB, `{best['method']}`, {best['order']} (density {best['density']:.3f})"
        clips = ", ".join(f"{gain:+.1f}" for gain in each)
        gain = f"{plan['psnr'] - best['psnr']:.1f} dB | {clips} dB | {mean(each):+.1f} dB"
        lines.append(f"| {plan['density']:.3f} | {plan['psnr']:.1f} dB | {how} | {gain} |")
    return "\n".join(lines)


def costs(name: str) -> str:
    """Return the time of a search, and the expected and measured speed-up of its plan."""
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    files = sorted(RESULTS.glob(f"{Path(name).stem}-run-*.json"))
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    minutes, seconds = divmod(round(found["search_seconds"]), 60)
    plan = f"the plan of density {found['density']:.3f}"
    text = f"The search for {plan} took {minutes} min {seconds} s on {found['device']}."
    if runs:
        times = " and ".join(f"{run['speedup_attention']:.2f}" for run in runs)
        text += (
            f"\nIt expects attention to be {found['speedup_attention']:.2f} times as fast as dense; measured: {times}."
        )
    links = ", ".join(f"[{file}](../benches/results/{file})" for file in (name, *(file.name for file in files)))
    return f"{text}\nAll numbers: {links}."


def reuse_table(name: str) -> str:
    """Return the cost of reusing masks."""
    rows = sorted(settings(read(name)), key=lambda row: (row["method"], row["refresh"]))
    names = {1: "every step", 30: "never"}  # of 30 steps
    lines = ["| method | order | masks rebuilt | density | PSNR | SSIM | clips |", "|" + "---|" * 7]
    for row in rows:
        when = names.get(row["refresh"], f"every {row['refresh']} steps")
        quality = f"{row['density']:.3f} | {row['psnr']:.1f} | {row['ssim']:.3f}"
        lines.append(f"| `{row['method']}` | {row['order']} | {when} | {quality} | {row['clips']} |")
    return "\n".join(lines)


def fill(text: str, name: str, table: str) -> str:
    """Return the text with a table between its marks."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


TABLES = (
    ("methods.md", "methods", "demo-methods.jsonl", methods_table),
    ("methods.md", "reuse", "demo-reuse.jsonl", reuse_table),
    ("search.md", "search", "demo-search.jsonl", methods_table),
    ("search.md", "margins", "demo-search.jsonl", margins_table),
    ("search.md", "costs", "search.json", costs),
)
"""Page, mark, results file and table function."""


def main() -> None:
    """Write all tables whose results exist."""
    for page, mark, name, table in TABLES:
        if (RESULTS / name).exists():
            path = ROOT / "docs" / page
            path.write_text(fill(path.read_text(encoding="utf-8"), mark, table(name)), encoding="utf-8")


if __name__ == "__main__":
    main()
