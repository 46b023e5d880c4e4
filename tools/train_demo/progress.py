"""What a training loop shows: a progress bar with loss and time left, and a loss curve."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastdit.files import moved_when_complete, read_json_lines

logger = logging.getLogger(__name__)


class LossLog:
    """A JSONL log of ``{"step": .., ...}`` lines."""

    def __init__(self, path: Path, resume_step: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_losses(path) if line["step"] <= resume_step]
        with moved_when_complete(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def add(self, **values: float | int | str) -> None:
        """Append one line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_losses(path: Path) -> list[dict]:
    """Return the lines of a loss log, none if there is no file; a line that was cut off is left out."""
    if not path.exists():
        return []
    return [line for _, line in read_json_lines(path)]


@contextmanager
def training_bar(name: str, start: int, total: int) -> Iterator:
    """Show a bar; yields ``update(step, text)``. Without a terminal, logs a line now and then."""
    console = Console()
    if not console.is_terminal:

        def update_log(step: int, text: str) -> None:
            if step % 25 == 0 or step == total:
                logger.info("%s %d/%d %s", name, step, total, text)

        yield update_log
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total, completed=start, text="")
        yield lambda step, text: progress.update(task, completed=step, text=text)


def plot_losses(logs: dict[str, Path], output: Path) -> None:
    """Draw every log's ``loss`` (a running mean) and ``held_out`` where there is one, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, len(logs), figsize=(4.5 * len(logs), 3.2), squeeze=False)
    for axis, (name, path) in zip(axes[0], logs.items(), strict=True):
        lines = [line for line in read_losses(path) if "loss" in line]
        steps = np.array([line["step"] for line in lines])
        loss = np.array([line["loss"] for line in lines])
        if len(loss):
            window = max(len(loss) // 60, 1)
            smooth = np.convolve(loss, np.ones(window) / window, "valid")
            axis.plot(steps[len(steps) - len(smooth) :], smooth, label="training", linewidth=1.2)
        held = [line for line in read_losses(path) if "held_out" in line]
        if held:
            axis.plot(
                [line["step"] for line in held],
                [line["held_out"] for line in held],
                "o-",
                markersize=3,
                label="held out, all tokens",
            )
        axis.set(title=name, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=90)
    plt.close(figure)
