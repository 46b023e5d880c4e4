"""Scores of other programs for folders of videos."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from ..files import moved_when_complete
from .errors import InputError
from .screen import Screen


def check_command(command: str | None) -> None:
    """Check that a command can be run for a folder.

    Args:
        command: As the user wrote it; ``None`` for none.

    Raises:
        InputError: There is no such program, or the command does not say where the folder goes.
    """
    if command is None:
        return
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InputError(f"--score-with cannot be read as a command ({error}), got {command!r}") from error
    if not any("{folder}" in word for word in words):
        raise InputError("--score-with has no {folder}; write it where the folder of videos belongs")
    if shutil.which(words[0]) is None:
        raise InputError(f"--score-with: there is no program {words[0]!r} here")


def score_folders(command: str, videos: Path, screen: Screen) -> None:
    """Run a command on the videos of each setting and of dense attention; what it prints goes to ``scores.txt`` there.

    Args:
        command: With ``{folder}`` where the folder belongs.
        videos: Where the folders are.
        screen: Shows where the scores are.

    Raises:
        InputError: The command failed.
    """
    for folder in sorted(path for path in videos.glob("*") if path.is_dir() and path.name != "side-by-side"):
        words = [word.replace("{folder}", str(folder)) for word in shlex.split(command)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{shlex.join(words)} failed with {done.returncode}: {done.stderr.strip()[-300:]}")
        with moved_when_complete(folder / "scores.txt") as part:
            part.write_text(done.stdout, encoding="utf-8")
        screen.note(f"scores of {folder.name} are in {folder / 'scores.txt'}")
