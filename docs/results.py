"""Results table and picture of the README: ``python docs/results.py REPORT.json [MORE.json ...]``.

Reports come from ``fastdit generate PROMPT --compare --report REPORT.json``; ``make results`` stores that of
``make demo`` in ``benches/results/demo.json``. The table shows the first report; further reports add the speed-ups of
more runs. The picture is redrawn if the videos of the first report still exist.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import imageio.v3 as iio

from fastdit.bench.measuring.clips import strip

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
STRIP = ROOT / "docs" / "images" / "strip.png"
START, END = "<!-- results:start -->", "<!-- results:end -->"


def draw(clip: dict) -> None:
    """Draw frames of the dense clip above the same frames of the sparse one, if their files exist."""
    files = [Path(clip[name]) for name in ("dense_file", "file")]
    if all(file.exists() for file in files):
        dense, sparse = (iio.imread(file) / 255 for file in files)
        STRIP.parent.mkdir(exist_ok=True)
        iio.imwrite(STRIP, strip(dense, sparse, height=dense.shape[1]))


def table(report: dict, clip: dict) -> str:
    """Return a report as Markdown."""
    fields = ", ".join(f"`{name}={value}`" for name, value in report["method_fields"].items())
    if report["method"] == "plan":
        fields = "a searched plan, which `summary()` describes"
    sparse, steps = len(report["sparse_steps"]), report["steps"]
    grid = f"{report['frames']} frames of {report['width']} x {report['height']}"
    rows = [
        ("density (fraction of attention computed)", f"{report['density']:.3f}", f"{report['overall_density']:.3f}"),
        ("attention, dense over sparse time", "", f"{report['speedup_attention']:.2f}x"),
        ("time, dense over sparse", f"{report['speedup_sparse_steps']:.2f}x", f"{report['speedup']:.2f}x"),
        ("PSNR to the dense video", "", f"{report['psnr']:.1f} dB"),
        ("SSIM to the dense video", "", f"{report['ssim']:.3f}"),
    ]
    lines = [
        f"| method `{report['method']}` | {sparse} sparse steps | whole run, {steps} steps and decoding |",
        "|---|---|---|",
        *(f"| {name} | {a} | {b} |" for name, a, b in rows),
        "",
        f'Measured in one run of `make demo` on {report["device"]}: the demo model, {grid}, "{clip["prompt"]}", '
        f"seed {report['seed']}; {fields}. Above: dense; below: sparse.",
    ]
    return "\n".join(lines)


def sources(paths: Sequence[Path], reports: Sequence[dict]) -> str:
    """Return the speed-ups of several runs, and links to the reports that are in the checkout."""
    kept = [path.resolve().relative_to(ROOT) for path in paths if path.resolve().is_relative_to(ROOT / "benches")]
    links = ", ".join(f"[{path.name}]({path.as_posix()})" for path in kept)
    runs = ", ".join(f"{report['speedup']:.2f}x" for report in reports)
    said = [f"The whole run in each of {len(reports)} runs: {runs}."] if len(reports) > 1 else []
    return " ".join([*said, *([f"All numbers: {links}."] if links else [])])


def main(*names: str) -> None:
    """Write the table and the picture.

    Args:
        names: Report files.
    """
    paths = [Path(name) for name in names]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    clip = reports[0]["clips"][0]
    draw(clip)
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    shown = f"{table(reports[0], clip)} {sources(paths, reports)}".rstrip()
    README.write_text(f"{before}{START}\n{shown}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
