"""Files that are written and files that are read, kept apart."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path

from .errors import InputError

Named = tuple[str, "Path | None"]
"""What a file is, or which option names it, and the file; ``None`` where there is none."""


def check_apart(written: Iterable[Named], read: Iterable[Named] = ()) -> None:
    """Check that no file is written twice, and none that is read, by whatever names and links they are reached.

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
                raise InputError(_clash(what, path, *known[key]))
        for parent in Path(os.path.realpath(path)).parents:
            for key in _keys(parent):
                if key in folders:
                    raise InputError(_clash(what, path, *folders[key]))
        known |= {key: (what, path) for key in _keys(path)}


def plan_files(path: Path | None, what: str = "--plan") -> Iterator[Named]:
    """Yield the files of a plan: itself, and masks beside it.

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


def _clash(what: str, path: Path, other: str, place: Path) -> str:
    return f"{what} and {other} are the same, or one in the other: {path} and {place}; name another file for one of them"
