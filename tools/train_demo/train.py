"""Train the demo model: ``python -m tools.train_demo.train`` runs every stage, or go on with one."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

logger = logging.getLogger(__name__)


class Stage(str, Enum):
    """Stages in their order; each reads what the ones before left in the work folder."""

    vae = "vae"
    latents = "latents"
    dit = "dit"
    export = "export"
    all = "all"


def main(
    stage: Annotated[Stage, typer.Option(help="The stage to run, or all of them.")] = Stage.all,
    work: Annotated[Path, typer.Option(help="Folder of checkpoints and latents.")] = Path("build/demo"),
    output: Annotated[Path | None, typer.Option(help="Where to export; the package's weights if not given.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes a GPU if there is one.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads, 0 for torch's default.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seeds everything.")] = 0,
    vae_steps: Annotated[int, typer.Option(min=1)] = 2500,
    clips: Annotated[int, typer.Option(help="Clips to encode for the transformer.", min=1)] = 1600,
    dit_steps: Annotated[int, typer.Option(min=1)] = 6500,
    part: Annotated[int, typer.Option(help="This process's share of the latents stage.")] = 0,
    parts: Annotated[int, typer.Option(help="Processes that share the latents stage.", min=1)] = 1,
) -> None:
    """Train the demo model's autoencoder and transformer, and export them.

    Every stage goes on from its last checkpoint. The dit stage picks up latents as they arrive, so
    the latents stage may run beside it.
    """
    import torch

    from .export import export_weights, plot_training
    from .latents import encode_clips
    from .train_dit import train_dit
    from .train_vae import load_vae, measure_vae, train_vae

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads:
        torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)

    def wanted(*names: Stage) -> bool:
        return stage in (*names, Stage.all)

    if wanted(Stage.vae):
        train_vae(work, vae_steps, device, seed)
        logger.info("held-out clips: %s", measure_vae(load_vae(work, device), range(10**9, 10**9 + 4), device))
    if wanted(Stage.latents):
        encode_clips(work, clips, device, part, parts)
    if wanted(Stage.dit):
        train_dit(work, dit_steps, device, seed)
    if wanted(Stage.export):
        folder = export_weights(work, output)
        plot_training(work, work / "loss.png")
        logger.info("exported to %s, loss curve in %s", folder, work / "loss.png")


if __name__ == "__main__":
    typer.run(main)
