"""What holds for all measurements of one run."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol


class Conditions(Protocol):
    """The device, the dtype and the seed of a run, and its file of results."""

    @property
    def output(self) -> Path:
        """Return the file of results."""
        ...

    @property
    def seed(self) -> int:
        """Return the seed of everything that is random, at least 0."""
        ...

    @property
    def device(self) -> str:
        """Return where it runs."""
        ...

    @property
    def dtype(self) -> str:
        """Return the dtype of weights and tensors, as the user named it."""
        ...
