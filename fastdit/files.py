"""Files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def moved_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; afterwards it becomes the file, or is removed after an error.

    Args:
        path: The file in the end.
    """
    part = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # a disk that is full, or a machine that stops now, must not leave half a file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
