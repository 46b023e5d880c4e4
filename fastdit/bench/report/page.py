"""Reports of results as a self-contained HTML page or Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..inputs.settings import DEFAULT
from .columns import COLUMNS, TITLES, mean_rows
from .pictures import kernel_pictures, method_pictures, quality_pictures, time_pictures
from .ranking import ranked, winners
from .result_store import Row, absent, latest

PICTURES = {"kernels": kernel_pictures, "methods": method_pictures, "quality": quality_pictures}
CLIPS = 12
"""Pictures of videos in a report, at most."""

NOTES = {
    "kernels": (
        "Median times over the same blocks, one contender after the other in turn, each checked against fp64 first. "
        "x dense: over the fastest dense one of the same run; of ideal: of what the density alone would give."
    ),
    "methods": (
        "Error of the output against dense attention on the same queries, keys and values, mean over heads. Densities "
        "are those that were computed; a method that cannot come near the one asked for shows at its own. "
        "choice / call: choosing blocks anew, over a call that has them; first / call: the first call of a video."
    ),
    "quality": (
        "Each video beside the dense one of the same prompt and seed. density: of the sparse calls; all steps: with "
        "the dense first steps. flicker / dense: change from frame to frame over that of the dense videos. default: as "
        "it is without a density; default@...: at that one."
    ),
    "e2e": (
        "Dense and sparse in turn, medians. first: the first video of each, with what is built or compiled once; dense "
        "comes first, and pays for what all need. peak: of tensors on a GPU, else of the whole process. Amdahl says: "
        "what the share of attention and its own speed-up predict. Of random weights one step of each kind is run, and "
        "the times of a video are added up; there is no quality."
    ),
}


def tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the tables of a report: ``benchmark``, ``title``, ``note``, ``winners``, ``groups`` of rows.

    Args:
        rows: The rows.
    """
    parts = []
    for benchmark, columns in COLUMNS.items():
        each = [row for row in latest(rows) if row["benchmark"] == benchmark and "absent" not in row]
        mine = mean_rows(each)
        if not mine:
            continue
        used = [column for column in columns if any(row.get(column.name) is not None for row in mine)]
        by_job: dict[str, list[Row]] = {}
        for row in mine:
            by_job.setdefault(row["model"] if benchmark == "quality" else row["job"], []).append(row)
        groups = [
            {
                "name": job,
                "head": ["", *(column.title for column in used)],
                "body": [[row["part"], *(column.write(row) for column in used)] for row in ranked(group)],
                "ours": [row["part"] for row in group if row.get("setting", {}).get("name") == DEFAULT],
            }
            for job, group in by_job.items()
        ]
        parts.append(
            {
                "benchmark": benchmark,
                "title": TITLES[benchmark],
                "note": NOTES[benchmark],
                "winners": winners(each),
                "groups": groups,
                "rows": mine,
            }
        )
    return parts


def html(rows: Sequence[Row], folder: Path | None = None) -> str:
    """Write a page.

    Args:
        rows: The rows.
        folder: Where relative paths of pictures begin; ``None`` for the working directory.
    """
    from jinja2 import Environment

    parts = tables(rows)
    by_name = {part["benchmark"]: part["rows"] for part in parts}
    for part in parts:
        draw = PICTURES.get(part["benchmark"])
        part["pictures"] = [] if draw is None else draw(part["rows"])
        if part["benchmark"] == "e2e":
            part["pictures"] = time_pictures(part["rows"], by_name.get("quality", []))
    source = files("fastdit.bench.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    return template.render(parts=parts, runs=runs(rows), clips=_clips(rows, folder), absent=absent(rows))


def markdown(rows: Sequence[Row]) -> str:
    """Write the tables as Markdown.

    Args:
        rows: The rows.
    """
    places = (
        f"Measured on {run['device']}{_threads(run)}, torch {run['versions'].get('torch')}." for run in runs(rows)
    )
    lines = list(dict.fromkeys(places))
    for part in tables(rows):
        lines += ["", f"### {part['title']}", "", part["note"]]
        lines += ["", *(f"- {sentence}" for sentence in part["winners"])] if part["winners"] else []
        for group in part["groups"]:
            head = group["head"]
            lines += [
                "",
                f"**{group['name']}**",
                "",
                f"| {' | '.join(head)} |",
                "|---" + "|---:" * (len(head) - 1) + "|",
            ]
            lines += [f"| {_marked(row[0], group['ours'])} | {' | '.join(row[1:])} |" for row in group["body"]]
    if absent(rows):
        lines += ["", "### Not measured here", "", *(f"- `{name}`: {reason}" for name, reason in absent(rows))]
    return "\n".join(lines).strip() + "\n"


def runs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what the rows say of the runs they come from, each device, commit and set of versions once.

    Args:
        rows: The rows.
    """
    distinct: dict[str, dict[str, Any]] = {}
    for row in rows:
        about = {name: row["run"].get(name) for name in ("device", "threads", "commit", "python", "versions", "seed")}
        distinct.setdefault(repr(about), {**about, "time": row["run"].get("time")})
    return list(distinct.values())


def _marked(part: str, ours: Sequence[str]) -> str:
    return f"**`{part}`**" if part in ours else f"`{part}`"


def _threads(run: dict[str, Any]) -> str:
    return f" ({run['threads']} threads)" if run.get("threads") else ""


def _clips(rows: Sequence[Row], folder: Path | None) -> list[dict[str, str]]:
    clips = []
    for row in latest(rows):
        if row["benchmark"] != "quality" or "strip" not in row or len(clips) == CLIPS:
            continue
        path = (folder or Path()) / row["strip"]
        if path.is_file():
            data = base64.b64encode(path.read_bytes()).decode()
            clips.append({"prompt": row["prompt"], "part": row["part"], "psnr": _decibels(row), "data": data})
    return clips


def _decibels(row: Row) -> str:
    return "identical" if row["psnr"] == "inf" else f"{row['psnr']:.1f} dB"
