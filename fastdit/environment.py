"""Which packages are installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def installed_version(package: str) -> str | None:
    """Return the version of a package, ``None`` if it is not installed.

    Args:
        package: Its name, as pip knows it.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        return None
