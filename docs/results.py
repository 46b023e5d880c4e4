"""Put a measured comparison into the README: ``python docs/results.py REPORT.json``.

The report is what ``fastdit generate PROMPT --compare --report REPORT.json`` writes; its videos must still be there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np

ROOT = Path(__file__).parent.parent
STRIP = ROOT / "docs" / "images" / "strip.png"
START, END = "<!-- results:start -->", "<!-- results:end -->"
COLUMNS = 6


def strip(clip: dict) -> np.ndarray:
    """Show frames of the dense clip above the same frames of the sparse one: ``(H, W, 3)`` uint8."""
    rows = []
    for name in ("dense_file", "file"):
        frames = iio.imread(clip[name])
        chosen = frames[np.linspace(0, len(frames) - 1, COLUMNS).round().astype(int)]
        rows.append(np.concatenate([np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=255) for f in chosen], 1))
    return np.concatenate(rows, 0)


def table(report: dict, clip: dict) -> str:
    """Return the Markdown of what was measured."""
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


def main(path: str) -> None:
    """Write the strip and the table.

    Args:
        path: The report.
    """
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    clip = report["clips"][0]
    STRIP.parent.mkdir(exist_ok=True)
    iio.imwrite(STRIP, strip(clip))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n{table(report, clip)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
