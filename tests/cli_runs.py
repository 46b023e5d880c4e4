"""The command line run in this process or in one of its own, and a folder with a small untrained pipeline."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

from fastdit.cli import app

SIZE = ("--height", "32", "--width", "48", "--frames", "5", "--steps", "3")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


@functools.cache
def folder() -> Path:
    """Save an untrained demo pipeline, once per test process."""
    import torch

    from tools.train_demo.models import build_pipeline

    torch.manual_seed(0)
    path = Path(tempfile.mkdtemp(prefix="fastdit-tests-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    build_pipeline().save_pretrained(path)
    return path


def small(*arguments: object) -> list[str]:
    """Return the arguments of a small ``generate`` with the untrained pipeline."""
    return ["generate", "--model", str(folder()), *SIZE, *map(str, arguments)]


def run(*arguments: object):
    """Run a command in this process."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(a) for a in arguments])


def run_json(*arguments: object) -> dict:
    """Run a command in this process and read what it writes to stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def spawn(*arguments: object, cwd: Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Run a command in a process of its own."""
    command = [sys.executable, *(launcher or ("-m", "fastdit")), *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def listing(path: Path) -> list[str]:
    """List the files of a folder, hidden ones too."""
    return sorted(p.name for p in path.iterdir())
