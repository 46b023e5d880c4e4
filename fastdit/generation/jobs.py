"""Jobs: the videos to make and their files."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ..files import cut, folded
from .errors import InputError
from .video import SUFFIXES, check_folder, check_target

LONGEST_NAME, MOST_BYTES = 60, 200
"""Largest number of characters, and of bytes, of a prompt in the name of its video."""


@dataclass(frozen=True)
class Job:
    """One video to make.

    Args:
        prompt: What it shows.
        output: Where it goes.
    """

    prompt: str
    output: Path

    @property
    def dense_output(self) -> Path:
        """Return where the dense video of a comparison goes."""
        return self.output.with_name(f"{self.output.stem}.dense{self.output.suffix}")

    @property
    def pair_output(self) -> Path:
        """Return where the side-by-side video of a comparison goes."""
        return self.output.with_name(f"{self.output.stem}.compare{self.output.suffix}")

    def files(self, *, compare: bool) -> dict[str, Path]:
        """Return the files to write, each with a description.

        Args:
            compare: Whether the dense video and that of both are among them.
        """
        more = {"the dense video": self.dense_output, "the side-by-side video": self.pair_output}
        return {"the video": self.output, **(more if compare else {})}


def read_prompts(prompt: str | None, file: Path | None) -> list[str]:
    """Return the prompts: the one given, or the lines of a file.

    Args:
        prompt: The prompt.
        file: A text file in UTF-8, one prompt a line; empty lines are left out.

    Raises:
        InputError: Neither or both are given, the prompt or the file is empty, or the file cannot be read.
    """
    if (prompt is None) == (file is None):
        raise InputError('pass either a prompt, as in fastdit generate "a red ball", or --prompts FILE')
    if prompt is not None:
        if not prompt.strip():
            raise InputError("the prompt is empty; describe what the video shows")
        return [checked_text("the prompt", prompt.strip())]
    assert file is not None
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read the prompts in {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read the prompts in {file}: it is not UTF-8 text") from error
    if "\0" in text:
        raise InputError(f"cannot read the prompts in {file}: it contains zero bytes, so it is not UTF-8 text")
    # str.splitlines would also split at characters that stand within a prompt, such as U+2028
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError(f"{file} has no prompts; write one prompt per line")
    return prompts


def checked_text(what: str, text: str) -> str:
    """Return a text that can be written to a file.

    Args:
        what: What to call it in the error.
        text: The text.

    Raises:
        InputError: It is not valid UTF-8, as when it was typed in another encoding.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid UTF-8, got {text!r}") from error
    return text


def plan_jobs(prompts: list[str], output: Path | None, *, single: bool, compare: bool = True) -> list[Job]:
    """Decide where the videos go, and check that they can be written there.

    Names made from prompts differ from those of existing files, and from each other in more than case.

    Args:
        prompts: At least one.
        output: A file for a single prompt, or a folder, which need not be there yet; default the current folder.
        single: Whether the prompt was given by itself, so that ``output`` may be a file.
        compare: Whether dense videos and videos of both are written too.

    Raises:
        InputError: The folder does not exist or cannot be written, or the name of a file does not fit.
    """
    if output is not None and single and not os.path.isdir(output):
        jobs = [Job(prompts[0], output)]
    else:
        folder = Path() if output is None else output
        if folder.suffix.lower() in SUFFIXES and not os.path.exists(folder):
            raise InputError(
                f"--prompts makes one video per line, but {folder} names a file; pass a folder to --output"
            )
        check_folder(folder, new=True)
        jobs = _named(prompts, folder)
        single = False
    for job in jobs:
        for path in job.files(compare=compare).values():
            check_target(path, new_folder=not single)
    return jobs


def _named(prompts: list[str], folder: Path) -> list[Job]:
    taken: set[str] = set()
    jobs = []
    for prompt in prompts:
        words = re.sub(r"[^\w]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-_")
        stem = cut(words[:LONGEST_NAME], MOST_BYTES).rstrip("-_") or "video"
        job, count = Job(prompt, folder / f"{stem}.mp4"), 1
        while folded(job.output.name) in taken or any(map(os.path.lexists, job.files(compare=True).values())):
            count += 1
            job = Job(prompt, folder / f"{stem}-{count}.mp4")
        taken.add(folded(job.output.name))
        jobs.append(job)
    return jobs
