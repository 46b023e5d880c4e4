"""Measure the demo's prompt accuracy: ``python -m tools.train_demo.evaluate``."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from fastdit.demo import DEFAULTS, load_pipeline
from fastdit.demo.captions import HELD_OUT_CAPTIONS, parse_caption
from fastdit.demo.scorer import read_clip

if TYPE_CHECKING:
    from diffusers import WanPipeline

logger = logging.getLogger(__name__)

FIELDS = ("color", "shape", "motion", "background", "all")


def generate_clip(
    pipeline: WanPipeline, prompt: str, seed: int, steps: int | None = None, guidance: float | None = None
) -> np.ndarray:
    """Return the frames ``(F, H, W, 3)`` float32 in [0, 1] of one default clip."""
    import torch

    return pipeline(
        prompt=prompt,
        negative_prompt=DEFAULTS.negative_prompt,
        num_frames=DEFAULTS.num_frames,
        height=DEFAULTS.height,
        width=DEFAULTS.width,
        num_inference_steps=steps or DEFAULTS.num_inference_steps,
        guidance_scale=DEFAULTS.guidance_scale if guidance is None else guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames[0]


def evaluate(
    pipeline: WanPipeline,
    captions: tuple[str, ...],
    seeds: int,
    steps: int | None = None,
    guidance: float | None = None,
    on_clip: Callable[[dict, np.ndarray], None] | None = None,
    first_seed: int = 0,
) -> dict:
    """Score ``captions`` x ``seeds`` clips.

    Args:
        pipeline: The demo model.
        captions: Prompts in the words of the demo world.
        seeds: Seeds of every caption, at least 1.
        steps: Denoising steps, the default's if ``None``.
        guidance: Guidance scale, the default's if ``None``.
        on_clip: Called with every clip's result and frames.
        first_seed: The first of them, at least 0.

    Returns:
        ``accuracy`` per field in [0, 1], ``seconds`` per clip, ``clips`` with one entry each.
    """
    clips = []
    for seed in range(first_seed, first_seed + seeds):
        for caption in captions:
            began = time.perf_counter()
            frames = generate_clip(pipeline, caption, seed, steps, guidance)
            seconds = time.perf_counter() - began
            reading = read_clip(frames)
            clips.append(
                {
                    "caption": caption,
                    "seed": seed,
                    "seconds": round(seconds, 2),
                    "read": vars(reading),
                    "right": reading.score(parse_caption(caption)),
                }
            )
            if on_clip:
                on_clip(clips[-1], frames)
    return summarize(clips)


def summarize(clips: list[dict]) -> dict:
    """Return ``clips`` with their mean ``accuracy`` per field and mean ``seconds``."""
    accuracy = {f: float(np.mean([clip["right"][f] for clip in clips])) for f in FIELDS}
    mean = float(np.mean([clip["seconds"] for clip in clips]))
    return {"accuracy": accuracy, "seconds": round(mean, 2), "clips": clips}


def contact_row(frames: np.ndarray, count: int = 6, scale: int = 2) -> np.ndarray:
    """Return ``count`` frames of a clip side by side, uint8, each ``scale`` times smaller."""
    picks = np.linspace(0, len(frames) - 1, count).round().astype(int)
    row = np.concatenate([frames[i] for i in picks], axis=1)
    height, width = (n // scale * scale for n in row.shape[:2])
    small = row[:height, :width].reshape(height // scale, scale, width // scale, scale, 3)
    return np.rint(small.mean((1, 3)) * 255.0).astype(np.uint8)


def main(
    seeds: Annotated[int, typer.Option(help="Seeds of every caption.", min=1)] = 2,
    first_seed: Annotated[int, typer.Option(help="The first of them.", min=0, max=2**63)] = 0,
    captions: Annotated[int, typer.Option(help="How many of the 24 held-out captions.", min=1)] = 24,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("build/demo/evaluation"),
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads, 0 for torch's default.", min=0)] = 0,
) -> None:
    """Make clips of captions that the demo was not trained on, and count what they get right.

    Writes ``evaluation.json``, brought up to date after every clip, and
    ``contact_sheet.png`` (one row per clip of the first seed).
    """
    import imageio.v3 as iio
    import torch
    from rich.console import Console
    from rich.table import Table

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if threads:
        torch.set_num_threads(threads)
    output.mkdir(parents=True, exist_ok=True)
    rows: list[np.ndarray] = []
    done: list[dict] = []

    def on_clip(clip: dict, frames: np.ndarray) -> None:
        wrong = [name for name in FIELDS[:4] if not clip["right"][name]]
        logger.info("%s, seed %d: %s", clip["caption"], clip["seed"], f"wrong {wrong}" if wrong else "right")
        done.append(clip)
        (output / "evaluation.json").write_text(json.dumps(summarize(done), indent=1))
        if clip["seed"] == first_seed:
            rows.append(contact_row(frames))
            half = -(-len(rows) // 2) if len(rows) > 12 else len(rows)
            left, right = rows[:half], rows[half:]
            right = right + [np.zeros_like(rows[0])] * (half - len(right)) if right else []
            columns = [np.concatenate(column) for column in (left, right) if column]
            iio.imwrite(output / "contact_sheet.png", np.concatenate(columns, axis=1))

    prompts = HELD_OUT_CAPTIONS[:captions]
    result = evaluate(load_pipeline(device=device), prompts, seeds, steps, guidance, on_clip, first_seed)
    table = Table("", *FIELDS, title=f"{captions} held-out captions x {seeds} seeds")
    table.add_row("accuracy", *(f"{result['accuracy'][f]:.3f}" for f in FIELDS))
    Console().print(table)
    Console().print(f"{result['seconds']} s per clip; results in {output}")


if __name__ == "__main__":
    typer.run(main)
