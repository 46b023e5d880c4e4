"""Quality at equal density: clips of the demo, sparse beside dense of the same seed.

``python -m benches.quality methods -o FILE.jsonl``; under ``torchrun`` settings are divided among processes. Rows that
the file has already are not made again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress

import fastdit
from fastdit.demo import load_pipeline
from fastdit.demo.captions import parse_caption
from fastdit.demo.scorer import read_clip
from fastdit.metrics import psnr, ssim

from .clips import make_clip
from .plans import calibrated
from .settings import SUITES, Setting

PROMPTS = (
    "a green square moving up on a blue background",
    "a red circle moving left on a striped gray background",
    "a yellow triangle moving down on a purple background",
    "a white circle bouncing on a green background",
)
"""The first two were used for choosing our own preset, the others were not."""

GRID = (12, 24, 24)


def measure(pipeline: Any, setting: Setting, prompt: str, seed: int, dense: np.ndarray) -> dict[str, Any]:
    """Make a sparse clip and compare it with the dense one.

    Args:
        pipeline: The demo.
        setting: How it is made.
        prompt: What it shows.
        seed: Of the noise.
        dense: ``(F, H, W, 3)`` fp32 in [0, 1], the dense clip.
    """
    if setting.method == "plan":
        sparse = fastdit.sparse_attention(pipeline, setting.fields["path"])
    else:
        fields = setting.fields | calibrated(pipeline, setting)
        sparse = fastdit.sparse_attention(pipeline, setting.method, schedule=setting.schedule, **fields)
    with sparse as handle:
        frames = make_clip(pipeline, prompt, seed, setting.steps)
        density, overall = handle.density, handle.overall_density
    reference, video = torch.from_numpy(dense), torch.from_numpy(frames)
    return {
        "setting": setting.name,
        "method": setting.method,
        "order": setting.order,
        "compensate": setting.fields.get("compensate"),
        "asked": setting.density,
        "refresh": setting.schedule.refresh_steps,
        "prompt": prompt,
        "seed": seed,
        "density": density,
        "overall_density": overall,
        "psnr": float(psnr(video, reference)),
        "ssim": float(ssim(video, reference)),
        "right": read_clip(frames).score(parse_caption(prompt)),
    }


def main(
    suite: Annotated[str, typer.Argument(help=f"One of {', '.join(SUITES)}.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON lines, one per clip.")],
    prompts: Annotated[int, typer.Option(min=1, max=len(PROMPTS), help="How many prompts.")] = 2,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each.")] = 1,
    density: Annotated[float | None, typer.Option(help="Only settings of this density.")] = None,
    skip: Annotated[int, typer.Option(min=0, help="How many prompts to leave out first.")] = 0,
) -> None:
    """Compare methods with dense on the demo.

    Args:
        suite: Name of a list of settings.
        output: JSON lines, one for each clip; rows are added.
        prompts: How many prompts, at least 1.
        seeds: Seeds of each, at least 1.
        density: Only settings of this density, in (0, 1].
        skip: How many prompts to leave out first, at least 0.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    settings = [s for s in SUITES[suite](GRID) if density in (None, s.density)][rank::world]
    pairs = [(prompt, seed) for prompt in PROMPTS[skip : skip + prompts] for seed in range(seeds)]
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {(row["setting"], row["prompt"], row["seed"]) for row in rows}
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True), disable=rank > 0) as progress:
        task = progress.add_task(suite, total=len(pairs) * len(settings))
        for prompt, seed in pairs:
            dense: dict[int | None, np.ndarray] = {}
            for setting in settings:
                if (setting.name, prompt, seed) not in done:
                    if setting.steps not in dense:
                        dense[setting.steps] = _dense(pipeline, prompt, seed, setting.steps)
                    row = measure(pipeline, setting, prompt, seed, dense[setting.steps])
                    with output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                progress.advance(task)


def _dense(pipeline: Any, prompt: str, seed: int, steps: int | None) -> np.ndarray:
    with fastdit.sparse_attention(pipeline, "dense"):
        return make_clip(pipeline, prompt, seed, steps)


if __name__ == "__main__":
    typer.run(main)
