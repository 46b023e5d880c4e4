"""Checks that written files are distinct from read files."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

from ..generation.errors import InputError

Named = tuple[str, Path | None]
"""The description or option of a file, and the file; ``None`` for no file."""


def check_apart(written: Iterable[Named], read: Iterable[Named] = ()) -> None:
    """Check that no file is written twice or both read and written, through any name or link.

    Args:
        written: Files, and folders whose names are not taken yet.
        read: Files, and folders all of whose files are read.

    Raises:
        InputError: Two are the same.
    """
    known = {key: (what, path) for what, path in read if path is not None for key in _keys(path)}
    folders = {key: named for key, named in known.items() if os.path.isdir(named[1])}
    for what, path in written:
        if path is None:
            continue
        for key in _keys(path):
            if key in known:
                other, place = known[key]
                raise InputError(f"{what} and {other} are the same file, {path} and {place}; rename one of them")
        for parent in Path(os.path.realpath(path)).parents:
            for key in _keys(parent):
                if key in folders:
                    other, place = folders[key]
                    raise InputError(f"{what} {path} is inside {other} {place}, which is read; pass another path")
        known |= dict.fromkeys(_keys(path), (what, path))


def plan_files(path: Path | None, what: str = "--plan") -> Iterator[Named]:
    """Yield the files of a plan: the plan and the masks next to it.

    Args:
        path: The plan; ``None`` for none.
        what: What to call it.
    """
    if path is not None:
        yield what, path
        yield from ((what, file) for file in path.parent.glob("*.safetensors") if file.name.startswith(f"{path.stem}-"))


def _keys(path: Path) -> Iterator[Hashable]:
    real = os.path.realpath(path)
    yield os.path.normcase(real)
    if os.path.exists(real):  # hard links, and file systems that do not tell A from a
        about = os.stat(real)
        yield about.st_dev, about.st_ino
