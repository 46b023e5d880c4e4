"""Results: one JSON line for each measurement, with all that is needed to make it again."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ...files import read_json_lines

Row = dict[str, Any]

PACKAGES = ("fastdit", "torch", "triton", "diffusers", "transformers", "xformers")


SAME_RUN = ("device", "dtype", "seed")
"""What all rows of a file have in common, so that they can stand beside each other."""


def environment(device: str, seed: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Return what every row of a run says of it.

    Args:
        device: Where it runs, as torch names it.
        seed: Of all that is random in it.
        dtype: Of weights and tensors; ``None`` where each row has its own.
    """
    cpu = f"CPU, {platform.machine()}, {os.cpu_count()} cores"
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": name,
        "threads": None if device.startswith("cuda") else torch.get_num_threads(),
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "seed": seed,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


@dataclass(frozen=True)
class Store:
    """Keep rows in a file of JSON lines.

    Args:
        path: The file.
    """

    path: Path

    def read(self) -> list[Row]:
        """Return the rows; a last line that was cut off is none.

        Raises:
            ValueError: A line is no row.
        """
        return read_rows(self.path) if self.path.exists() else []

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows, in one write, so that processes may share a file.

        Args:
            rows: The rows.

        Raises:
            OSError: They cannot be written, as on a full disk.
        """
        text = "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        if not text:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            if file.tell() and not _ends_whole(self.path):
                text = "\n" + text
            # what is no letter becomes an escape, as JSON has it
            data = text.encode(errors="backslashreplace")
            written = file.write(data)
            if written < len(data):  # what is left of the row counts as cut off
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """Read a file of rows.

    Args:
        path: The file.

    Raises:
        ValueError: A line is no row. A line that was cut off counts as none.
        OSError: The file cannot be read.
    """
    rows = []
    for number, row in read_json_lines(path):
        if not all(isinstance(row.get(name), str) for name in ("benchmark", "job", "part")):
            raise ValueError(f"{path}, line {number}: this is no result of fastdit bench")
        rows.append(row)
    return rows


def other_run(rows: Iterable[Row], run: Mapping[str, Any]) -> str | None:
    """Say in what rows differ from a run so that its rows do not belong beside them, or return ``None``.

    Args:
        rows: The rows; what older ones do not say counts as the same.
        run: What ``environment`` says of the run.
    """
    for row in rows:
        about = row.get("run", {})
        for name in SAME_RUN:
            if name in about and about[name] != run[name]:
                return f"{name} {about[name]}, this run has {run[name]}"
    return None


def key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return what a row measures, the same in every run.

    Args:
        row: The row.
    """
    return row["benchmark"], row["job"], row["part"]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return one row for each measurement, the last, in the order in which they first came.

    Args:
        rows: The rows.
    """
    return list({key(row): row for row in rows}.values())


def absent(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return what could not be measured, and why, each once and by name.

    Args:
        rows: The rows.
    """
    found = set()
    for row in latest(rows):
        if "absent" in row:
            found.add((row["part"].partition("@")[0], row["absent"]))
        if "lpips_absent" in row:
            found.add(("LPIPS", row["lpips_absent"]))
    return sorted(found)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else None
    return value


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        head, changed = (
            subprocess.run(["git", "-C", str(folder), *c], capture_output=True, text=True, check=True).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changed else head
