"""Progress of a run, as callbacks of a display."""

from __future__ import annotations

from typing import Protocol


class Step(Protocol):
    """One part of the work, while it is done."""

    def advance(self) -> None:
        """Move on by one."""

    def finish(self) -> None:
        """Mark it as done."""


class Display(Protocol):
    """A place where progress is shown."""

    def start(self, name: str, total: int | None = None) -> Step:
        """Show that a part of the work begins.

        Args:
            name: What is being done.
            total: Steps that it takes; ``None`` if that is unknown.
        """
        ...

    def clear(self) -> None:
        """Remove finished parts."""

    def note(self, text: str) -> None:
        """Show a line of text.

        Args:
            text: The text.
        """


class Silent:
    """A display that shows nothing."""

    def start(self, name: str, total: int | None = None) -> Step:
        """Begin a part of the work.

        Args:
            name: Not used.
            total: Not used.
        """
        return self

    def advance(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def clear(self) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing.

        Args:
            text: Not used.
        """
