"""Files that are whole or not there, the names they may have, and lines of JSON."""

from __future__ import annotations

import json
import os
import re
import unicodedata
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

LONGEST_NAME = 255
"""Bytes that file systems allow for a name."""


@contextmanager
def moved_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; afterwards it becomes the file, or is removed after an error.

    Args:
        path: The file in the end.
    """
    # both parts are cut, so that a name of full length has a temporary one too
    part = path.with_name(f".{cut(path.stem, 100)}.{uuid.uuid4().hex[:8]}.part{cut(path.suffix, 100)}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # a disk that is full, or a machine that stops now, must not leave half a file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cut(text: str, size: int) -> str:
    """Return the beginning of a text, without half a letter at its end.

    Args:
        text: The text.
        size: Bytes it may have in UTF-8, at least 0.
    """
    return os.fsencode(text)[:size].decode(errors="ignore")


def folded(name: str) -> str:
    """Return what names have in common that some file systems take for the same: letters whatever their case or form.

    Args:
        name: The name.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def distinct_names(texts: Iterable[str], other: str, size: int) -> dict[str, str]:
    """Return a name for each text: itself, with ``_`` for what names do not have, and cut to a length.

    Those that a file system would take for the same have the beginning of the text's SHA-256 behind them.

    Args:
        texts: The texts.
        other: A regular expression of the letters that become ``_``.
        size: Bytes of a name, at least 20.
    """
    plain = {text: cut(re.sub(other, "_", text), size - 9) for text in texts}
    common = Counter(map(folded, plain.values()))
    return {text: name if common[folded(name)] == 1 else f"{name}-{_digest(text)}" for text, name in plain.items()}


def _digest(text: str) -> str:
    return sha256(os.fsencode(text)).hexdigest()[:8]


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the objects in a file of JSON lines, each with the number of its line from 1.

    Lines end at a line feed only. One that was cut off, by whatever stopped the program that wrote it, is left out.

    Args:
        path: The file.

    Raises:
        ValueError: A line is no JSON object, not even the beginning of one.
        OSError: The file cannot be read.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        line = line.strip(b" \t\r\0")  # a machine that stopped may have left zeros
        if not line:
            continue
        if not line.startswith(b"{"):
            raise ValueError(f"{path}, line {number}: this is no JSON object; give a file of JSON lines")
        try:
            yield number, json.loads(line.decode())
        except (ValueError, RecursionError):
            continue
